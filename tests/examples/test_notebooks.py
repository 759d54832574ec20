"""The notebooks: short, stored with outputs that name no machine, and right when they run again."""

import re
import sys
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = ("text.ipynb", "images.ipynb")
NUMBER = r"([\d.]+(?:e-?\d+)?)"


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def numbers(text, pattern):
    """The numbers of all lines that match a pattern, in which NUMBER stands for a number."""
    found = re.findall(pattern.replace("NUMBER", NUMBER), text)
    assert found, f"nothing printed matches {pattern!r}"
    return [float(number) for number in found]


def check_text(text):
    differences = numbers(text, "largest difference between attention and .*: NUMBER")
    assert len(differences) == 2 and max(differences) < 1e-4
    differences = numbers(text, "largest difference by padding NUMBER")
    assert len(differences) == 3 and max(differences) < 1e-4
    (masked,), (frequent,) = numbers(text, "masked accuracy: NUMBER%"), numbers(text, "most frequent token .*: NUMBER%")
    assert masked > 14 and masked > 2 * frequent
    (right,), (most,) = numbers(text, "accuracy NUMBER%;"), numbers(text, "most frequent class gives NUMBER%")
    assert right > 75 and right > most + 10


def check_images(text):
    differences = numbers(text, "largest difference between attention and .*: NUMBER")
    assert len(differences) == 2 and max(differences) < 1e-4
    accuracies = numbers(text, "order='.*': test accuracy NUMBER%")
    assert len(accuracies) == 2 and min(accuracies) > 90
    (loaded,) = numbers(text, "test accuracy of the loaded model: NUMBER%")
    assert loaded == accuracies[1]


CHECKS = {"text.ipynb": check_text, "images.ipynb": check_images}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_stored_with_its_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 40
    assert (FOLDER / name).stat().st_size < 400_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(pictures(notebook)) >= 4
    CHECKS[name](printed(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_names_no_machine_and_shows_no_noise(name):
    notebook = read(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)
    kinds = {output.get("name", output.output_type) for output in outputs(notebook)}
    assert kinds == {"stdout", "display_data"}  # no warnings, errors or progress bars
    paths = r"(?<![\w.)])/(home|Users|root|tmp|usr|opt|work)\b|\b[A-Z]:\\"
    assert not re.search(paths, (FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_to_files(name):
    """Pages of docs/ and the other notebook, relative to the notebook's folder."""
    text = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert not [link for link in links if "://" not in link and not (FOLDER / link).is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_again_with_the_same_findings(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "execute", raising=False)
    from execute import execute

    notebook = read(name)
    stored = [len(cell.get("outputs", [])) for cell in notebook.cells]
    again = execute(notebook, tmp_path)
    assert [len(cell.get("outputs", [])) for cell in again.cells] == stored
    assert {output.get("name", output.output_type) for output in outputs(again)} == {"stdout", "display_data"}
    CHECKS[name](printed(again))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")] == ["outputs/notebooks"]
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
