"""Whole models under torch.func: per-sample gradients, as differential privacy and influence functions use them."""

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, spread_decays, text_config, text_inputs, vision_config
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

import lion_hf


def text(mask_type, form):
    model = lion_hf.LionForSequenceClassification(text_config(mask_type, format=form, num_labels=4, softmax_layers=[1]))
    return model, text_inputs(2, 9), torch.tensor([3, 1])


def image(mask_type, form):
    order = "normal" if mask_type == "lit" else "s"
    model = lion_hf.LionForImageClassification(vision_config(mask_type, format=form, order=order, num_labels=4))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}, torch.tensor([3, 1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
@pytest.mark.parametrize("build", [text, image], ids=lambda x: x.__name__)
def test_gradients_of_each_sample_are_those_of_autograd(build, mask_type, form):
    model, inputs, labels = build(mask_type, form)
    model = spread_decays(model).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row, label):
        outputs = functional_call(model, parameters, (), {name: x[None] for name, x in row.items()})
        return F.cross_entropy(outputs.logits, label[None])

    samples = vmap(grad(loss), (None, 0, 0))(parameters, inputs, labels)
    for i in range(2):
        row = {name: x[i] for name, x in inputs.items()}
        model.zero_grad()
        loss(dict(model.named_parameters()), row, labels[i]).backward()
        alone = grad(loss)(parameters, row, labels[i])
        for name, p in model.named_parameters():
            torch.testing.assert_close(samples[name][i], p.grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(alone[name], p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask_type, form", [(name, FORMS[i % 3]) for i, name in enumerate(ALL_VARIANTS)])
def test_forward_mode_is_the_gradient_along_a_direction(mask_type, form):
    model, inputs, labels = image(mask_type, form)
    model = spread_decays(model).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return F.cross_entropy(functional_call(model, parameters, (), inputs).logits, labels)

    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    along = sum((direction[name] * g).sum() for name, g in grad(loss)(parameters).items())
    torch.testing.assert_close(jvp(loss, (parameters,), (direction,))[1], along, rtol=1e-9, atol=1e-9)


def test_dropout_draws_for_each_sample():
    config = text_config(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2, format="attention")
    model = lion_hf.LionForMaskedLM(config).train()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(1, 61, (1, 9)).expand(2, 9)

    def loss(parameters, ids):
        return functional_call(model, parameters, (ids[None],)).logits.sum()

    samples = vmap(grad(loss), (None, 0), randomness="different")(parameters, ids)
    first, second = samples["lion.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(first, second)
