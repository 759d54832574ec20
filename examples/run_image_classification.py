"""Image classification with LION, or a baseline, from scratch or from a checkpoint.

    python examples/run_image_classification.py --output_dir outputs/digits
    python examples/run_image_classification.py --output_dir outputs/fashion --train_file train.parquet \
        --validation_file test.parquet
    python examples/run_image_classification.py examples/recipes/imagenet/lion-s-base-snake.yaml

Without data arguments it trains on scikit-learn's 8 x 8 digits, so it needs no network.
"""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from lion_hf.training import reports
import torch
from lion_hf.training.arguments import LionTrainingArguments, UserError, parse_arguments, run
from lion_hf.training.distillation import DistillationArguments, Teacher
from lion_hf.training.ema import Ema
from lion_hf.training.hidden_teacher import HiddenStateTeacher
from lion_hf.training.augmentation import AugmentationArguments
from lion_hf.training.images import ImageArguments, ImageCollator, first_image, load_images
from lion_hf.training.image_models import ImageModelArguments, check_model, get_model, image_options, make_processor
from torch.nn import functional as F
from lion_hf.training.trainer import LionTrainer, check_disk, check_resumable, checkpoint_to_resume
from transformers import AutoModelForImageClassification, set_seed
from transformers.trainer_utils import EvalPrediction, SchedulerType


# What --smoke makes of any recipe.
SMOKE = {
    "dataset_name": None,
    "model_name_or_path": None,
    "warm_start": None,
    "warm_start_distillation": None,
    "teacher": None,
    "train_file": None,
    "validation_file": None,
    "train_dir": None,
    "validation_dir": None,
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
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW; for a base model 5e-4."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    lr_scheduler_type: SchedulerType = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per optimizer step on all devices; sets --gradient_accumulation_steps accordingly."},
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Also keep an average of the weights, of which so much stays at each step (DeiT: 0.99996)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; allowed is 0 (no average) to less than 1")
        if self.total_batch_size is not None:
            at_once = self.train_batch_size * self.world_size
            if self.total_batch_size < 1 or self.total_batch_size % at_once:
                raise ValueError(
                    f"--total_batch_size is {self.total_batch_size}; it must be a multiple of {at_once}, the batch size "
                    "per device times the number of devices"
                )
            self.gradient_accumulation_steps = self.total_batch_size // at_once


# --------------------------------------------------------------------------------------------- training and metrics


