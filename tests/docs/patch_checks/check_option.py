"""Check docs/contributing/option.patch: both encoders accept the new option of the block and store it."""

import tempfile

import torch
from small_models import FORMS, text_config, text_inputs, vision_config
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTModel

import lion_hf
from lion_hf.convert import from_bert, from_vit


def refused(call, *words):
    try:
        call()
    except Exception as error:  # Transformers wraps the errors of configurations
        assert all(word in f"{error} {error.__cause__}" for word in words), error
    else:
        raise AssertionError(f"not refused: {words}")


def check_forms(model, call):
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 4  # of the mixer and of the MLP of two layers
    results = []
    for form in FORMS:
        model.config.format = form
        model.zero_grad()
        logits = call().logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(norm.weight.grad for norm in norms)])
    assert all(grad.abs().sum() > 0 for grad in results[0][1:])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def check_saved(model, call):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).double()
        assert loaded.config.branch_norm == "rms"
        torch.testing.assert_close(call(loaded).logits, call(model).logits, rtol=1e-9, atol=1e-12)
        refused(lambda: type(model).from_pretrained(folder, branch_norm="none"), "branch_norm", "when it is loaded")
        other = type(model.config).from_dict({**model.config.to_dict(), "branch_norm": "none"})
        refused(lambda: type(model).from_pretrained(folder, config=other), "branch_norm", "when it is loaded")


torch.manual_seed(0)
inputs, pixels = text_inputs(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
text = lion_hf.LionForMaskedLM(text_config(branch_norm="RMS", unpad=False)).double().eval()
check_forms(text, lambda: text(**inputs))
check_saved(text, lambda model: model(**inputs))
for norm_position in ("post", "pre"):
    config = vision_config("decay", branch_norm="rms", norm_position=norm_position)
    image = lion_hf.LionForImageClassification(config).double().eval()
    check_forms(image, lambda image=image: image(pixels))
check_saved(image, lambda model: model(pixels))
encoder = lion_hf.nn.Encoder(24, 2, 3, branch_norm="rms")
assert sum(isinstance(module, nn.RMSNorm) for module in encoder.modules()) == 4
sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
bert, vit = BertForMaskedLM(BertConfig(vocab_size=61, **sizes)), ViTModel(ViTConfig(image_size=32, **sizes))
refused(lambda: from_bert(bert, branch_norm="rms"), "branch_norm='rms' cannot be chosen")
refused(lambda: from_vit(vit, branch_norm="rms"), "branch_norm='rms' cannot be chosen")
refused(lambda: text_config(branch_norm="batch"), "branch_norm is 'batch'", "'none', 'rms'")
