"""Modules of the package, and files of users that register classes, are saved as flat files beside the weights."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import spread_decays, text_config, text_inputs, vision_config
from transformers.dynamic_module_utils import get_relative_imports

import lion_hf
from lion_hf._flatten import _flattened, flat_files, flat_name
from lion_hf.nn.variants import VARIANTS


ROOT = Path(lion_hf.__file__).parent
MODULES = sorted(
    ".".join(["lion_hf", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for folder in ("ops", "nn", "models")
    for file in (ROOT / folder).rglob("*.py")
)


def text_of(module):
    place = ROOT.joinpath(*module.split(".")[1:])
    return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- our files


@pytest.mark.parametrize("module", MODULES)
def test_transformers_follows_every_import_of_a_module_that_travels(tmp_path, module):
    files = flat_files(module)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, text in files.items():
        followed = set(get_relative_imports(tmp_path / name))
        assert {f"{x}.py" for x in followed} <= files.keys()
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        assert {node.module for node in imports if node.level} == followed and all(node.level < 2 for node in imports)
        assert "lion_hf" not in {node.module.partition(".")[0] for node in imports if not node.level}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_but_imports_changes(module):
    def without_imports(text):
        tree = ast.parse(text)
        return [line for line in ast.unparse(tree).splitlines() if "import" not in line]

    assert without_imports(flat_files(module)[f"{flat_name(module)}.py"]) == without_imports(text_of(module))


@pytest.mark.parametrize(
    "module, name",
    [
        ("lion_hf.models.modeling_lion", "modeling_lion"),
        ("lion_hf.models.configuration_lion", "configuration_lion"),
        ("lion_hf.ops", "lion_ops"),
        ("lion_hf.ops.api", "lion_ops_api"),
        ("lion_hf.ops.triton.kernels", "lion_ops_triton_kernels"),
    ],
)
def test_files_are_named_by_their_path(module, name):
    assert flat_name(module) == name and f"{name}.py" in flat_files(module)


STATEMENTS = {
    "from .chunk import a": ("from .lion_ops_chunk import a", ["lion_hf.ops.chunk"]),
    "from ..models.modeling_lion import a  # why": (
        "from .modeling_lion import a  # why",
        ["lion_hf.models.modeling_lion"],
    ),
    "from lion_hf.ops.scans import a": ("from .lion_ops_scans import a", ["lion_hf.ops.scans"]),
    "from ..ops import a": ("from .lion_ops import a", ["lion_hf.ops"]),
    "from .chunk import (\n    a,\n    b,\n)": (
        "from .lion_ops_chunk import (\n    a,\n    b,\n)",
        ["lion_hf.ops.chunk"],
    ),
    "def f():\n    from .triton.launch import a": (
        "def f():\n    from .lion_ops_triton_launch import a",
        ["lion_hf.ops.triton.launch"],
    ),
    "s = 'ä'\nfrom .chunk import a": ("s = 'ä'\nfrom .lion_ops_chunk import a", ["lion_hf.ops.chunk"]),
    "text = 'from .chunk import a'": ("text = 'from .chunk import a'", []),
    "import torch\nfrom torch import nn": ("import torch\nfrom torch import nn", []),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_imports_are_rewritten_where_they_stand(statement):
    assert _flattened(statement, "lion_hf.ops.api") == STATEMENTS[statement]


REFUSED = {
    "from . import chunk": "import names from lion_hf.ops.chunk, not the module",
    "from .. import ops": "import from the module that defines it",
    "from .triton import launch": "import names from lion_hf.ops.triton.launch, not the module",
    "import lion_hf.ops.chunk": "import names, as in",
    "import torch, lion_hf as lion": "import names, as in",
    "from lion_hf import LionConfig": "import from the module that defines it",
    "from lion_hf.lion_ops import a": "is not a file of this package",
    "import torch; from .chunk import a": "write it on its own line",
    "from \\\n    .chunk import a": "write it on its own line",
}


@pytest.mark.parametrize("statement", REFUSED)
def test_imports_without_a_flat_form_are_refused(statement):
    with pytest.raises(ValueError, match=f"cannot follow .* in line 1 of lion_hf.ops.api: .*{REFUSED[statement]}"):
        _flattened(statement, "lion_hf.ops.api")


# ------------------------------------------------------------------------------------------------------- a user's files

OWN = """
import torch

from lion_hf.nn import (
    Recurrence,
    Variant,
)
from lion_hf.nn.variants import register_variant


@register_variant("own")
class Own(Variant):
    label = "own"
    decay = "head"

    def prepare(self, x, query, key, value, prefix_tokens):
        return Recurrence(query, key, value, torch.full((self.heads,), -0.3))
"""

LOADS = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lion_hf", "own_variant"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
from transformers import AutoConfig, AutoModelForMaskedLM

def registered():
    tables = [vars(module)["VARIANTS"] for name, module in sys.modules.items() if name.endswith("lion_nn_variants")]
    return [table["own"].__name__ for table in tables]

AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
assert registered() == ["Own"], registered()
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert set(registered()) == {"Own"}, registered()
torch.save(model(input_ids=torch.arange(1, 12)[None]).logits, sys.argv[2])
"""


