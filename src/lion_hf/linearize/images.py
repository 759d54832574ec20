"""Images without labels: files, and rows of parquet files, decoded batch by batch with the source's image processor."""

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig

from ..convert.source import first_line


if importlib.util.find_spec("PIL") is None:
    raise ImportError("--images requires pillow: pip install pillow")

from PIL import Image, ImageOps


# Number of images to measure on, at most.
_HELD_OUT = 256
# Pillow's modes by the number of channels that the source reads.
_MODES = {1: "L", 3: "RGB"}


class Rows:
    """Images that are read when they are asked for.

    Args:
        names: folders, which are searched with their subfolders, image files, and parquet files with one column of
            images. Hidden files and folders are left out.

    Raises:
        ValueError: if a name does not exist or holds no images, or there are fewer than two images in all.
        ImportError: if a parquet file is given and a package that reads it is not installed.
    """

    def __init__(self, names: Sequence[str]):
        self.parts = [_table(name) if Path(name).suffix.lower() == ".parquet" else _files(name) for name in names]
        if len(self) < 2:
            raise ValueError(
                f"{' and '.join(map(repr, names))} holds {len(self)} image; training and measuring need at least two, "
                "and a few thousand are useful"
            )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, i: int) -> tuple[str, Any]:
        """Return the name of image number i, and the file that holds it."""
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError(i)


class _Files:
    """Image files."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[str, Path]:
        return str(self.paths[i]), self.paths[i]


class _Table:
    """The rows of a parquet file."""

    def __init__(self, name: str, rows, column: str):
        self.name, self.rows, self.column = name, rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[str, Any]:
        image = self.rows[i][self.column] or {}
        data = image.get("bytes")
        return f"row {i} of {self.name}", image.get("path") if data is None else BytesIO(data)


def _files(name: str) -> _Files:
    folder, known = Path(name), {x for x, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    if not folder.exists():
        raise ValueError(f"there is no folder or file {name!r}; --images takes folders of images and parquet files")
    if folder.is_file():
        if folder.suffix.lower() not in known:
            raise ValueError(f"{name!r} is no image file; --images takes folders of images, images and parquet files")
        return _Files([folder])
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in known
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        parquet = next(folder.rglob("*.parquet"), None)
        hint = "" if parquet is None else f"; give parquet files by name, such as {str(parquet)!r}"
        raise ValueError(f"{name!r} holds no images{hint}")
    return _Files(found)


def _table(name: str) -> _Table:
    """Return the images of a parquet file; they are not decoded, and the file is mapped into memory."""
    import datasets  # only here: folders need pillow alone

    from ..training.data import load_file, reading
    from ..training.errors import UserError

    try:
        rows = load_file(name)
        columns = [x for x, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        columns = columns or [x for x in ("image", "img") if x in rows.column_names]
        if len(columns) != 1:
            raise ValueError(
                f"{name!r} has {len(columns)} columns of images among {', '.join(rows.column_names)}; it must have "
                "one, which is named 'image' unless the file states the types of its columns"
            )
        with reading(f"column {columns[0]!r} of {name!r} holds no images"):
            rows = rows.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    except UserError as error:
        raise ValueError(str(error)) from error
    return _Table(name, rows, columns[0])


def load_processor(source: str):
    """Return the image processor of a source. Raises ValueError if it has none that loads."""
    try:
        return AutoImageProcessor.from_pretrained(source)
    except Exception as error:  # files of processors raise errors of many types
        raise ValueError(
            f"the image processor of {source!r} does not load; save the one that the source was trained with in its "
            f"folder ({first_line(error)})"
        ) from error


def image_size(processor, config: PreTrainedConfig) -> tuple[int, int]:
    """Return height and width of the images that a processor makes.

    Args:
        processor: the source's image processor.
        config: the source's configuration.

    Raises:
        ValueError: if the source does not read images of 1 or 3 channels, or the size depends on the image.
    """
    if config.num_channels not in _MODES:
        raise ValueError(f"the source reads images of {config.num_channels} channels; supported are 1 and 3")
    blank = [Image.new(_MODES[config.num_channels], size) for size in ((90, 60), (60, 90))]
    first, second = (tuple(processor(image, return_tensors="pt")["pixel_values"].shape[2:]) for image in blank)
    if first != second:
        raise ValueError(
            "the source's image processor does not give all images the same size; it needs do_resize with a size of "
            "height and width, or do_center_crop"
        )
    return first


class Images:
    """Images, split into those to train on and those to measure on. An image that does not decode is left out.

    Args:
        rows: the images.
        processor: the source's image processor.
        channels: number of channels that the source reads, 1 or 3.
        batch_size: number of images in a batch.
        seed: seed of the split and of the order.
        say: receives a line about the first image that does not decode.
    """

    def __init__(
        self,
        rows: Rows,
        processor,
        channels: int,
        batch_size: int,
        seed: int,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.rows, self.processor, self.mode = rows, processor, _MODES[channels]
        self.batch_size, self.seed, self.say = batch_size, seed, say
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, min(_HELD_OUT, len(rows) // 20))
        self.held_out, self.training = sorted(order[:count]), sorted(order[count:])
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._said = False

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step. It depends on the seed and the step only, so that a run can be resumed.

        Raises:
            ValueError: if no image of the batch decodes.
        """
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return {"pixel_values": torch.stack([x for _, x in self._decoded([self._chosen(place) for place in places])])}

    def _chosen(self, place: int) -> int:
        """Return the image at a place of the order, in which each image comes once in an epoch."""
        epoch, place = divmod(place, len(self.training))
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(len(self.training), generator=generator).tolist()
        return self.training[self._epoch[1][place]]

    def measuring(self) -> list[dict[str, Tensor]]:
        """Return the images to measure on, in batches. Those that do not decode leave `held_out`.

        Raises:
            ValueError: if none decodes.
        """
        decoded = self._decoded(self.held_out)
        self.held_out = [i for i, _ in decoded]
        return [{"pixel_values": x} for x in torch.stack([x for _, x in decoded]).split(self.batch_size)]

    def _decoded(self, chosen: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Return number and pixels, (channels, height, width), of those images that decode."""
        rows = [self.rows[i] for i in chosen]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # Pillow computes without the interpreter's lock
            images = list(threads.map(self._read, [file for _, file in rows]))
        bad = [
            f"{name} does not decode ({first_line(image)})"
            for (name, _), image in zip(rows, images, strict=True)
            if isinstance(image, Exception)
        ]
        if len(bad) == len(images):
            raise ValueError(f"{bad[0]}, and no other of {len(bad)} images does")
        if bad and not self._said:
            self._said = True
            self.say(f"{bad[0]}; this image and others that do not decode are left out")
        return [(i, image) for i, image in zip(chosen, images, strict=True) if torch.is_tensor(image)]

    def _read(self, file: Any) -> Tensor | Exception:
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert(self.mode)
        except Exception as error:  # Pillow's decoders raise errors of many types
            return error
        return self.processor(image, return_tensors="pt")["pixel_values"][0]
