"""What the example scripts share: arguments, data, models, the Trainer and error messages."""

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


FILE_TYPES = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class UserError(Exception):
    """A mistake in what the user gave; shown as one line, without a traceback."""


def run(main: Callable[[], Any]) -> None:
    """Runs a script; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def user_errors(prefix: str, *kinds: type[Exception]):
    """Turns errors of these kinds, which other libraries raise for wrong input, into a one-line `UserError`."""
    try:
        yield
    except kinds as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise UserError(f"{prefix}: {' '.join(lines[:3]) or type(cause).__name__}") from error


# ------------------------------------------------------------------------------------------------------- arguments


@dataclass
class ModelArguments:
    """A new model by preset or by flags, or an existing one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a model to go on with."}
    )
    preset: str | None = field(default=None, metadata={"help": "Named size of the paper, such as lion-s-base."})
    mask_type: str | None = field(
        default=None, metadata={"help": "Decay: lit (none), decay (LION-D), selective (LION-S)."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the model."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads; each has a decay of its own."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the MLP, 4 * hidden_size by default."}
    )
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout."})
    initializer_range: float | None = field(
        default=None,
        metadata={"help": "Deviation of the initial weights."},
    )
    pos_emb: bool | None = field(default=None, metadata={"help": "Learned positions."})
    format: str = field(default="auto", metadata={"help": "How LION is computed: auto, attention, rnn or chunk."})

    def overrides(self) -> dict[str, Any]:
        """The options of the configuration that were given, by name."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {k: v for k, v in given.items() if k not in ("model_name_or_path", "preset", "format")}


@dataclass
class DataArguments:
    """A data set of the Hub by name, or files; with neither, a built-in data set that needs no network."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training file."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation file; else a part is held out."})
    validation_share: float = field(default=0.05, metadata={"help": "Part held out where no validation data is given."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many validation rows only."})


@dataclass
class LionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the paper's recipes where they suit small runs."""

    output_dir: str | None = field(default=None, metadata={"help": "Where everything is written. Required."})
    do_train: bool = field(default=True, metadata={"help": "Train (otherwise only evaluate)."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate at the end."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint folder, or 'no' to start anew; by default the last one in output_dir, if any."},
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=20, metadata={"help": "Log the loss every so many steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps, or a share of all steps if below 1."})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin memory; of use with an accelerator."}
    )
    seed: int = field(default=17, metadata={"help": "Seed of weights, data order, masks and held-out data."})


class _Parser(HfArgumentParser):
    """Errors are exceptions, not a page of usage."""

    def error(self, message: str):
        raise UserError(message)


def parse_arguments(classes: Sequence[type], argv: Sequence[str], description: str | None = None) -> tuple:
    """Flags; or one YAML or JSON file with the flags' names as keys, which flags after it override.

    Raises:
        UserError: for unknown flags or keys, wrong values, and a missing `output_dir`.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = _flags_of_file(Path(argv[0])) + argv[1:]
    parser = _Parser(classes, description=description, allow_abbrev=False)
    with user_errors("wrong arguments", ValueError, OSError, ImportError):
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        raise UserError(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    training = next(x for x in parsed if isinstance(x, TrainingArguments))
    if "--output_dir" not in {flag.split("=")[0].replace("-dir", "_dir") for flag in argv}:
        raise UserError("--output_dir is required: the folder that everything is written to")
    make_output_dir(training.output_dir)
    return tuple(parsed)


def _flags_of_file(path: Path) -> list[str]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"{str(path)!r} is neither a flag nor a .yaml, .yml or .json file of arguments")
    require_path(path, "argument file")
    with user_errors(f"{path} is not valid", yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, such as 'learning_rate: 0.001'")
    flags = []
    for name, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, items)]
    return flags


def make_output_dir(folder: str | Path) -> Path:
    """Makes the folder and proves that it can be written to."""
    folder = Path(folder)
    with user_errors(f"cannot write to --output_dir {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    return folder


def require_path(path: str | Path, what: str) -> Path:
    """The path, if it exists."""
    if not Path(path).exists():
        raise UserError(f"{what} {str(path)!r} does not exist")
    return Path(path)


# ------------------------------------------------------------------------------------------------------------ data


def load_splits(data: DataArguments, training: TrainingArguments, load_file: Callable[[str], Any]) -> tuple:
    """Training and validation data by Hub name, or from `train_file` and `validation_file` through `load_file`."""
    if data.dataset_name:
        if data.train_file or data.validation_file:
            raise UserError("give either --dataset_name or --train_file and --validation_file")
        with reading(f"cannot load data set {data.dataset_name!r}"):
            splits = datasets.load_dataset(data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise UserError(f"data set {data.dataset_name!r} has no split 'train'; it has {', '.join(splits)}")
        held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
        return hold_out(splits["train"], held_out, data, training.seed)
    if not data.train_file:
        raise UserError("--validation_file needs --train_file too")
    held_out = load_file(data.validation_file) if data.validation_file else None
    return hold_out(load_file(data.train_file), held_out, data, training.seed)


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


def load_file(path: str) -> datasets.Dataset:
    """One txt (a row per line), csv, json, jsonl or parquet file."""
    file = require_path(path, "data file")
    if file.suffix not in FILE_TYPES:
        raise UserError(f"{path!r} ends in {file.suffix!r}; allowed are {', '.join(FILE_TYPES)}")
    if file.stat().st_size == 0:
        raise UserError(f"data file {path!r} is empty")
    with reading(f"cannot read {path!r}"):
        return datasets.load_dataset(FILE_TYPES[file.suffix], data_files=str(file), split="train")


@contextmanager
def reading(prefix: str):
    """`datasets` hides the cause of a failure in the exception below it."""
    with user_errors(prefix, UserError, OSError, ValueError, TypeError, NotImplementedError, DatasetsError):
        try:
            yield
        except DatasetGenerationError as error:
            raise UserError(error.__cause__ or error) from error


def require_column(dataset, column: str, flag: str) -> None:
    """Raises a `UserError` that names the columns there are."""
    if column not in dataset.column_names:
        raise UserError(
            f"there is no column {column!r}; the columns are {', '.join(dataset.column_names)} (set {flag})"
        )


# ----------------------------------------------------------------------------------------------------------- model


def existing_config(name_or_path: str, model_type: str) -> PreTrainedConfig:
    """Configuration of a checkpoint by Hub name or folder, which must be of this kind."""
    if Path(name_or_path).exists() and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(f"{name_or_path!r} is not a checkpoint: it has no config.json")
    with user_errors(f"cannot load {name_or_path!r}", OSError, ValueError, StrictDataclassError):
        config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type != model_type:
        raise UserError(f"{name_or_path!r} is a {config.model_type!r} model; this script trains {model_type!r}")
    return config


def build_model(auto_class, config_class, model: ModelArguments, defaults: dict[str, Any], fixed: dict[str, Any]):
    """The model to train: an existing one, a preset, or one of the sizes given by flags.

    Args:
        auto_class: such as `AutoModelForMaskedLM`.
        config_class: `LionConfig` or `LionVisionConfig`.
        model: the arguments.
        defaults: options of a new model where neither preset nor flags say otherwise.
        fixed: options that the data decides, such as the size of the vocabulary.
    """
    overrides = model.overrides()
    if model.model_name_or_path:
        if model.preset or overrides:
            first = "preset" if model.preset else next(iter(overrides))
            raise UserError(f"--model_name_or_path says what the model is; it cannot be combined with --{first}")
        existing_config(model.model_name_or_path, config_class.model_type)
        labels = {k: v for k, v in fixed.items() if k in ("id2label", "label2id", "problem_type")}
        with user_errors(f"cannot load {model.model_name_or_path!r}", OSError, ValueError, StrictDataclassError):
            return auto_class.from_pretrained(
                model.model_name_or_path, format=model.format, ignore_mismatched_sizes=bool(labels), **labels
            )
    if not model.preset:
        overrides = {**defaults, **overrides}
    if "hidden_size" in overrides:
        overrides.setdefault("intermediate_size", 4 * overrides["hidden_size"])
    with user_errors("wrong model options", ValueError, StrictDataclassError):
        if model.preset:
            config = config_class.from_preset(model.preset, **overrides, **fixed, format=model.format)
        else:
            config = config_class(**overrides, **fixed, format=model.format)
    return auto_class.from_config(config)


class LionTrainer(Trainer):
    """Trainer whose weight decay spares biases, norms, decays, the class token, position tables and 1-D parameters."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        spared = ("decay_logit", "decay_proj", "cls_token", "position_embeddings")
        sizes = {name: parameter.dim() for name, parameter in model.named_parameters(remove_duplicate=False)}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if sizes[name] > 1 and not any(word in name for word in spared)]


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The checkpoint folder to go on from, if any (see `resume_from_checkpoint`)."""
    wanted = training.resume_from_checkpoint
    if not training.do_train or str(wanted).lower() in ("no", "false"):
        return None
    if wanted is None:
        return get_last_checkpoint(training.output_dir)
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {wanted!r} is not a checkpoint folder: it has no trainer_state.json")
    return wanted


def check_resumable(checkpoint: str, config: PreTrainedConfig) -> None:
    """Raises a `UserError` if the checkpoint holds a model of another shape."""
    stored, new = existing_config(checkpoint, config.model_type).to_dict(), config.to_dict()
    ignored = {"format", "chunk_size", "transformers_version", "dtype", "architectures", "_name_or_path"}
    for name, value in new.items():
        if name not in ignored and stored.get(name) != value:
            raise UserError(
                f"{checkpoint!r} holds another model: {name} is {stored.get(name)!r} there and {value!r} here; choose "
                "another --output_dir, or --resume_from_checkpoint no to start anew"
            )
