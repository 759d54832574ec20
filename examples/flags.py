"""Finds misspelt flags and paths before a script imports PyTorch and Transformers, which takes seconds.

The names of flags are read from the source of the script and of the classes that hold arguments, not by importing them.
What passes here is parsed and checked in full later.
"""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


PATHS = {"train_file", "validation_file", "test_file", "train_dir", "validation_dir", "test_dir", "data_dir"}


def check_flags(script: str, argv: Sequence[str] | None = None) -> None:
    """Ends the process with exit code 2 and one line, if a flag is unknown or what it names does not exist."""
    argv = sys.argv[1:] if argv is None else argv
    problem = problem_of(argv, known_flags(script))
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)


def problem_of(argv: Sequence[str], known: set[str]) -> str | None:
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
        if name in PATHS and value and not any(c in value for c in "*?[") and not Path(value).exists():
            what = "data file" if name.endswith("file") else "--data_dir" if name == "data_dir" else "image folder"
            return f"{what} {value!r} does not exist"
    return None


def known_flags(script: str) -> set[str]:
    """Every name that may be a flag of the script: never fewer than there are."""
    files = [Path(script), Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")]
    files += sorted((Path(importlib.util.find_spec("lion_hf").origin).parent / "training").rglob("*.py"))
    return {"help", "smoke", *(name for file in files for name in names_in(file))}


def names_in(file: Path) -> Iterator[str]:
    """The fields of classes, and what `add_argument` is called with."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            fields = [x.target for x in node.body if isinstance(x, ast.AnnAssign)]
            yield from (field.id for field in fields if isinstance(field, ast.Name))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_argument":
            yield from (str(x.value).lstrip("-") for x in node.args if isinstance(x, ast.Constant))
