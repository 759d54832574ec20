"""Images: where they come from, their classes, and how they become pixels."""

from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import logging

from .arguments import DataArguments
from .augmentation import AugmentationArguments, batch_numbers, deit_augmentation, mix, seeded, shift_and_flip
from .data import (
    classes_of_model,
    hold_out,
    load_file,
    load_splits,
    random_numbers,
    reading,
    require_column,
)
from .errors import UserError, require_path


logger = logging.get_logger(__name__)

# Short names of data sets on the Hub: the full name, the column with the images and the one with the classes.
KNOWN = {
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label"),
}


@dataclass
class ImageArguments(DataArguments):
    dataset_name: str | None = field(
        default=None, metadata={"help": f"Name of a data set on the Hub; short names: {', '.join(KNOWN)}."}
    )
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    bad_images: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Images that do not decode: stop, or skip and count them."}
    )
    eval_crop_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Evaluation resizes the shorter side to image_size over this and crops the centre; 1 resizes to "
            "the square. Default: as the model to go on with, else 1. DeiT: 0.875."
        },
    )
    interpolation: Literal["bilinear", "bicubic"] | None = field(
        default=None, metadata={"help": "Of resizing. Default: as the model to go on with, else bilinear."}
    )
    normalization: Literal["half", "imagenet"] | None = field(
        default=None,
        metadata={"help": "half scales to [-1, 1]. Default: as the model to go on with, else half."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_crop_ratio is not None and not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(f"--eval_crop_ratio is {self.eval_crop_ratio}; allowed is more than 0 and at most 1")
        if self.dataset_name in KNOWN:
            self.dataset_name, image, label = KNOWN[self.dataset_name]
            self.image_column = image if self.image_column == "image" else self.image_column
            self.label_column = label if self.label_column == "label" else self.label_column


# --------------------------------------------------------------------------------------------------------- sources


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
    if not require_path(path, "image folder").is_dir():
        raise UserError(f"{path!r} is a file; image folders hold a folder per class")
    with reading(f"cannot read {path!r}"):
        images = datasets.load_dataset("imagefolder", data_dir=path, split="train")
    if "label" not in images.column_names:
        raise UserError(f"{path!r} has no classes: it must hold a folder of images for each, two or more")
    return numbered(images)


def numbered(rows: Dataset) -> Dataset:
    """The rows with their numbers, which messages name however the rows are shuffled and split later."""
    return rows if "source_row" in rows.column_names else rows.add_column("source_row", list(range(len(rows))))


def load_images(
    data: ImageArguments, training: TrainingArguments, evaluated: PreTrainedConfig | None = None
) -> tuple[Dataset, Dataset, list[str], str]:
    """Training and validation images and labels, the names of the classes (those of the model that is only evaluated,
    if any), and a sentence about the source."""
    if data.validation_dir and not data.train_dir:
        raise UserError("--validation_dir needs --train_dir too")
    if data.train_dir:
        if data.train_file or data.validation_file or data.dataset_name:
            raise UserError("--train_dir, --train_file and --dataset_name are three kinds of data; give one")
        held_out = load_folder(data.validation_dir) if data.validation_dir else None
        train, validation = hold_out(load_folder(data.train_dir), held_out, data, training.seed)
        source = f"`{data.train_dir}`"
    elif data.dataset_name or data.train_file or data.validation_file:
        train, validation = load_splits(data, training, lambda path: numbered(load_file(path)))
        source = f"`{data.dataset_name or data.train_file}`"
    else:
        train, validation = load_digits(data, training.seed)
        source = "Digits of scikit-learn (8 x 8 pixels; a fifth of every class held out)"
    for part in (train, validation):
        shown = part.remove_columns([name for name in ("source_row",) if name in part.column_names])
        require_column(shown, data.image_column, "--image_column")
        require_column(shown, data.label_column, "--label_column")
    names = class_names(train, data.label_column)
    if evaluated is not None:
        names = classes_of_model(evaluated, names)
    train, validation = (with_labels(part, data, names) for part in (train, validation))
    source += f": {len(train):,} training and {len(validation):,} validation images, {len(names)} classes."
    return train, validation, names, source


def class_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes: those the data set declares, or the sorted values of the training labels."""
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    values = set(train[column])
    if None in values:
        raise UserError(f"column {column!r} has rows without a label; leave them out")
    if not all(isinstance(value, (str, int)) for value in values):
        raise UserError(f"column {column!r} holds {feature}, not classes: text or whole numbers are needed")
    if len(values) == 1:
        raise UserError(f"column {column!r} has the same value {values.pop()!r} in every row: nothing to tell apart")
    return [str(value) for value in sorted(values)]


def with_labels(part: Dataset, data: ImageArguments, names: list[str]) -> Dataset:
    """Image (not decoded yet), label (numbered by `names`) and number of the row."""
    part = numbered(part)
    feature = part.features[data.label_column]
    values = part[data.label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.int2str(value) if value >= 0 else value for value in values]
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted({str(value) for value in values} - set(number))
    if unknown:
        raise UserError(f"label {unknown[0]!r} in column {data.label_column!r} is not among the training classes")
    with reading(f"column {data.image_column!r} holds no images"):
        images = part.select_columns([data.image_column, "source_row"])
        images = images.cast_column(data.image_column, datasets.Image(decode=False))
    images = images.rename_columns({} if data.image_column == "image" else {data.image_column: "image"})
    return images.add_column("label", [number[str(value)] for value in values])


# ---------------------------------------------------------------------------------------------------------- pixels


def decode(image: dict[str, Any]) -> Image.Image:
    """The RGB image in a row. Pillow's decoders raise errors of many kinds."""
    return datasets.Image().decode_example(image).convert("RGB")


def first_image(part: Dataset, column: str) -> Image.Image:
    """The first image that decodes, of the first 16."""
    for row in part.select(range(min(16, len(part)))):
        try:
            return decode(row["image"])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    raise UserError(f"column {column!r} holds no images ({reason})")


def target_size(processor) -> tuple[int, int]:
    """Height and width of what the processor returns."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    return (size.height, size.width) if size.height else (size.shortest_edge,) * 2


class ImageCollator:
    """Rows to pixels and labels. Those with a "key" are for training: changed at random, and mixed if asked for (then
    with "soft_labels", probabilities of the classes). The others go through the processor alone.

    An image that does not decode is an error, or it is left out of a training batch; where it must keep its place (in
    evaluation, or as the only one of a batch), it is black and its label is -100, which counts nowhere.
    """

    uses_keys = True

    def __init__(
        self,
        processor,
        augmentation: AugmentationArguments,
        classes: int,
        seed: int,
        bad_images: str,
        **parts: Dataset,
    ):
        self.processor, self.augmentation, self.classes = processor, augmentation, classes
        self.seed, self.bad_images = seed, bad_images
        self.size = target_size(processor)
        self.recipe = deit_augmentation(augmentation, processor, self.size) if augmentation.augment == "deit" else None
        # One mark per row, which the workers of a loader share.
        lengths = {name: 1 + max(part["source_row"][:]) for name, part in parts.items()}
        self.bad = {name: torch.zeros(n, dtype=torch.bool).share_memory_() for name, n in lengths.items()}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        training = "key" in rows[0]
        images = [self.open(row, "training" if training else "validation") for row in rows]
        if training and any(images):
            rows = [row for row, image in zip(rows, images, strict=True) if image]
            images = [image for image in images if image]
        labels = torch.tensor([row["label"] if image else -100 for row, image in zip(rows, images, strict=True)])
        images = [image or Image.new("RGB", self.size[::-1]) for image in images]
        if not training:
            return {"pixel_values": self.process(images), "labels": labels}
        keys = [row["key"] for row in rows]
        pixels = self.augment(images, keys)
        if not (self.augmentation.mixup or self.augmentation.cutmix):
            return {"pixel_values": pixels, "labels": labels}
        targets = F.one_hot(labels.clamp(min=0), self.classes).float()
        pixels, targets = mix(pixels, targets, self.augmentation, batch_numbers(self.seed, keys))
        return {"pixel_values": pixels, "labels": labels, "soft_labels": targets}

    def open(self, row: dict[str, Any], part: str) -> Image.Image | None:
        try:
            return decode(row["image"])
        except Exception as error:
            path = (row["image"] or {}).get("path")
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            problem = (
                f"the {part} image in row {row['source_row']}{f' ({path})' if path else ''} does not decode: {reason}"
            )
            if self.bad_images == "error":
                raise UserError(f"{problem} (--bad_images skip leaves out such images)") from error
            if not any(marks.any() for marks in self.bad.values()):
                logger.warning(f"{problem}; it is skipped, and so are others like it")
            self.bad[part][row["source_row"]] = True
            return None

    def process(self, images: list[Image.Image]) -> torch.Tensor:
        fits = all(image.size == self.size[::-1] for image in images)  # resizing would change nothing, but take long
        resize = self.processor.do_resize and (self.processor.do_center_crop or not fits)
        return self.processor(images, do_resize=resize, return_tensors="pt")["pixel_values"]

    def augment(self, images: list[Image.Image], keys: list) -> torch.Tensor:
        if self.recipe is not None:
            pixels = []
            for image, key in zip(images, keys, strict=True):
                with seeded(int(random_numbers(self.seed, key).integers(2**63))):
                    pixels.append(self.recipe(image))
            return torch.stack(pixels)
        pixels = self.process(images)
        if self.augmentation.augment == "none":
            return pixels
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.processor.image_mean, self.processor.image_std))
        draws = np.stack([random_numbers(self.seed, key).random(3) for key in keys])
        return shift_and_flip(pixels, self.augmentation.augment, -mean / std, draws)
