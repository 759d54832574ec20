"""Write mean and standard deviation of each task over its seeds, and the GLUE score, as JSON, Markdown and a chart.

    python -m lion_hf.training.glue.summary outputs/glue

This reads the glue_result.json of every run below the folder. run_glue.py does the same at its end.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

from ..errors import UserError, require_path, run, say
from .tasks import CUSTOM, SCORED, TASKS


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RESULT = "glue_result.json"
# Options with which a result is not a GLUE score.
NOT_GLUE = {"builtin_data": "toy data, not GLUE", "max_eval_samples": "a part of the validation data"}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the contents of the `RESULT` files of all finished runs below a folder."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*/*/{RESULT}"))]
    if not results:
        raise UserError(f"{str(folder)!r} has no finished run: no task/seed/{RESULT} below it")
    return results


def run_score(result: dict[str, Any]) -> float:
    """Return the mean of the metrics of the task's score; NaN if one is missing."""
    return fmean(_number(result["metrics"].get(name)) for name in result["score_metrics"])


def spread(values: list[float]) -> dict[str, float | None]:
    """Return mean and sample standard deviation; None for a value that is undefined."""
    mean = fmean(values)
    deviation = stdev(values) if len(values) > 1 and math.isfinite(mean) else math.nan
    return {"mean": _or_none(mean), "std": _or_none(deviation)}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the runs of each task, mean and deviation of its metrics and score, and the GLUE score.

    The score of a task is the mean over its seeds and metrics; the GLUE score is the mean over the paper's eight tasks.
    It is None, with the reasons in "no_glue_score", if a task is missing, was not evaluated on the full GLUE data, or
    has a metric that is not a number.
    """
    tasks = {}
    for name in (*TASKS, CUSTOM.name):
        runs = {result["seed"]: result for result in results if result["task"] == name}
        if runs:
            runs = dict(sorted(runs.items()))
            metrics = {
                metric: [_number(r["metrics"][metric]) for r in runs.values()] for metric in _common_metrics(runs)
            }
            tasks[name] = {
                "seeds": {str(seed): result["metrics"] for seed, result in runs.items()},
                "metrics": {metric: spread(values) for metric, values in metrics.items()},
                "score": spread([run_score(result) for result in runs.values()]),
                "baseline": next(iter(runs.values())).get("baseline"),
            }
    reasons = _obstacles(tasks, results)
    scores = [tasks[name]["score"]["mean"] for name in SCORED if name in tasks]
    return {"tasks": tasks, "glue_score": None if reasons else fmean(scores), "no_glue_score": reasons}


def _common_metrics(runs: dict[int, dict[str, Any]]) -> list[str]:
    return [name for name in next(iter(runs.values()))["metrics"] if all(name in r["metrics"] for r in runs.values())]


def _obstacles(tasks: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    reasons = []
    missing = [TASKS[name].title for name in SCORED if name not in tasks]
    if missing:
        reasons.append(f"missing: {', '.join(missing)}")
    for name in SCORED:
        if name in tasks and tasks[name]["score"]["mean"] is None:
            reasons.append(f"{TASKS[name].title} has no number for {', '.join(TASKS[name].evaluated)}")
    for option, reason in NOT_GLUE.items():
        if any(result["arguments"].get(option) for result in results):
            reasons.append(f"measured on {reason}")
    return reasons


# --------------------------------------------------------------------------------------------------------- writing


def write_summary(folder: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Write glue.json, glue.md and glue.png, and the predictions of each task's best seed; return the summary."""
    summary = summarise(results)
    chosen = copy_predictions(folder, results)
    summary["submission"] = chosen
    (folder / "glue.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "glue.md").write_text(to_markdown(summary), encoding="utf-8")
    draw(summary, folder / "glue.png")
    return summary


def copy_predictions(folder: Path, results: list[dict[str, Any]]) -> dict[str, int]:
    """Copy the predictions of each task's seed with the best validation score to submission/; return these seeds."""
    chosen = {}
    for name in dict.fromkeys(result["task"] for result in results):
        runs = [result for result in results if result["task"] == name]
        best = max(runs, key=lambda result: -math.inf if math.isnan(run_score(result)) else run_score(result))
        place = folder / name / str(best["seed"]) / "predictions"
        files = sorted(place.glob("*.tsv" if name in TASKS else "*.csv"))
        if files:
            (folder / "submission").mkdir(exist_ok=True)
            chosen[name] = best["seed"]
        for file in files:
            shutil.copy(file, folder / "submission" / file.name)
    return chosen


def title_of(name: str) -> str:
    return TASKS[name].title if name in TASKS else name


def to_markdown(summary: dict[str, Any]) -> str:
    """Return the GLUE score and a table of the tasks with notes, as Markdown."""
    rows = []
    for name, task in summary["tasks"].items():
        shown = {metric: values for metric, values in task["metrics"].items() if not metric.endswith("loss")}
        metrics = "; ".join(f"{metric.replace('_', ' ')} {_percent(values)}" for metric, values in shown.items())
        wanted = TASKS[name].seeds if name in TASKS else len(task["seeds"])
        seeds = f"{len(task['seeds'])}" + (f" of {wanted}" if len(task["seeds"]) < wanted else "")
        rows.append(f"| {title_of(name)} | {_percent(task['score'])} | {metrics} | {seeds} |")
    if summary["glue_score"] is None:
        score = f"No GLUE score: {'; '.join(summary['no_glue_score'])}."
    else:
        score = f"**GLUE score: {100 * summary['glue_score']:.2f}** (mean over the eight tasks of the paper)."
    sent = ", ".join(f"{title_of(name)} {seed}" for name, seed in summary["submission"].items())
    sent = (
        f"\nThe test predictions in submission/ are those of the seed with the best validation score: {sent}.\n"
        if sent
        else ""
    )
    return f"""# Results

{score}

| task | score | metrics | seeds |
|---|---:|---|---:|
{chr(10).join(rows)}

In percent, on validation data: mean over the seeds ± sample standard deviation. The score of a task is the mean of the
metrics of its score: accuracy; QQP accuracy and F1; STS-B Spearman; MRPC F1; CoLA Matthews; MNLI matched and mismatched
accuracy. WNLI does not count for the GLUE score.
{sent}
![score of each task](glue.png)
"""


def _percent(values: dict[str, float | None]) -> str:
    if values["mean"] is None:
        return "not a number"
    return f"{100 * values['mean']:.2f}" + ("" if values["std"] is None else f" ± {100 * values['std']:.2f}")


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw a bar per task, with its deviation and number of seeds.

    Dotted lines are the scores of a constant prediction; the dashed line is the GLUE score.
    """
    tasks = summary["tasks"]
    heights = [100 * (task["score"]["mean"] or 0) for task in tasks.values()]
    deviations = [100 * _number(task["score"]["std"]) for task in tasks.values()]
    colors = ["C0" if name in SCORED else "0.7" for name in tasks]
    figure, axis = plt.subplots(figsize=(max(4, 1.1 * len(tasks)), 4), layout="constrained")
    names = [f"{title_of(name)}\n{_seeds(len(task['seeds']))}" for name, task in tasks.items()]
    bars = axis.bar(names, heights, yerr=deviations, capsize=4, color=colors)
    lines = [(i, 100 * task["baseline"]) for i, task in enumerate(tasks.values()) if task.get("baseline") is not None]
    for number, (i, height) in enumerate(lines):
        label = None if number else "constant prediction"
        axis.plot([i - 0.4, i + 0.4], [height, height], color="k", linestyle=":", linewidth=1.5, label=label)
    labels = [
        _percent(task["score"]).replace(" ± ", "\n± ").replace("not a number", "no\nnumber") for task in tasks.values()
    ]
    axis.bar_label(bars, labels, padding=2, fontsize=8)
    if summary["glue_score"] is not None:
        score = 100 * summary["glue_score"]
        axis.axhline(score, color="0.3", linestyle="--", linewidth=1, zorder=0, label=f"GLUE score {score:.1f}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)
    axis.set_ylabel("score (%), mean and deviation over seeds")
    lowest = min(height - (0 if math.isnan(d) else d) for height, d in zip(heights, deviations, strict=True))
    axis.set_ylim(min(0.0, 1.3 * lowest), 118)
    figure.suptitle("; ".join(summary["no_glue_score"]) if tasks.keys() & set(SCORED) else "", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --output_dir of run_glue.py")
    folder = require_path(parser.parse_args().folder, "folder")
    write_summary(folder, read_results(folder))
    say((folder / "glue.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
