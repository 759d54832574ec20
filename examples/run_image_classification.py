"""Image classification with LION, or a baseline, from scratch or from a checkpoint.

    python examples/run_image_classification.py --output_dir outputs/digits
    python examples/run_image_classification.py --output_dir outputs/fashion --train_file train.parquet \
        --validation_file test.parquet
    python examples/run_image_classification.py examples/recipes/imagenet/lion-s-base-snake.yaml

Without data arguments it trains on scikit-learn's 8 x 8 digits, so it needs no network.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import reporting
from arguments import LionTrainingArguments, ModelArguments, UserError, parse_arguments, run, user_errors
from image_data import AUGMENTATIONS, ImageArguments, collate, load_images, to_pixels
from training import LionTrainer, build_model, check_disk, check_resumable, checkpoint_to_resume, existing_config
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, set_seed
from transformers.trainer_utils import EvalPrediction

from lion_hf import LionVisionConfig


SMALL_MODEL = {
    "mask_type": "decay",
    "order": "s",
    "pos_emb": True,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


@dataclass
class ImageModelArguments(ModelArguments):
    order: str | None = field(default=None, metadata={"help": "Scan: normal, or s (snake along rows and columns)."})
    cls_tok: bool | None = field(default=None, metadata={"help": "Classify from the class token, not the mean."})
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth of the last block."})
    image_size: int | None = field(default=None, metadata={"help": "Images are resized to this side. Default: theirs."})
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a patch. Default: 2, 4 or 16 by image size."}
    )


@dataclass
class ImageTrainingArguments(LionTrainingArguments):
    num_train_epochs: float = field(default=15, metadata={"help": "Epochs."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW; for a base model 5e-4."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})


# ----------------------------------------------------------------------------------------------------------- model


def image_options(model: ImageModelArguments, first_side: int) -> None:
    """Fills in image and patch size where neither a preset, a model nor the flags decide them."""
    if model.model_name_or_path or model.preset:
        return
    if model.patch_size is None:
        side = model.image_size or first_side
        model.patch_size = 2 if side <= 16 else 4 if side <= 64 else 16
    if model.image_size is None:
        model.image_size = max(1, min(224, first_side) // model.patch_size) * model.patch_size


def make_processor(config: LionVisionConfig, model: ImageModelArguments) -> ViTImageProcessorPil:
    """The processor of the model to go on with, or one that resizes, converts to RGB and scales to [-1, 1]."""
    if model.model_name_or_path:
        with user_errors(f"{model.model_name_or_path!r} has no image processor", OSError, ValueError):
            return ViTImageProcessorPil.from_pretrained(model.model_name_or_path)
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    half = [0.5, 0.5, 0.5]
    size = {"height": height, "width": width}
    return ViTImageProcessorPil(size=size, image_mean=half, image_std=half, do_convert_rgb=True)


# ------------------------------------------------------------------------------------------------------------ main


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose most likely class is right (top 1)."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and evaluates; returns the metrics, which are also in `all_results.json`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data, training = parse_arguments(
        (ImageModelArguments, ImageArguments, ImageTrainingArguments), argv, description=__doc__
    )
    if data.augment not in AUGMENTATIONS:
        raise UserError(f"--augment is {data.augment!r}; allowed are {', '.join(AUGMENTATIONS)}")
    if model_args.model_name_or_path:
        existing_config(model_args.model_name_or_path, AutoModelForImageClassification)
    set_seed(training.seed)
    checkpoint = checkpoint_to_resume(training)
    with training.main_process_first(desc="data"):
        train, validation, names, source = load_images(data, training)

    image_options(model_args, train[0]["image"].height)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    labels["problem_type"] = "single_label_classification"
    model = build_model(AutoModelForImageClassification, LionVisionConfig.model_type, model_args, SMALL_MODEL, labels)
    if checkpoint:
        check_resumable(checkpoint, AutoModelForImageClassification, model.config)
    check_disk(training, model)
    processor = make_processor(model.config, model_args)
    if training.process_index == 0:
        print(
            f"{model.num_parameters():,} parameters, {len(train):,} training and {len(validation):,} validation images"
        )
    trainer = LionTrainer(
        model=model,
        args=training,
        train_dataset=train.with_transform(to_pixels(processor, data.augment)),
        eval_dataset=validation.with_transform(to_pixels(processor)),
        processing_class=processor,
        data_collator=collate,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = reporting.train_and_evaluate(trainer, training, checkpoint)
    report = reporting.Report(
        title=f"Image classifier, {reporting.model_name(model.config)}",
        pipeline_tag="image-classification",
        data=source,
        command=reporting.command_line("run_image_classification.py", argv),
        metric="eval_accuracy",
        metric_label="top-1 accuracy (%)",
        loss_label="cross entropy (nats per image)",
        usage="import lion_hf\nfrom transformers import pipeline\n\n"
        f'pipeline("image-classification", "{training.output_dir}")("image.png")',
    )
    reporting.finish(trainer, training, metrics, report)
    return metrics


if __name__ == "__main__":
    run(main)
