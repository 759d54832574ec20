"""Draw the decay masks of the three LION variants, computed by the package.

python examples/draw_masks.py --output docs/masks.png
"""

import argparse
import math
from pathlib import Path

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import matplotlib
import torch

from lion_hf.ops.api import attention_scores


matplotlib.use("Agg")
from matplotlib import pyplot as plt


LENGTH = 24
DECAY = 0.85  # of LION-D's only head


def mask(log_decay: torch.Tensor | None, length: int = LENGTH) -> torch.Tensor:
    """Return the decay mask (length, length): the unscaled attention matrix if all queries and keys are 1."""
    ones = torch.ones(1, 1, length, 1)
    return attention_scores(ones, ones, log_decay, scale=1.0)[0, 0]


def selective_decays(length: int = LENGTH) -> torch.Tensor:
    """Return decays as LION-S may compute them: most are near 1, and two are near 0."""
    decays = torch.empty(length).uniform_(0.86, 1.0, generator=torch.Generator().manual_seed(3))
    decays[length // 3] = 0.12
    decays[2 * length // 3 + 1] = 0.35
    return decays


def draw_masks(path: str | Path) -> Path:
    """Draw the three masks, create the folder if needed, and return the path."""
    decays = selective_decays()
    variants = (
        ("LION-LIT", "no decay:  $M_{ij} = 1$", None, torch.ones(LENGTH)),
        (
            "LION-D",
            r"learned decay per head:  $M_{ij} = \lambda^{|i-j|}$",
            torch.tensor([math.log(DECAY)]),
            torch.full((LENGTH,), DECAY),
        ),
        (
            "LION-S",
            r"decay per token:  $M_{ij} = \prod \lambda_t$ between $i$ and $j$",
            decays.log().view(1, 1, -1),
            decays,
        ),
    )
    figure, axes = plt.subplots(
        2, 3, figsize=(13, 5.05), height_ratios=(1, 12), sharex="col", layout="constrained", facecolor="white"
    )
    figure.get_layout_engine().set(wspace=0.05, hspace=0.02)
    for column, (name, rule, log_decay, per_token) in enumerate(variants):
        strip, square = axes[:, column]
        strip.imshow(per_token.view(1, -1), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        strip.set_yticks([0], [r"$\lambda_j$"], fontsize=13)
        strip.tick_params(length=0)
        strip.set_title(f"{name}\n", fontsize=17, fontweight="bold", pad=8)
        strip.text(0.5, 1.25, rule, transform=strip.transAxes, ha="center", va="bottom", fontsize=12)
        image = square.imshow(mask(log_decay), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        square.set_xlabel("key position $j$", fontsize=12)
        ticks = range(0, LENGTH, 4)
        square.set_xticks(ticks, ticks)
        square.set_yticks(ticks, ticks)
    axes[1, 0].set_ylabel("query position $i$", fontsize=12)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015, aspect=28)
    bar.set_label("weight of key $j$ for query $i$", fontsize=12)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/masks.png", help="PNG to write (default: docs/masks.png)")
    try:
        print(f"wrote {draw_masks(parser.parse_args().output)}")
    except (OSError, ValueError) as error:
        parser.error(f"cannot write the picture: {error}")


if __name__ == "__main__":
    main()
