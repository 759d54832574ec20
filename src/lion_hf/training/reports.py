"""What a run leaves behind: metrics, the model, curves and a model card."""

import json
import math
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import torch
import transformers
from transformers import Trainer, TrainingArguments

from .. import __version__
from ..nn.variants import variant_class
from .errors import say


matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass
class Report:
    """What a script says about its run: in the model card, and in the curves."""

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


def model_name(config) -> str:
    """ "LION-D", "LION-S, snake", "LION-S, hybrid" or the kind of a baseline, for titles."""
    if not config.model_type.startswith("lion"):
        return config.model_type
    name = variant_class(config.mask_type).label
    name += ", snake" if getattr(config, "order", "normal") == "s" else ""
    return f"{name}, hybrid" if config.softmax_layers else name


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command of this run, to be repeated."""
    return shlex.join(["python", f"examples/{script}", *argv])


def train_and_evaluate(
    trainer: Trainer, training: TrainingArguments, checkpoint: str | None, extra: Callable[[dict], dict] | None = None
) -> dict[str, float]:
    """Trains, evaluates, prints and saves both sets of metrics; `extra` derives more from the evaluation's."""
    metrics: dict[str, float] = {}
    if training.do_train and checkpoint and trainer.is_finished(checkpoint):
        trainer.restore(checkpoint)
        stored = Path(training.output_dir) / "train_results.json"
        metrics |= json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
        if trainer.is_world_process_zero():
            say(f"training was finished before, in {checkpoint}; evaluating it again")
    elif training.do_train:
        metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics |= {"train_loss": mean_loss(trainer.state.log_history, metrics["train_loss"])}
        if checkpoint:  # they divide all steps by the time since the resume
            metrics = {name: value for name, value in metrics.items() if not name.endswith("per_second")}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training.do_eval:
        evaluation = trainer.evaluate()
        evaluation |= extra(evaluation) if extra else {}
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
        metrics |= evaluation
    return metrics


def mean_loss(history: list[dict[str, float]], otherwise: float) -> float:
    """The mean of the logged losses, each for the steps since the one before; it counts steps before a resume too."""
    logged = [(0, 0.0)] + [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if len(logged) == 1:
        return otherwise
    total = sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logged))
    return total / logged[-1][0]


def finish(trainer: Trainer, training: TrainingArguments, metrics: dict[str, float], report: Report) -> None:
    """Saves the model with its tokenizer or processor, the curves, and the model card, if there was training."""
    if not training.do_train:
        return
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(training.output_dir)
        plot_curves(trainer.state.log_history, folder / "curves.png", report)
        write_card(folder / "README.md", trainer.model, metrics, report)
        say(f"Model, metrics (all_results.json), curves.png and README.md are in {folder}")


def plot_curves(history: list[dict[str, float]], path: Path, report: Report) -> None:
    """Loss, metric, learning rate and throughput against optimizer steps, with the baselines as dashed lines."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    panels = (
        ((("loss", "training"), ("eval_loss", "evaluation")), report.loss_label, report.loss_baseline, 1),
        (((report.metric, "evaluation"),), report.metric_label, report.metric_baseline, 100),
        ((("learning_rate", "training"),), "learning rate", None, 1),
        ((("samples_per_second", "training"),), "throughput (samples per second)", None, 1),
    )
    for axis, (curves, label, baseline, factor) in zip(axes.flat, panels, strict=True):
        for key, name in curves:
            points = [(entry["step"], factor * entry[key]) for entry in history if key in entry]
            if points:
                evaluated = key.startswith("eval")
                style = {"color": "C1", "marker": "o", "markersize": 4} if evaluated else {"color": "C0", "alpha": 0.7}
                axis.plot(*zip(*points, strict=True), label=name, **style)
        if baseline is not None:
            axis.axhline(factor * baseline[1], color="0.4", linestyle="--", linewidth=1, label=baseline[0])
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.suptitle(report.title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_card(path: Path, model, metrics: dict[str, float], report: Report) -> None:
    """README.md of the saved folder: what the model is, its data, command, versions and metrics."""
    config = model.config
    is_lion = config.model_type.startswith("lion")
    kind = f"LION with mask type `{config.mask_type}`" if is_lion else f"`{config.model_type}`, a baseline for LION"
    tags = "\n- lion\n- linear-attention" if is_lion else f"\n- {config.model_type}"
    usage, command = _with_own_variant(config, report) if is_lion else (report.usage, report.command)
    size = f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads"
    rows = [f"| {name} | {value:,.4f} |" for name, value in metrics.items() if _is_number(value)]
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

| metric | value |
|---|---:|
{chr(10).join(rows)}

![loss and metric against optimizer steps](curves.png)
"""
    path.write_text(card, encoding="utf-8")


def _with_own_variant(config, report: Report) -> tuple[str, str]:
    """How to use and repeat a run: where the variant is not from this package, its module has to be imported first."""
    module = variant_class(config.mask_type).__module__
    if module.partition(".")[0] == variant_class.__module__.partition(".")[0]:
        return report.usage, report.command
    usage = report.usage.replace("import lion_hf\n", f"import lion_hf\nimport {module}\n", 1)
    return usage, report.command.replace("python ", f"python -m lion_hf --import {module} ", 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
