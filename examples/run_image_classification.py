"""Train LION, or a baseline, to classify images, from scratch or from a checkpoint.

    python examples/run_image_classification.py --output_dir outputs/digits
    python examples/run_image_classification.py --output_dir outputs/fashion --train_file train.parquet \
        --validation_file test.parquet
    python examples/run_image_classification.py examples/recipes/imagenet/lion.yaml \
        --preset lion-s-base-patch16-224-snake

Without data arguments, the script trains on scikit-learn's 8 x 8 digits and needs no network.
"""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import torch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, set_seed
from transformers.trainer_utils import EvalPrediction, SchedulerType

from lion_hf.training.arguments import LionTrainingArguments
from lion_hf.training.augmentation import AugmentationArguments
from lion_hf.training.checkpoints import check_disk, check_resumable, checkpoint_to_resume
from lion_hf.training.distillation import DistillationArguments, Teacher
from lion_hf.training.ema import Ema
from lion_hf.training.errors import UserError, run
from lion_hf.training.hidden_teacher import HiddenStateTeacher
from lion_hf.training.image_models import ImageModelArguments, check_model, get_model, image_options, make_processor
from lion_hf.training.image_trainer import ImageTrainer
from lion_hf.training.images import (
    ImageArguments,
    ImageCollator,
    first_image,
    load_images,
    load_test_images,
    most_frequent_class,
    try_images,
)
from lion_hf.training.models import require_head
from lion_hf.training.parsing import parse_arguments
from lion_hf.training.reports import (
    Report,
    command_line,
    finish,
    model_name,
    train_and_evaluate,
    write_predictions,
)


# The values that --smoke sets in any recipe.
SMOKE = {
    "dataset_name": None,
    "model_name_or_path": None,
    "warm_start": None,
    "warm_start_layers": None,
    "warm_start_distillation": None,
    "teacher": None,
    "train_file": None,
    "validation_file": None,
    "train_dir": None,
    "validation_dir": None,
    "test_file": None,
    "test_dir": None,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_train_samples": 40,
    "max_eval_samples": 20,
    "per_device_train_batch_size": 8,
    "total_batch_size": 16,
    "dataloader_num_workers": 0,
}


@dataclass
class ImageTrainingArguments(LionTrainingArguments):
    num_train_epochs: float = field(default=15, metadata={"help": "Epochs."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of AdamW. Default: 5e-4 * 768 / width (5e-4 for a base model), at most 3e-3."
        },
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    lr_scheduler_type: SchedulerType = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per optimizer step on all devices; sets --gradient_accumulation_steps."},
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay per step of a moving average of the weights; 0 keeps none (DeiT: 0.99996)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; it must be at least 0 (no average) and less than 1")
        if self.total_batch_size is not None:
            at_once = self.train_batch_size * self.world_size
            if self.total_batch_size < 1 or self.total_batch_size % at_once:
                raise ValueError(
                    f"--total_batch_size is {self.total_batch_size}; it must be a multiple of {at_once}, the batch "
                    "size per device times the number of devices"
                )
            self.gradient_accumulation_steps = self.total_batch_size // at_once


# --------------------------------------------------------------------------------------------------------- metrics


def scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what evaluation needs of each image: top-1 hit, top-5 hit and loss."""
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
    return hits[:, 0], hits.any(1), F.cross_entropy(logits, labels, reduction="none")


def image_metrics(prediction: EvalPrediction, classes: int) -> dict[str, float]:
    """Return the metrics over all images that decode, independent of the batches."""
    (first, first_five, losses), counted = prediction.predictions, prediction.label_ids != -100
    if not counted.any():
        raise UserError("none of the validation images can be decoded")
    metrics = {"accuracy": first, "loss": losses.astype("float64")} | (
        {"top5_accuracy": first_five} if classes > 5 else {}
    )
    return {name: float(values[counted].mean()) for name, values in metrics.items()}


@contextmanager
def one_line_errors():
    """Reduce an error of a data loader's worker process to its last line, without the traceback."""
    try:
        yield
    except UserError as error:
        name = f"{UserError.__module__}.{UserError.__name__}: "
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(name)) from error


# ------------------------------------------------------------------------------------------------------------ main

