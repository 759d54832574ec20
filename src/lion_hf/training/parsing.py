"""From flags, or one file and the flags after it, to arguments."""

import difflib
import json
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from .arguments import ModelArguments
from .errors import UserError, make_output_dir, user_errors
from .recipes import ARGUMENT_FILES, SECTION, expand, read_values, take_preset


logger = logging.get_logger(__name__)

Smoke = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


class _Parser(HfArgumentParser):
    """Errors are exceptions, not a page of usage."""

    def error(self, message: str):
        raise UserError(message)


def parse_arguments(
    classes: Sequence[type], argv: Sequence[str], description: str | None = None, smoke: Smoke | None = None
) -> tuple:
    """Flags; or one file with the flags' names as keys (see `recipes`), which flags after it override.

    Args:
        classes: dataclasses of arguments, one of them `TrainingArguments`.
        argv: what follows the script's name.
        description: the first lines of `--help`.
        smoke: what the flag `--smoke` changes in the file's values, None for those it takes away, or a function of
            these values that says so; flags still override.

    Raises:
        UserError: for unknown flags or keys, wrong values, a preset that the file does not know or needs, and a missing
            `output_dir`.
    """
    given, argv = argv, _merge(argv, smoke)
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
        if unknown[0] not in given and not given[0].startswith("-"):
            raise UserError(
                f"{given[0]} sets {unknown[0].removeprefix('--')!r}, which this script does not know; is it made for "
                "another script?"
            )
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.7)
        raise UserError(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    training = next(x for x in parsed if isinstance(x, TrainingArguments))
    if "--output_dir" not in {flag.split("=")[0].replace("-dir", "_dir") for flag in argv}:
        raise UserError("--output_dir is required: the folder that everything is written to")
    model = next((x for x in parsed if isinstance(x, ModelArguments)), None)
    if not training.do_train and model is not None and not model.model_name_or_path:
        raise UserError("--do_train false evaluates a trained model: name it with --model_name_or_path")
    make_output_dir(training.output_dir)
    is_recipe = smoke is not None and not given[0].startswith("-") and SECTION in read_values(given[0])
    if is_recipe and "--smoke" not in given and training.device.type == "cpu":
        logger.warning(f"{given[0]} is made for GPUs, and there is none; --smoke runs it on a CPU in seconds")
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
        preset, argv = take_preset(argv)
        values = expand(argv.pop(0), preset)
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
