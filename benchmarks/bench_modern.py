"""Time and memory of the modern block against Transformers' ModernBERT of the same shape, on a CPU.

    python benchmarks/bench_modern.py                       # inference and training steps, rows without padding
    python benchmarks/bench_modern.py --bf16                # adds each model under bfloat16 autocast
    python benchmarks/bench_modern.py --padded              # adds batches of four rows of different lengths

Both have the base shape (width 768, 12 heads, gated MLP of 1,152) without a head, and random weights. In groups of
three layers two have local attention of 128 tokens; the third is LION-S here and global softmax attention there. The
models are timed in turn in one process; "ratio" is the time over ModernBERT's in the same precision: below 1, LION is
faster. A training step is forward and backward of the mean output. Memory is what one call adds to a process of its
own, beyond weights and inputs.
"""

import argparse

import torch
from bench_models import inference, train_step
from common import added_memory, alternate, count, output_folder, peak_memory, print_table, save, token_axis
from transformers import ModernBertConfig, ModernBertModel

from lion_hf import LionConfig, LionModel


MODELS, MODES = ("modernbert", "lion-s-modern"), ("inference", "train")
PADDED_ROWS = 4


def model(name: str, layers: int) -> torch.nn.Module:
    if name == "modernbert":
        return ModernBertModel(ModernBertConfig(num_hidden_layers=layers))
    config = LionConfig.from_preset("lion-s-modern-base", num_hidden_layers=layers)
    return LionModel(config, add_pooling_layer=False)


def inputs(length: int, tokens: int, padded: bool) -> dict[str, torch.Tensor]:
    """Return rows of one length, about `tokens` in all, or a few that are full, and 3, 2 and 1 quarters of it."""
    rows = PADDED_ROWS if padded else max(1, tokens // length)
    mask = torch.ones(rows, length, dtype=torch.long)
    if padded:
        for i in range(rows):
            mask[i, length - i * length // rows :] = 0
    return {"input_ids": torch.randint(10, 50000, (rows, length)), "attention_mask": mask}


def runner(made: torch.nn.Module, mode: str, rows: dict[str, torch.Tensor], bf16: bool = False):
    return (train_step if mode == "train" else inference)(made.train(mode == "train"), rows, bf16)


def measure(length: int, mode: str, padded: bool, arguments: argparse.Namespace) -> list[dict]:
    precisions = (False, True) if arguments.bf16 else (False,)
    cases = [(name, bf16) for bf16 in precisions for name in MODELS]
    models = {name: model(name, arguments.layers) for name in MODELS}
    rows = inputs(length, arguments.tokens, padded)
    candidates = {(name, bf16): runner(models[name], mode, rows, bf16) for name, bf16 in cases}
    times = alternate(candidates, arguments.seconds, arguments.rounds)
    sizes = [str(x) for x in ("--layers", arguments.layers, "--tokens", arguments.tokens)]
    mib = {name: peak_memory(__file__, *sizes, "--one_case", name, mode, str(length), str(padded)) for name in MODELS}
    return [
        {
            "tokens": length,
            "rows": "padded" if padded else "full",
            "mode": mode,
            "precision": "bfloat16" if bf16 else "float32",
            "model": name,
            "ms": 1e3 * times[name, bf16],
            "ratio": times[name, bf16] / times[MODELS[0], bf16],
            "MiB": mib[name] if not bf16 else float("nan"),
            "memory ratio": mib[name] / mib[MODELS[0]] if not bf16 else float("nan"),
        }
        for name, bf16 in cases
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=count, nargs="+", default=[128, 512, 2048, 8192], help="tokens in a row")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="what to time (default: both)")
    parser.add_argument("--layers", type=count, default=3, help="layers of both models (default: 3)")
    parser.add_argument("--tokens", type=count, default=2048, help="tokens in a batch (at least one row)")
    parser.add_argument("--bf16", action="store_true", help="also time every model under bfloat16 autocast")
    parser.add_argument("--padded", action="store_true", help="also time batches of rows of different lengths")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum time for each comparison")
    parser.add_argument("--rounds", type=count, default=3, help="minimum number of repeats")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    parser.add_argument("--one_case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.one_case:  # in a process of its own, see `measure`
        name, mode, length, padded = arguments.one_case
        rows = inputs(int(length), arguments.tokens, padded == "True")
        print(added_memory(runner(model(name, arguments.layers), mode, rows)))
        return
    rows = []
    for padded in (False, True) if arguments.padded else (False,):
        for length in arguments.lengths:
            for mode in arguments.modes:
                rows += measure(length, mode, padded, arguments)
                print_table(rows[-len(MODELS) * (1 + arguments.bf16) :])

    def picture(axis):
        for mode in arguments.modes:
            for precision, style in {"float32": "o-", "bfloat16": "s--"}.items():
                wanted = {"mode": mode, "precision": precision, "model": MODELS[1], "rows": "full"}
                chosen = [row for row in rows if wanted.items() <= row.items()]
                if chosen:
                    lengths, ratios = zip(*((row["tokens"], row["ratio"]) for row in chosen), strict=True)
                    axis.plot(lengths, ratios, style, color=f"C{MODES.index(mode)}", label=f"{mode}, {precision}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(ylabel="time / ModernBERT", title="below 1 is faster")
        token_axis(axis, arguments.lengths)
        axis.legend()

    save("bench_modern", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
