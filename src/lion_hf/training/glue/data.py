"""Rows of run_glue.py: texts and labels, their checks, and their tokens."""

import dataclasses
import math
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data import classes_of_model, columns_of, hold_out, naming_builtin_data, say_split_off
from ..errors import UserError
from .sources import GlueArguments, load_splits
from .tasks import CUSTOM, GlueTask


logger = logging.get_logger(__name__)

# The held-out rows of a task are the same for every seed.
HOLD_OUT_SEED = 17


class TaskData(NamedTuple):
    """Rows of a task, with its text columns and "labels" (`test` has no labels).

    The keys of `validation` are the prefixes of its metrics, those of `test` the names of the prediction files. `index`
    holds the numbers of the test rows in these files. `task` has the columns and labels of custom data sets too.
    """

    task: GlueTask
    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]
    index: dict[str, list]
    source: str


def load_task(task: GlueTask, data: GlueArguments, evaluated: PreTrainedConfig | None = None) -> TaskData:
    """Read and check the rows of a task.

    If a model is only evaluated, its configuration provides the classes, and validation or test rows are enough.
    """
    splits, source = load_splits(task, data, evaluated is None)
    if "train" not in splits and evaluated is None:
        raise UserError(f"{source} has no split 'train'; it has {', '.join(splits)}")
    first = next((name for name in splits if name == "train" or name.startswith("validation")), None)
    part = splits[first or next(iter(splits))]
    task, numbers = dataclasses.replace(task, columns=text_columns(task, data, part, first is not None)), {}
    if first is not None:
        task, numbers = settle_labels(task, data, part, evaluated)
    if evaluated is not None:
        with naming_builtin_data(not (data.name("") or data.test_file or data.builtin_data)):
            task, numbers = labels_of_model(task, numbers, evaluated, first is not None)
    train, validation = training_rows(task, data, splits, numbers, evaluated)
    tests = test_rows(task, splits)
    test = {name: part.select_columns(list(task.columns)) for name, part in tests.items()}
    index = {
        name: part["idx"][:] if "idx" in part.column_names else list(range(len(part))) for name, part in tests.items()
    }
    counts = [f"{len(train):,} training"] if train is not None else []
    counts += [" + ".join(f"{len(part):,}" for part in validation.values()) + " validation"] if validation else []
    counts += [] if train is not None else [f"{len(part):,} test" for part in test.values()]
    return TaskData(task, train, validation, test, index, f"{source}: {' and '.join(counts)} rows.")


def training_rows(
    task: GlueTask,
    data: GlueArguments,
    splits: dict[str, Dataset],
    numbers: dict[Any, int],
    evaluated: PreTrainedConfig | None,
) -> tuple[Dataset | None, dict[str, Dataset]]:
    """Return training rows, and validation rows by the prefix of their metrics, held out if there are none."""
    parts = {word: splits[name] for word, name in task.validation if name in splits}
    first = task.validation[0][0]
    if first not in parts and "validation" in splits:
        parts[first] = splits["validation"]
    parts = {word: labelled(part, task, data, numbers, "validation") for word, part in parts.items()}
    if "train" not in splits:
        return None, {word: hold_out(part, part, data, HOLD_OUT_SEED)[1] for word, part in parts.items()}
    if evaluated is not None and first not in parts:
        say_split_off(data, HOLD_OUT_SEED)
    whole = labelled(splits["train"], task, data, numbers, "training")
    train, held_out = hold_out(whole, parts.get(first), data, HOLD_OUT_SEED)
    validation = {first: held_out} | {
        word: hold_out(whole, part, data, HOLD_OUT_SEED)[1] for word, part in parts.items() if word != first
    }
    if not task.labels and min(map(len, validation.values())) < 2:
        raise UserError(
            "the correlation of a single validation row is undefined: give more rows, or a larger --validation_share"
        )
    return train, validation


