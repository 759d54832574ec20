"""Names, numbers and pictures in the documentation are those of the package. Code and links: test_pages.py."""

import html
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from urllib.parse import unquote

import pytest
from pages import blocks_of
from PIL import Image

import lion_hf
import lion_hf.convert
from lion_hf.ops.api import CROSSOVER


ROOT = Path(__file__).parents[2]
FOLDERS = (".", "examples", "benchmarks")  # where a script may be whose folder a page does not repeat
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_presets_and_files_that_a_page_names_exist(page):
    words = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    presets = [word for word in words if re.fullmatch(r"lion-\w+-(tiny|small|base|large).*", word)]
    assert set(presets) <= lion_hf.PRESETS.keys()
    files = [name for word in words for name in re.findall(r"[\w/]+\.py", word)]
    absent = [name for name in files if not any((ROOT / folder / name).is_file() for folder in FOLDERS)]
    assert not absent


def test_the_readme_fits_into_120_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_first_code_of_the_readme_is_short():
    code = blocks_of(ROOT / "README.md", "python")[0].code
    assert 4 <= len([line for line in code.splitlines() if line.strip()]) <= 10


def test_the_index_links_every_page_and_answers_twenty_questions():
    index = text("index.md")
    linked = set(re.findall(r"\]\(([^)#]+)", index))
    assert {page.name for page in PAGES if page.name not in ("README.md", "index.md")} <= linked
    questions = re.findall(r"^\| ([^|]*\?) \| (.*) \|$", index, re.MULTILINE)
    assert len({question for question, _ in questions}) >= 20
    assert not [question for question, answer in questions if not re.search(r"\]\([\w./-]+(#[\w-]+)?\)", answer)]


