"""NaN and infinity in one row of a batch do not reach other rows. Models do not check their own activations."""

import math

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, spread_decays, text_config, vision_config

import lion_hf


ORDERED = [(variant, order) for variant in ALL_VARIANTS for order in ("normal", "s")]


def assert_only_one_row_is_lost(run, clean, bad, row=1):
    """Check that NaN in one row changes no other row; `run` maps a batch to outputs with the same rows."""
    expected, actual = run(clean), run(bad)
    assert expected.isfinite().all()
    others = [i for i in range(len(clean)) if i != row]
    assert not actual[row].isfinite().any()
    torch.testing.assert_close(actual[others], expected[others], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant, order", ORDERED)
def test_an_image_of_nan_costs_its_own_row_only(variant, order, form):
    config = vision_config(variant, order=order, format=form)
    model = spread_decays(lion_hf.LionForImageClassification(config)).train()
    clean = torch.randn(3, 3, 16, 16)
    bad = clean.clone()
    bad[1, 2, 3, 4] = math.nan
    assert_only_one_row_is_lost(lambda x: model(x).logits.detach(), clean, bad)

    def gradients(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).logits.sum(), x)[0]

    others = [0, 2]
    torch.testing.assert_close(gradients(bad)[others], gradients(clean)[others], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant, order", ORDERED)
def test_an_image_that_overflows_in_float16_costs_its_own_row_only(variant, order, form):
    config = vision_config(variant, order=order, format=form)
    model = spread_decays(lion_hf.LionForImageClassification(config)).half().eval()
    clean = torch.randn(3, 3, 16, 16).half()
    bad = clean.clone()
    weight = model.lion_vision.embeddings.patch_embeddings.projection.weight.data.mul_(10)
    bad[1] = weight[0].sign().repeat(1, 4, 4) * 6e4
    with torch.no_grad():
        assert_only_one_row_is_lost(lambda x: model(x).logits, clean, bad)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_text_of_nan_costs_its_own_row_only(value, variant, form, unpad):
    model = spread_decays(lion_hf.LionForSequenceClassification(text_config(variant, format=form, unpad=unpad))).eval()
    clean = torch.randn(3, 11, 24)
    bad = clean.clone()
    bad[1, 2, 0] = value
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 7:] = mask[1, 9:] = 0
    with torch.no_grad():
        assert_only_one_row_is_lost(lambda x: model(inputs_embeds=x, attention_mask=mask).logits, clean, bad)
