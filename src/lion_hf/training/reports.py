"""The outputs of a run: metrics, the model, curves and a model card."""

import csv
import json
import math
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch
import transformers
from transformers import TrainingArguments
from transformers.utils import logging

from .. import __version__
from ..nn.variants import variant_class
from .errors import say
from .trainer import LionTrainer


matplotlib.use("Agg")
from matplotlib import pyplot as plt


logger = logging.get_logger(__name__)


@dataclass
class Report:
    """Contents of the model card and the curves of a run.

    Attributes:
        title, data: the model and its data in a few words; a sentence about the source of the data.
        metric, metric_label: the evaluated metric, a share (drawn in percent) or a `correlation`.
        metric_baseline, loss_baseline: name and value of a baseline that does not read the input.
        metric_error: difference between `metric` and its baseline that chance alone explains.
        judged_by_loss: whether the loss, and not the metric, decides if the model has learned anything.
    """

    title: str
    pipeline_tag: str
    data: str
    command: str
    metric: str
    metric_label: str
    loss_label: str
    usage: str
    metric_baseline: tuple[str, float] | None = None
    loss_baseline: tuple[str, float] | None = None
    metric_error: float = 0.0
    correlation: bool = False
    judged_by_loss: bool = False

    def at_baseline(self, metrics: dict[str, float]) -> str | None:
        """Return a sentence if a run ends no better than its baseline (within `metric_error`, or NaN), else None."""
        if self.judged_by_loss:
            found, baseline = metrics.get("eval_loss"), self.loss_baseline
        else:
            found, baseline = metrics.get(self.metric), self.metric_baseline
        if found is None or baseline is None:
            return None
        name, reached = baseline
        if self.judged_by_loss and found < reached:
            return None
        if not self.judged_by_loss and found > reached + self.metric_error:
            return None
        what = "eval_loss" if self.judged_by_loss else self.metric
        return f"{what} is {found:.4f}, no better than the baseline ({name}: {reached:.4f})"


def model_name(config) -> str:
    """Return "LION-D", "LION-S, snake", "LION-S, hybrid" or the type of a baseline, for titles."""
    if not config.model_type.startswith("lion"):
        return config.model_type
    name = variant_class(config.mask_type).label
    name += ", snake" if getattr(config, "order", "normal") == "s" else ""
    return f"{name}, hybrid" if config.softmax_layers else name


def command_line(script: str, argv: Sequence[str]) -> str:
    """Return the command that repeats this run."""
    return shlex.join(["python", f"examples/{script}", *argv])


def train_and_evaluate(
    trainer: LionTrainer,
    training: TrainingArguments,
    checkpoint: str | None,
    extra: Callable[[dict], dict] | None = None,
) -> dict[str, float]:
    """Train, evaluate, and log and save the metrics of both; `extra` derives more from those of the evaluation."""
    metrics: dict[str, float] = {}
    if training.do_train and checkpoint and trainer.is_finished(checkpoint):
        trainer.restore(checkpoint)
        stored = Path(training.output_dir) / "train_results.json"
        metrics |= json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
        if trainer.is_world_process_zero():
            say(
                f"training is already finished in {checkpoint}; the model is only evaluated. Changed training data and "
                "flags of training have no effect. To train again, use another --output_dir, or "
                "--resume_from_checkpoint no"
            )
    elif training.do_train:
        if checkpoint and trainer.is_world_process_zero():
            say(f"resuming from {checkpoint}")
        metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        if checkpoint:  # speeds divide all steps by the time since the resume, so they are left out
            metrics = {name: value for name, value in metrics.items() if not name.endswith("per_second")}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training.do_eval and trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        evaluation |= extra(evaluation) if extra else {}
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
        metrics |= evaluation
    return metrics


def finish(trainer: LionTrainer, training: TrainingArguments, metrics: dict[str, float], report: Report) -> None:
    """Save the model with its tokenizer or processor, the curves and the model card after training.

    If training was already finished, the curves and the card of the run that trained the model stay as they are.
    """
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(training.output_dir)
        if trainer.restored is None or not is_newer(folder / "README.md", Path(trainer.restored, "trainer_state.json")):
            plot_curves(trainer.state.log_history, folder / "curves.png", report)
            write_card(folder / "README.md", trainer.model, metrics, report)
        say(f"Model, metrics (all_results.json), curves.png and README.md are in {folder}")
        problem = report.at_baseline(metrics)
        if problem:
            rate = f"another --learning_rate (it was {training.learning_rate:g}) with a new --output_dir"
            tip = f". Try {rate}, or more epochs" if trainer.restored is None else ""
            logger.warning(f"the model has not learned anything measurable: {problem}{tip}")


def is_newer(file: Path, other: Path) -> bool:
    """Return whether a file exists that was written after the other."""
    return file.is_file() and file.stat().st_mtime_ns >= other.stat().st_mtime_ns


