"""Time and memory of local attention, over softmax attention with a dense mask of the band and over full attention.

    python benchmarks/bench_local.py                            # on the GPU if there is one, else on the CPU
    python benchmarks/bench_local.py --device cpu --longest_dense 4096
    python benchmarks/bench_local.py --blocks 32 64 128 256     # block sizes of local attention, at --lengths

One layer (12 heads of width 64, window 128, RoPE) with its projections, and its attention alone. On a GPU "local" means
the fused kernels and "blocks" the form in PyTorch. All candidates of one length are timed in turn in one process. Peak
memory counts what one call adds; on a CPU each case has its own process.
"""

import argparse
from unittest import mock

import torch
from common import (
    CPU,
    added_memory,
    alternate,
    count,
    device_memory,
    device_timer,
    draw_lines,
    failures,
    machine,
    output_folder,
    peak_memory,
    print_table,
    save,
    token_axis,
    usable_device,
)
from torch.nn import functional as F

from lion_hf.nn.local_attention import LocalMixer
from lion_hf.nn.softmax import SoftmaxMixer
from lion_hf.ops import backend, band


HEADS, WIDTH = 12, 64
MODES = ("forward", "forward + backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DenseMixer(LocalMixer):
    """The same layer, with a mask (length, length) that SDPA reads."""

    def _attend(self, query, key, value, key_mask, cu_seqlens, dropout):
        near = band.band(query.shape[2], self.window // 2, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=near)


def layer(name, arguments):
    dim, options = HEADS * WIDTH, {"rope_theta": 10000.0}
    if name != "full":
        options["window"] = arguments.window
    build = {"local": LocalMixer, "blocks": LocalMixer, "dense band": DenseMixer, "full": SoftmaxMixer}[name]
    mixer = build(dim, HEADS, **options)
    return mixer.to(arguments.device, DTYPES[arguments.dtype])


def attention(name, arguments):
    """Return the attention of a layer without projections and RoPE."""
    mixer = layer(name, arguments)
    return lambda query, key, value: mixer._attend(query, key, value, None, None, 0.0)


def inputs(length, arguments, count):
    shape = max(1, arguments.tokens // length), length, HEADS * WIDTH
    like = {"device": arguments.device, "dtype": DTYPES[arguments.dtype]}
    return [torch.randn(shape, **like).requires_grad_() for _ in range(count)]


def runner(name, part, mode, length, arguments):
    if part == "layer":
        function, tensors = layer(name, arguments), inputs(length, arguments, 1)
    else:
        inner, tensors = attention(name, arguments), inputs(length, arguments, 3)

        def function(*tensors):
            return inner(*(x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in tensors))

    direction = torch.randn_like(function(*tensors)) if mode != "forward" else None

    def run():
        chosen = "torch" if name == "blocks" else backend.BACKEND
        with mock.patch.object(backend, "BACKEND", chosen), torch.inference_mode(mode == "forward"):
            out = function(*tensors)
        if mode != "forward":
            out.backward(direction)
            for x in tensors:
                x.grad = None

    return run


def memory(name, mode, length, arguments):
    if arguments.device.type == "cuda":
        try:
            return device_memory(runner(name, "layer", mode, length, arguments), arguments.device)
        except failures():
            return float("nan")
    options = "--tokens", arguments.tokens, "--window", arguments.window, "--dtype", arguments.dtype
    case = "--device", "cpu", "--case", name, mode, length, *options
    return peak_memory(__file__, *map(str, case))


def compared(arguments, timer):
    rows = []
    for length in arguments.lengths:
        names = ["local", *["blocks"] * (arguments.device != CPU)]
        names += ["dense band", "full"] if length <= arguments.longest_dense else []
        for mode in MODES:
            cases = [(part, name) for part in ("layer", "attention") for name in names]
            candidates = {case: runner(case[1], case[0], mode, length, arguments) for case in cases}
            times = alternate(candidates, arguments.seconds, arguments.rounds, timer, failures())
            rows += [
                {
                    "part": part,
                    "length": length,
                    "mode": mode,
                    "attention": name,
                    "us/token": times[part, name] * 1e6 / (length * max(1, arguments.tokens // length)),
                    "local / this": times[part, "local"] / times[part, name],
                    "MiB": memory(name, mode, length, arguments) if part == "layer" else float("nan"),
                }
                for part, name in cases
            ]
            print_table(rows[-len(cases) :])
    return rows


def flatness(rows):
    """Print the time per token of local attention at the longest text over that at 2,048 tokens, or the first one."""
    for part in ("layer", "attention"):
        for mode in MODES:
            at = {
                row["length"]: row["us/token"]
                for row in rows
                if (row["part"], row["mode"], row["attention"]) == (part, mode, "local")
            }
            first = 2048 if 2048 in at else min(at)
            print(
                f"{part}, {mode}: {at[max(at)] / at[first]:.2f} times the time per token, {first} to {max(at)} tokens"
            )


def blocks(arguments, timer):
    rows, kept = [], band.BLOCK
    for length in arguments.lengths:
        for mode in MODES:
            candidates = {}
            for size in arguments.blocks:
                run = runner("blocks", "attention", mode, length, arguments)

                def sized(size=size, run=run):
                    band.BLOCK = dict.fromkeys(kept, size)
                    run()

                candidates[size] = sized
            times = alternate(candidates, arguments.seconds, arguments.rounds, timer, failures())
            best = min(times.values())
            rows += [
                {"length": length, "mode": mode, "block": size, "ms": t * 1e3, "over best": t / best}
                for size, t in times.items()
            ]
            print_table(rows[-len(times) :])
    band.BLOCK = kept
    return rows


def parser():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", type=usable_device, default=device, help="default: the GPU if there is one")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of weights and inputs")
    options.add_argument("--lengths", type=count, nargs="+", default=[128, 512, 2048, 8192, 16384], help="in tokens")
    options.add_argument("--tokens", type=count, default=2048, help="tokens of a batch; longer texts are batches of 1")
    options.add_argument("--window", type=count, default=128, help="window of local attention, in tokens")
    options.add_argument("--longest_dense", type=count, default=8192, help="longest text of the quadratic candidates")
    options.add_argument("--blocks", type=count, nargs="+", help="compare these block sizes instead")
    options.add_argument("--seconds", type=float, default=4.0, help="minimum time for each comparison")
    options.add_argument("--rounds", type=count, default=3, help="minimum number of repeats")
    options.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    options.add_argument("--case", nargs=3, metavar=("NAME", "MODE", "LENGTH"), help=argparse.SUPPRESS)
    return options


def main():
    arguments = parser().parse_args()
    torch.manual_seed(0)
    if arguments.case:  # in a process of its own, see `memory`
        name, mode, length = arguments.case
        print(added_memory(runner(name, "layer", mode, int(length), arguments)))
        return
    print(machine(arguments.device), flush=True)
    timer = device_timer(arguments.device)
    name = "bench_local" if arguments.device == CPU else "bench_local_gpu"
    if arguments.blocks:
        rows, y = blocks(arguments, timer), "over best"

        def picture(axis):
            draw_lines(axis, [row for row in rows if row["mode"] == MODES[0]], "length", y, "block")
            token_axis(axis, arguments.lengths)
            axis.set(ylabel="time over the best block", title="forward")

        save(f"{name}_blocks", arguments.output, rows, picture, device=arguments.device)
        return
    rows = compared(arguments, timer)
    flatness(rows)

    def pictures(*axes):
        for axis, mode in zip(axes, MODES, strict=True):
            chosen = [row for row in rows if row["mode"] == mode and row["part"] == "layer"]
            draw_lines(axis, chosen, "length", "us/token", "attention")
            token_axis(axis, arguments.lengths)
            axis.set(ylabel="microseconds per token", yscale="log", title=f"one layer, {mode}")

    save(name, arguments.output, rows, pictures, 2, arguments.device)


if __name__ == "__main__":
    main()
