"""Project rules that a program can check: sizes, line lengths, no print, and which part may import which."""

import ast
import tokenize
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
CODE = ("src", "examples", "benchmarks", "tests", "model_cards")
# Files written by programs: results, golden numbers, and folders as version 0.1 saved them.
WRITTEN = ("examples/results/", "benchmarks/results/", "tests/golden/", "tests/data/v0_1/")
# A part may import itself and parts with a lower number. Names of `import lion_hf` count as PACKAGE, above models.
FLOORS = {"ops": 0, "nn": 1, "models": 2, "hub": 4, "convert": 5, "training": 6}
PACKAGE = 3


def files(*suffixes, folders=CODE):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return [name for name in names if not name.startswith(WRITTEN) and ".egg-info" not in name]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def body_length(function):
    """Count the lines from the first statement after the docstring to the last one."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def test_files_have_at_most_600_lines():
    lengths = {name: len(text(name).splitlines()) for name in files(".py", ".yaml")}
    assert not {name: length for name, length in lengths.items() if length > 600}


def test_functions_fit_a_screen():
    """Bodies have at most 60 lines, except in GPU kernels, which cannot be split."""
    long = {}
    for name in files(".py"):
        for node in ast.walk(ast.parse(text(name))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_length(node) > 60:
                long[f"{name}: {node.name}"] = body_length(node)
    assert not {name: length for name, length in long.items() if "ops/triton/kernels.py" not in name}


def test_lines_have_at_most_120_characters():
    """Exempt are tables and addresses in documents, which cannot be broken, and cards, which come from templates."""
    documents = [name for name in files(".md", folders=(*CODE, "docs")) if not name.startswith("model_cards/")]
    long = []
    for name in [*files(".py", ".yaml"), *documents, *(path.name for path in sorted(ROOT.glob("*.md")))]:
        for number, line in enumerate(text(name).splitlines(), 1):
            fixed = name.endswith(".md") and (line.lstrip().startswith("|") or "://" in line)
            if len(line) > 120 and not fixed:
                long.append(f"{name}:{number}")
    assert not long, "\n".join(long)


def test_the_package_prints_nothing():
    printing = []
    for name in files(".py", folders=("src",)):
        with open(ROOT / name, "rb") as file:
            names = {token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME}
        printing += [name] if "print" in names else []
    assert not printing


def imported(name):
    """Yield the modules of the package that a file imports anywhere: `nn.mixer` for `from ..nn import mixer`."""
    package = Path(name).relative_to("src/lion_hf").parent.parts
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lion_hf.") for alias in node.names if alias.name.startswith("lion_hf"))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            if node.level or f"{module}.".startswith("lion_hf."):
                own = module.removeprefix("lion_hf").lstrip(".")
                yield from (f"{own}.{alias.name}".lstrip(".") for alias in node.names)


@pytest.mark.parametrize("part", FLOORS)
def test_nothing_imports_upwards(part):
    home = [name for name in files(".py", folders=("src",)) if Path(name).parts[2] in (part, f"{part}.py")]
    pairs = [(name, module) for name in home for module in imported(name) if module.split(".")[0] != part]
    assert home
    assert not [pair for pair in pairs if FLOORS.get(pair[1].split(".")[0], PACKAGE) >= FLOORS[part]]