def table(page, first):
    """The rows of a table, from the one that begins with `first`: the other cells by the first one."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in row[1:-1].split("|")] for row in rows)}


def by_model(stored):
    """The reported runs of a file that holds them one by one, by model and task."""
    found = {}
    for run in stored.values():
        if run["stage"] == "final":
            row = found.setdefault(f"{run['model']}, {run['task']}", {"accuracy": [], "loss": []})
            for name, values in row.items():
                values.append(run[name])
    return found


def runs(experiment):
    """Mean and standard deviation of accuracy (%) and loss by model, as pages write them."""
    stored = json.loads((ROOT / "examples" / "results" / f"{experiment}.json").read_text(encoding="utf-8"))
    for model, found in (by_model(stored["runs"]) if "runs" in stored else stored).items():
        if "accuracy" in found:
            accuracy, loss = [100 * value for value in found["accuracy"]], found["loss"]
            spread = [stdev(values) if len(values) > 1 else 0 for values in (accuracy, loss)]
            yield model, f"{mean(accuracy):.1f} ± {spread[0]:.1f}", f"{mean(loss):.3f} ± {spread[1]:.3f}"


EXPERIMENTS = ("text", "images", "sentiment", "pooling", "diagonal", "warm_start", "modern", "modern_512")
README_ROWS = {
    "masked tokens of an encyclopedia, accuracy": ("text", "BERT", ""),
    "Fashion-MNIST, accuracy": ("images", "ViT", ""),
    "sentiment of reviews, after that, from the first token": ("sentiment", "BERT", ""),
}
README_TABLE = ROOT / "README.md", "masked tokens of an encyclopedia, accuracy"


@pytest.mark.parametrize("row", README_ROWS)
def test_accuracies_of_the_readme_are_those_of_the_stored_runs(row):
    experiment, baseline, suffix = README_ROWS[row]
    stored = {model: accuracy.split()[0] for model, accuracy, _ in runs(experiment)}
    expected = [stored[baseline], *(stored[f"{name}{suffix}"] for name in ("LION-LIT", "LION-D", "LION-S"))]
    *cells, command = table(*README_TABLE)[row]
    assert cells == [f"{value} %" for value in expected]
    assert command == f"`run_evidence.py {experiment}`"


def test_the_readme_tells_the_stored_results_of_the_modern_block_and_of_linear_conversions():
    shown, modern = table(*README_TABLE), {model: accuracy.split()[0] for model, accuracy, _ in runs("modern")}
    rows = {
        "masked tokens with rotary positions, as new models have": [
            f"LION-{name}, RoPE in linear layers" for name in ("LIT", "D", "S")
        ],
        "masked tokens: the block of the modern presets, ModernBERT": [
            "ModernBERT", "LION-S, preset block, RoPE in linear layers, windows"
        ],
    }  # fmt: skip
    for row, names in rows.items():
        assert [cell for cell in shown[row][:-1] if cell] == [f"{modern[f'{name}, text']} %" for name in names]
    stored = json.loads((ROOT / "examples/results/linearize.json").read_text(encoding="utf-8"))
    sentiment = [stored["sentiment"][name]["accuracy"] for name in ("the source", "all layers linear")]
    cells = shown["all-MiniLM-L6-v2 made linear, all layers: sentiment of reviews"]
    assert [cells[0], cells[3]] == [f"{100 * mean(values):.1f} %" for values in sentiment]
    found = stored["embeddings"]["models"]["all layers linear"]["reviews"]
    cells = shown["its embeddings: rank correlation of all pairs, of neighbours"]
    assert cells[3] == f"{found['random']:.2f}, {found['neighbours']:.2f}"


def test_the_page_of_conversions_tells_the_stored_results():
    stored = json.loads((ROOT / "examples/results/linearize.json").read_text(encoding="utf-8"))
    page, names = ROOT / "docs/linearize.md", {"every second": "every second layer linear", "all": "all layers linear"}
    for shown, name in names.items():
        kinds = stored["embeddings"]["models"][name]
        cells = [f"{kinds[kind][how]:.3f}" for kind in ("encyclopedia", "reviews") for how in ("random", "neighbours")]
        assert table(page, "every second")[shown] == cells
    for name, row in stored["sentiment"].items():
        values = [100 * value for value in row["accuracy"]]
        assert table(page, "the source")[name] == [f"{mean(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"]
    of_length = {name: name for name in names.values()}
    of_length["the source in windows of 512 tokens"] = "the source, windows of 512 tokens"
    of_length["the first 512 tokens alone"] = "the source, the first 512 tokens"
    for shown, name in of_length.items():
        row = stored["length"][name]
        assert table(page, "tokens")[shown] == [f"{cell['random']:.3f}" for cell in row.values()]


def test_figures_of_the_results_are_those_of_the_stored_runs():
    stored = {text for experiment in EXPERIMENTS for _, *texts in runs(experiment) for text in texts}
    shown = re.findall(r"\d+\.\d+ ± \d+\.\d+", text("results.md"))
    assert len(shown) > 50
    assert not set(shown) - stored


def test_times_of_the_readme_are_those_of_the_benchmarks():
    shown = table(*README_TABLE)
    page = ROOT / "docs" / "benchmarks.md"
    cpu, gpu = table(page, "128"), table(page, "text 128")
    by_length = [[cpu[length][variant] for length in ("512", "2048", "8192")] for variant in range(3)]
    assert shown["time of a training step on a CPU: 128 tokens"][1:4] == cpu["128"][:3]
    assert shown["512, 2,048 and 8,192 tokens"][1:4] == [", ".join(ratios) for ratios in by_length]
    rows = [re.findall(r"\(([\d.]+)\)", " ".join(gpu[f"text {length}"])) for length in ("512", "2,048", "8,192")]
    by_length = [", ".join(ratios) for ratios in zip(*rows, strict=True)]
    assert shown["on a GPU: 512, 2,048 and 8,192 tokens"][1:4] == by_length


def test_times_of_the_modern_block_are_those_of_the_benchmarks():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.partition("## The modern block against ModernBERT")[2]
    found = [re.search(rf"^\| {length} \| ([\d.]+) ", section, re.MULTILINE)[1] for length in ("512", "2,048", "8,192")]
    shown = table(*README_TABLE)["time of inference on a CPU, ModernBERT 1: 512, 2,048 and 8,192 tokens"]
    assert shown[3] == ", ".join(found)


def test_migration_names_every_preset_of_a_size_and_every_text_model():
    named = set(re.findall(r"`(lion-[\w-]+)`", text("migration.md")))
    assert {name for name in lion_hf.PRESETS if "tiny" in name or "patch" not in name} <= named


@pytest.mark.parametrize("device, label", [("cpu", "CPU"), ("accelerator", "accelerator")])
def test_the_table_of_auto_is_the_one_in_use(device, label):
    (row,) = re.findall(rf"^\| {label} .*$", text("formats.md"), re.MULTILINE)
    assert [int(cell) for cell in row.split("|")[2:-1]] == list(CROSSOVER[device].values())


def test_pictures_are_drawn(tmp_path, examples, monkeypatch, capsys):
    import draw_forms

    monkeypatch.setattr(sys, "argv", ["draw_forms.py", "--folder", str(tmp_path / "new")])
    draw_forms.main()
    assert str(tmp_path / "new" / "scans.png") in capsys.readouterr().out
    for name in ("forms.png", "scans.png"):
        with Image.open(tmp_path / "new" / name) as drawn, Image.open(ROOT / "docs" / name) as kept:
            assert abs(drawn.width - kept.width) < 50 and len(drawn.convert("RGB").getcolors(2**20)) > 50


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, examples, monkeypatch, capsys):
    import draw_forms

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["draw_forms.py", "--folder", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        draw_forms.main()
    assert stopped.value.code == 2
    assert "error: cannot write the pictures" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `make docs` builds."""
    pytest.importorskip("furo")
    (recipe,) = re.findall(r"^docs:.*\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folder = tmp_path_factory.mktemp("site")
    command = recipe.replace("build/docs", str(folder / "html")).replace("build/doctrees", str(folder / "doctrees"))
    subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT)
    return folder / "html"


