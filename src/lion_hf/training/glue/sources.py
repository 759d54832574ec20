"""Sources of the data of run_glue.py: the Hub, files, a folder per task, or toy data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from datasets import Dataset

from ..arguments import DataArguments, require_at_least
from ..data import FILE_TYPES, load_file, load_named
from ..errors import UserError, require_path
from ..text import MIN_VOCABULARY, VOCABULARY
from .builtin import builtin_splits
from .tasks import GlueTask


GLUE_ON_THE_HUB = "nyu-mll/glue"


@dataclass
class GlueArguments(DataArguments):
    """The data of text classification."""

    task: list[str] | None = field(
        default=None,
        metadata={"help": "GLUE tasks by name, all, or custom for your own data. Default: custom."},
    )
    test_file: str | None = field(
        default=None, metadata={"help": "File to predict, with or without training. Labels in it are ignored."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with a folder per task, each with train, validation and test files (csv, json, ...)."
        },
    )
    builtin_data: bool = field(
        default=False, metadata={"help": "Use toy data that imitates each task, made from Python's documentation."}
    )
    sentence1_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text. Default: the task's; for your own data text, sentence or sentence1."},
    )
    sentence2_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the second text of a pair. Default: the task's; for your own data sentence2, if any."
        },
    )
    label_column: str = field(default="label", metadata={"help": "Column with the classes, or numbers to predict."})
    label_type: Literal["classes", "numbers"] | None = field(
        default=None,
        metadata={
            "help": "Type of the labels of your own data. Default: text and whole numbers are classes, numbers with a "
            "decimal point are numbers to predict."
        },
    )
    metric_name: str | None = field(
        default=None,
        metadata={"help": "Name or path of the metric. Default: 'glue' for Hub data, else the one of this package."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text or pair, including special tokens."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of a tokenizer. Default: the model's; for a new model one is trained."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": f"Size of the vocabulary of a newly trained tokenizer. Default: {VOCABULARY}."},
    )
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "Train a tokenizer with this many tokens, even if --tokenizer_name is given."}
    )
    num_seeds: int | None = field(
        default=None,
        metadata={
            "help": "Runs per task, with seeds from --seed up. Default: the paper's number for several tasks, else 1."
        },
    )
    parallel: int | None = field(
        default=None, metadata={"help": "Runs at a time, each on its own GPU. Default: one per GPU."}
    )
    from_mnli: bool = field(
        default=False, metadata={"help": "Start RTE, MRPC and STS-B from the model fine-tuned on MNLI."}
    )
    streaming: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, MIN_VOCABULARY, "vocab_size", "train_tokenizer")


def load_splits(task: GlueTask, data: GlueArguments, for_training: bool = True) -> tuple[dict[str, Dataset], str]:
    """Return all parts of a task by name, and a description of their source."""
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    files = {name: path for name, path in files.items() if path}
    given = [bool(files), bool(data.data_dir), bool(data.dataset_name), data.builtin_data]
    if sum(given) > 1:
        raise UserError(
            "only one source of data can be given: --train_file, --validation_file and --test_file, or --data_dir, or "
            "--dataset_name, or --builtin_data"
        )
    if files:
        if "train" not in files and for_training:
            raise UserError(
                f"--{next(iter(files))}_file requires --train_file, or --do_train false with --model_name_or_path"
            )
        return {name: load_file(path) for name, path in files.items()}, f"`{next(iter(files.values()))}`"
    if data.data_dir:
        return load_task_folder(task, Path(data.data_dir)), f"`{data.data_dir}`"
    if data.builtin_data or (task.name == "custom" and not data.dataset_name):
        return builtin_splits(task), "toy data made from Python's documentation"
    if task.name == "custom":
        splits = dict(load_named(data.dataset_name, data.dataset_config_name))
        if "validation" not in splits and "test" in splits:
            splits["validation"] = splits.pop("test")
        return splits, f"`{data.dataset_name}`"
    name = data.dataset_name or GLUE_ON_THE_HUB
    try:
        splits = dict(load_named(name, data.dataset_config_name or task.name))
        if task.name == "mnli" and name == GLUE_ON_THE_HUB:
            splits |= {"ax": load_named(name, "ax")["test"]}
    except UserError as error:
        raise UserError(f"{error}; without a network use --data_dir, --train_file or --builtin_data true") from error
    return splits, f"`{name}`, {task.name}"


def load_task_folder(task: GlueTask, root: Path) -> dict[str, Dataset]:
    """Load the files train, validation and test of the folder with the name of the task.

    MNLI has validation_matched and validation_mismatched; AX is a test file in its own folder. Files may be shards such
    as train-00000-of-00002.parquet.
    """
    require_path(root, "--data_dir")
    folders = {normal_name(folder.name): folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    if task.name not in folders:
        known = ", ".join(folder.name for folder in folders.values()) or "no folders"
        raise UserError(f"--data_dir {str(root)!r} has no folder {task.name!r}; it has {known}")
    parts = ["train", "validation", "test", *(part for _, part in task.validation), *task.test_parts.values()]
    paths = {part: _data_files(folders[task.name], part) for part in dict.fromkeys(parts)}
    if task.name == "mnli" and "ax" in folders:
        paths["ax"] = _data_files(folders["ax"], "test")
    return {part: load_file(path) for part, path in paths.items() if path}


def _data_files(folder: Path, part: str) -> str | None:
    for suffix in (suffix for suffix in FILE_TYPES if suffix != ".txt"):
        if (folder / f"{part}{suffix}").is_file():
            return str(folder / f"{part}{suffix}")
        if any(folder.glob(f"{part}-*{suffix}")):
            return str(folder / f"{part}-*{suffix}")
    return None


def normal_name(name: str) -> str:
    """Return "sst2" for "SST-2" and "sst_2"."""
    return name.lower().replace("-", "").replace("_", "")
