"""Checkpoints in the layouts of the authors' training scripts, for the tests of the converter.

tests/golden holds one complete checkpoint of each kind. The others are built here, from the weights in tests/golden or
from random weights.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_models import spread_decays, text_config, vision_config

import lion_hf
from lion_hf.convert.names import revert_text_state_dict, revert_vision_state_dict


GOLDEN = Path(__file__).parent / "golden"
IMAGE, TEXT = GOLDEN / "vision_checkpoint.pth", GOLDEN / "text_checkpoint_d" / "latest-rank0.pt"
IMAGE_EXPECTED, TEXT_EXPECTED = GOLDEN / f"{IMAGE.name}.expected.safetensors", TEXT.parent / "expected.safetensors"


def golden(name):
    """Return the weights under the authors' names, all tensors of the file, and the configuration of a golden model."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    config = next(case["config"] for case in manifest if case["file"] == f"{name}.safetensors")
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("weight."): x for k, x in tensors.items() if k.startswith("weight.")}, tensors, config


def deit(weights, config, **changes):
    """Return what the authors' image training saves; `config` has the spelling of the golden files."""
    args = {name: config[name] for name in ("mask_type", "order", "pos_emb", "cls_tok")}
    args |= {"model": "lion_custom", "input_size": config["img_size"], "nb_classes": config["num_classes"]}
    return {"model": weights, "epoch": 3, "args": argparse.Namespace(**args, drop=0.0, drop_path=0.1, **changes)}


def composer(weights, config, **changes):
    """Return what the authors' text training saves; `config` has the spelling of the golden files."""
    content = {name: value for name, value in config.items() if name not in ("head", "num_labels", "chunk_size")}
    model = {"config": {"file_extension": ".json", "content": content | {"model_type": "bert"} | changes}}
    weights = {f"model.{name}": x for name, x in weights.items()}
    return {"state": {"model": weights, "integrations": {"huggingface": {"model": model}}}, "rng": []}


def bare_image(mask_type="lit", **options):
    """Return random weights of an image classifier under the authors' names, and our model with these weights."""
    model = spread_decays(lion_hf.LionForImageClassification(vision_config(mask_type, **options))).eval()
    return revert_vision_state_dict(model.state_dict()), model


def bare_text(mask_type="lit", **options):
    """Return random weights of a masked language model under the authors' names, and our model with these weights."""
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, **options))).eval()
    return revert_text_state_dict(model.state_dict(), model.config), model


def relative(actual, expected):
    """Return the largest error divided by the largest entry."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def save(content, path):
    torch.save(content, path)
    return path
