"""Reading runs no code, rejects types that the authors do not store, and finds the weights in every layout."""

import argparse
import datetime
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import IMAGE, TEXT, bare_image, bare_text, save
from safetensors.torch import save_file

from lion_hf.convert.source import ConversionError, _load, read_source


class Hostile:
    """Creates a file when an unsafe reader unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def raw_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


WRITERS = {
    "zip": torch.save,
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "pickle": raw_pickle,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", ["all", "weights", "args"])
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(tmp_path, writer, place):
    hostile = Hostile(tmp_path / "marker")
    content = {
        "all": hostile,
        "weights": {"model": {"cls_token": hostile}},
        "args": {"args": argparse.Namespace(x=hostile)},
    }
    WRITERS[writer](content[place], tmp_path / "source.pth")
    with pytest.raises(ConversionError, match="Nothing in it was run") as error:
        read_source(tmp_path / "source.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(Exception, match="."):  # the file is indeed hostile: an unsafe reader runs it
        torch.load(tmp_path / "source.pth", weights_only=False)["x"]
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "foreign, name",
    [
        (datetime.datetime(2025, 1, 1), "datetime.datetime"),
        (np.float64(1), "scalar"),
        (np.array([os.path.join]), "posixpath.join"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (os.path.join, "posixpath.join"),
    ],
    ids=["datetime", "numpy scalar", "function in an array", "module", "function"],
)
def test_only_the_types_of_the_authors_are_allowed(tmp_path, foreign, name):
    source = save({"model": {}, "args": argparse.Namespace(x=foreign)}, tmp_path / "source.pth")
    with pytest.raises(ConversionError, match=name):
        read_source(source)


class Forged:
    """An array of objects at addresses given by the file, which NumPy would dereference."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np.ndarray, self.arguments


def test_no_object_of_numpy_is_made_from_what_a_file_says(tmp_path):
    weights, _ = bare_image("decay")
    arrays = {"array": np.arange(4), "called": Forged((2,), "u4"), "type": np.dtype("O")}
    content = _load(save({"model": weights, **arrays}, tmp_path / "arrays.pth"))
    assert not any(isinstance(content[name], (np.ndarray, np.dtype)) for name in arrays)
    forged = Forged(Forged((2,), "O", b"A" * 16))
    source = read_source(save({"model": weights, "rng": forged}, tmp_path / "source.pth"))
    assert source.weights.keys() == weights.keys()


def test_a_name_that_is_none_is_refused(tmp_path):
    weights, _ = bare_image("decay")
    with pytest.raises(ConversionError, match="under 3, but names of weights must be strings"):
        read_source(save({**weights, 3: torch.zeros(1)}, tmp_path / "source.pth"))


