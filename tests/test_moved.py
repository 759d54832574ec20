"""Import paths of 0.1 work, and each gives one warning with the new path."""

import importlib
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lion_hf
from lion_hf import _moved


NAMES = json.loads((Path(__file__).parent / "data" / "v0_1" / "names.json").read_text(encoding="utf-8"))
OLD = sorted(NAMES)
FUNCTIONS = ("push", "save_with_code")
# Internal helpers of 0.1 without a direct counterpart; CHANGELOG.md names their replacements.
GONE = {
    "configuration_lion": {"SPELLINGS"},
    "lion_kernels": {"gate_gradient_kernel", "mix_kernel", "scan_kernel", "sums_kernel"},
    "lion_layer": {"decay_names", "init_mixer"},
    "modeling_lion": {"LionMLP"},
    "modeling_lion_vision": {"LionVisionDropPath", "LionVisionMLP"},
}


@pytest.fixture
def forgotten():
    """Unload the old modules, as before their first import."""

    def forget():
        for name in OLD:
            sys.modules.pop(f"lion_hf.{name}", None)
            if name not in FUNCTIONS:
                vars(lion_hf).pop(name, None)

    forget()
    yield
    forget()


def old_module(name):
    if name in ("lion_kernels", "lion_triton"):
        pytest.importorskip("triton")
    return importlib.import_module(f"lion_hf.{name}")


def said(caught):
    return [warning for warning in caught if "old path" in str(warning.message)]


def test_the_table_names_every_module_of_0_1():
    assert sorted(_moved.MOVED) == OLD


def test_the_changelog_tells_where_each_module_is_now():
    changes = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`([\w.]+)`", line) for line in changes.splitlines() if line.startswith("| `lion_hf.")]
    assert rows == [[f"lion_hf.{name}", *_moved.targets(f"lion_hf.{name}")] for name in _moved.MOVED]


@pytest.mark.parametrize("name", OLD)
def test_an_old_module_warns_once_and_holds_every_public_name(name, forgotten):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = old_module(name)
        assert importlib.import_module(f"lion_hf.{name}") is module
        found = {x: getattr(module, x) for x in NAMES[name] if x not in GONE.get(name, ())}
        exec(f"from lion_hf.{name} import *", starred := {})
    (warning,) = said(caught)
    assert warning.category is FutureWarning
    assert all(target in str(warning.message) for target in _moved.targets(f"lion_hf.{name}"))
    homes = [importlib.import_module(target) for target in _moved.targets(f"lion_hf.{name}")]
    for key, value in found.items():
        assert value is next(getattr(home, key) for home in homes if hasattr(home, key))
        assert key not in module.__all__ or (starred[key] is value and key in dir(module))


@pytest.mark.parametrize("name", [name for name in OLD if name not in FUNCTIONS])
def test_an_old_module_is_an_attribute_of_the_package(name, forgotten):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name in ("lion_kernels", "lion_triton"):
            pytest.importorskip("triton")
        assert getattr(lion_hf, name) is getattr(lion_hf, name) is sys.modules[f"lion_hf.{name}"]
    (warning,) = said(caught)
    assert warning.filename == __file__, "the warning does not point to the line of the import"


def test_the_warning_names_the_line_of_the_import(forgotten):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from lion_hf import lion_ops  # noqa: F401
        from lion_hf.configuration_lion import LionConfig  # noqa: F401
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert [lines[x.lineno - 1].split()[:2] for x in said(caught)] == [
        ["from", "lion_hf"],
        ["from", "lion_hf.configuration_lion"],
    ]
    assert {x.filename for x in said(caught)} == {__file__}


def test_new_values_show_under_the_old_path(forgotten, monkeypatch):
    module = old_module("lion_ops")
    monkeypatch.setattr("lion_hf.ops.api.CROSSOVER", "changed")
    assert module.CROSSOVER == "changed"


def test_an_unknown_name_is_told_where_to_look(forgotten):
    module = old_module("lion_scan_order")
    with pytest.raises(AttributeError, match=r"'lion_hf.lion_scan_order' has no attribute 'x'; .* now in lion_hf\.ops"):
        module.x  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'y'"):
        from lion_hf.lion_scan_order import y  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="lion_hf.lion_nothing"):
        importlib.import_module("lion_hf.lion_nothing")
    with pytest.raises(AttributeError, match="'lion_hf' has no attribute 'lion_nothing'"):
        lion_hf.lion_nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="not a package"):
        importlib.import_module("lion_hf.convert_names.more")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "statement", ["import lion_hf.{0}", "from lion_hf.{0} import {0}", "import lion_hf.{0} as {0}"]
)
def test_functions_stay_functions_after_the_import_of_a_module_of_their_name(name, statement, forgotten):
    function = getattr(lion_hf, name)
    exec(statement.format(name), space := {})
    assert getattr(lion_hf, name) is function is getattr(sys.modules[f"lion_hf.{name}"], name)
    assert space.get(name, function) is function


@pytest.mark.parametrize(
    "module, name", [("configuration_lion", "LionConfig"), ("push", "push"), ("lion_layer", "LionMixer")]
)
def test_pickles_that_name_old_modules_load(module, name, forgotten):
    written = pickle.dumps(getattr(old_module(module), name), protocol=0)
    new = getattr(old_module(module), name).__module__.encode()
    assert written.count(new) == 1
    assert pickle.loads(written.replace(new, f"lion_hf.{module}".encode())) is getattr(old_module(module), name)


def test_a_configuration_pickled_by_0_1_loads(forgotten):
    config = lion_hf.LionConfig(hidden_size=24, num_attention_heads=3)
    written = pickle.dumps(config, protocol=0).replace(
        b"lion_hf.models.configuration_lion", b"lion_hf.configuration_lion"
    )
    assert b"lion_hf.configuration_lion" in written
    loaded = pickle.loads(written)
    assert type(loaded) is lion_hf.LionConfig and loaded.to_dict() == config.to_dict()


@pytest.mark.slow
def test_the_old_command_is_the_new_one(tmp_path):
    def run(module):
        command = [sys.executable, "-m", module, "absent.pth", "out"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    old, new = run("lion_hf.convert_lion_checkpoint"), run("lion_hf.convert")
    assert new.stderr.splitlines()[-1] == "lion-convert: error: absent.pth does not exist."
    assert (old.returncode, old.stdout) == (new.returncode, new.stdout) == (2, "")
    assert old.stderr.splitlines()[-1] == new.stderr.splitlines()[-1]
    assert old.stderr.count("FutureWarning: lion_hf.convert_lion_checkpoint is now") == 1
    assert "old path" not in new.stderr and "RuntimeWarning" not in old.stderr + new.stderr
