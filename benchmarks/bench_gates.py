"""What gates in half precision cost: how far a mixer's rows are from those with gates in float32.

    python benchmarks/bench_gates.py     # about two minutes on two free CPU cores

Only the gates (`float32_weights` of the variant) are converted; all else stays float32. Decays start from windows, as
in warm starts: from the smallest one, 4 or 16, to the length, spread over the heads. The distance of a row is relative
to its norm, and the worst is that of any row of any start. Rows of tokens are random, of norm sqrt(dim), as after a
LayerNorm. Outputs of text are not normalised, those of images are.
"""

import argparse
import itertools

import torch
from common import count, output_folder, print_table, save
from torch.nn import functional as F

from lion_hf.convert.warm_start import head_windows, set_windows
from lion_hf.nn import Mixer
from lion_hf.nn.variants import VARIANTS


SMALLEST_WINDOWS = (4, 16)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"text": {"normalize": False}, "image": {}}


def convert_gates(mixer: Mixer, dtype: torch.dtype) -> None:
    for name, parameter in mixer.named_parameters():
        if name.startswith(tuple(mixer.weight_names())):
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def rows_of(mixer: Mixer, windows: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the mixer computes with gates of that dtype, without the bias at its end, (length, dim)."""
    convert_gates(mixer, torch.float32)
    set_windows(mixer, windows)
    convert_gates(mixer, dtype)
    return (mixer(x, format="chunk") - mixer.o_proj.bias)[0]


def distances(variant: str, kind: str, length: int, dim: int, heads: int) -> dict[str, torch.Tensor]:
    """By dtype, the distance of each row of each start."""
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
    parser.add_argument("--lengths", type=count, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dim", type=count, default=192)
    parser.add_argument("--heads", type=count, nargs="+", default=[3, 12], help="that divide --dim")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results")
    arguments = parser.parse_args()
    if any(arguments.dim % heads for heads in arguments.heads):
        parser.error(f"--heads: {arguments.heads} must divide --dim {arguments.dim}.")
    torch.manual_seed(0)
    rows = []
    gated = [name for name, cls in VARIANTS.items() if cls.float32_weights]
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
        axis.set(
            xscale="log", ylim=(0, None), xlabel="tokens", ylabel="worst relative distance", title="bfloat16 gates"
        )
        axis.legend()

    save("bench_gates", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
