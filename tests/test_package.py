"""Names and imported modules of `import lion_hf`, with and without Transformers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lion_hf


ROOT = Path(lion_hf.__file__).parent
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
NO_TRANSFORMERS = (
    "import sys\nfor name in ('transformers', 'huggingface_hub', 'safetensors'): sys.modules[name] = None\n"
)


def run(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


def imports(file):
    """Yield the full names that a file of the package imports."""
    package = ["lion_hf", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])])


@pytest.mark.parametrize("folder, inside", [("ops", ("lion_hf.ops",)), ("nn", ("lion_hf.nn", "lion_hf.ops"))])
def test_operators_and_layers_import_nothing_but_pytorch_and_each_other(folder, inside):
    found = {name: file.name for file in (ROOT / folder).rglob("*.py") for name in imports(file)}
    assert any(name.startswith(inside) for name in found), "no import was found"
    own = tuple(f"{name}." for name in inside)
    alien = {x: file for x, file in found.items() if not f"{x}.".startswith(own) and x.partition(".")[0] not in ALLOWED}
    assert not alien


@pytest.mark.parametrize("folder", ["models", "convert"])
def test_nothing_below_imports_what_is_above(folder):
    above = {"models": ("convert", "hub", "training"), "convert": ("training",)}[folder]
    found = {name for file in (ROOT / folder).rglob("*.py") for name in imports(file)}
    assert not [name for name in found if name.startswith(tuple(f"lion_hf.{x}" for x in above))]


def test_operators_and_layers_run_where_transformers_is_not_installed(tmp_path):
    run(NO_TRANSFORMERS + (Path(__file__).parent / "smoke_torch_only.py").read_text(encoding="utf-8"), cwd=tmp_path)


def test_what_needs_transformers_says_so_where_it_is_not_installed():
    code = NO_TRANSFORMERS + (
        "import lion_hf\n"
        "for name in ('LionModel', 'push', 'PRESETS', 'convert'):\n"
        "    try:\n"
        "        getattr(lion_hf, name)\n"
        "    except ImportError as error:\n"
        "        assert f'lion_hf.{name} needs Transformers' in str(error), error\n"
        "        assert 'pip install transformers' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
        "try:\n"
        "    from lion_hf import LionForMaskedLM\n"
        "except ImportError as error:\n"
        "    assert 'pip install transformers' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
        "assert not hasattr(lion_hf, 'nothing')\n"
    )
    run(code)


@pytest.mark.slow
def test_a_broken_transformers_is_not_taken_for_an_absent_one(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("import something_it_needs")
    code = (
        "try:\n"
        "    import lion_hf\n"
        "except ModuleNotFoundError as error:\n"
        "    assert error.name == 'something_it_needs'\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT.parent)])
    run(code, env=os.environ | {"PYTHONPATH": path})


def test_the_import_alone_is_enough_for_auto_classes_and_is_silent():
    code = (
        "import lion_hf, lion_hf.convert.command\n"  # an old path of 0.1 would warn
        "from transformers import AutoConfig, AutoModelForMaskedLM\n"
        "small = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "config = AutoConfig.for_model('lion', **small)\n"
        "assert isinstance(AutoModelForMaskedLM.from_config(config), lion_hf.LionForMaskedLM)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    bare = run("from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel", env=environment)
    done = run(code, env=environment)
    assert (done.stdout, done.stderr) == (bare.stdout, bare.stderr), "lion_hf prints something"


def test_public_names_and_folders_are_there():
    assert all(hasattr(lion_hf, name) for name in (*lion_hf.__all__, "ops", "nn", "convert"))
    assert callable(lion_hf.push) and callable(lion_hf.save_with_code)
    assert all(hasattr(lion_hf.convert, name) for name in lion_hf.convert.__all__)


def test_metadata_and_citation_have_the_version():
    setup, citation, questions = (
        (ROOT.parents[1] / name).read_text(encoding="utf-8")
        for name in ("setup.cfg", "CITATION.cff", "docs/questions.md")
    )
    assert f"\nversion = {lion_hf.__version__}\n" in setup
    citation = yaml.safe_load(citation)
    assert citation["version"] == lion_hf.__version__
    paper = citation["preferred-citation"]
    names = " and ".join(f"{x['family-names']}, {x['given-names']}" for x in paper["authors"])
    questions = " ".join(questions.split())
    assert f"author = {{{names}}}" in questions and f"title = {{{paper['title']}}}" in questions


@pytest.mark.slow
def test_a_spawned_worker_knows_lion(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing\n"
        "import lion_hf\n"
        "from transformers import AutoModelForMaskedLM\n"
        "def build(config):\n"
        "    return type(AutoModelForMaskedLM.from_config(config)).__name__\n"
        "if __name__ == '__main__':\n"
        "    small = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.apply(build, (lion_hf.LionConfig(**small),)) == 'LionForMaskedLM'\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
