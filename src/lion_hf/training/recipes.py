"""Argument files: YAML or JSON with the names of flags as keys, and presets for several models in one file.

A file with a section `presets` serves several models, of which `--preset` chooses one. The section holds names, or
patterns of the names in `lion_hf.PRESETS`. Each has values that are added to those of the file or override them.
`{preset}` in a value stands for the chosen name::

    presets:
      lion-*-base: {learning_rate: 8.0e-4}
      lion-*-large: {learning_rate: 2.0e-4}
    preset: "{preset}"
    output_dir: outputs/recipes/mlm/{preset}
"""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..models.configuration_lion import PRESETS
from .errors import UserError, require_path, user_errors


ARGUMENT_FILES = (".yaml", ".yml", ".json")
SECTION = "presets"
_WILDCARDS = "*?["


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the names and values of a file as written, including the section `presets`.

    Raises:
        UserError: for a file of another type, a missing file, or one that does not hold names and values.
    """
    path = Path(path)
    if path.suffix not in ARGUMENT_FILES:
        raise UserError(f"{str(path)!r} is neither a flag nor a .yaml, .yml or .json argument file")
    require_path(path, "argument file")
    with user_errors(f"{path} is not valid", yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, such as 'learning_rate: 0.001'")
    section = values.get(SECTION, {})
    if not isinstance(section, dict) or not all(isinstance(x, dict | None) for x in section.values()):
        raise UserError(f"{path}: '{SECTION}' must hold names of presets, each with names and values or nothing")
    return values


def presets_of(path: str | Path) -> list[str]:
    """Return the presets that a file can be used with; none if it has no section `presets`."""
    return _allowed(read_values(path).get(SECTION, {}))


def expand(path: str | Path, preset: str | None = None) -> dict[str, Any]:
    """Return the values of a file for one preset, in the form that flags give.

    Args:
        path: the file.
        preset: one of `presets_of(path)`, in upper or lower case; None for a file without a section `presets`.

    Raises:
        UserError: if the preset is missing or not among those of the file; see also `read_values`.
    """
    values = read_values(path)
    if SECTION not in values:
        return values | ({} if preset is None else {"preset": preset})
    section = values.pop(SECTION)
    allowed = _allowed(section)
    if preset is None:
        raise UserError(f"{path} requires --preset, one of {', '.join(allowed)}")
    name = preset.lower()
    if name not in allowed:
        raise UserError(f"--preset is {preset!r}; {path} allows {', '.join(allowed)}")
    for pattern, changes in section.items():
        if fnmatchcase(name, pattern):
            values |= changes or {}
    return {key: _filled_in(value, name) for key, value in values.items()}


def take_preset(flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of the last `--preset` among flags, and the other flags."""
    preset, others, left = None, [], list(flags)
    while left:
        flag = left.pop(0)
        if flag.startswith("--preset="):
            preset = flag.partition("=")[2]
        elif flag == "--preset" and left and not left[0].startswith("-"):
            preset = left.pop(0)
        else:
            others.append(flag)
    return preset, others


def _allowed(section: dict[str, Any]) -> list[str]:
    """Return the names of a section and those that its patterns match, presets of the paper in their order."""
    names = [pattern for pattern in section if not any(sign in pattern for sign in _WILDCARDS)]
    matched = [name for name in PRESETS if any(fnmatchcase(name, pattern) for pattern in section)]
    return list(dict.fromkeys(matched + names))


def _filled_in(value: Any, preset: str) -> Any:
    return value.replace("{preset}", preset) if isinstance(value, str) else value