def test_namespace_timedelta_and_random_states_are_allowed_and_only_while_reading(tmp_path):
    weights, _ = bare_image("decay")
    state = np.random.RandomState(0).get_state()
    extra = {"args": argparse.Namespace(drop=0.1), "rng": [{"numpy": state}], "time": datetime.timedelta(seconds=3)}
    source = save({"model": weights, **extra}, tmp_path / "source.pth")
    allowed = set(torch.serialization.get_safe_globals())
    assert read_source(source).stated == {"drop": 0.1}
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_both_numpy_generations_are_read(tmp_path, module):
    with zipfile.ZipFile(TEXT) as old, zipfile.ZipFile(tmp_path / "source.pt", "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            if entry.endswith("data.pkl"):
                assert b"numpy._core.multiarray\n" in data or b"numpy.core.multiarray\n" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                data = data.replace(b"numpy.core.multiarray", module)
            new.writestr(entry, data)
    assert read_source(tmp_path / "source.pt").kind == "text"


def truncated(path, part):
    data = IMAGE.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


BROKEN = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.touch(), "is empty"),
    "text": (lambda path: path.write_text("weights\n" * 9), "not a complete PyTorch checkpoint"),
    "almost whole": (lambda path: truncated(path, 0.999), "not a complete PyTorch checkpoint"),
    "half": (lambda path: truncated(path, 0.5), "not a complete PyTorch checkpoint"),
    "beginning": (lambda path: truncated(path, 0.0001), "not a complete PyTorch checkpoint"),
    "list": (lambda path: torch.save([1], path), "contains list, not a checkpoint"),
    "nothing": (lambda path: torch.save({}, path), "contains nothing"),
    "nothing wrapped": (lambda path: torch.save({"state_dict": {}}, path), "contains 'state_dict', but neither"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_checkpoint_is_an_error_of_one_line(tmp_path, kind):
    make, message = BROKEN[kind]
    make(tmp_path / "source.pth")
    with pytest.raises(ConversionError, match=message) as error:
        read_source(tmp_path / "source.pth")
    assert "\n" not in str(error.value)


def test_a_truncated_safetensors_file_is_an_error_of_one_line(tmp_path):
    weights, _ = bare_image()
    save_file(weights, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    assert read_source(tmp_path / "whole.safetensors").kind == "image"
    with pytest.raises(ConversionError, match="not a complete safetensors file") as error:
        read_source(tmp_path / "half.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names", [("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight"), ("encoder.block.0.weight",), (1, 2)]
)
def test_another_architecture_is_refused_by_its_names(tmp_path, names):
    source = save({name: torch.zeros(2) for name in names}, tmp_path / "source.pth")
    with pytest.raises(ConversionError, match=f"not one of the authors' models: it contains {names[0]!r}"):
        read_source(source)


@pytest.mark.parametrize(
    "value", [3, torch.zeros(1, device="meta"), torch.eye(2).to_sparse()], ids=["int", "meta", "sparse"]
)
def test_anything_but_dense_tensors_is_refused(tmp_path, value):
    weights, _ = bare_image()
    source = save(weights | {"norm.weight": value}, tmp_path / "source.pth")
    with pytest.raises(ConversionError, match=r"dense tensor under 'norm.weight'|refuses"):
        read_source(source)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("make, kind", [(bare_image, "image"), (bare_text, "text")])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix, make, kind):
    weights, _ = make()
    source = read_source(save({prefix + name: x for name, x in weights.items()}, tmp_path / "source.pth"))
    assert (source.kind, source.layout) == (kind, "bare state dict")
    assert source.weights.keys() == weights.keys()


@pytest.mark.parametrize("make, kind", [(bare_image, "image"), (bare_text, "text")])
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_a_state_dict_under_its_common_name_is_found(tmp_path, prefix, make, kind):
    weights, _ = make()
    content = {"epoch": 3, "state_dict": {prefix + name: x for name, x in weights.items()}}
    source = read_source(save(content, tmp_path / "source.ckpt"))
    assert (source.kind, source.layout, source.stated) == (kind, "wrapped state dict", {})
    assert source.weights.keys() == weights.keys()
    source = read_source(save(content | {"args": argparse.Namespace(cls_tok=True)}, tmp_path / "source.ckpt"))
    assert source.stated == {"cls_tok": True}


def test_layouts_are_told_apart():
    image, text = read_source(IMAGE), read_source(TEXT)
    assert (image.kind, image.layout, image.stated["mask_type"]) == ("image", "DeiT image checkpoint", "Selective")
    assert (text.kind, text.layout, text.stated["arch_type"]) == ("text", "Composer text checkpoint", "lion-d")
    assert text.tokenizer["vocab"]["[MASK]"] == 4


def test_averaged_weights_are_taken_on_demand_and_their_absence_is_an_error(tmp_path):
    plain, averaged = read_source(IMAGE), read_source(IMAGE, ema=True)
    assert plain.weights.keys() == averaged.weights.keys()
    assert not torch.equal(plain.weights["head.weight"], averaged.weights["head.weight"])
    weights, _ = bare_image()
    for content in ({"model": weights}, {"model": weights, "model_ema": None}, weights):
        with pytest.raises(ConversionError, match="remove --ema"):
            read_source(save(content, tmp_path / "source.pth"), ema=True)


def test_a_checkpoint_in_the_old_format_of_pytorch_is_read(tmp_path):
    weights, _ = bare_image()
    torch.save({"model": weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_source(tmp_path / "old.pth").weights.keys() == weights.keys()


WRAPPINGS = {
    "compiled": "_orig_mod.",
    "parallel, compiled": "module._orig_mod.",
    "averaged": "module.",
    "averaged, parallel": "module.module.",
    "lightning": "model._orig_mod.",
    "fsdp": "_fsdp_wrapped_module.",
}


def wrapped(weights, prefix):
    """Return names as wrappers around the model and around each block change them."""
    inner = {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module."): x
             for name, x in weights.items()}  # fmt: skip
    inner = {name.replace("encoder.layer.0.", "encoder.layer.0._orig_mod."): x for name, x in inner.items()}
    content = {prefix + name: x for name, x in inner.items()}
    return content | {"n_averaged": torch.tensor(7)} if prefix.startswith("module.") else content


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("make", [bare_image, bare_text], ids=["image", "text"])
@pytest.mark.parametrize("place", ["bare", "model", "state_dict"])
def test_names_are_read_whatever_stood_around_the_modules(tmp_path, make, wrapping, place):
    weights, _ = make("selective")
    content = wrapped(weights, WRAPPINGS[wrapping])
    source = read_source(save(content if place == "bare" else {place: content}, tmp_path / "source.pth"))
    assert source.weights.keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in source.weights.items())


def test_what_wrappers_leave_that_cannot_be_read_is_refused_with_a_way_out(tmp_path):
    weights, _ = bare_image("decay")
    for content, message in (
        ({"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, "FULL_STATE_DICT"),
        ({"flat_param": torch.zeros(9), **weights}, "FULL_STATE_DICT"),
        ({"module.norm.weight": torch.zeros(9), **weights}, "both become 'norm.weight' without wrappers; remove one"),
    ):
        with pytest.raises(ConversionError, match=message) as error:
            read_source(save(content, tmp_path / "source.pth"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_averages_beside_weights_are_taken_on_demand_and_alone_they_are_told(tmp_path, key):
    weights, _ = bare_image("decay")
    averaged = {f"module.{name}": x + 1 for name, x in weights.items()}
    source = save({"state_dict": weights, key: averaged}, tmp_path / "both.pth")
    assert torch.equal(read_source(source).weights["norm.bias"], weights["norm.bias"])
    assert torch.equal(read_source(source, ema=True).weights["norm.bias"], weights["norm.bias"] + 1)
    alone = save({key: averaged, "epoch": 3}, tmp_path / "alone.pth")
    with pytest.raises(ConversionError, match=f"averaged weights only \\({key}\\); convert them with --ema"):
        read_source(alone)
    assert read_source(alone, ema=True).weights.keys() == weights.keys()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_shards_of_one_process_are_refused_with_a_way_out(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        weights, _ = bare_image("decay")
        mesh = init_device_mesh("cpu", (1,))
        shards = {name: distribute_tensor(x, mesh) for name, x in weights.items()}
        source = save({"model": shards}, tmp_path / "source.pth")
        with pytest.raises(ConversionError, match="full_state_dict=True"):
            read_source(source)
    finally:
        torch.distributed.destroy_process_group()
