"""Time and memory of the operator's forms, compared with each other and with softmax attention (PyTorch's SDPA).

    python benchmarks/bench_ops.py                 # time per token, ratios, linearity, peak memory
    python benchmarks/bench_ops.py --crossover     # length at which the chunk form overtakes the attention form
    python benchmarks/bench_ops.py --options       # options of two_sided_attention over LION-S: time, work, memory
    python benchmarks/bench_ops.py --options --only token_channel log_weight --lengths 2048 16384

The heads of one layer (12 x 64) in float32, forward and backward unless --inference is given. All candidates of one
length are timed in turn in one process. Peak memory is measured in a fresh process for every case, and counts what the
call adds. --options counts the multiply-adds of one call as well, and prints which goals are met.
"""

import argparse

import op_options
import torch
from common import added_memory, alternate, count, draw_lines, output_folder, peak_memory, print_table, save, token_axis

from lion_hf import bidirectional_linear_attention


HEADS, WIDTH = 12, 64
KINDS = ("none", "head", "token")


def make(batch, length):
    query, key, value = (torch.randn(batch, length, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    decays = {
        "none": None,
        "head": (-torch.rand(HEADS)).requires_grad_(),
        "token": (-torch.rand(batch, HEADS, length)).requires_grad_(),
    }
    return (query, key, value), decays


def runner(operator, inputs, inference):
    def run():
        query, key, value = (x.transpose(1, 2) for x in inputs)
        if inference:
            with torch.inference_mode():
                operator(query, key, value)
        else:
            operator(query, key, value).sum().backward()
            for x in inputs:
                x.grad = None

    return run


def lion(form, log_decay, chunk_size):
    return lambda q, k, v: bidirectional_linear_attention(q, k, v, log_decay, format=form, chunk_size=chunk_size)


def times(arguments, lengths):
    rows = []
    for length in lengths:
        batch = max(1, arguments.tokens // length)
        inputs, decays = make(batch, length)
        candidates = {}
        if length <= arguments.longest_softmax:
            candidates["softmax (SDPA)"] = torch.nn.functional.scaled_dot_product_attention
        for kind in KINDS:
            for form in ("attention", "rnn", "chunk"):
                if form != "attention" or length <= arguments.longest_attention:
                    candidates[f"{kind} {form}"] = lion(form, decays[kind], arguments.chunk_size)
        measured = alternate(
            {name: runner(op, inputs, arguments.inference) for name, op in candidates.items()}, arguments.seconds
        )
        softmax = measured.get("softmax (SDPA)")
        for name, seconds in measured.items():
            rows.append(
                {
                    "length": length,
                    "operator": name,
                    "us per token": 1e6 * seconds / (batch * length),
                    "ratio to softmax": seconds / softmax if softmax else float("nan"),
                }
            )
        print_table(rows[-len(measured) :])
    return rows


def linearity(rows, short, long):
    """Print the cost per token at `long` over that at `short`, for the linear forms."""
    cost = {(r["length"], r["operator"]): r["us per token"] for r in rows}
    result = []
    for kind in KINDS:
        for form in ("rnn", "chunk"):
            name = f"{kind} {form}"
            ratio = cost[long, name] / cost[short, name]
            result.append({"operator": name, f"cost per token at {long} / {short}": ratio})
    print_table(result)
    return result


def memory(arguments):
    rows = []
    for kind in KINDS:
        for mode in ("inference", "training"):
            case = {
                form: peak_memory(__file__, "--one_case", kind, form, mode, str(arguments.memory_length))
                for form in ("attention", "rnn", "chunk")
            }
            for form, mib in case.items():
                rows.append(
                    {
                        "decay": kind,
                        "mode": mode,
                        "form": form,
                        f"peak MiB at {arguments.memory_length}": mib,
                        # A very short call may use less memory than the system can measure.
                        "ratio to attention": mib / case["attention"] if case["attention"] else float("nan"),
                    }
                )
    print_table(rows)
    return rows


def one_case(kind, form, mode, length):
    """Print the peak memory in MiB that one call adds to the process."""
    for size in (64, int(length)):  # first a short call, which loads lazily imported libraries
        inputs, decays = make(1, size)
        mib = added_memory(runner(lion(form, decays[kind], 64), inputs, mode == "inference"))
    print(mib)


def crossover(arguments):
    """Print the time of the chunk form over that of the attention form, by length and kind of decay."""
    rows = []
    for length in (32, 64, 96, 128, 192, 256, 384, 512):
        inputs, decays = make(max(1, arguments.tokens // length), length)
        for kind in KINDS:
            candidates = {
                f: runner(lion(f, decays[kind], 64), inputs, arguments.inference) for f in ("attention", "chunk")
            }
            measured = alternate(candidates, arguments.seconds / 4, rounds=9)
            rows.append(
                {"length": length, "decay": kind, "chunk / attention": measured["chunk"] / measured["attention"]}
            )
    print_table(rows)
    return rows


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=count, nargs="+", default=[128, 512, 2048, 8192, 16384], help="tokens in a row"
    )
    parser.add_argument("--tokens", type=count, default=2048, help="tokens in a batch (at least one row)")
    parser.add_argument("--chunk_size", type=count, default=64, help="tokens in a chunk")
    parser.add_argument("--longest_softmax", type=int, default=8192, help="longest row for softmax attention")
    parser.add_argument("--longest_attention", type=int, default=2048, help="longest row for the attention form")
    parser.add_argument("--memory_length", type=count, default=8192, help="tokens in the row whose memory is measured")
    parser.add_argument("--inference", action="store_true", help="time the forward pass only")
    parser.add_argument("--crossover", action="store_true", help="time the attention and the chunk form only")
    op_options.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=4.0, help="minimum time for each comparison")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    parser.add_argument("--one_case", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.manual_seed(0)
    if arguments.one_case:
        one_case(*arguments.one_case)
        return
    if arguments.one_option:
        op_options.one_option(*arguments.one_option, HEADS, WIDTH)
        return
    if arguments.options:
        op_options.run(arguments, __file__, HEADS, WIDTH)
        return
    if arguments.crossover:
        rows = crossover(arguments)

        def picture(axis):
            draw_lines(axis, rows, "length", "chunk / attention", "decay")
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set(ylabel="time of chunk / time of attention form", title="by kind of decay; below 1 chunk is faster")
            token_axis(axis, [row["length"] for row in rows if row["decay"] == KINDS[0]])

        save("crossover", arguments.output, rows, picture)
        return
    rows = times(arguments, arguments.lengths)
    if {2048, 16384} <= set(arguments.lengths):
        linearity(rows, 2048, 16384)
    memory_rows = memory(arguments)

    def picture(axis):
        draw_lines(axis, rows, "length", "us per token", "operator")
        mode = "forward" if arguments.inference else "forward + backward"
        axis.set(
            yscale="log", ylabel="microseconds per token", title=f"decay and form, {mode}, {HEADS} heads of {WIDTH}"
        )
        token_axis(axis, arguments.lengths)

    save("bench_ops", arguments.output, rows + memory_rows, picture)


if __name__ == "__main__":
    main()
