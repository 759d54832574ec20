"""Argument files: YAML or JSON with the names of flags as keys, and presets for several models in one file.

A file with a section `presets` serves several models, of which `--preset` chooses one. The section holds names, or
patterns of the names in `lion_hf.PRESETS`, the models of the paper. Each has values that are added to those of the file
or override them. `{preset}` in a value stands for the chosen name::

    presets:
      lion-*-base: {learning_rate: 8.0e-4}
      lion-*-large: {learning_rate: 2.0e-4}
    preset: "{preset}"
    output_dir: outputs/recipes/mlm/{preset}

A file with a section `phases` describes several runs, one after the other. Each has values that are added to those of
the file or override them, and writes to a folder of its name in `output_dir`. In these values `{NAME}` stands for the
folder of the phase NAME::

    phases:
      stable: {max_steps: 20000}
      decay: {decay_from: "{stable}", decay_steps: 2000}
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
PHASES = "phases"
_WILDCARDS = "*?["


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the names and values of a file as written, including the sections `presets` and `phases`.

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
    for name in (SECTION, PHASES):
        section = values.get(name, {})
        if not isinstance(section, dict) or not all(isinstance(x, dict | None) for x in section.values()):
            raise UserError(f"{path}: '{name}' must hold names of {name}, each with names and values or nothing")
    return values


def presets_of(path: str | Path) -> list[str]:
    """Return the presets that a file can be used with; none if it has no section `presets`."""
    return _allowed(read_values(path).get(SECTION, {}))


def expand(path: str | Path, preset: str | None = None, phase: str | None = None) -> dict[str, Any]:
    """Return the values of a file for one preset and one phase, in the form that flags give.

    Args:
        path: the file.
        preset: one of `presets_of(path)`, in upper or lower case; None for a file without a section `presets`.
        phase: one of the section `phases`; None for the values that all phases share.

    Raises:
        UserError: if the preset is missing or not among those of the file; see also `read_values`.
    """
    values = read_values(path)
    phases = values.pop(PHASES, {})
    later = {} if phase is None else phases[phase] or {}
    if SECTION not in values:
        return values | ({} if preset is None else {"preset": preset}) | later
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
    return {key: _filled_in(value, {"preset": name}) for key, value in (values | later).items()}


def values_of(path: str | Path, flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a file for the `--preset` and `--phase` among flags, and the other flags."""
    preset, flags = take("preset", flags)
    phase, flags = take("phase", flags)
    if phase is not None and phase not in read_values(path).get(PHASES, {}):
        raise UserError(f"--phase is {phase!r}, which {path} does not have")
    values = expand(path, preset, phase)
    if phase is not None:
        runs = Path(take("output_dir", flags)[0] or values.get("output_dir", "")).parent
        values = {
            key: _filled_in(value, {name: str(runs / name) for name in read_values(path)[PHASES]})
            for key, value in values.items()
        }
    return values, flags


def phase_runs(argv: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Return the phases that arguments ask for, in order, and the arguments of each.

    `--phase NAME` asks for one of the file's phases; without it they are all run. Anything but a file with phases is
    one run without a name.

    Raises:
        UserError: for a phase that the file does not have, and without an `output_dir`.
    """
    is_file = bool(argv) and Path(argv[0]).suffix in ARGUMENT_FILES
    phases = list(read_values(argv[0]).get(PHASES, {})) if is_file else []
    wanted, flags = take("phase", argv)
    if wanted is not None and wanted not in phases:
        allowed = f"the phases of {argv[0]} are {', '.join(phases)}" if phases else "it requires a recipe with phases"
        raise UserError(f"--phase is {wanted!r}; {allowed}")
    if not phases:
        return [(None, list(argv))]
    folder, flags = take("output_dir", flags)
    if folder is None:
        values, _ = values_of(argv[0], flags[1:])
        if "output_dir" not in values:
            raise UserError("--output_dir is required: the folder for everything that the run writes")
        folder = values["output_dir"] + "-smoke" * ("--smoke" in flags)
    runs = [wanted] if wanted else phases
    return [(name, [*flags, f"--phase={name}", f"--output_dir={Path(folder) / name}"]) for name in runs]


def take(flag: str, flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of the last `--flag` among flags, and the other flags."""
    found, others, left = None, [], list(flags)
    spellings = (f"--{flag}", f"--{flag.replace('_', '-')}")
    while left:
        item = left.pop(0)
        if item.partition("=")[0] in spellings and "=" in item:
            found = item.partition("=")[2]
        elif item in spellings and left and not left[0].startswith("-"):
            found = left.pop(0)
        else:
            others.append(item)
    return found, others


def _allowed(section: dict[str, Any]) -> list[str]:
    """Return the names of a section and those that its patterns match, presets of the paper in their order."""
    names = [pattern for pattern in section if not any(sign in pattern for sign in _WILDCARDS)]
    matched = [name for name in PRESETS if any(fnmatchcase(name, pattern) for pattern in section)]
    return list(dict.fromkeys(matched + names))


def _filled_in(value: Any, names: dict[str, str]) -> Any:
    """Return a value in which `{NAME}` is replaced by what the name stands for."""
    for name, meaning in names.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", meaning)
    return value
