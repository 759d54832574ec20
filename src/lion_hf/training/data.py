"""Data: by Hub name or from local files, and the order in which training reads it."""

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
from .errors import UserError, require_path, user_errors


logger = logging.get_logger(__name__)

FILE_TYPES = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(data: DataArguments, training: TrainingArguments, load_file: Callable[[str], Any]) -> tuple:
    """Training and validation data by Hub name, or from `train_file` and `validation_file` through `load_file`. Without
    training, what is not given is None, but for the validation data where training data is given."""
    if data.dataset_name:
        if data.train_file or data.validation_file:
            raise UserError("give either --dataset_name or --train_file and --validation_file")
        splits = load_named(data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise UserError(f"data set {data.dataset_name!r} has no split 'train'; it has {', '.join(splits)}")
        held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
        return parts_of(splits["train"], held_out, data, training, training.seed)
    if not data.train_file and training.do_train:
        raise UserError("--validation_file needs --train_file too")
    held_out = load_file(data.validation_file) if data.validation_file else None
    return parts_of(load_file(data.train_file) if data.train_file else None, held_out, data, training, training.seed)


def parts_of(train, validation, data: DataArguments, training: TrainingArguments, seed: int) -> tuple:
    """As `hold_out`; without training, either part may be None."""
    if not training.do_train and train is None:
        return None, None if validation is None else hold_out(validation, validation, data, seed)[1]
    if not training.do_train and validation is None:
        say_split_off(data, seed)
    return hold_out(train, validation, data, seed)


def say_split_off(data: DataArguments, seed: int) -> None:
    """A model that is only evaluated may have been trained on the rows that it is asked for."""
    logger.warning(
        f"no validation data is given, so rows split off {data.name('the training data')} are evaluated "
        f"(--validation_share {data.validation_share:g}, seed {seed}). A model that was trained on this data has seen "
        "them, unless its training held out the same rows: by the same share and seed. --validation_file or its like "
        "gives data of its own"
    )


def load_named(name: str, config_name: str | None = None, **kwargs):
    """`datasets.load_dataset`, with one line for what can be wrong: the name, the network, a gate, the format."""
    with reading(f"cannot load data set {name!r}"):
        try:
            return datasets.load_dataset(name, config_name, **kwargs)
        except DatasetNotFoundError as error:
            if "gated" in str(error):
                raise UserError(
                    f"data set {name!r} is gated: accept its terms at https://huggingface.co/datasets/{name} and log "
                    "in with `hf auth login`, or give local files"
                ) from error
            raise


def hold_out(train, validation, data: DataArguments, seed: int) -> tuple:
    """Splits off a validation part where there is none, then cuts both to the wanted number of rows."""
    if validation is None:
        if len(train) < 2:
            raise UserError("the training data is empty or a single row, so nothing can be held out for validation")
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
    """Rows of one txt (a row per line), csv, tsv, json, jsonl or parquet file, or of all that a pattern such as
    `shards/*.parquet` matches."""
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
    """`datasets` hides the cause of a failure in the exception below it."""
    kinds = (OSError, ValueError, TypeError, NotImplementedError, RuntimeError, DatasetsError)  # scripts: RuntimeError
    with user_errors(prefix, *kinds):
        try:
            yield
        except DatasetGenerationError as error:
            raise UserError(f"{prefix}: {error.__cause__ or error}") from error
        except ValueError as error:
            if "corresponds to no data" in str(error):  # a header and nothing below it
                raise UserError(f"{prefix}: it has no rows") from error
            raise


def require_columns(dataset, columns: dict[str, str]) -> None:
    """Raises a `UserError` that names all missing columns, given by the flags that name them, and the columns there
    are."""
    missing = [f"no column {name!r} (set {flag})" for flag, name in columns.items() if name not in dataset.column_names]
    if missing:
        raise UserError(f"there is {' and '.join(missing)}; the columns are {', '.join(dataset.column_names)}")


@contextmanager
def naming_builtin_data(used: bool):
    """Adds to an error of the user's that no data was given, where the built-in data is `used`."""
    try:
        yield
    except UserError as error:
        if not used:
            raise
        raise UserError(
            f"{error}. No data was given, so this is the built-in data: give your own, such as --validation_file"
        ) from error


def classes_of_model(config: PreTrainedConfig, names: list[str]) -> list[str]:
    """The classes of a trained model in its own order, to evaluate it on data that has classes of these names. Whole
    numbers that are no names of the model's classes number them from 0; a model without names takes the data's.

    Raises:
        UserError: for a class that the model does not know.
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
    raise UserError(f"the data has the class {unknown!r}, which the model does not know; it knows {shown}")


# ------------------------------------------------------------------------------------- which rows make which batch


class Key(NamedTuple):
    """One reading of one training row; random changes of the row are drawn from it (see `random_numbers`)."""

    epoch: int
    index: int
    repeat: int = 0
    filler: bool = False


def random_numbers(seed: int, key: Key) -> np.random.Generator:
    """The generator of one reading of one row: the same in any process, worker, batch, and after a resume."""
    return np.random.Generator(np.random.Philox(key=[seed, key.repeat], counter=[0, 0, key.epoch, key.index]))


class EpochBatchSampler:
    """Batches of `Key` for one process, a pure function of (seed, epoch): N processes read together what one process
    with N times the batch size reads.

    Each global batch is dealt out row by row. In the last one, which may be smaller, processes get a row more or less;
    nothing is read twice and nothing dropped. A process that gets no row at all has one filler, whose labels
    `collate_keyed` sets to -100, so that it does not count.

    Args:
        length: rows of the data set.
        batch_size: rows per process.
        seed, rank, world_size: as usual.
        drop_last: leave out the last global batch where it is smaller.
        repeats: readings of each row, side by side and hence in different processes (repeated augmentation). An epoch
            stays `length` readings long.
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
    """A map-style data set read by `Key`; every row carries its key as "key"."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        columns = self.dataset[[key.index for key in keys]]
        return [{name: values[i] for name, values in columns.items()} | {"key": key} for i, key in enumerate(keys)]


def collate_keyed(collator: Callable, uses_keys: bool, rows: list[dict[str, Any]]):
    """The batch of a collator, which sees the keys only if it says so; a filler's labels are -100."""
    filler = rows[0]["key"].filler
    if not uses_keys:
        rows = [{name: value for name, value in row.items() if name != "key"} for row in rows]
    batch = collator(rows)
    if filler:
        batch["labels"] = batch["labels"].new_full(batch["labels"].shape, -100)
    return batch


class EpochDataLoader(DataLoader):
    """A loader whose batch sampler is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
