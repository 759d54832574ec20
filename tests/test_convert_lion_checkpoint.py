"""Checkpoints of the authors become folders that give their logits; whatever does not fit is one line and no file.

tests/golden holds two whole checkpoints of the authors' training scripts, and weights from which others are built here.
"""

import argparse
import configparser
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from models import VARIANTS, spread_decays, text_config, vision_config
from PIL import Image
from safetensors.torch import load_file, save_file
from test_golden import FOLDERS, relative
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
)

import lion_hf
from lion_hf import convert_lion_checkpoint as command
from lion_hf.convert_companions import image_processor


GOLDEN = Path(__file__).parent / "golden"
IMAGE, TEXT = GOLDEN / "vision_checkpoint.pth", GOLDEN / "text_checkpoint_d" / "latest-rank0.pt"
AUTO = {
    "LionForImageClassification": AutoModelForImageClassification,
    "LionForMaskedLM": AutoModelForMaskedLM,
    "LionForSequenceClassification": AutoModelForSequenceClassification,
}


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def logits(folder, tensors):
    """What the folder's model computes in float64 from the inputs of a golden file, through its Auto class."""
    head = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = AUTO[head].from_pretrained(folder, dtype=torch.float64).eval()
    inputs = {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def golden_cases(*kinds):
    entries = json.loads((FOLDERS[0] / "manifest.json").read_text())
    entries = entries["cases"] if isinstance(entries, dict) else entries
    return [pytest.param(case, id=case["file"].split(".")[0]) for case in entries if case["kind"] in kinds]


def golden_weights(case):
    tensors = load_file(FOLDERS[0] / case["file"])
    return {name.removeprefix("weight."): x for name, x in tensors.items() if name.startswith("weight.")}, tensors


def deit(weights, config, **changes):
    """A checkpoint as the authors' image training writes it."""
    args = {name: config[name] for name in ("mask_type", "order", "pos_emb", "cls_tok")}
    args |= {"input_size": config["img_size"], "nb_classes": config["num_classes"], "model": "lion_custom"}
    args |= {"drop": 0.0, "drop_path": 0.1} | changes
    return {"model": weights, "epoch": 3, "args": argparse.Namespace(**args)}


def composer(weights, config, **changes):
    """A checkpoint as the authors' text training writes it."""
    content = {name: value for name, value in config.items() if name not in ("head", "batch", "seq_len", "lengths")}
    model = {"config": {"content": content | {"model_type": "bert"} | changes}}
    state = {"model": {f"model.{name}": x for name, x in weights.items()}}
    return {"state": state | {"integrations": {"huggingface": {"model": model}}}, "rng": []}


def tiny_official(mask_type="lit", **options):
    """Random weights of an image model under the authors' names, without anything that describes them."""
    options = {"num_attention_heads": 3, **options}
    model = spread_decays(lion_hf.LionForImageClassification(vision_config(mask_type, **options)))
    from lion_hf.convert_names import revert_vision_state_dict

    return revert_vision_state_dict(model.state_dict())


@pytest.fixture
def saved(tmp_path):
    """Saves an object as source.pt; everything else appears in a folder of its own."""
    (tmp_path / "place").mkdir()

    def save(content, name="source.pt", **options):
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def out(tmp_path):
    (tmp_path / "place").mkdir(exist_ok=True)
    return tmp_path / "place" / "out"


def assert_refused(capfd, out, *arguments, match):
    """Exit code 2, one line that says why, and nothing new beside `out`."""
    before = sorted(out.parent.rglob("*"))
    assert run(*arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lion-convert: error: ") and captured.err.count("\n") == 1, captured.err
    assert pytest.importorskip("re").search(match, captured.err), captured.err
    assert sorted(out.parent.rglob("*")) == before


# ----------------------------------------------------------------------------------------------- the authors' outputs


@pytest.mark.parametrize("source", [IMAGE, TEXT], ids=["image", "text"])
def test_golden_checkpoints_give_the_authors_logits_through_auto_classes(source, out):
    assert run(source, out) == 0
    expected = (
        IMAGE.with_name(IMAGE.name + ".expected.safetensors")
        if source == IMAGE
        else TEXT.parent / "expected.safetensors"
    )
    tensors = load_file(expected)
    assert relative(logits(out, tensors), tensors["output.attention.logits_float64"]) < 1e-9


def test_averaged_weights_give_the_authors_averaged_logits(out):
    assert run(IMAGE, out, "--ema") == 0
    tensors = load_file(IMAGE.with_name(IMAGE.name + ".expected.safetensors"))
    actual = logits(out, tensors)
    assert relative(actual, tensors["output.attention_ema.logits"].double()) < 1e-6  # written in float32
    assert relative(actual, tensors["output.attention.logits_float64"]) > 1e-3


@pytest.mark.parametrize("case", golden_cases("vision"))
def test_image_checkpoints_of_every_variant(case, saved, out):
    weights, tensors = golden_weights(case)
    flags = ["--num-heads", case["config"]["num_heads"]] if case["config"]["mask_type"] == "Lit" else []
    assert run(saved(deit(weights, case["config"])), out, *flags) == 0
    assert relative(logits(out, tensors), tensors["output.attention.logits"]) < 1e-9


@pytest.mark.parametrize("case", golden_cases("text"))
def test_text_checkpoints_of_every_variant_and_head(case, saved, out):
    weights, tensors = golden_weights(case)
    assert run(saved(composer(weights, case["config"])), out) == 0
    assert relative(logits(out, tensors), tensors["output.attention.logits"]) < 1e-9


NAMES = {
    "text_lit_yaml": ("lion-lit", "linear_attention", "LINEAR_ATTENTION", "Lit"),
    "text_d_yaml": ("lion-d", "nova", "Nova", "LION-D", "Decay"),
    "text_s_ln_holes": ("lion-s", "nova-inputdep", "Nova-InputDep", "selective"),
}


@pytest.mark.parametrize("stem, name", [(stem, name) for stem, names in NAMES.items() for name in names])
def test_every_name_of_a_variant_is_understood(stem, name, saved):
    case = next(p.values[0] for p in golden_cases("text") if p.id == stem)
    weights, _ = golden_weights(case)
    plan = command.convert_checkpoint(saved(composer(weights, case["config"], arch_type=name)), None)
    assert (
        plan.model.config.mask_type
        == case["config"]["arch_type"].replace("lion-", "").replace("d", "decay").replace("s", "selective")
        if stem != "text_lit_yaml"
        else plan.model.config.mask_type == "lit"
    )


@pytest.mark.parametrize("size, heads", [("tiny", 3), ("small", 6), ("base", 12)])
def test_heads_of_lit_come_from_the_name_of_the_model_in_args(size, heads, saved, out):
    model = lion_hf.LionForImageClassification(vision_config("lit", hidden_size=24, num_attention_heads=heads)).eval()
    weights = tiny_official_of(model)
    config = {
        "mask_type": "Lit",
        "order": "Normal",
        "pos_emb": False,
        "cls_tok": True,
        "img_size": 16,
        "num_classes": 5,
    }
    assert run(saved(deit(weights, config, model=f"lion_{size}_patch16_224")), out) == 0
    loaded = AutoModelForImageClassification.from_pretrained(out).eval()
    assert loaded.config.num_attention_heads == heads and loaded.config.cls_tok
    model.config.cls_tok = True
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)