class ImageTrainer(LionTrainer):
    """Trainer with soft targets, a teacher, and an average of the weights that is saved and evaluated too.

    Args:
        teacher: see `Teacher`.
        ema: see `Ema`.
        kwargs: as for `LionTrainer`.
    """

    def __init__(self, *args, teacher: Teacher | None = None, ema: Ema | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.ema = teacher, ema
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by num_items_in_batch, whatever the model
        if ema is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UserError("--ema_decay needs whole weights on every device; FSDP and DeepSpeed shard them")
            self.add_callback(ema)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross entropy with the classes or the mixed "soft_labels", and the teacher's part; images labelled -100 count
        nothing. In training a sum over the batch divided by the number of images in an optimizer step."""
        labels = inputs["labels"]
        taught = self.hidden_teacher is not None and model.training
        outputs = model(pixel_values=inputs["pixel_values"], output_hidden_states=taught)
        logits = outputs.logits.float()
        if not model.training:
            loss = F.cross_entropy(logits, labels)
            return (loss, outputs) if return_outputs else loss
        targets, smoothing = inputs.get("soft_labels", labels), self.args.label_smoothing_factor
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        if self.teacher is not None:
            with self.accelerator.autocast():
                seen = self.teacher.logits(inputs["pixel_values"])
            losses = self.teacher.losses(losses, logits, seen)
        counted = labels != -100
        images = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = (losses * counted).sum() / images.to(losses.device).clamp(min=1)
        if taught:
            loss = loss + self.hidden_teacher.loss(outputs.hidden_states, inputs, num_items_in_batch)
        loss = self.summed_over_devices(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.ema is not None and self.ema.average is not None:
            with self.ema.in_place_of(self.model):
                metrics |= super().evaluate(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
        return metrics

    def restore(self, checkpoint: str) -> None:
        super().restore(checkpoint)
        if self.ema is not None:
            self.ema.on_train_begin(self.args, self.state, self.control, self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and its average in the subfolder "ema"; in checkpoints too, before the file that completes them."""
        super().save_model(output_dir, _internal_call)
        if self.ema is not None and self.ema.average is not None and self.args.should_save:
            self.ema.save(output_dir or self.args.output_dir, self.processing_class)


def scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Per image, whether its class is the first and among the first five, and its loss: all that evaluation keeps."""
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
    return hits[:, 0], hits.any(1), F.cross_entropy(logits, labels, reduction="none")


def image_metrics(prediction: EvalPrediction, classes: int) -> dict[str, float]:
    """Means over the images that decode, however they were batched."""
    (first, first_five, losses), counted = prediction.predictions, prediction.label_ids != -100
    if not counted.any():
        raise UserError("no validation image decodes")
    metrics = {"accuracy": first, "loss": losses.astype("float64")} | (
        {"top5_accuracy": first_five} if classes > 5 else {}
    )
    return {name: float(values[counted].mean()) for name, values in metrics.items()}


@contextmanager
def one_line_errors():
    """An error of a loader's worker process comes with its traceback; only its last line is for the user."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("arguments.UserError: ")) from error


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and evaluates; returns the metrics, which are also in `all_results.json`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    classes = (
        ImageModelArguments,
        ImageArguments,
        AugmentationArguments,
        DistillationArguments,
        ImageTrainingArguments,
    )
    model_args, data, augmentation, distillation, training = parse_arguments(
        classes, argv, description=__doc__, smoke=SMOKE
    )
    config = check_model(model_args)
    set_seed(training.seed)
    checkpoint = checkpoint_to_resume(training)
    with training.main_process_first(desc="data"):
        train, validation, names, source = load_images(data, training, None if training.do_train else config)

    image_options(model_args, first_image(train, data.image_column).height)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    labels |= {"num_labels": len(names), "problem_type": "single_label_classification"}
    model = get_model(model_args, labels)
    if checkpoint:
        check_resumable(checkpoint, AutoModelForImageClassification, model.config)
    check_disk(training, model, copies=2 if training.ema_decay else 1)
    processor = make_processor(model.config, model_args, data)
    collator = ImageCollator(
        processor, augmentation, len(names), training.seed, data.bad_images, training=train, validation=validation
    )
    teacher = (
        Teacher(distillation, model.config, processor, collator.size, training.device) if distillation.teacher else None
    )
    if training.process_index == 0:
        batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
        print(
            f"{model.num_parameters():,} parameters, {len(train):,} training and {len(validation):,} validation images, "
            f"{batch} per optimizer step"
        )
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

    def skipped(evaluation: dict[str, float]) -> dict[str, float]:
        """Images that did not decode, of those that all processes read since the start or the last resume."""
        if data.bad_images == "error":
            return {}
        marks = {name: trainer.accelerator.reduce(bad.int().to(training.device)) for name, bad in collator.bad.items()}
        return {f"skipped_{name}_images": int(mark.count_nonzero()) for name, mark in marks.items()}

    with one_line_errors():
        metrics = reporting.train_and_evaluate(trainer, training, checkpoint, skipped)
    report = reporting.Report(
        title=f"Image classifier, {reporting.model_name(model.config)}",
        pipeline_tag="image-classification",
        data=source,
        command=reporting.command_line("run_image_classification.py", argv),
        metric="eval_accuracy",
        metric_label="top-1 accuracy (%)",
        loss_label="cross entropy (nats per image)",
        usage="import lion_hf\nfrom transformers import pipeline\n\n"
        f'print(pipeline("image-classification", "{training.output_dir}")("image.png"))',
    )
    reporting.finish(trainer, training, metrics, report)
    return metrics


if __name__ == "__main__":
    run(main)
