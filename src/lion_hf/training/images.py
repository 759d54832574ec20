"""Images: their sources, their classes, and their conversion to pixels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.data_files import EmptyDatasetError
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
    naming_builtin_data,
    parts_of,
    random_numbers,
    reading,
    require_columns,
)
from .errors import UserError, require_path


logger = logging.get_logger(__name__)

# Short names of data sets on the Hub: full name, column of the images, column of the classes.
KNOWN = {
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label"),
}


# Names of folders that hold parts of a data set; validation data is the first of the held-out parts that exists.
TRAINING_NAMES = ("train", "training")
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test", "testing")

# Largest number of images that are all decoded once before training.
TRIED = 2000


@dataclass
class ImageArguments(DataArguments):
    """The data of the image script."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Name of a data set on the Hub; short names: {', '.join(KNOWN)}."}
    )
    train_dir: str | None = field(default=None, metadata={"help": "Folder that holds one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Validation images, in the same layout."})
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder of images to classify, subfolders included, with or without training."}
    )
    test_file: str | None = field(default=None, metadata={"help": "File of images to classify, such as parquet."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    bad_images: Literal["error", "skip"] | None = field(
        default=None,
        metadata={
            "help": "Images that do not decode: stop (error), or omit and count them (skip). Default: error for up "
            f"to {TRIED:,} images, which are all decoded before training, else skip."
        },
    )
    eval_crop_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Evaluation resizes the shorter side to image_size / ratio and crops the centre; 1 resizes to the "
            "square. Default: as in --model_name_or_path, else 1. DeiT: 0.875."
        },
    )
    interpolation: Literal["bilinear", "bicubic"] | None = field(
        default=None,
        metadata={"help": "Interpolation of resizing. Default: as in --model_name_or_path, else bilinear."},
    )
    normalization: Literal["half", "imagenet"] | None = field(
        default=None,
        metadata={
            "help": "half: scale to [-1, 1]; imagenet: ImageNet's mean. Default: as in --model_name_or_path, else half."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_crop_ratio is not None and not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(f"--eval_crop_ratio is {self.eval_crop_ratio}; it must be greater than 0 and at most 1")
        if self.dataset_name in KNOWN:
            self.dataset_name, image, label = KNOWN[self.dataset_name]
            self.image_column = image if self.image_column == "image" else self.image_column
            self.label_column = label if self.label_column == "label" else self.label_column


# --------------------------------------------------------------------------------------------------------- sources


def load_digits(data: ImageArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels, with a fifth of every class held out."""
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
    """Load a folder that holds one folder of images per class."""
    if not require_path(path, "image folder").is_dir():
        raise UserError(f"{path!r} is a file, not a folder that holds one folder of images per class")
    form = Path(path) / "CLASS" / "1.jpg"
    folders = {folder.name for folder in Path(path).iterdir() if folder.is_dir() and not folder.name.startswith(".")}
    refuse_splits(Path(path), sorted(folders))
    with reading(f"cannot read {path!r}"):
        try:
            images = datasets.load_dataset("imagefolder", data_dir=path, split="train")
        except (EmptyDatasetError, ValueError) as error:
            if isinstance(error, ValueError) and "corresponds to no data" not in str(error):
                raise
            raise UserError(f"cannot read {path!r}: it holds no images; the form is {form}") from error
    if "label" not in images.column_names:
        raise UserError(
            f"{path!r} has no classes: it must hold one folder of images per class, two or more, such as {form}"
        )
    empty = sorted(folders - set(images.features["label"].names))
    if empty:
        logger.warning(f"{path!r} has folders without images, which are not used as classes: {', '.join(empty)}")
    return numbered(images)


def refuse_splits(path: Path, folders: list[str]) -> None:
    """Raise a `UserError` if all folders have names of splits, of which only one would be read."""
    train = [name for name in folders if name.lower() in TRAINING_NAMES]
    held_out = [name for name in folders if name.lower() in HELD_OUT_NAMES]
    if train and len(train) + len(held_out) == len(folders):
        first = min(held_out, key=lambda name: HELD_OUT_NAMES.index(name.lower()), default=None)
        flags = f"--train_dir {path / train[0]}" + (f" --validation_dir {path / first}" if first else "")
        raise UserError(
            f"{str(path)!r} holds folders that look like parts of the data, not like classes: {', '.join(folders)}. "
            f"Use {flags}"
        )


def load_test_images(data: ImageArguments) -> tuple[Dataset | None, list[str]]:
    """Return the images to classify, in the form of `with_labels` without labels, and the file or row of each."""
    if data.test_dir and data.test_file:
        raise UserError("--test_dir and --test_file cannot be combined")
    if data.test_dir:
        folder, known = require_path(data.test_dir, "image folder"), Image.registered_extensions()
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known and file.is_file())
        if not files:
            raise UserError(f"{data.test_dir!r} holds no images")
        images = Dataset.from_dict({"image": list(map(str, files))})
        names = [str(file.relative_to(folder)) for file in files]
    elif data.test_file:
        images = load_file(data.test_file)
        require_columns(images, {"--image_column": data.image_column})
        images = images.select_columns([data.image_column]).rename_columns(
            {} if data.image_column == "image" else {data.image_column: "image"}
        )
        names = [f"row {i}" for i in range(len(images))]
    else:
        return None, []
    with reading(f"column {data.image_column!r} holds no images"):
        images = numbered(images.cast_column("image", datasets.Image(decode=False)))
    return images, names


def numbered(rows: Dataset) -> Dataset:
    """Add the number of each row, which messages name however the rows are shuffled and split later."""
    return rows if "source_row" in rows.column_names else rows.add_column("source_row", list(range(len(rows))))


def load_images(
    data: ImageArguments, training: TrainingArguments, evaluated: PreTrainedConfig | None = None
) -> tuple[Dataset | None, Dataset | None, list[str], str]:
    """Return training and validation images with labels, the names of the classes, and a sentence about the source.

    The classes are those of the model `evaluated`, if one is given. Without training, a part that is not given is None.
    """
    train, validation, source = load_parts(data, training)
    for part in (part for part in (train, validation) if part is not None):
        shown = part.remove_columns([name for name in ("source_row",) if name in part.column_names])
        require_columns(shown, {"--image_column": data.image_column, "--label_column": data.label_column})
    first = validation if train is None else train
    if first is None:
        return None, None, [str(evaluated.id2label[i]) for i in range(evaluated.num_labels)], ""
    names = class_names(first, data.label_column, evaluated is None)
    if evaluated is not None:
        with naming_builtin_data(not data.name("")):
            names = classes_of_model(evaluated, names)
    train, validation = (part if part is None else with_labels(part, data, names) for part in (train, validation))
    if train is not None and training.do_train:
        tell_missing(train, validation, names)
    known = "" if train is None else f"{len(train):,} training and "
    return train, validation, names, f"{source}: {known}{len(validation):,} validation images, {len(names)} classes."


def load_parts(data: ImageArguments, training: TrainingArguments) -> tuple[Dataset | None, Dataset | None, str]:
    """Return unchanged training and validation rows, and a description of their source."""
    if data.validation_dir and not data.train_dir and training.do_train:
        raise UserError("--validation_dir requires --train_dir, unless --do_train is false")
    if data.train_dir or data.validation_dir:
        if data.train_file or data.validation_file or data.dataset_name:
            raise UserError("--train_dir, --train_file and --dataset_name cannot be combined; give one of them")
        train, held_out = (load_folder(path) if path else None for path in (data.train_dir, data.validation_dir))
        return *parts_of(train, held_out, data, training, training.seed), f"`{data.name('')}`"
    if data.dataset_name or data.train_file or data.validation_file:
        parts = load_splits(data, training, lambda path: numbered(load_file(path)))
        return *parts, f"`{data.name('')}`"
    if not training.do_train and (data.test_dir or data.test_file):
        return None, None, ""
    digits = load_digits(data, training.seed)
    return *digits, "Digits of scikit-learn (8 x 8 pixels; a fifth of every class held out)"


def tell_missing(train: Dataset, validation: Dataset, names: list[str]) -> None:
    """Warn about declared classes without a training or a validation image."""
    for part, name in ((train, "training"), (validation, "validation")):
        missing = [names[i] for i in sorted(set(range(len(names))) - set(part["label"][:]))]
        if missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            logger.warning(f"{len(missing)} of {len(names)} classes have no {name} image: {shown}")


def most_frequent_class(train: Dataset, validation: Dataset, classes: int) -> tuple[float, float]:
    """Return the accuracy of the most frequent training class, and the cross entropy of the class frequencies."""
    shares = (np.bincount(train["label"][:], minlength=classes) + 1) / (len(train) + classes)
    labels = np.asarray(validation["label"][:])
    return float((labels == shares.argmax()).mean()), float(-np.log(shares)[labels].mean())


def class_names(train: Dataset, column: str, several: bool = True) -> list[str]:
    """Return the class names: those the data set declares, or the sorted values of the labels.

    With `several`, fewer than two classes raise a `UserError`.
    """
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    values = set(train[column])
    if None in values:
        raise UserError(f"column {column!r} has rows without a label; remove them from the data")
    if not all(isinstance(value, (str, int)) for value in values):
        raise UserError(f"column {column!r} holds {feature}, not classes; labels must be text or whole numbers")
    if len(values) == 1 and several:
        raise UserError(
            f"column {column!r} has the same value {values.pop()!r} in every row; at least two classes are required"
        )
    return [str(value) for value in sorted(values)]


def with_labels(part: Dataset, data: ImageArguments, names: list[str]) -> Dataset:
    """Return rows with the image (not decoded), the label (its index in `names`) and the number of the row."""
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
    """Decode the RGB image of a row. Pillow's decoders raise errors of many types."""
    return datasets.Image().decode_example(image).convert("RGB")


def first_image(part: Dataset, column: str) -> Image.Image:
    """Return the first of 16 images that decodes."""
    for row in part.select(range(min(16, len(part)))):
        try:
            return decode(row["image"])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    raise UserError(f"column {column!r} holds no images ({reason})")


def try_images(part: Dataset, name: str) -> None:
    """Decode every image of a part with at most `TRIED` images.

    Raises:
        UserError: for images that do not decode. It names the first and counts the others.
    """
    if len(part) > TRIED:
        return
    bad = []
    for row in part:
        try:
            decode(row["image"])
        except Exception as error:
            bad.append(problem_of(row, name, error))
    if bad:
        others = f", and {len(bad) - 1:,} more do not" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{others} (use --bad_images skip to leave such images out)")


def problem_of(row: dict[str, Any], part: str, error: Exception) -> str:
    path = (row["image"] or {}).get("path")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the {part} image in row {row['source_row']}{f' ({path})' if path else ''} does not decode: {reason}"


def target_size(processor) -> tuple[int, int]:
    """Return height and width of the processor's output."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    return (size.height, size.width) if size.height else (size.shortest_edge,) * 2


class ImageCollator:
    """Turn rows into pixels and labels.

    Rows with a "key" are for training: they are augmented, and with mixup or cutmix the batch has "soft_labels",
    probabilities of the classes. Other rows only pass through the processor. Rows without "label" are test rows.

    An image that does not decode raises an error or is left out of a training batch. If it must keep its place (in
    evaluation, or as the only image of a batch), it is black and labelled -100, so that it does not count.
    """

    uses_keys = True

    def __init__(
        self,
        processor,
        augmentation: AugmentationArguments,
        classes: int,
        seed: int,
        bad_images: str,
        **parts: Dataset | None,
    ):
        self.processor, self.augmentation, self.classes = processor, augmentation, classes
        self.seed, self.bad_images = seed, bad_images
        self.size = target_size(processor)
        self.recipe = deit_augmentation(augmentation, processor, self.size) if augmentation.augment == "deit" else None
        # One mark per row, which the workers of a loader share.
        lengths = {name: 1 + max(part["source_row"][:]) for name, part in parts.items() if part is not None}
        self.bad = {name: torch.zeros(n, dtype=torch.bool).share_memory_() for name, n in lengths.items()}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        training = "key" in rows[0]
        labelled = "label" in rows[0]
        part = "training" if training else "validation" if labelled else "test"
        images = [self.open(row, part) for row in rows]
        if training and any(images):
            rows = [row for row, image in zip(rows, images, strict=True) if image]
            images = [image for image in images if image]
        labels = [row.get("label", -100) if image else -100 for row, image in zip(rows, images, strict=True)]
        labels = torch.tensor(labels)
        images = [image or Image.new("RGB", self.size[::-1]) for image in images]
        if not training:
            return {"pixel_values": self.process(images)} | ({"labels": labels} if labelled else {})
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
            problem = problem_of(row, part, error)
            if self.bad_images == "error":
                raise UserError(f"{problem} (use --bad_images skip to leave such images out)") from error
            if not any(marks.any() for marks in self.bad.values()):
                logger.warning(f"{problem}; this image and others that do not decode are skipped")
            self.bad[part][row["source_row"]] = True
            return None

    def process(self, images: list[Image.Image]) -> torch.Tensor:
        fits = all(image.size == self.size[::-1] for image in images)  # resizing would change nothing but take time
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
