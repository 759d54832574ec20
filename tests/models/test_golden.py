"""Every form reproduces the authors' models: outputs to 1e-9, gradients to 1e-7.

tests/golden holds a small set of recorded outputs. A larger set beside the checkout (shared/golden) is also used if
present.
"""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import relative
from safetensors.torch import load_file
from small_models import FORMS

import lion_hf


FOLDERS = (Path(__file__).parents[1] / "golden", Path(__file__).parents[3] / "shared" / "golden")


def cases():
    found = {}
    for folder in FOLDERS[::-1]:  # of files with the same name, the small copy is used
        if (manifest := folder / "manifest.json").exists():
            entries = json.loads(manifest.read_text())
            entries = entries["cases"] if isinstance(entries, dict) else entries
            found |= {c["file"]: (folder, c) for c in entries if c["kind"] in ("vision", "text")}
    return [pytest.param(folder, case, id=name.split(".")[0]) for name, (folder, case) in sorted(found.items())]


def build(case, tensors):
    """Return our model with the authors' weights, and the converter of their names."""
    k = case["config"]
    if case["kind"] == "vision":
        config = lion_hf.LionVisionConfig(
            mask_type=k["mask_type"],
            order=k["order"],
            pos_emb=k["pos_emb"],
            cls_tok=k["cls_tok"],
            image_size=k["img_size"],
            patch_size=k["patch_size"],
            hidden_size=k["embed_dim"],
            num_hidden_layers=k["depth"],
            num_attention_heads=k["num_heads"],
            intermediate_size=int(k["embed_dim"] * k["mlp_ratio"]),
            num_labels=k["num_classes"],
            chunk_size=k["chunk_size"],
        )
        model, convert = lion_hf.LionForImageClassification(config), lion_hf.convert_vision_state_dict
    else:
        same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        config = lion_hf.LionConfig(
            mask_type=k["arch_type"],
            layer_norm_after=k["layer_norm_after"],
            pos_emb=k["position_embedding_type"] == "absolute",
            max_position_embeddings=k["max_position_embeddings"],
            chunk_size=k["chunk_size"],
            num_labels=k["num_labels"] or 2,
            **{name: k[name] for name in same},
        )
        head = lion_hf.LionForMaskedLM if k["head"] == "mlm" else lion_hf.LionForSequenceClassification
        model, convert = head(config), lion_hf.convert_text_state_dict
    weights = {name.removeprefix("weight."): x for name, x in tensors.items() if name.startswith("weight.")}
    model = model.double()
    model.load_state_dict(convert(weights, config))
    return model.eval(), lambda state: convert(state, config)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder, case", cases())
def test_outputs_and_gradients_equal_the_authors(folder, case, form):
    tensors = load_file(folder / case["file"])
    model, convert = build(case, tensors)
    model.config.format = form
    inputs = {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}
    outputs = model(**inputs, output_hidden_states=True, output_attentions=form == "attention")
    assert relative(outputs.logits, tensors["output.attention.logits"]) < 1e-9
    stem, states = (
        ("block", outputs.hidden_states[1:]) if case["kind"] == "vision" else ("hidden_states", outputs.hidden_states)
    )
    for i, state in enumerate(states):
        assert relative(state, tensors[f"output.attention.{stem}.{i}"]) < 1e-9, i
    if case["kind"] == "text" and form == "attention":
        for i, weights in enumerate(outputs.attentions):
            assert relative(weights, tensors[f"output.attention.attentions.{i}"]) < 1e-9, i
    if "input.labels" not in tensors:
        return
    loss = outputs.loss
    if isinstance(model, lion_hf.LionForMaskedLM):  # Transformers computes this loss in float32
        assert abs(loss.item() / tensors["output.attention.loss"].item() - 1) < 2e-6
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten())
    if "output.attention.loss" in tensors:
        assert abs(loss.item() - tensors["output.attention.loss"].item()) < 1e-9
    gradients = convert({n.removeprefix("grad."): x for n, x in tensors.items() if n.startswith("grad.")})
    if gradients:
        loss.backward()
        parameters = dict(model.named_parameters())
        assert set(parameters) <= set(gradients)
        for name, parameter in parameters.items():
            assert (parameter.grad - gradients[name]).abs().max() < 1e-7, name


@pytest.mark.parametrize("folder, case", cases())
def test_float32_stays_close_to_float64(folder, case):
    tensors = load_file(folder / case["file"])
    model, _ = build(case, tensors)
    inputs = {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}
    inputs.pop("labels", None)
    low = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    error = (model.float()(**low).logits - tensors["output.attention.logits"]).abs().max()
    assert error < (5e-6 if case["kind"] == "vision" else 6e-5)