def imported(folder, monkeypatch, text, name="own_variant"):
    """Write a user's file, import it, and return its class Own."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name).Own


@pytest.fixture
def own(monkeypatch):
    """Make models report the use of classes from outside the package."""
    classes = []
    monkeypatch.setattr("lion_hf.hub._foreign_classes", lambda model: classes)
    yield classes


def test_a_folder_with_a_variant_of_the_user_registers_it_where_neither_is_installed(tmp_path, monkeypatch):
    imported(tmp_path / "user", monkeypatch, OWN)
    model = lion_hf.LionForMaskedLM(text_config("own")).eval()
    folder = lion_hf.save_with_code(model, tmp_path / "model")
    del VARIANTS["own"]
    assert "from .lion_nn import (" in (folder / "own_variant.py").read_text(encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", LOADS, str(folder), str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(input_ids=torch.arange(1, 12)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=0, atol=0)


def test_a_file_whose_name_begins_as_ours_comes_along_too(tmp_path, monkeypatch):
    imported(tmp_path / "user", monkeypatch, OWN.replace('"own"', '"own_too"'), "lion_hf_variants")
    folder = lion_hf.save_with_code(lion_hf.LionModel(text_config("own_too")), tmp_path / "model")
    del VARIANTS["own_too"]
    assert (folder / "lion_hf_variants.py").is_file()


def test_copied_code_with_a_variant_of_the_user_is_saved_again(tmp_path, monkeypatch, modules_cache):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    imported(tmp_path / "user", monkeypatch, OWN)
    first = lion_hf.save_with_code(lion_hf.LionModel(text_config("own")), tmp_path / "first")
    del VARIANTS["own"]
    loaded = get_class_from_dynamic_module("modeling_lion.LionModel", first).from_pretrained(first)
    second = lion_hf.save_with_code(loaded, tmp_path / "second")
    assert (second / "own_variant.py").read_text() == (first / "own_variant.py").read_text()


def test_what_only_the_users_file_imports_comes_along(tmp_path, monkeypatch):
    own = imported(tmp_path, monkeypatch, "class Own: pass")
    files = flat_files("lion_hf.models.configuration_lion", [own])
    alone = {"configuration_lion.py", "lion_adapters.py", "lion_config_base.py", "lion_options.py", "own_variant.py"}
    alone |= {"lion_presets.py", "lion_nn_gates.py", "lion_nn_names.py", "lion_nn_registry.py", "lion_nn_variants.py"}
    alone |= {"lion_nn_linear_transformers.py", "lion_nn_recurrent_variants.py"}
    assert set(files) == alone
    (tmp_path / "own_variant.py").write_text("from lion_hf.ops.checks import is_binary\nclass Own: pass")
    files = flat_files("lion_hf.models.configuration_lion", [own])
    assert set(files) == alone | {"lion_ops_checks.py"}
    assert files["configuration_lion.py"].endswith("\nfrom .own_variant import Own\n")
    assert "own_variant" not in files["lion_ops_checks.py"]


def test_two_classes_of_one_file_and_two_files_come_along(tmp_path, monkeypatch):
    first = imported(tmp_path, monkeypatch, "class Own: pass\nclass Other: pass")
    third = imported(tmp_path, monkeypatch, "class Own: pass", "third_variant")
    files = flat_files("lion_hf.models.modeling_lion", [first, sys.modules["own_variant"].Other, third])
    assert {"own_variant.py", "third_variant.py"} <= files.keys()
    for name in ("modeling_lion.py", "configuration_lion.py"):
        lines = [line for line in files[name].splitlines() if "_variant import" in line]
        assert lines == [
            "from .own_variant import Own",
            "from .own_variant import Other",
            "from .third_variant import Own",
        ]


IMPOSSIBLE = {
    "relative": ("from . import x", "packages cannot be included"),
    "the package": ("import lion_hf", "import names, as in `from lion_hf.nn import x`"),
    "a name of the package": ("from lion_hf import LionModel", "import from the module that defines it"),
    "an old path": ("from lion_hf.lion_ops import attention_scores", "is not a file of this package"),
    "a file beside it": ("import beside_it", "beside_it is not included; put everything .* into one file"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_imports_that_cannot_come_along_are_refused_by_name_and_nothing_is_written(tmp_path, monkeypatch, own, kind):
    statement, reason = IMPOSSIBLE[kind]
    (tmp_path / "beside_it.py").write_text("")
    own.append(imported(tmp_path, monkeypatch, "class Own: pass"))
    (tmp_path / "own_variant.py").write_text(f"if True:\n    {statement}\nclass Own: pass")
    with pytest.raises(
        ValueError, match=f"code of own_variant.Own cannot be saved with the model: .* line 2 .*{reason}"
    ):
        lion_hf.save_with_code(lion_hf.LionModel(text_config()), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_package_of_the_user_does_not_come_along(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("class Own: pass")
    (package / "helper.py").write_text("x = 1")
    (package / "variant.py").write_text("from own_package.helper import x\nclass Own: pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="own_package is not included"):
        flat_files("lion_hf.models.modeling_lion", [importlib.import_module("own_package.variant").Own])
    with pytest.raises(ValueError, match="__init__.py cannot be imported as a flat file"):
        flat_files("lion_hf.models.modeling_lion", [sys.modules["own_package"].Own])


def test_classes_without_a_file_of_their_own_are_refused(tmp_path, monkeypatch):
    def refusal(cls):
        with pytest.raises(ValueError, match="cannot be saved with the model") as error:
            flat_files("lion_hf.models.modeling_lion", [cls])
        return str(error.value)

    class Local:
        pass

    assert "test_flatten.py has no such name at top level" in refusal(Local)
    assert "in a notebook or in the running script" in refusal(type("Own", (), {"__module__": "__main__"}))
    assert "no source file" in refusal(type("Own", (), {"__module__": "nowhere"}))
    assert "no source file" in refusal(type("Own", (), {"__module__": "math"}))


@pytest.mark.parametrize("name", ["modeling_lion", "configuration_lion", "lion_ops_api"])
def test_a_users_file_does_not_replace_one_of_ours(tmp_path, monkeypatch, name):
    own = imported(tmp_path, monkeypatch, "class Own: pass", name)
    with pytest.raises(ValueError, match=rf"{name}.Own .*: {name}.py has the same name as another .* rename it"):
        flat_files("lion_hf.models.modeling_lion", [own])


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    first = imported(tmp_path / "a", monkeypatch, "class Own: pass")
    first.__module__ = "elsewhere"
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules["own_variant"])
    second = imported(tmp_path / "b", monkeypatch, "class Own: pass")
    with pytest.raises(ValueError, match="own_variant.Own .*: own_variant.py has the same name as another"):
        flat_files("lion_hf.models.modeling_lion", [first, second])


# ----------------------------------------------------------------------------------- the package and a copy of its code

MEETING = """
import os, sys, torch
import lion_hf
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, inputs = sys.argv[1], torch.load(sys.argv[2])
def values(model):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