def write_predictions(
    path: Path, inputs: dict[str, Sequence[str]], names: Sequence[str], predictions: np.ndarray
) -> None:
    """Write a csv file with a row per prediction: the input, the label, and the probability of every class.

    Args:
        path: the file.
        inputs: leading columns by name: texts, or names of files.
        names: the classes; none for a regression, whose column is "prediction".
        predictions: (rows, classes) probabilities, or (rows, 1) numbers; NaN in rows that could not be read, which get
            no label.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [*inputs, *(["label", *(f"probability_{name}" for name in names)] if names else ["prediction"])]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for *row, values in zip(*inputs.values(), predictions, strict=True):
            if np.isnan(values).any():
                writer.writerow([*row, *[""] * (len(header) - len(row))])
            else:
                label = [names[values.argmax()]] if names else []
                writer.writerow([*row, *label, *(f"{value:.6g}" for value in values)])


def plot_curves(history: list[dict[str, float]], path: Path, report: Report) -> None:
    """Plot loss, metric, learning rate and throughput, if logged, against optimizer steps.

    Baselines are dashed lines. Means over several steps are drawn at the middle of these steps. Axes start at 0.
    """
    percent = not report.correlation
    panels = (
        ((("loss", "training"), ("eval_loss", "evaluation")), report.loss_label, report.loss_baseline, 1),
        (((report.metric, "evaluation"),), report.metric_label, report.metric_baseline, 100 if percent else 1),
        ((("learning_rate", "training"),), "learning rate", None, 1),
        ((("samples_per_second", "training"),), "throughput (samples per second)", None, 1),
    )
    drawn = [panel for panel in panels if any(curve_points(history, key) for key, _ in panel[0])]
    columns = min(2, max(1, len(drawn)))
    shape = (max(1, -(-len(drawn) // 2)), columns)
    figure, axes = plt.subplots(*shape, figsize=(5.5 * columns, 3.5 * shape[0]), layout="constrained", squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, (curves, label, baseline, factor) in zip(axes.flat, drawn, strict=False):
        for key, name in curves:
            points = [(step, factor * value) for step, value in curve_points(history, key)]
            if points:
                style = {"color": "C1"} if key.startswith("eval") else {"color": "C0", "alpha": 0.7}
                marks = {"marker": "o", "markersize": 4} if key.startswith("eval") or len(points) < 20 else {}
                axis.plot(*zip(*points, strict=True), label=name, **style, **marks)
        if baseline is not None:
            axis.axhline(factor * baseline[1], color="0.4", linestyle="--", linewidth=1, label=baseline[0])
        axis.set_xlim(left=0)
        lowest, highest = axis.dataLim.intervaly
        highest = factor if curves[0][0] == report.metric else highest
        least = -0.05 if report.correlation and curves[0][0] == report.metric else 0.0
        axis.set_ylim(min(least, 1.05 * lowest), 1.05 * highest or 1.0)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.1)
    figure.suptitle(report.title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve_points(history: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """Return steps and values of a key.

    Loss and throughput of training are means since the last logged step and get the middle of these steps.
    """
    points, before = [], 0
    for entry in history:
        value = entry.get(key)
        if value is not None and math.isfinite(value):
            averaged = key in ("loss", "samples_per_second")
            points.append(((before + entry["step"]) / 2 if averaged else entry["step"], value))
        before = entry["step"] if "loss" in entry else before
    return points


def write_card(path: Path, model, metrics: dict[str, float], report: Report) -> None:
    """Write README.md of the saved folder: the model, its data, command, versions and metrics."""
    config = model.config
    is_lion = config.model_type.startswith("lion")
    kind = f"LION with mask type `{config.mask_type}`" if is_lion else f"`{config.model_type}`, a baseline for LION"
    tags = "\n- lion\n- linear-attention" if is_lion else f"\n- {config.model_type}"
    usage, command = _with_own_variant(config, report) if is_lion else (report.usage, report.command)
    size = f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads"
    rows = [f"| {name} | {value:,.4f} |" for name, value in metrics.items() if _is_number(value)]
    for metric, baseline in ((report.metric, report.metric_baseline), ("eval_loss", report.loss_baseline)):
        rows += [f"| {metric} of a baseline: {baseline[0]} | {baseline[1]:,.4f} |"] if baseline else []
    problem = report.at_baseline(metrics)
    verdict = f"**This model has not learned anything measurable:** {problem}.\n\n" if problem else ""
    versions = {
        "lion_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }
    card = f"""---
library_name: transformers
pipeline_tag: {report.pipeline_tag}
tags:{tags}
---

# {report.title}

{kind} ({size}, {model.num_parameters():,} parameters), see
[Linear Attention for Efficient Bidirectional Sequence Modeling](https://arxiv.org/abs/2502.16249).

```python
{usage}
```

## Data

{report.data}

## Training

```bash
{command}
```

Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}.

## Metrics

{verdict}| metric | value |
|---|---:|
{chr(10).join(rows)}

![loss and metric against optimizer steps](curves.png)
"""
    path.write_text(card, encoding="utf-8")


def _with_own_variant(config, report: Report) -> tuple[str, str]:
    """Return usage and command of a run; a custom variant adds the import of its module to both."""
    module = variant_class(config.mask_type).__module__
    if module.partition(".")[0] == variant_class.__module__.partition(".")[0]:
        return report.usage, report.command
    usage = report.usage.replace("import lion_hf\n", f"import lion_hf\nimport {module}\n", 1)
    return usage, report.command.replace("python ", f"python -m lion_hf --import {module} ", 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