CLASSES = (
    ImageModelArguments,
    ImageArguments,
    AugmentationArguments,
    DistillationArguments,
    ImageTrainingArguments,
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train and evaluate; return the metrics, which are also in `all_results.json`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data, augmentation, distillation, training = parse_arguments(
        CLASSES, argv, description=__doc__, smoke=SMOKE
    )
    config = check_model(model_args)
    if not training.do_train:
        require_head(config, AutoModelForImageClassification, model_args.model_name_or_path)
    if training.learning_rate is None:
        training.learning_rate = min(3e-3, 5e-4 * 768 / config.hidden_size)
    set_seed(training.seed)
    checkpoint = checkpoint_to_resume(training)
    with training.main_process_first(desc="data"):
        train, validation, names, source = load_images(data, training, None if training.do_train else config)
        test, files = load_test_images(data)
        if train is not None:
            image_options(model_args, first_image(train, data.image_column).height)
        if data.bad_images != "skip":
            try_parts(training=train, validation=validation)

    model = get_model(model_args, label_options(names))
    if checkpoint:
        check_resumable(checkpoint, AutoModelForImageClassification, model.config)
    check_disk(training, model, copies=2 if training.ema_decay else 1)
    processor = make_processor(model.config, model_args, data)
    bad_images, parts = data.bad_images or "skip", {"training": train, "validation": validation, "test": test}
    collator = ImageCollator(processor, augmentation, len(names), training.seed, bad_images, **parts)
    teacher = (
        Teacher(distillation, model.config, processor, collator.size, training.device) if distillation.teacher else None
    )
    if training.process_index == 0:
        counts = [f"{len(part):,} {name}" for name, part in parts.items() if part is not None]
        batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
        steps = f", {batch} per optimizer step, learning rate {training.learning_rate:g}" if training.do_train else ""
        print(f"{model.num_parameters():,} parameters, {' and '.join(counts)} images{steps}")
    trainer = ImageTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        data_collator=collator,
        compute_metrics=partial(image_metrics, classes=len(names)),
        preprocess_logits_for_metrics=scores,
        repeats=augmentation.repeated_augmentation,
        teacher=teacher,
        hidden_teacher=HiddenStateTeacher.of(model_args, training.device),
        ema=Ema(training.ema_decay, checkpoint) if training.ema_decay else None,
    )
    with one_line_errors():
        metrics = train_and_evaluate(trainer, training, checkpoint, partial(skipped_images, trainer, data.bad_images))
        if test is not None:
            predict(trainer, test, files, names)
    if training.do_train:
        baseline = most_frequent_class(train, validation, len(names))
        name = data.name("scikit-learn's digits")
        finish(trainer, training, metrics, card(name, source, baseline, len(validation), model, training, argv))
    return metrics


def try_parts(**parts) -> None:
    for name, part in parts.items():
        if part is not None:
            try_images(part, name)


def predict(trainer: ImageTrainer, test, files: list[str], names: list[str]) -> None:
    """Write the class and the probabilities of every image to predictions.csv.

    They are empty for an image that cannot be decoded.
    """
    predictions = trainer.predictions(test, probabilities)
    bad = trainer.accelerator.reduce(trainer.data_collator.bad["test"].int().to(trainer.args.device)).bool()
    if trainer.is_world_process_zero():
        predictions[bad.cpu().numpy()[: len(test)]] = float("nan")
        path = Path(trainer.args.output_dir) / "predictions.csv"
        write_predictions(path, {"file": files}, names, predictions)
        unread = f"; {int(bad.sum())} cannot be decoded" if bad.any() else ""
        print(f"Predictions for {len(test):,} images are in {path}{unread}")


def probabilities(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return the probabilities of the classes, (images, classes)."""
    return (logits[0] if isinstance(logits, tuple) else logits).float().softmax(-1)


def label_options(names: list[str]) -> dict[str, Any]:
    """Return the configuration values that describe the classes."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return labels | {"num_labels": len(names), "problem_type": "single_label_classification"}


def skipped_images(trainer: ImageTrainer, bad_images: str | None, evaluation: dict[str, float]) -> dict[str, float]:
    """Return, and print, the numbers of images that could not be decoded.

    All processes are counted, since the start or the last resume. Without such images, the numbers are returned only
    with `--bad_images skip`.
    """
    bad, device = trainer.data_collator.bad, trainer.args.device
    marks = {name: trainer.accelerator.reduce(part.int().to(device)) for name, part in bad.items() if name != "test"}
    counts = {name: int(mark.count_nonzero()) for name, mark in marks.items()}
    if any(counts.values()) and trainer.is_world_process_zero():
        shown = " and ".join(f"{count:,} {name}" for name, count in counts.items())
        print(f"Skipped images that cannot be decoded: {shown}")
    if bad_images != "skip" and not any(counts.values()):
        return {}
    return {f"skipped_{name}_images": count for name, count in counts.items()}


def card(
    name: str,
    source: str,
    baseline: tuple[float, float],
    rows: int,
    model,
    training: ImageTrainingArguments,
    argv: Sequence[str],
) -> Report:
    return Report(
        title=f"Image classifier of {name}, {model_name(model.config)}",
        pipeline_tag="image-classification",
        data=source,
        command=command_line("run_image_classification.py", argv),
        metric="eval_accuracy",
        metric_label="top-1 accuracy (%)",
        metric_baseline=("most frequent class", baseline[0]),
        metric_error=0.5 * rows**-0.5,
        loss_label="cross entropy (nats per image)",
        loss_baseline=("class frequencies", baseline[1]),
        usage="import lion_hf\nfrom transformers import pipeline\n\n"
        f'print(pipeline("image-classification", "{training.output_dir}")("image.png"))',
    )


if __name__ == "__main__":
    run(main)
