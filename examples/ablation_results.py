"""Tables and the plot of `ablation_evidence.py`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt


SENTIMENT = {"sentiment, first": "first token", "sentiment, mean": "mean"}


def finals(runs: dict[str, dict], model: str, task: str) -> list[dict]:
    """Return the reported runs of a model on a task, by seed."""
    found = [r for r in runs.values() if (r["model"], r["task"], r["stage"]) == (model, task, "final")]
    return sorted(found, key=lambda run: run["seed"])


def sweep(runs: dict[str, dict], model: str, task: str) -> dict[float, float]:
    """Return the held-out loss of a model by learning rate, in the order of the rates."""
    found = {
        r["rate"]: r["loss"] for r in runs.values() if (r["model"], r["task"], r["stage"]) == (model, task, "rate")
    }
    return dict(sorted(found.items()))


def cell(values: Sequence[float], factor: float = 1, digits: int = 2) -> str:
    """Return mean and standard deviation as a cell of a table."""
    if not values:
        return ""
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


def differences(runs: dict[str, dict], model: str, reference: str) -> list[float]:
    """Return the masked loss of a model less that of the reference, seed by seed."""
    here, there = ({r["seed"]: r["loss"] for r in finals(runs, name, "text")} for name in (model, reference))
    return [here[seed] - there[seed] for seed in here if seed in there]


def write_table(models: dict, runs: dict[str, dict], file: Path) -> None:
    """Write the results as Markdown tables. `models` maps names to descriptions; the first is the reference.

    A model is a row when all its seeds are done.
    """
    reference = next(iter(models))
    seeds = len(finals(runs, reference, "text"))
    reported = [name for name in models if seeds and len(finals(runs, name, "text")) == seeds]
    lines = results_table(reported, runs, reference) if reported else []
    lines += held_out_tables(models, runs)
    waiting = [name for name, model in models.items() if model.reported and name not in reported]
    lines += ["", f"Not run yet: {'; '.join(waiting)}."] if waiting else []
    devices = sorted({run["device"] for run in runs.values()})
    lines += ["", f"Device: {'; '.join(devices)}. The options of the models:", ""]
    lines += [f"- {name}: `{model.options}`" for name, model in models.items() if sweep(runs, name, "text")]
    given = next(iter(runs.values()))["command"].partition(" --only")[0] if runs else ""
    lines += ["", f"A run is repeated by `{given} --only NAME`."]
    file.write_text("\n".join(lines).lstrip("\n") + "\n")


def results_table(names: Sequence[str], runs: dict[str, dict], reference: str) -> list[str]:
    """Return the lines of the table of the validation files."""
    lines = [
        "| model | parameters (millions) | masked loss (nats) | less that of the first, by seed | "
        "masked accuracy (%) | sentiment, first token (%) | sentiment, mean (%) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        text = finals(runs, name, "text")
        by_seed = ", ".join(f"{value:+.3f}" for value in differences(runs, name, reference))
        accuracies = [cell([r["accuracy"] for r in finals(runs, name, task)], 100, 1) for task in SENTIMENT]
        lines += [
            f"| {name} | {text[0]['parameters'] / 1e6:.2f} | {cell([r['loss'] for r in text], 1, 3)} | {by_seed} | "
            f"{cell([r['accuracy'] for r in text], 100)} | {accuracies[0]} | {accuracies[1]} |"
        ]
    entropy = mean(r["unigram_entropy"] for r in finals(runs, names[0], "text"))
    seeds = ", ".join(str(r["seed"]) for r in finals(runs, names[0], "text"))
    lines += ["", f"Mean and standard deviation over the seeds {seeds}, on the validation files."]
    lines += [f"The unigram entropy of the masked tokens, the loss of token frequencies alone, is {entropy:.3f} nats."]
    return lines


def held_out_tables(models: dict, runs: dict[str, dict]) -> list[str]:
    """Return the lines of the tables of held-out losses by learning rate, with which rates and options were chosen."""
    lines = []
    for task, title in (
        ("text", "masked loss"),
        *((task, f"sentiment loss, {how}") for task, how in SENTIMENT.items()),
    ):
        sweeps = {name: sweep(runs, name, task) for name in models}
        rates = sorted({rate for losses in sweeps.values() for rate in losses})
        if not rates:
            continue
        lines += ["", f"| {title} on held-out rows of the training file, one seed, by learning rate | "]
        lines[-1] += " | ".join(f"{rate:g}" for rate in rates) + " |"
        lines += ["|---" * (len(rates) + 1) + "|"]
        for name, losses in sweeps.items():
            if losses:
                values = " | ".join(f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates)
                lines += [f"| {name} | {values} |"]
    return lines


def draw(models: dict, runs: dict[str, dict], file: Path) -> None:
    """Draw the masked loss of each reported model less that of the first, and its sentiment accuracies."""
    reference = next(iter(models))
    names = [name for name in models if name != reference and differences(runs, name, reference)]
    if not names:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.3 * len(names) + 1.8), layout="constrained", sharey=True)
    places = range(len(names) + 1)
    for place, name in zip(places, [reference, *names], strict=True):
        values = differences(runs, name, reference)
        left.barh(place, mean(values), height=0.5, alpha=0.3, color="C0")
        left.plot(values, [place] * len(values), "o", color="C0", markersize=3)
        for i, (task, label) in enumerate(SENTIMENT.items()):
            accuracies = [100 * r["accuracy"] for r in finals(runs, name, task)]
            right.plot(accuracies, [place] * len(accuracies), "os"[i], color=f"C{i}", markersize=3, label=label)
    left.axvline(0, color="0.4", linestyle="--", linewidth=1)
    left.set_yticks(places, [reference, *names], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel(f"masked loss less that of {reference} (nats)", fontsize=8)
    right.set_xlabel("sentiment accuracy (%)", fontsize=8)
    right.set_xlim(0, 100)
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[:2], labels[:2], fontsize=8, title="the classifier reads", title_fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle("Options of the modern block, each seed and mean", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
