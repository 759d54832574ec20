"""Find misspelt flags and missing files before a script imports PyTorch and Transformers, which takes seconds.

The names of the flags are read from the source code of the script and of the argument classes, without importing them.
The scripts parse and check all arguments in full later.
"""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


PATHS = {"train_file", "validation_file", "test_file", "train_dir", "validation_dir", "test_dir", "data_dir"}


def check_flags(script: str, argv: Sequence[str] | None = None) -> None:
    """Exit with code 2 and a one-line error if a flag is unknown or names a file or folder that does not exist."""
    argv = sys.argv[1:] if argv is None else argv
    problem = problem_of(argv, known_flags(script))
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)


def problem_of(argv: Sequence[str], known: dict[str, set[str]]) -> str | None:
    """Return what is wrong with the flags, or None.

    `known` maps the name of every flag to its allowed values; an empty set allows any value.
    """
    if argv and argv[0].endswith((".yaml", ".yml", ".json")) and not Path(argv[0]).exists():
        return f"argument file {argv[0]!r} does not exist"
    for i, flag in enumerate(argv):
        name, _, value = flag.partition("=")
        name = name[2:].replace("-", "_")
        if not flag.startswith("--") or not name:
            continue
        if not any(other.startswith((name, name.removeprefix("no_"))) for other in known):
            near = difflib.get_close_matches(name, known, 1, 0.7)
            return f"unknown argument {flag!r}" + (f"; did you mean '--{near[0]}'?" if near else "")
        value = value or (argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else "")
        if value and known.get(name) and value not in known[name]:
            return f"--{name} is {value!r}; allowed are {', '.join(sorted(known[name]))}"
        if name in PATHS and value and not any(c in value for c in "*?[") and not Path(value).exists():
            what = "data file" if name.endswith("file") else "--data_dir" if name == "data_dir" else "image folder"
            return f"{what} {value!r} does not exist"
    return None


def known_flags(script: str) -> dict[str, set[str]]:
    """Return every name that may be a flag of the script, with its allowed values (an empty set allows any).

    The names may include some that are no flags of this script, but none is missing.
    """
    base = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")
    files = sorted((Path(importlib.util.find_spec("lion_hf").origin).parent / "training").rglob("*.py"))
    own: dict[str, list[set[str]]] = {"help": [set()], "smoke": [set()], "phase": [set()]}
    for name, values in (found for file in (Path(script), *files) for found in names_in(file)):
        own.setdefault(name, []).append(values)
    # A name that takes any value in one class takes any value.
    few = {name: set().union(*found) if all(found) else set() for name, found in own.items()}
    return {name: set() for name, _ in names_in(base)} | few


def names_in(file: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield the fields of classes with the values of their `Literal`, and the flags passed to `add_argument`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for field in (x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)):
                yield field.target.id, set(literals(field.annotation))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_argument":
            yield from ((str(x.value).lstrip("-"), set()) for x in node.args if isinstance(x, ast.Constant))


def literals(annotation: ast.expr) -> Iterator[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) == "Literal":
            yield from (x.value for x in ast.walk(node.slice) if isinstance(x, ast.Constant))
