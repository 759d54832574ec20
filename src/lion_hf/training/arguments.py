"""Arguments of the example scripts, from flags or one file, and one-line messages for what a user got wrong."""

import dataclasses
import difflib
import json
import os
import shutil
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks


Smoke = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]
ARGUMENT_FILES = (".yaml", ".yml", ".json")


class UserError(Exception):
    """A mistake in what the user gave; shown as one line, without a traceback."""


def run(main: Callable[[], Any]) -> None:
    """Runs a script; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint, if one was saved", file=sys.stderr)
        sys.exit(130)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()  # ends its threads, which would abort the process if they met the interpreter's end


@contextmanager
def user_errors(prefix: str, *kinds: type[Exception]):
    """Turns errors of these kinds, which other libraries raise for wrong input, into a one-line `UserError`."""
    try:
        yield
    except kinds as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise UserError(f"{prefix}: {' '.join(lines[:3]) or type(cause).__name__}") from error


# Model arguments that are no options of a configuration, or are passed on their own.
_NO_OPTIONS = ("model_name_or_path", "model_type", "warm_start", "warm_start_distillation", "preset", "format")


@dataclass
class ModelArguments:
    """A new model by preset or by flags, one with the weights of a BERT or ViT, or an existing one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a model to go on with."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Kind of a new model: LION by default; bert, modernbert or vit are the baselines."},
    )
    warm_start: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a BERT or ViT whose weights a new LION starts with."}
    )
    warm_start_distillation: float = field(
        default=0.0,
        metadata={"help": "Weight, in the loss, of the distance to the hidden states of the --warm_start model."},
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
    softmax_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers, counted from 0, that keep softmax attention (a hybrid)."}
    )
    format: str = field(default="auto", metadata={"help": "How LION is computed: auto, attention, rnn or chunk."})

    def __post_init__(self):
        require_at_least(self, 1, *(name for name, value in dataclasses.asdict(self).items() if type(value) is int))
        if self.warm_start_distillation < 0:
            raise ValueError(f"--warm_start_distillation is {self.warm_start_distillation}; it must not be negative")
        if self.warm_start_distillation and not self.warm_start:
            raise ValueError("--warm_start_distillation needs --warm_start, whose hidden states it learns")

    @property
    def source(self) -> str | None:
        """The existing model that the weights, and the tokenizer or image processor, come from."""
        return self.model_name_or_path or self.warm_start

    def overrides(self) -> dict[str, Any]:
        """The options of the configuration that were given, by name."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {k: v for k, v in given.items() if k not in _NO_OPTIONS}


@dataclass
class TextModelArguments(ModelArguments):
    layer_norm_after: bool | None = field(
        default=None, metadata={"help": "LayerNorm over all heads after mixing; default: LION-LIT and warm starts."}
    )


@dataclass
class DataArguments:
    """A data set of the Hub by name, or files; with neither, a built-in data set that needs no network."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training file, or a pattern of files."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation file; else a part is held out."})
    validation_share: float = field(default=0.05, metadata={"help": "Part held out where no validation data is given."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many validation rows only."})

    def __post_init__(self):
        require_at_least(self, 1, "max_train_samples", "max_eval_samples")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation_share is {self.validation_share}; it is a share of the rows, 0 to 1")


@dataclass
class LionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the paper's recipes where they suit small runs."""

    output_dir: str | None = field(default=None, metadata={"help": "Where everything is written. Required."})
    do_train: bool = field(default=True, metadata={"help": "Train (otherwise only evaluate)."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate, at the end and as --eval_strategy says."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'no' to start anew; by default the last complete one in output_dir, if any."
        },
    )
    eval_strategy: Literal["no", "steps", "epoch"] = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(
        default="epoch", metadata={"help": "When to save a checkpoint."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=20, metadata={"help": "Log the loss every so many steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size per device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps, or a share of all steps if below 1."})
    lr_floor: float = field(
        default=0.0, metadata={"help": "Last learning rate of the linear and cosine schedules, as a share of the peak."}
    )
    lr_warmup_start: float = field(
        default=0.0, metadata={"help": "First learning rate of the warm-up, as a share of the peak."}
    )
    decay_all: bool = field(
        default=False,
        metadata={
            "help": "Weight decay for every parameter, as the authors' text recipe has it, not for matrices only."
        },
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin memory; of use with an accelerator."}
    )
    seed: int = field(default=17, metadata={"help": "Seed of weights, data order, masks and held-out data."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The scripts choose the columns themselves."})

    def __post_init__(self):
        if not self.do_eval:
            self.eval_strategy = "no"
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 0, "learning_rate", "num_train_epochs", "seed")
        super().__post_init__()
        get_reporting_integration_callbacks(self.report_to)  # ValueError for a name that is none
        for name in ("lr_floor", "lr_warmup_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it is a share of the learning rate, 0 to 1")
            if getattr(self, name) and self.lr_scheduler_type not in ("linear", "cosine"):
                raise ValueError(f"--{name} needs the linear or cosine schedule, not {self.lr_scheduler_type.value!r}")


def require_at_least(arguments: Any, least: int, *names: str) -> None:
    """Raises ValueError for an argument that is given and smaller."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")


class _Parser(HfArgumentParser):
    """Errors are exceptions, not a page of usage."""

    def error(self, message: str):
        raise UserError(message)


def parse_arguments(
    classes: Sequence[type], argv: Sequence[str], description: str | None = None, smoke: Smoke | None = None
) -> tuple:
    """Flags; or one YAML or JSON file with the flags' names as keys, which flags after it override.

    Args:
        classes: dataclasses of arguments, one of them `TrainingArguments`.
        argv: what follows the script's name.
        description: the first lines of `--help`.
        smoke: what the flag `--smoke` changes in the file's values, None for those it takes away, or a function of these
            values that says so; flags still override.

    Raises:
        UserError: for unknown flags or keys, wrong values, and a missing `output_dir`.
    """
    argv = _merge(argv, smoke)
    if smoke is not None:
        description = f"{description}\n--smoke shrinks any recipe to two steps of a tiny model on built-in data."
    parser = _Parser(classes, description=description, allow_abbrev=False)
    with user_errors("wrong arguments", ValueError, OSError, ImportError):
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown and not unknown[0].startswith("-"):
        is_file = Path(unknown[0]).suffix in ARGUMENT_FILES
        hint = "a file of arguments comes before all flags" if is_file else "no flag before it takes it"
        raise UserError(f"unexpected {unknown[0]!r}: {hint}")
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        raise UserError(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    training = next(x for x in parsed if isinstance(x, TrainingArguments))
    if "--output_dir" not in {flag.split("=")[0].replace("-dir", "_dir") for flag in argv}:
        raise UserError("--output_dir is required: the folder that everything is written to")
    model = next((x for x in parsed if isinstance(x, ModelArguments)), None)
    if not training.do_train and model is not None and not model.model_name_or_path:
        raise UserError("--do_train false evaluates a trained model: name it with --model_name_or_path")
    make_output_dir(training.output_dir)
    return tuple(parsed)


def given_values(classes: Sequence[type], argv: Sequence[str], smoke: Smoke | None = None) -> dict[str, Any]:
    """What a file and flags say by themselves, by name: the parsed arguments without the defaults."""
    parser = _Parser(classes, allow_abbrev=False)
    for action in parser._actions:
        action.default = SUPPRESS
    return vars(parser.parse_args(_merge(argv, smoke)))


def _merge(argv: Sequence[str], smoke: Smoke | None) -> list[str]:
    """The file's values, as `--smoke` changes them, and the flags after it, all as flags."""
    argv, values = list(argv), {}
    if argv and not argv[0].startswith("-"):
        values = _read_values(Path(argv.pop(0)))
    if smoke is not None and "--smoke" in argv:
        argv.remove("--smoke")
        folder = {"output_dir": f"{values['output_dir']}-smoke"} if "output_dir" in values else {}
        changes = smoke(values) if callable(smoke) else smoke
        values |= {"max_steps": 2, "use_cpu": True, "bf16": False, "save_strategy": "no"} | changes | folder
    return _flags(values) + argv


def _read_values(path: Path) -> dict[str, Any]:
    if path.suffix not in ARGUMENT_FILES:
        raise UserError(f"{str(path)!r} is neither a flag nor a .yaml, .yml or .json file of arguments")
    require_path(path, "argument file")
    with user_errors(f"{path} is not valid", yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, such as 'learning_rate: 0.001'")
    return values


def _flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is False and name.endswith("_strategy"):  # YAML reads `no` as False
            value = "no"
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


def require_disk(folder: str | Path, num_bytes: int) -> None:
    """Raises a `UserError` if the disk has no room for what a run is known to write."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{str(folder)!r} has {free / 1e9:.1f} GB free, but this run writes {num_bytes / 1e9:.1f} GB (checkpoints with "
            "optimizer states, and the final model): free space, choose another --output_dir, or a smaller "
            "--save_total_limit"
        )


def require_path(path: str | Path, what: str) -> Path:
    """The path, if it exists."""
    if not Path(path).exists():
        raise UserError(f"{what} {str(path)!r} does not exist")
    return Path(path)
