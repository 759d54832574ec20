"""Data sets from the Hub or from local files, and the order in which training reads their rows."""

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import logging

from .arguments import DataArguments
from .errors import UserError, require_folder_or_hub_name, require_path, user_errors


logger = logging.get_logger(__name__)

FILE_TYPES = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(data: DataArguments, training: TrainingArguments, load_file: Callable[[str], Any]) -> tuple:
    """Return training and validation data by Hub name, or from `train_file` and `validation_file` through `load_file`.

    Without training, a part that is not given is None. Validation data is held out of training data if that is given.
    """
    if data.dataset_name:
        if data.train_file or data.validation_file:
            raise UserError("--dataset_name cannot be combined with --train_file or --validation_file")
        splits = load_named(data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise UserError(f"data set {data.dataset_name!r} has no split 'train'; it has {', '.join(splits)}")
        held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
        return parts_of(splits["train"], held_out, data, training, training.seed)
    if not data.train_file and training.do_train:
        raise UserError("--validation_file requires --train_file, unless --do_train is false")
    held_out = load_file(data.validation_file) if data.validation_file else None
    return parts_of(load_file(data.train_file) if data.train_file else None, held_out, data, training, training.seed)


def parts_of(train, validation, data: DataArguments, training: TrainingArguments, seed: int) -> tuple:
    """Do the same as `hold_out`; without training, either part may be None."""
    if not training.do_train and train is None:
        return None, None if validation is None else hold_out(validation, validation, data, seed)[1]
    if not training.do_train and validation is None:
        say_split_off(data, seed)
    return hold_out(train, validation, data, seed)


def say_split_off(data: DataArguments, seed: int) -> None:
    """Warn that a model may have been trained on the rows it is evaluated on."""
    logger.warning(
        f"no validation data is given: the model is evaluated on rows split off {data.name('the training data')} "
        f"(--validation_share {data.validation_share:g}, seed {seed}). A model that was trained on this data has seen "
        "these rows, unless it used the same share and seed. Give separate data, for example with --validation_file"
    )


def load_named(name: str, config_name: str | None = None, **kwargs):
    """Call `datasets.load_dataset`; a wrong name, no network, a gated or unreadable set is a one-line error."""
    if Path(name).is_file() or (Path(name).suffix in FILE_TYPES and Path(name).parent.is_dir()):
        raise UserError(f"--dataset_name is {name!r}, which is not a data set; for a local file use --train_file")
    require_folder_or_hub_name(name, "--dataset_name", "dataset")
    with reading(f"cannot load data set {name!r}"):
        try:
            return datasets.load_dataset(name, config_name, **kwargs)
        except DatasetNotFoundError as error:
            if "gated" in str(error):
                raise UserError(
                    f"data set {name!r} is gated: accept its terms at https://huggingface.co/datasets/{name} and log "
                    "in with `hf auth login`, or use local files"
                ) from error
            raise


def hold_out(train, validation, data: DataArguments, seed: int) -> tuple:
    """Split off a validation part if there is none, then cut both parts to the requested number of rows."""
    if validation is None:
        if len(train) < 2:
            raise UserError(
                "the training data has fewer than two rows, so none can be held out; give --validation_file"
            )
        with user_errors("wrong --validation_share", ValueError):
            parts = train.train_test_split(test_size=data.validation_share, seed=seed)
        train, validation = parts["train"], parts["test"]
    if data.max_train_samples:
        train = train.shuffle(seed=seed).select(range(min(data.max_train_samples, len(train))))
    if data.max_eval_samples:
        validation = validation.shuffle(seed=seed).select(range(min(data.max_eval_samples, len(validation))))
    for name, part in (("training", train), ("validation", validation)):
        if len(part) == 0:
            raise UserError(f"the {name} data is empty")
    return train, validation


def load_file(path: str, *, streaming: bool = False):
    """Load the rows of a txt (a row per line), csv, tsv, json, jsonl or parquet file.

    A pattern such as `shards/*.parquet` loads all matching files.
    """
    files = sorted(glob.glob(path)) if any(c in path for c in "*?[") else [str(require_path(path, "data file"))]
    if not files:
        raise UserError(f"no file matches {path!r}")
    if Path(path).is_dir():
        raise UserError(f"{path!r} is a folder; give a file, or a pattern of files such as '{path}/*.txt'")
    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= set(FILE_TYPES):
        raise UserError(
            f"{path!r} ends in {', '.join(map(repr, sorted(suffixes)))}; allowed are {', '.join(FILE_TYPES)}"
        )
    empty = next((file for file in files if Path(file).stat().st_size == 0), None)
    if empty:
        raise UserError(f"data file {empty!r} is empty")
    (suffix,) = suffixes
    options = {"delimiter": "\t", "quoting": 3} if suffix == ".tsv" else {}
    with reading(f"cannot read {path!r}"):
        return datasets.load_dataset(
            FILE_TYPES[suffix], data_files=files, split="train", streaming=streaming, **options
        )


@contextmanager
def reading(prefix: str):
    """Turn errors of `datasets` into a `UserError`; the reason is often the cause of the exception it raises."""
    # Data sets that need a script raise RuntimeError.
    kinds = (OSError, ValueError, TypeError, NotImplementedError, RuntimeError, DatasetsError)
    with user_errors(prefix, *kinds):
        try:
            yield
        except DatasetGenerationError as error:
            raise UserError(f"{prefix}: {error.__cause__ or error}") from error
        except ValueError as error:
            if "corresponds to no data" in str(error):  # only a header
                raise UserError(f"{prefix}: it has no rows") from error
            raise


def require_columns(dataset, columns: dict[str, str]) -> None:
    """Raise a `UserError` that names missing columns, the flags that set them, and the existing columns."""
    missing = [f"no column {name!r} (set {flag})" for flag, name in columns.items() if name not in dataset.column_names]
    if missing:
        raise UserError(f"there is {' and '.join(missing)}; {columns_of(dataset)}")


def columns_of(dataset) -> str:
    """Return a part of a message that lists the columns, with a hint for csv files, whose first line names them."""
    hint = " (if the first line of the file is data, add a line with the column names)"
    return f"the columns are {', '.join(dataset.column_names)}" + hint * (dataset.info.builder_name == "csv")


@contextmanager
def naming_builtin_data(used: bool):
    """Add to a `UserError` that no data was given, if the built-in data is `used`."""
    try:
        yield
    except UserError as error:
        if not used:
            raise
        raise UserError(
            f"{error}. No data was given, so the built-in data is used; give your own, such as --validation_file"
        ) from error


def classes_of_model(config: PreTrainedConfig, names: list[str]) -> list[str]:
    """Return the classes of a trained model in its own order, to evaluate it on data with classes of these names.

    Whole numbers that are not names of the model's classes count its classes from 0. A model without names takes the
    names of the data.

    Raises:
        UserError: for a class that the model does not have.
    """
    known = [str(config.id2label[i]) for i in range(config.num_labels)]
    if set(names) <= set(known):
        return known
    if all(name.isdigit() and int(name) < len(known) for name in names):
        return [str(i) for i in range(len(known))]
    if known == [f"LABEL_{i}" for i in range(len(names))]:
        return names
    unknown = next(name for name in names if name not in known)
    shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
    raise UserError(f"the data has the class {unknown!r}, which the model does not have; its classes are {shown}")


# ------------------------------------------------------------------------------------- which rows make which batch


class Key(NamedTuple):
    """One reading of one training row; it seeds the random changes of the row (see `random_numbers`)."""

    epoch: int
    index: int
    repeat: int = 0
    filler: bool = False


def random_numbers(seed: int, key: Key) -> np.random.Generator:
    """Return the generator of one reading of one row: the same in any process, worker, batch, and after a resume."""
    return np.random.Generator(np.random.Philox(key=[seed, key.repeat], counter=[0, 0, key.epoch, key.index]))


class EpochBatchSampler:
    """Batches of `Key` for one process, a function of the seed and the epoch alone.

    N processes together read the same rows as one process with N times the batch size. Each global batch is dealt out
    row by row. The last one may be smaller, so that processes differ by a row; no row is read twice or dropped. A
    process without a row gets a filler row, whose labels `collate_keyed` sets to -100, so that it does not count.

    Args:
        length: rows of the data set.
        batch_size: rows per process.
        seed, rank, world_size: as usual.
        drop_last: whether to leave out a last global batch that is smaller.
        repeats: readings of each row, side by side and hence in different processes (repeated augmentation). An epoch
            still has `length` readings.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        drop_last: bool = False,
    ):
        self.length, self.batch_size, self.seed, self.repeats = length, batch_size, seed, repeats
        self.rank, self.world_size = rank, world_size
        size = batch_size * world_size
        self.end = length // size * size if drop_last else length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.end // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        rows = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        rows = np.repeat(rows, self.repeats)[: self.length]
        repeat = np.arange(self.length) % self.repeats
        size = self.batch_size * self.world_size
        for start in range(0, self.end, size):
            mine = range(start + self.rank, min(start + size, self.length), self.world_size)
            keys = [Key(self.epoch, int(rows[i]), int(repeat[i])) for i in mine]
            yield keys or [Key(self.epoch, int(rows[start]), filler=True)]


class KeyedRows:
    """A map-style data set that is read by `Key`; every row holds its key as "key"."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        columns = self.dataset[[key.index for key in keys]]
        return [{name: values[i] for name, values in columns.items()} | {"key": key} for i, key in enumerate(keys)]


def collate_keyed(collator: Callable, uses_keys: bool, rows: list[dict[str, Any]]):
    """Return the batch of a collator, which gets the keys only if `uses_keys`; labels of a filler are -100."""
    filler = rows[0]["key"].filler
    if not uses_keys:
        rows = [{name: value for name, value in row.items() if name != "key"} for row in rows]
    batch = collator(rows)
    if filler:
        batch["labels"] = batch["labels"].new_full(batch["labels"].shape, -100)
    return batch


class EpochDataLoader(DataLoader):
    """A loader that passes the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