ours = lion_hf.LionForMaskedLM.from_pretrained(folder).eval()
before = values(ours)
copy = get_class_from_dynamic_module("modeling_lion.LionForMaskedLM", folder).from_pretrained(folder).eval()
assert type(copy) is not type(ours) and type(copy.config) is not type(ours.config)
for model in (copy, ours, copy):
    assert all(torch.equal(x, y) for x, y in zip(before, values(model), strict=True))
kernels = {name.rpartition(".")[2] for name in sys.modules if "triton" in name and "launch" in name and "lion" in name}
assert (kernels >= {"launch", "lion_ops_triton_launch"}) == (os.environ["LION_BACKEND"] == "triton"), kernels
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_package_and_a_copy_of_its_code_work_in_one_process(tmp_path, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(format="chunk", num_hidden_layers=1)))
    folder, inputs = lion_hf.save_with_code(model, tmp_path / "model"), text_inputs(2, 5)
    torch.save(inputs | {"labels": inputs["input_ids"]}, tmp_path / "inputs.pt")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "LION_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEETING, str(folder), str(tmp_path / "inputs.pt")]
    done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_of_copied_code_is_saved_with_that_code(tmp_path, modules_cache):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    first = lion_hf.save_with_code(lion_hf.LionForImageClassification(vision_config()), tmp_path / "first")
    loaded = get_class_from_dynamic_module("modeling_lion_vision.LionForImageClassification", first)
    second = lion_hf.save_with_code(loaded.from_pretrained(first), tmp_path / "second")
    code = {file.name: file.read_text(encoding="utf-8") for file in first.glob("*.py")}
    assert {file.name: file.read_text(encoding="utf-8") for file in second.glob("*.py")} == code
    maps = [json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] for folder in (first, second)]
    assert maps[0] == maps[1]


# ------------------------------------------------------------------------------------------------------ without PyTorch

WITHOUT_TORCH = """
import sys

sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1])
from copied.configuration_lion import LionConfig, LionVisionConfig

assert LionConfig(mask_type="LION-LIT").pos_emb and LionVisionConfig(order="snake").order == "s"
for options in ({"mask_type": "other"}, {"norm_position": "other"}, {"format": "other"}):
    try:
        LionConfig(**options)
    except Exception as error:
        assert "is 'other' in LionConfig; allowed are" in str(error.__cause__ or error), error
    else:
        raise AssertionError(options)
"""


def test_configurations_check_names_without_pytorch(tmp_path):
    """The files saved with a configuration, which hold the tables of names, work without PyTorch."""
    (tmp_path / "copied").mkdir()
    for name, text in flat_files("lion_hf.models.configuration_lion").items():
        (tmp_path / "copied" / name).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
