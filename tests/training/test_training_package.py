"""lion_hf.training as a package: loaded only where it is asked for, one way of dependencies, and what it needs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lion_hf
from lion_hf import training
from lion_hf.training import glue


FOLDER = Path(training.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


# One process imports the package and prints which modules that loads; a fork for each missing package prints the error.
PROCESS = """
import json, os, sys
import lion_hf

loaded = [name for name in sys.modules if name.startswith(("lion_hf.training", "matplotlib"))]
print(json.dumps(loaded), flush=True)
for module in sys.argv[1:]:
    if os.fork() == 0:
        sys.modules[module] = None
        try:
            import lion_hf.training.trainer
        except ImportError as error:
            print(json.dumps(str(error)), flush=True)
        os._exit(0)
    os.wait()
"""
PACKAGES = {"datasets": "datasets", "PIL": "pillow", "sklearn": "scikit-learn"}


@pytest.fixture(scope="module")
def process():
    """The lines that the process printed."""
    done = subprocess.run([sys.executable, "-c", PROCESS, *PACKAGES], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 1 + len(PACKAGES), done.stderr
    return lines


def documented_order(package):
    """Names of modules in the order in which the package's docstring lists them."""
    names = re.findall(r"`([a-z_]+)`", package.__doc__)
    folder = Path(package.__file__).parent
    return [name for name in names if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()]


def imports(file):
    """(level, module) of each relative import, and (0, module) of the others, wherever they stand."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def test_importing_lion_hf_does_not_load_it(process):
    assert process[0] == []


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(module, process):
    said = process[1 + list(PACKAGES).index(module)]
    assert said == f"lion_hf.training requires {PACKAGES[module]}: pip install 'lion-hf[train]'"


def test_the_extra_holds_every_package_that_is_looked_for():
    settings = (Path(lion_hf.__file__).parents[2] / "setup.cfg").read_text()
    extra = re.search(r"^train =\n((?:    .*\n)+)", settings, re.MULTILINE)[1]
    listed = {re.match(r"[a-z-]+", line.strip())[0] for line in extra.splitlines()}
    assert listed == {*training._PACKAGES.values(), "kornia"}


@pytest.mark.parametrize("package", [training, glue], ids=["training", "glue"])
def test_modules_import_only_those_before_them(package):
    order, folder = documented_order(package), Path(package.__file__).parent
    modules = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    assert set(order) == modules - {"__init__"} and len(order) == len(set(order)), (
        "the docstring lists every module once"
    )
    for i, name in enumerate(order):
        if (folder / f"{name}.py").is_file():
            above = {module.split(".")[0] for level, module in imports(folder / f"{name}.py") if level == 1}
            assert above <= set(order[:i]), name


ALLOWED = {
    "", "convert", "convert.encoder", "hub", "models.configuration_lion", "models.lion_inputs", "models.lion_presets",
    "models.modeling_lion",
    "models.modeling_lion_vision", "nn.mixer", "nn.names", "nn.variants",
}  # fmt: skip


def test_nothing_above_is_imported_and_nothing_is_printed():
    """Only the version comes from `lion_hf`; every other name is imported from the module that defines it."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        depth = len(file.relative_to(FOLDER).parts)
        names = {module for level, module in imports(file) if level == depth + 1}
        assert names <= ALLOWED, file
        assert not any(module.startswith("lion_hf") for level, module in imports(file) if level == 0), file
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file
