"""Error of gates in half precision: how far a mixer's output is from its output with float32 gates.

    python benchmarks/bench_gates.py     # about two minutes on two free CPU cores

Only the gates (`float32_weights` of the variant) are converted; all else stays float32. Decays are initialised from
windows, as in warm starts. The windows of the heads range from 4 or 16 tokens to the length. The error of an output row
is relative to the norm of the row. "worst" is the largest error of any row, "mean" the average. Input tokens are random
and have the norm sqrt(dim), as after a LayerNorm. Outputs of text are not normalised, those of images are.
"""

import argparse
import itertools

import torch
from common import VARIANTS, count, output_folder, print_table, save
from torch.nn import functional as F

from lion_hf.convert import head_windows
from lion_hf.nn import Mixer
from lion_hf.nn.variants import variant_class


SMALLEST_WINDOWS = (4, 16)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"text": {"normalize": False}, "image": {}}


def convert_gates(mixer: Mixer, dtype: torch.dtype) -> None:
    for name, parameter in mixer.named_parameters():
        if name.startswith(tuple(mixer.weight_names())):
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def rows_of(mixer: Mixer, windows: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mixer's output, (length, dim), with gates of this dtype and without the bias of the last layer."""
    convert_gates(mixer, torch.float32)
    mixer.set_windows(windows)
    convert_gates(mixer, dtype)
    return (mixer(x, format="chunk") - mixer.o_proj.bias)[0]


def distances(variant: str, kind: str, length: int, dim: int, heads: int) -> dict[str, torch.Tensor]:
    """Return for each dtype the relative error of every row, for both smallest windows."""
    found = {name: [] for name in DTYPES}
    x = F.layer_norm(torch.randn(1, length, dim), (dim,))
    for smallest in SMALLEST_WINDOWS:
        mixer = Mixer(dim, heads, variant, **KINDS[kind]).eval()
        windows = head_windows((smallest, length), heads)
        expected = rows_of(mixer, windows, x, torch.float32)
        for name, dtype in DTYPES.items():
            distance = (rows_of(mixer, windows, x, dtype) - expected).norm(dim=-1)
            found[name].append(distance / expected.norm(dim=-1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=count, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="tokens")
    parser.add_argument("--dim", type=count, default=192, help="width of the mixer")
    parser.add_argument(
        "--heads", type=count, nargs="+", default=[3, 12], help="numbers of heads; each must divide --dim"
    )
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    arguments = parser.parse_args()
    if any(arguments.dim % heads for heads in arguments.heads):
        parser.error(f"--heads {arguments.heads} must divide --dim {arguments.dim} without remainder.")
    torch.manual_seed(0)
    rows = []
    gated = [name for name in VARIANTS if variant_class(name).float32_weights]
    for variant, kind, heads in itertools.product(gated, KINDS, arguments.heads):
        by_length = [distances(variant, kind, length, arguments.dim, heads) for length in arguments.lengths]
        row = {"variant": variant, "kind": kind, "heads": heads}
        for name in DTYPES:
            worst = [found[name].max().item() for found in by_length]
            mean = torch.stack([found[name].mean() for found in by_length]).mean().item()
            row |= {f"{name} worst": max(worst), f"{name} mean": mean, f"{name} by length": worst}
        rows.append(row)
    print_table([{name: cell for name, cell in row.items() if not name.endswith("by length")} for row in rows])

    def picture(axis):
        for row in rows:
            label = f"{row['variant']}, {row['kind']}, {row['heads']} heads"
            axis.plot(arguments.lengths, row["bf16 by length"], marker="o", label=label)
        axis.set(xscale="log", ylim=(0, None), xlabel="tokens", ylabel="worst relative error", title="bfloat16 gates")
        axis.legend()

    save("bench_gates", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
