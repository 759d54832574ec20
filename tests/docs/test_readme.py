"""The README's Python runs as it stands, and its numbers have their commands."""

import re
from pathlib import Path

import pytest


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[-1][:40])
def test_python_in_the_readme_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_first_example_is_short_and_there():
    assert BLOCKS and len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_local_links_of_the_readme_lead_somewhere(target):
    if not target.startswith("http"):
        assert (Path(__file__).parents[2] / target).exists()
