"""Metrics of run_glue.py through `evaluate`, and its files of predictions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import evaluate
import numpy as np
import torch
from torch.nn import functional as F
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from ..errors import UserError, user_errors
from .sources import GlueArguments
from .tasks import CUSTOM, GlueTask


logger = logging.get_logger(__name__)

LOCAL_METRIC = Path(__file__).with_name("offline.py")


def load_metric(task: GlueTask, data: GlueArguments) -> evaluate.EvaluationModule:
    """The Hub's metric where the data is the Hub's too, else the local one; both give the same numbers."""
    local = data.train_file or data.data_dir or data.builtin_data or (task.name == "custom" and not data.dataset_name)
    name = data.metric_name or (str(LOCAL_METRIC) if local else "glue")
    load = partial(evaluate.load, config_name=task.metric_config, keep_in_memory=True)
    try:
        with user_errors(f"cannot load the metric {name!r}", OSError, ImportError, KeyError, ValueError):
            return load(name)
    except UserError as error:
        if data.metric_name or local:
            raise
        logger.warning_once(f"{error}; {LOCAL_METRIC} computes the same numbers")
        return load(str(LOCAL_METRIC))


def predictions_and_losses(logits: torch.Tensor, labels: torch.Tensor | None = None):
    """Per row the class, or the number of a regression, and the loss where the label is known: all that evaluation
    keeps of the logits."""
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    if logits.shape[-1] > 1:
        predictions = logits.argmax(-1)
        return predictions if labels is None else (predictions, F.cross_entropy(logits, labels, reduction="none"))
    predictions = logits[..., 0]
    return predictions if labels is None else (predictions, (predictions - labels) ** 2)


def metrics_by(metric: evaluate.EvaluationModule) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metric's numbers, and the mean loss per row however the rows were batched."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, losses = prediction.predictions
        numbers = metric.compute(predictions=predictions, references=prediction.label_ids)
        return numbers | {"loss": float(losses.astype(np.float64).mean())}

    return compute


def write_predictions(path: Path, task: GlueTask, index: list, predictions: np.ndarray) -> None:
    """A file in the form of GLUE's submissions: names of classes or their numbers, similarities within 0 to 5."""
    if task.name == "stsb":
        values = [f"{value:.3f}" for value in predictions.clip(0, 5)]
    elif not task.labels:
        values = [f"{value:.6g}" for value in predictions]
    elif task.names_in_submission or task.name == CUSTOM.name:
        values = [task.labels[value] for value in predictions]
    else:
        values = [str(value) for value in predictions]
    path.parent.mkdir(exist_ok=True)
    rows = [f"{i}\t{value}" for i, value in zip(index, values, strict=True)]
    path.write_text("\n".join(["index\tprediction", *rows]) + "\n", encoding="utf-8")