@pytest.mark.slow
def test_the_api_pages_hold_every_public_name_with_its_docstring(site):
    for module in (lion_hf, lion_hf.nn, lion_hf.ops, lion_hf.convert):
        page = (site / "docs" / "api" / f"{module.__name__.split('.')[-1]}.html").read_text(encoding="utf-8")
        assert all(f'id="{module.__name__}.{name}"' in page for name in module.__all__), module
        assert "<strong>" in page  # arguments are a list, not a paragraph
        assert 'id="lion_hf.LionModel.forward"' in page or module is not lion_hf
        assert ".gradient_checkpointing_enable" not in page  # and nothing that Transformers documents


@pytest.mark.slow
def test_every_link_of_the_site_works_without_a_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag, target in re.findall(r'<(script|link|img|a)\b[^>]*?(?:src|href)="([^"]*)"', text):
            name, _, anchor = html.unescape(unquote(target)).partition("#")
            if re.match(r"[a-z]+:", name):
                assert tag == "a", f"{page.name} loads {target}"
                continue
            file = page.parent / name.partition("?")[0] if name else page
            assert file.is_file(), f"{page.relative_to(site)}: {target}"
            assert not anchor or file.suffix != ".html" or f'id="{anchor}"' in file.read_text(encoding="utf-8"), target
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_the_site_begins_with_the_contents_and_shows_pictures(site):
    assert "url=docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
    assert {"masks.png", "scans.png", "forms.png"} <= {path.name for path in (site / "_images").iterdir()}
    assert "copybutton" in (site / "docs" / "training.html").read_text(encoding="utf-8")
    assert "docs/training" in (site / "searchindex.js").read_text(encoding="utf-8")
