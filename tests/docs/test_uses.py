"""The page about uses runs as it stands: its first piece makes two small models, the others use them."""

import re
from pathlib import Path

import pytest


PAGE = (Path(__file__).parents[2] / "docs" / "uses.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
PIECES = [
    (section.splitlines()[0], code)
    for section in SECTIONS
    for code in re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
]
# What takes more than a few seconds to import or to run.
SLOW = ("sentence_transformers", "onnx.export")


def pieces():
    for title, code in PIECES[1:]:
        marks = [pytest.mark.slow] if any(word in code for word in SLOW) else []
        yield pytest.param(code, id=title, marks=marks)


@pytest.mark.parametrize("code", pieces())
def test_python_of_the_page_runs(code, tmp_path, monkeypatch):
    for library in ("peft", "torchao", "sentence_transformers"):
        if f"from {library}" in code:
            pytest.importorskip(library)
    if "onnx.export" in code:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    exec(compile(PIECES[0][1], "docs/uses.md", "exec"), {})
    exec(compile(code, "docs/uses.md", "exec"), {})
