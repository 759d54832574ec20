"""Parse flags, or one argument file and the flags after it, into dataclasses of arguments."""

import argparse
import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

from .arguments import ModelArguments
from .errors import UserError, make_output_dir, user_errors
from .recipes import ARGUMENT_FILES, SECTION, read_values, values_of


logger = logging.get_logger(__name__)

Smoke = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


# Flags of `TrainingArguments` that `--help` lists with those of the script.
_OFTEN_USED = {"max_steps", "num_train_epochs", "weight_decay", "lr_scheduler_type", "gradient_accumulation_steps"}
_OFTEN_USED |= {"bf16", "use_cpu", "eval_steps", "save_steps", "load_best_model_at_end", "metric_for_best_model"}
_OFTEN_USED |= {"dataloader_num_workers", "report_to", "disable_tqdm"}


_ABOUT_FILES = """\
FILE is a YAML or JSON file with names of flags as keys; flags after it override its values. --preset chooses a model
of a file that serves several, --phase a run of a file that describes several. --smoke shrinks any recipe to a few
steps of a tiny model on built-in data. Flags may be written with hyphens: --output-dir.
"""


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help that keeps the newlines of the description and shows one spelling of each flag."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings[:2] if action.dest == "help" else action.option_strings[:1])
        values = "NUMBER" if action.type in (int, float) else "TEXT"
        values = "true|false" if action.type is string_to_bool else values
        return f"{action.option_strings[0]} {self._format_args(action, values)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The help text with the default, unless there is none or the text names it."""
        if action.default is None or action.nargs == 0 or "default" in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Raises `UserError` instead of printing a page of usage. `--help` lists the script's own flags first."""

    def __init__(self, classes: Sequence[type], **kwargs):
        usage = "%(prog)s [FILE] --output_dir FOLDER [FLAGS]"
        super().__init__(classes, formatter_class=_Formatter, usage=usage, **kwargs)
        own = _OFTEN_USED | {
            name
            for cls in classes
            for base in cls.__mro__
            if base not in TrainingArguments.__mro__
            for name in inspect.get_annotations(base)
        }
        training = self.add_argument_group("training")
        others = self.add_argument_group("all other flags of Transformers' TrainingArguments")
        flags = self._optionals._group_actions
        for action in [action for action in flags if action.dest != "help"]:
            flags.remove(action)
            (training if action.dest in own else others)._group_actions.append(action)

    def error(self, message: str):
        raise UserError(message)


def parse_arguments(
    classes: Sequence[type], argv: Sequence[str], description: str | None = None, smoke: Smoke | None = None
) -> tuple:
    """Parse flags, or one file with the names of flags as keys (see `recipes`) that flags after it override.

    Args:
        classes: dataclasses of arguments, one of them `TrainingArguments`.
        argv: the arguments after the name of the script.
        description: the first lines of `--help`.
        smoke: values that the flag `--smoke` sets over those of the file (None removes one), or a function from the
            values of the file to these. Flags still override them.

    Raises:
        UserError: for unknown flags or keys, wrong values, an unknown or missing preset, and a missing `output_dir`.
    """
    given, argv = argv, _merge(argv, smoke)
    if smoke is not None:
        description = f"{description}\n{_ABOUT_FILES}"
    parser = _Parser(classes, description=description, allow_abbrev=False)
    with user_errors("wrong arguments", ValueError, OSError, ImportError):
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown and not unknown[0].startswith("-"):
        is_file = Path(unknown[0]).suffix in ARGUMENT_FILES
        hint = "an argument file must come before all flags" if is_file else "it does not belong to a flag"
        raise UserError(f"unexpected {unknown[0]!r}: {hint}")
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.7)
        if unknown[0] not in given and not given[0].startswith("-"):
            hint = f"did you mean {near[0].removeprefix('--')!r}?" if near else "is it for another script?"
            key = unknown[0].removeprefix("--")
            raise UserError(f"{given[0]} sets {key!r}, which is not a flag of this script; {hint}")
        raise UserError(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    training = next(x for x in parsed if isinstance(x, TrainingArguments))
    if "--output_dir" not in {flag.split("=")[0].replace("-dir", "_dir") for flag in argv}:
        raise UserError("--output_dir is required: the folder for everything that the run writes")
    model = next((x for x in parsed if isinstance(x, ModelArguments)), None)
    if not training.do_train and model is not None and not model.model_name_or_path:
        raise UserError("--do_train false requires --model_name_or_path, the trained model to evaluate")
    make_output_dir(training.output_dir)
    is_recipe = smoke is not None and not given[0].startswith("-") and SECTION in read_values(given[0])
    if is_recipe and "--smoke" not in given and training.device.type == "cpu":
        logger.warning(
            f"{given[0]} is a recipe for GPUs, and no GPU is available; --smoke runs a tiny version on a CPU in seconds"
        )
    return tuple(parsed)


def given_values(classes: Sequence[type], argv: Sequence[str], smoke: Smoke | None = None) -> dict[str, Any]:
    """Return the values that a file and flags set, by name: the parsed arguments without the defaults."""
    parser = _Parser(classes, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(_merge(argv, smoke)))


def _merge(argv: Sequence[str], smoke: Smoke | None) -> list[str]:
    """Return the values of the file, changed by `--smoke`, and the flags after it, all as flags."""
    argv, values = list(argv), {}
    if argv and not argv[0].startswith("-"):
        values, argv = values_of(argv[0], argv[1:])
    if smoke is not None and "--smoke" in argv:
        argv.remove("--smoke")
        folder = {"output_dir": f"{values['output_dir']}-smoke"} if "output_dir" in values else {}
        changes = smoke(values) if callable(smoke) else smoke
        values |= {"max_steps": 2, "use_cpu": True, "bf16": False, "save_strategy": "no"} | changes | folder
    return _flags(values) + argv


def _flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is False and name.endswith("_strategy"):  # YAML reads `no` as False
            value = "no"
        if value is not None:
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, items)]
    return flags
