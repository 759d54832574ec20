"""Images of the example scripts: where they come from, their classes, and how they become pixels."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from arguments import DataArguments, UserError, require_path
from data_loading import hold_out, load_file, load_splits, reading, require_column
from datasets import Dataset
from transformers import TrainingArguments, ViTImageProcessorPil


AUGMENTATIONS = ("none", "shift", "flip", "shift+flip")


@dataclass
class ImageArguments(DataArguments):
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    augment: str = field(
        default="none", metadata={"help": "Random changes in training: none, shift, flip, shift+flip."}
    )


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
    return hold_out(train, test, data, seed)


def load_folder(path: str) -> Dataset:
    """A folder with one folder of images per class."""
    require_path(path, "image folder")
    with reading(f"cannot read {path!r}"):
        return datasets.load_dataset("imagefolder", data_dir=path, split="train")


def load_images(data: ImageArguments, training: TrainingArguments) -> tuple[Dataset, Dataset, list[str], str]:
    """Training and validation images and labels, the names of the classes, and a sentence about the source."""
    if data.train_dir:
        if data.train_file or data.dataset_name:
            raise UserError("give only one of --train_dir, --train_file and --dataset_name")
        held_out = load_folder(data.validation_dir) if data.validation_dir else None
        train, validation = hold_out(load_folder(data.train_dir), held_out, data, training.seed)
        source = f"`{data.train_dir}`"
    elif data.dataset_name or data.train_file or data.validation_file:
        train, validation = load_splits(data, training, load_file)
        source = f"`{data.dataset_name or data.train_file}`"
    else:
        train, validation = load_digits(data, training.seed)
        source = "Digits of scikit-learn (8 x 8 pixels; a fifth of every class held out)"
    for part in (train, validation):
        require_column(part, data.image_column, "--image_column")
        require_column(part, data.label_column, "--label_column")
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
    with reading(f"column {data.image_column!r} holds no images"):
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