def test_rows(task: GlueTask, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Return test rows by the name of their prediction file; the MNLI model predicts AX too."""
    parts = {name: splits[part] for name, part in (*task.test_parts.items(), ("AX", "ax")) if part in splits}
    if "test" in splits:
        parts[next(iter(task.test_parts))] = splits["test"]
    for part in parts.values():
        for column in task.columns:
            require_text(part, column, "test")
    return {name: part for name, part in parts.items() if len(part)}


# ------------------------------------------------------------------------------------------------ texts and labels


# Names of text columns that need no flag, in this order.
TEXT_COLUMNS = (("sentence1", "sentence2"), ("text",), ("sentence",))


def text_columns(task: GlueTask, data: GlueArguments, part: Dataset, labelled: bool) -> tuple[str, ...]:
    """Return the text columns: those of the arguments or of the task, else the first usual names that exist.

    Raises:
        UserError: for missing columns, including the label column of a labelled part. It names all of them.
    """
    there = set(part.column_names)
    usual = task.columns or next((names for names in TEXT_COLUMNS if there.issuperset(names)), ())
    given = (data.sentence1_column, data.sentence2_column)
    columns = [name or (usual[i] if i < len(usual) else None) for i, name in enumerate(given)]
    columns = tuple(column for column in columns if column is not None)
    problems = []
    if not columns:
        accepted = "; ".join(" and ".join(map(repr, names)) for names in TEXT_COLUMNS)
        problems.append(f"no text column (accepted are {accepted}, or any name set by --sentence1_column)")
    problems += [
        f"no column {column!r} (set --sentence{i + 1}_column)"
        for i, column in enumerate(columns)
        if column not in there
    ]
    if labelled and data.label_column not in there:
        problems.append(f"no column {data.label_column!r} (set --label_column)")
    if problems:
        raise UserError(f"there is {', and '.join(problems)}; {columns_of(part)}")
    return columns


def require_same(part: Dataset, column: str, name: str) -> None:
    """Raise a `UserError` if a part lacks a column of the training data."""
    if column not in part.column_names:
        raise UserError(
            f"the {name} data has no column {column!r}, which the training data has; it has "
            + ", ".join(part.column_names)
        )


def require_text(part: Dataset, column: str, name: str) -> None:
    """Raise a `UserError` if a column is missing or does not hold text."""
    require_same(part, column, name)
    kind = getattr(part.features[column], "dtype", type(part.features[column]).__name__)
    if kind not in ("string", "large_string") and any(value is not None for value in part[column]):
        raise UserError(f"column {column!r} of the {name} data holds {kind}, not text")


def settle_labels(
    task: GlueTask, data: GlueArguments, part: Dataset, evaluated: PreTrainedConfig | None = None
) -> tuple[GlueTask, dict[Any, int]]:
    """Return the task, with the labels of the training data if it is not a GLUE task, and the number of each label.

    If a model is only evaluated, it decides whether labels are numbers to predict, and classes may be missing.
    """
    column = data.label_column
    feature = part.features[column]
    if task.name != CUSTOM.name:
        named = {name: i for i, name in enumerate(task.labels)}
        return task, named | {str(i): i for i in named.values()} | {i: i for i in named.values()}
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    if not isinstance(feature, ClassLabel) and not kind.startswith(
        ("float", "double", "int", "uint", "bool", "string", "large_string")
    ):
        raise UserError(
            f"column {column!r} holds {kind}, not labels: they must be text, whole numbers, or numbers to predict"
        )
    if are_numbers(data, part, kind, evaluated):
        return dataclasses.replace(task, labels=(), score=("spearmanr",)), {}
    if isinstance(feature, ClassLabel):
        return dataclasses.replace(task, labels=tuple(feature.names)), {i: i for i in range(len(feature.names))}
    values = sorted({value for value in part[column] if value is not None})
    if evaluated is None:
        check_classes(values, len(part), column)
    names = [f"{value:g}" if kind.startswith(("float", "double")) else str(value) for value in values]
    return dataclasses.replace(task, labels=tuple(names)), {value: i for i, value in enumerate(values)}


def are_numbers(data: GlueArguments, part: Dataset, kind: str, evaluated: PreTrainedConfig | None) -> bool:
    """Return whether labels are numbers to predict rather than classes; warn if this may be unexpected."""
    column, fractional = data.label_column, kind.startswith(("float", "double"))
    whole = fractional and all(value is not None and value.is_integer() for value in part[column])
    if evaluated is not None:
        return evaluated.num_labels == 1 or (fractional and not whole)
    if data.label_type == "numbers" and not (fractional or kind.startswith(("int", "uint"))):
        raise UserError(f"column {column!r} holds {kind}, so --label_type numbers cannot be")
    if data.label_type is not None:
        return data.label_type == "numbers"
    if whole:
        logger.warning(
            f"column {column!r} holds whole numbers with a decimal point: they are predicted as numbers. Set "
            "--label_type classes to use them as classes"
        )
    elif kind.startswith(("int", "uint")):
        values = sorted({value for value in part[column] if value is not None})
        if len(values) > 2 or not set(values) <= {0, 1}:
            shown = ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
            logger.warning(
                f"column {column!r} holds whole numbers, {shown}: they are used as classes without an order. Set "
                "--label_type numbers to predict them as numbers"
            )
    return fractional


def labels_of_model(
    task: GlueTask, numbers: dict[Any, int], config: PreTrainedConfig, labelled: bool
) -> tuple[GlueTask, dict[Any, int]]:
    """Return task and labels with the numbering of a trained model; its own labels if no row is labelled."""
    if task.name == CUSTOM.name and not labelled:
        names = () if config.num_labels == 1 else tuple(config.id2label[i] for i in range(config.num_labels))
        return dataclasses.replace(task, labels=names), {}
    if not task.labels:
        if config.num_labels != 1:
            raise UserError(f"the labels are numbers to predict, but the model has {config.num_labels} classes")
        return task, numbers
    classes = tuple(classes_of_model(config, list(task.labels)))
    if task.name != CUSTOM.name and classes != task.labels:
        raise UserError(f"the model has the classes {', '.join(classes)}; {task.title} has {', '.join(task.labels)}")
    return dataclasses.replace(task, labels=classes), {
        value: classes.index(task.labels[i]) for value, i in numbers.items()
    }


def check_classes(values: list, rows: int, column: str) -> None:
    """Raise a `UserError` if the distinct values of a column cannot be classes."""
    if len(values) == 1:
        raise UserError(
            f"column {column!r} has the same value {values[0]!r} in every row; at least two classes are required"
        )
    if len(values) > 20 and len(values) > rows / 2:
        what = "text" if isinstance(values[0], str) else "row numbers"
        raise UserError(
            f"column {column!r} has {len(values):,} different values in {rows:,} rows, such as "
            f"{str(values[0])[:60]!r}: this looks like {what}, not classes. Set --label_column; numbers to predict "
            "must have a decimal point"
        )


def labelled(part: Dataset, task: GlueTask, data: GlueArguments, numbers: dict[Any, int], name: str) -> Dataset:
    """Return the text columns and "labels" of the rows that hold text; every label is a class or a number."""
    if len(part) == 0:
        raise UserError(f"the {name} data is empty")
    for column in task.columns:
        require_text(part, column, name)
    require_same(part, data.label_column, name)
    texts = [part[column][:] for column in task.columns]
    kept = [i for i, row in enumerate(zip(*texts, strict=True)) if any(text and text.strip() for text in row)]
    if not kept:
        raise UserError(f"the {name} data holds no text in column {' and '.join(map(repr, task.columns))}")
    if len(kept) < len(part):
        logger.warning(f"{len(part) - len(kept):,} of {len(part):,} {name} rows hold no text and are left out")
    feature, values = part.features[data.label_column], part[data.label_column][:]
    labels = [_label(values[i], feature, task, numbers, f"row {i + 1} of the {name} data", data) for i in kept]
    return part.select(kept).select_columns(list(task.columns)).add_column("labels", labels)


def _label(
    value: Any, feature, task: GlueTask, numbers: dict[Any, int], where: str, data: GlueArguments
) -> int | float:
    column = f"column {data.label_column!r}"
    unlabelled = value == -1 and (task.name != "custom" or isinstance(feature, ClassLabel))
    if value is None or value != value or (unlabelled and task.labels):
        raise UserError(f"{where} has no label in {column} ({value}); remove such rows")
    if not task.labels:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise UserError(f"{where} has {value!r} in {column}, which is not a finite number")
    if isinstance(feature, ClassLabel) and task.name != "custom" and feature.names[value] in numbers:
        value = feature.names[value]
    if value not in numbers:
        allowed = ", ".join(task.labels[:10]) + (", ..." if len(task.labels) > 10 else "")
        source = "among the training classes" if task.name == "custom" else "one of the classes"
        raise UserError(f"{where} has the label {value!r} in {column}, which is not {source}: {allowed}")
    return numbers[value]


# ---------------------------------------------------------------------------------------------------------- tokens


def all_texts(part: Dataset, task: GlueTask) -> Dataset:
    """Return every text of a part, in the single column "text"."""
    return Dataset.from_dict({"text": [text for column in task.columns for text in part[column] if text]})


def tokenize(part: Dataset, task: GlueTask, tokenizer, max_length: int, name: str) -> Dataset:
    """Return rows of token ids, cut at `max_length` tokens; the longer text of a pair is cut first."""
    arguments = {"tokenizer": tokenizer, "columns": task.columns, "max_length": max_length}
    return part.map(
        encode, batched=True, remove_columns=list(task.columns), fn_kwargs=arguments, desc=f"Tokenizing {name} text"
    )


def encode(batch: dict[str, list], tokenizer, columns: tuple[str, ...], max_length: int) -> dict[str, list]:
    """Tokenize one or two columns; a missing text of a pair counts as empty."""
    texts = ([text or "" for text in batch[column]] for column in columns)
    return dict(tokenizer(*texts, truncation=True, max_length=max_length))
