"""Tables and the plot of `run_evidence.py diagonal`: the other diagonals compared with LION's, which counts once."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from safetensors import safe_open


# What the plot shows of each task: the measure, its factor, and the label of the axis.
SHOWN = {"text": ("loss", 1, "masked tokens: loss (nats)"), "images": ("accuracy", 100, "images: accuracy (points)")}


class Difference(NamedTuple):
    """How a diagonal differs from a diagonal of 1.

    Args:
        by_seed: the differences of the runs with the same seed, initial weights and order of the data.
        seeds_range: the larger of the two ranges over the seeds, highest minus lowest.
    """

    by_seed: list[float]
    seeds_range: float

    @property
    def mean(self) -> float:
        """The difference of the means."""
        return mean(self.by_seed)

    @property
    def settled(self) -> bool:
        """Whether the difference exceeds what the seeds alone change."""
        return abs(self.mean) > self.seeds_range


def difference(rows: dict, task: str, name: str, measure: str, factor: float = 1) -> Difference:
    """Return how the diagonal `name` of a task differs from a diagonal of 1 in `measure` times `factor`."""
    here, once = ([factor * value for value in rows[f"{task}, diagonal {which}"][measure]] for which in (name, "1"))
    by_seed = [a - b for a, b in zip(here, once, strict=True)]
    return Difference(by_seed, max(max(values) - min(values) for values in (here, once)))


def others(rows: dict) -> list[tuple[str, str]]:
    """Return task and diagonal of all rows that have a diagonal other than 1, as (task, name)."""
    return [(task, name) for task, name in (row.split(", diagonal ") for row in rows) if name != "1"]


def verdict(found: Difference, low_is_good: bool) -> str:
    """Return a difference in words."""
    if not found.settled:
        return "no difference"
    return "better" if (found.mean < 0) == low_is_good else "worse"


def comparison(rows: dict) -> list[str]:
    """Return the lines of the tables that compare the diagonals with 1."""
    lines = []
    for measure, factor, unit, digits in (("loss", 1, "nats", 3), ("accuracy", 100, "points", 2)):
        lines += ["", f"| {measure} less that of diagonal 1 ({unit}) | mean | by seed | range of the seeds | |"]
        lines += ["|---|---|---|---|---|"]
        for task, name in others(rows):
            found = difference(rows, task, name, measure, factor)
            by_seed = ", ".join(f"{value:+.{digits}f}" for value in found.by_seed)
            lines += [
                f"| {task}, diagonal {name} | {found.mean:+.{digits}f} | {by_seed} | {found.seeds_range:.{digits}f} | "
                f"{verdict(found, measure == 'loss')} |"
            ]
    lines += [
        "",
        "The range of the seeds is the larger one of the two diagonals, highest less lowest. Smaller differences count "
        "as none. Runs with the same seed have the same initial weights, order of the data and masked tokens.",
    ]
    for name, row in rows.items():
        if "learned" in row:
            factors = [value for run in row["learned"] for layer in run for value in layer]
            lines += [
                "",
                f"Learned factors of {name}, all layers, heads and seeds: mean {mean(factors):.2f}, from "
                f"{min(factors):.2f} to {max(factors):.2f}.",
            ]
    return lines


def learned_factors(folder: Path) -> list[list[float]]:
    """Return the learned factors of the diagonal of a trained model: for each layer, one number per head."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.endswith("mixer.diagonal")]  # noqa: SIM118
        names.sort(key=lambda name: int(re.search(r"\d+", name).group()))
        return [[round(value, 3) for value in weights.get_tensor(name).tolist()] for name in names]


def draw_differences(rows: dict, file: Path, title: str) -> None:
    """Draw how the diagonals differ from a diagonal of 1: a point for each seed, a bar for the mean."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(6.5, 3.2), layout="constrained")
    for axis, (task, (measure, factor, label)) in zip(axes, SHOWN.items(), strict=True):
        names = [name for other, name in others(rows) if other == task]
        found = [difference(rows, task, name, measure, factor) for name in names]
        _draw_points(axis, found, rows[f"{task}, diagonal 1"]["seeds"])
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel("diagonal")
        axis.set_ylabel(f"{label}, less that of 1", fontsize=8)
        better = "below 0 is better" if measure == "loss" else "above 0 is better"
        axis.set_title(better, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_points(axis, found: Sequence[Difference], seeds: Sequence[int]) -> None:
    axis.axhline(0, color="0.4", linestyle="--", linewidth=1)
    places = range(len(found))
    axis.bar(places, [one.mean for one in found], width=0.5, alpha=0.3, label="mean")
    for i, seed in enumerate(seeds):
        shift = 0.12 * (i - (len(seeds) - 1) / 2)
        axis.plot([p + shift for p in places], [one.by_seed[i] for one in found], "o", markersize=4, label=f"{seed}")
