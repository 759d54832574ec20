"""Image classification with LION, from scratch or from a checkpoint.

    python examples/run_image_classification.py --output_dir outputs/digits
    python examples/run_image_classification.py --output_dir outputs/fashion --train_file train.parquet \
        --validation_file test.parquet
    python examples/run_image_classification.py arguments.yaml --learning_rate 5e-4

Without data arguments it trains on scikit-learn's 8 x 8 digits, so it needs no network.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import common
import datasets
import numpy as np
import reporting
import torch
from common import UserError
from datasets import Dataset
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, set_seed
from transformers.trainer_utils import EvalPrediction

from lion_hf import LionVisionConfig


AUGMENTATIONS = ("none", "shift", "flip", "shift+flip")
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
class ImageModelArguments(common.ModelArguments):
    order: str | None = field(default=None, metadata={"help": "Scan: normal, or s (snake along rows and columns)."})
    cls_tok: bool | None = field(default=None, metadata={"help": "Classify from the class token, not the mean."})
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth of the last block."})
    image_size: int | None = field(default=None, metadata={"help": "Images are resized to this side. Default: theirs."})
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a patch. Default: 2, 4 or 16 by image size."}
    )


@dataclass
class ImageArguments(common.DataArguments):
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    augment: str = field(
        default="none", metadata={"help": "Random changes in training: none, shift, flip, shift+flip."}
    )


@dataclass
class ImageTrainingArguments(common.LionTrainingArguments):
    num_train_epochs: float = field(default=15, metadata={"help": "Epochs."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW; for a base model 5e-4."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: images are read on the fly."})


# ------------------------------------------------------------------------------------------------------------ data


def load_digits(data: ImageArguments, seed: int) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; a fifth of every class is held out for the test."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(
        {data.image_column: datasets.Image(), data.label_column: datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    parts = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    train, test = (
        Dataset.from_dict({data.image_column: list(images[i]), data.label_column: digits.target[i]}, features=features)
        for i in parts
    )
    return common.hold_out(train, test, data, seed)


def load_folder(path: str) -> Dataset:
    """A folder with one folder of images per class."""
    common.require_path(path, "image folder")
    with common.reading(f"cannot read {path!r}"):
        return datasets.load_dataset("imagefolder", data_dir=path, split="train")


def load_images(data: ImageArguments, training: ImageTrainingArguments) -> tuple[Dataset, Dataset, list[str], str]:
    """Training and validation images and labels, the names of the classes, and a sentence about the source."""
    if data.train_dir:
        if data.train_file or data.dataset_name:
            raise UserError("give only one of --train_dir, --train_file and --dataset_name")
        held_out = load_folder(data.validation_dir) if data.validation_dir else None
        train, validation = common.hold_out(load_folder(data.train_dir), held_out, data, training.seed)
        source = f"`{data.train_dir}`"
    elif data.dataset_name or data.train_file or data.validation_file:
        train, validation = common.load_splits(data, training, common.load_file)
        source = f"`{data.dataset_name or data.train_file}`"
    else:
        train, validation = load_digits(data, training.seed)
        source = "Digits of scikit-learn (8 x 8 pixels; a fifth of every class held out)"
    for part in (train, validation):
        common.require_column(part, data.image_column, "--image_column")
        common.require_column(part, data.label_column, "--label_column")
    names = class_names(train, data.label_column)
    train, validation = (with_labels(part, data, names) for part in (train, validation))
    source += f": {len(train):,} training and {len(validation):,} validation images, {len(names)} classes."
    return train, validation, names, source


def class_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes: those the data set declares, or the sorted values of the training labels."""
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    values = set(train[column])
    if not all(isinstance(value, (str, int)) for value in values):
        raise UserError(f"column {column!r} holds {feature}, not classes: text or whole numbers are needed")
    return [str(value) for value in sorted(values)]


def with_labels(part: Dataset, data: ImageArguments, names: list[str]) -> Dataset:
    """Only the columns image and label, the images decoded and the labels numbered by `names`."""
    feature = part.features[data.label_column]
    values = part[data.label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.int2str(value) if value >= 0 else value for value in values]
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted({str(value) for value in values} - set(number))
    if unknown:
        raise UserError(f"label {unknown[0]!r} in column {data.label_column!r} is not among the training classes")
    with common.reading(f"column {data.image_column!r} holds no images"):
        images = part.select_columns(data.image_column).cast_column(data.image_column, datasets.Image())
        images = images.rename_columns({} if data.image_column == "image" else {data.image_column: "image"})
        images[0]["image"].size  # noqa: B018  (a column of something else fails here)
    return images.add_column("label", [number[str(value)] for value in values])


def augment(pixels: torch.Tensor, kind: str, padding: torch.Tensor) -> torch.Tensor:
    """Shifts each image by up to an eighth of its side and mirrors every second one, as far as `kind` says."""
    if "flip" in kind:
        pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
    if "shift" in kind:
        side = pixels.shape[-1]
        reach = max(1, side // 8)
        canvas = padding.expand(len(pixels), -1, side + 2 * reach, side + 2 * reach).clone()
        canvas[:, :, reach:-reach, reach:-reach] = pixels
        corners = torch.randint(0, 2 * reach + 1, (len(pixels), 2)).tolist()
        pixels = torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in zip(canvas, corners, strict=True)])
    return pixels


def to_pixels(processor: ViTImageProcessorPil, kind: str = "none") -> Callable[[dict[str, list]], dict[str, Any]]:
    """Reads a batch of rows: images through the processor, augmented, and their labels."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (processor.image_mean, processor.image_std))

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": augment(pixels, kind, -mean / std), "labels": rows["label"]}

    return transform


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks images and labels."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


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
        with common.user_errors(f"{model.model_name_or_path!r} has no image processor", OSError, ValueError):
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
    model_args, data, training = common.parse_arguments(
        (ImageModelArguments, ImageArguments, ImageTrainingArguments), argv, description=__doc__
    )
    if data.augment not in AUGMENTATIONS:
        raise UserError(f"--augment is {data.augment!r}; allowed are {', '.join(AUGMENTATIONS)}")
    if model_args.model_name_or_path:
        common.existing_config(model_args.model_name_or_path, LionVisionConfig.model_type)
    set_seed(training.seed)
    checkpoint = common.checkpoint_to_resume(training)
    with training.main_process_first(desc="data"):
        train, validation, names, source = load_images(data, training)

    image_options(model_args, train[0]["image"].height)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    labels["problem_type"] = "single_label_classification"
    model = common.build_model(AutoModelForImageClassification, LionVisionConfig, model_args, SMALL_MODEL, labels)
    if checkpoint:
        common.check_resumable(checkpoint, model.config)
    processor = make_processor(model.config, model_args)
    if training.process_index == 0:
        print(
            f"{model.num_parameters():,} parameters, {len(train):,} training and {len(validation):,} validation images"
        )
    trainer = common.LionTrainer(
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
        title=f"Image classifier, LION {model.config.mask_type}",
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
    common.run(main)
