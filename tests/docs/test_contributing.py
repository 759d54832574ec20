"""CONTRIBUTING.md is true: a new variant, option or head is a patch of a few files and then works everywhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "docs" / "contributing"
# Files that a patch may touch without tests and docs.
MOST_FILES = {"variant": 1, "option": 4, "head": 3}


@pytest.fixture
def copy(tmp_path):
    """A copy of what the patches change and the checks read, outside a repository."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    return tmp_path


def git(folder, *arguments):
    # Without a ceiling git would look for a repository above the folder, and skip files outside of it.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", MOST_FILES)
def test_a_patch_applies_and_touches_few_files(name, copy):
    patch = str(PATCHES / f"{name}.patch")
    git(copy, "apply", "--check", patch)
    touched = [line.split("\t")[2] for line in git(copy, "apply", "--numstat", patch).splitlines()]
    own = [file for file in touched if not file.startswith(("tests/", "docs/")) and not file.endswith(".md")]
    assert 1 <= len(own) <= MOST_FILES[name], own


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_FILES)
def test_a_patched_package_does_what_the_patch_promises(name, copy):
    git(copy, "apply", str(PATCHES / f"{name}.patch"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(copy / folder) for folder in ("src", "tests")),
        "HF_MODULES_CACHE": str(copy / "modules"),
    }
    check = copy / "tests" / "docs" / "patch_checks" / f"check_{name}.py"
    run = subprocess.run([sys.executable, str(check)], cwd=copy, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def files(place):
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def guide():
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_guide_names_files_that_exist():
    named = set(re.findall(r"[\w./-]+\.(?:py|md|patch|txt|cfg)\b", guide()))
    own = [path.as_posix() for folder in ("src", "examples", "docs") for path in (ROOT / folder).rglob("*.*")]
    absent = {
        name for name in named if not (ROOT / name).is_file() and not any(path.endswith(f"/{name}") for path in own)
    }
    assert len(named) > 30 and not absent


def test_the_guide_names_code_that_exists():
    named = re.findall(r"`@?([A-Za-z_][\w.]*)(?:\(.*?\))?`", guide())
    text = "\n".join(
        path.read_text(encoding="utf-8") for folder in ("src", "tests/small_models.py") for path in files(ROOT / folder)
    )
    absent = {name for name in named if not re.search(rf"\b{name.split('.')[-1]}\b", text)}
    assert len(named) > 50 and not absent


def test_the_code_to_read_is_counted_and_listed():
    script = PATCHES / "code_to_read.py"
    counted = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    rows = re.findall(r"^\| (.*?) \| (\d+) \| ([\d,]+) \|$", counted, re.MULTILINE)
    assert len(rows) == 12 and all(int(number) > 0 for _, number, _ in rows)
    for part, _, _ in rows:
        assert f"\n| {part} |" in guide()
        assert part.startswith("a recipe") or f"\n- {part}:" in guide()
