"""Metrics of run_glue.py, computed by `evaluate`, and its prediction files."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import evaluate
import numpy as np
import torch
from torch.nn import functional as F
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from ..errors import UserError, user_errors
from .sources import GlueArguments
from .tasks import GlueTask


logger = logging.get_logger(__name__)

LOCAL_METRIC = Path(__file__).with_name("offline.py")


def load_metric(task: GlueTask, data: GlueArguments) -> evaluate.EvaluationModule:
    """Load the Hub's metric if the data is from the Hub, else the local one; both compute the same numbers."""
    local = data.train_file or data.data_dir or data.builtin_data or (task.name == "custom" and not data.dataset_name)
    name = data.metric_name or (str(LOCAL_METRIC) if local else "glue")
    load = partial(evaluate.load, config_name=task.metric_config, keep_in_memory=True)
    try:
        with user_errors(f"cannot load the metric {name!r}", OSError, ImportError, KeyError, ValueError):
            return load(name)
    except UserError as error:
        if data.metric_name or local:
            raise
        logger.warning_once(f"{error}; using {LOCAL_METRIC} instead, which computes the same numbers")
        return load(str(LOCAL_METRIC))


def predictions_and_losses(logits: torch.Tensor, labels: torch.Tensor):
    """Return the class or number and the loss of each row, which is all that evaluation keeps of the logits."""
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    if logits.shape[-1] > 1:
        return logits.argmax(-1), F.cross_entropy(logits, labels, reduction="none")
    predictions = logits[..., 0]
    return predictions, (predictions - labels) ** 2


def metrics_by(metric: evaluate.EvaluationModule) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function that computes the metric, and the mean loss per row independently of the batches."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, losses = prediction.predictions
        numbers = metric.compute(predictions=predictions, references=prediction.label_ids)
        return numbers | {"loss": float(losses.astype(np.float64).mean())}

    return compute


class Baseline(NamedTuple):
    """Scores of a constant prediction, which does not read the texts."""

    name: str
    metric: float
    score: float  # mean of the metrics of the task's score; `metric` is the first of them
    loss: float
    error: float  # about one standard error of the metric


def constant_baseline(
    metric: evaluate.EvaluationModule, task: GlueTask, train: Sequence[float], labels: Sequence[float]
) -> Baseline:
    """Return metric and loss of predicting the most frequent class, or the mean, of the training labels.

    The correlation of a constant is undefined and counts as 0.
    """
    train, labels, count = np.asarray(train), np.asarray(labels), len(labels)
    if not task.labels:
        loss = float(((labels - train.mean()) ** 2).mean())
        return Baseline("mean of the training labels", 0.0, 0.0, loss, count**-0.5)
    shares = (np.bincount(train, minlength=len(task.labels)) + 1) / (len(train) + len(task.labels))
    guesses = np.full(count, shares.argmax())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = metric.compute(predictions=guesses, references=labels)
    reached = [float(np.nan_to_num(numbers[name])) for name in task.score]
    error = 0.5 * count**-0.5 if reached[0] else count**-0.5
    loss = float(-np.log(shares)[labels].mean())
    return Baseline("most frequent class", reached[0], float(np.mean(reached)), loss, error)


# ----------------------------------------------------------------------------------------------------- predictions


def probabilities(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return probabilities (rows, classes), or the numbers of a regression (rows, 1)."""
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    return logits.softmax(-1) if logits.shape[-1] > 1 else logits


def write_submission(path: Path, task: GlueTask, index: list, predictions: np.ndarray) -> None:
    """Write a file in GLUE's submission format: names or numbers of classes, or similarities clipped to 0 to 5.

    Args:
        path: the file.
        task: the task.
        index: number of each row.
        predictions: see `probabilities`.
    """
    if not task.labels:
        values = [f"{value:.3f}" for value in predictions[:, 0].clip(0, 5)]
    elif task.names_in_submission:
        values = [task.labels[value] for value in predictions.argmax(-1)]
    else:
        values = [str(value) for value in predictions.argmax(-1)]
    path.parent.mkdir(exist_ok=True)
    rows = [f"{i}\t{value}" for i, value in zip(index, values, strict=True)]
    path.write_text("\n".join(["index\tprediction", *rows]) + "\n", encoding="utf-8")
