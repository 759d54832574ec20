"""Draw what the three forms compute and how image encoders scan patches: the pictures of the documentation.

python examples/draw_forms.py --folder docs
"""

import argparse
import math
from pathlib import Path

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import torch
from draw_masks import DECAY, LENGTH, mask
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lion_hf.ops.scans import snake_orders


CHUNK = 6
SIDE = 7  # patches in a row and in a column of the scanned image
GRID_DECAY = 0.8
FROM_LEFT, FROM_RIGHT = "#9ecae1", "#fdbe85"


def draw_forms(path: Path) -> None:
    """Draw which entries of the L x L matrix each form computes, and which it replaces by states."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.9), layout="constrained", facecolor="white")
    titles = (
        ("attention", "all pairs of tokens at once"),
        ("chunk", "tiles on the diagonal, the rest through states"),
        ("rnn", "the same, one chunk after the other"),
    )
    weights = mask(torch.tensor([math.log(DECAY)]))
    for axis, (name, rule) in zip(axes, titles, strict=True):
        axis.set_title(f"{name}\n", fontsize=17, fontweight="bold", pad=8)
        axis.text(0.5, 1.02, rule, transform=axis.transAxes, ha="center", va="bottom", fontsize=12)
        axis.set_xlabel("key position", fontsize=12)
        ticks = range(0, LENGTH, CHUNK)
        axis.set_xticks([x - 0.5 for x in ticks], ticks)
        axis.set_yticks([y - 0.5 for y in ticks], ticks)
        axis.set(xlim=(-0.5, LENGTH - 0.5), ylim=(LENGTH - 0.5, -0.5), aspect="equal")
    axes[0].set_ylabel("query position", fontsize=12)
    axes[0].imshow(weights, cmap="viridis", vmin=0, vmax=1)
    starts = range(0, LENGTH, CHUNK)
    for start in starts:
        _draw_row(axes[1], weights, start, faint=False)
        _draw_row(axes[2], weights, start, faint=start != starts[2])
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _draw_row(axis: Axes, weights: torch.Tensor, start: int, faint: bool) -> None:
    """Draw the tile of one chunk of queries, and the states they read."""
    stop, opacity = start + CHUNK, 0.25 if faint else 1.0
    edges = (start - 0.5, stop - 0.5)
    for left, right, colour, name in (
        (-0.5, edges[0], FROM_LEFT, "state from\nthe left"),
        (edges[1], LENGTH - 0.5, FROM_RIGHT, "state from\nthe right"),
    ):
        if right > left:
            axis.add_patch(
                Rectangle((left, edges[0]), right - left, CHUNK, facecolor=colour, edgecolor="white", alpha=opacity)
            )
            axis.text((left + right) / 2, sum(edges) / 2, name, ha="center", va="center", fontsize=9, alpha=opacity)
    tile = weights[start:stop, start:stop]
    axis.imshow(tile, cmap="viridis", vmin=0, vmax=1, alpha=opacity, extent=(*edges, edges[1], edges[0]))


def draw_scans(path: Path) -> None:
    """Draw the two snake scans, and the weights of all patches for the middle one in raster and in snake order."""
    orders = snake_orders(SIDE, SIDE)
    decay, patches = torch.tensor([math.log(GRID_DECAY)]), SIDE * SIDE
    raster = mask(decay, patches + 1)
    snake = sum(raster[inverse][:, inverse] for _, inverse in orders) / 2
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), layout="constrained", facecolor="white")
    for axis, (order, _), name in zip(axes[:2], orders, ("first scan: rows", "second scan: columns"), strict=True):
        rows, columns = (order[1:] - 1) // SIDE, (order[1:] - 1) % SIDE
        axis.plot(columns, rows, color="C0", linewidth=2)
        axis.plot(columns[0], rows[0], "o", color="C2", markersize=10)
        axis.plot(columns[-1], rows[-1], "s", color="C3", markersize=10)
        axis.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5), aspect="equal")
        axis.set_title(f"order s, {name}", fontsize=12)
    middle = patches // 2 + 1  # after the class token
    for axis, weights, name in zip(axes[2:], (raster, snake), ("normal", "s"), strict=True):
        image = axis.imshow(weights[middle, 1:].view(SIDE, SIDE), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"order {name}: middle patch reads", fontsize=12)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.015, label="weight")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("docs"), help="folder for forms.png and scans.png (default: docs)"
    )
    folder = parser.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw_forms(folder / "forms.png")
        draw_scans(folder / "scans.png")
    except OSError as error:
        parser.error(f"cannot write the pictures: {error}")
    print(f"wrote {folder / 'forms.png'} and {folder / 'scans.png'}")


if __name__ == "__main__":
    main()
