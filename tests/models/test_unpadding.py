"""`unpad` removes only padding, and does no harm to code that reads padded positions."""

import pytest
import torch
from small_models import ALL_VARIANTS, text_config
from text_models import build
from torch import nn

import lion_hf
from lion_hf.nn import Encoder, encoder
from lion_hf.ops import unpad


MASK_TOKEN = 60
ENDS = [[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]


@pytest.fixture(autouse=True)
def any_padding_pays(monkeypatch):
    monkeypatch.setattr(encoder, "LEAST_PADDING", 0)


def batch(expanded=False):
    """Return rows padded at both ends. With `expanded`, the masked positions on the right hold mask tokens."""
    mask = torch.tensor(ENDS)
    ids = torch.randint(1, MASK_TOKEN, mask.shape) * mask
    if expanded:
        after = mask.cumsum(1) == mask.sum(1, keepdim=True)
        ids = ids.masked_fill(after & (mask == 0), MASK_TOKEN)
    return ids, mask


def gradient_norm(model, loss):
    model.zero_grad()
    loss.backward()
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("head", [lion_hf.LionForMaskedLM, lion_hf.LionForTokenClassification])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_labels_left_on_padding_are_harmless(mask_type, head, norm_position):
    """The biases of a new model are 0; a head's LayerNorm over zeros would have a gradient of 1 / sqrt(eps)."""
    model = head(text_config(mask_type, norm_position=norm_position)).train()
    (ids, mask), norms = batch(), {}
    labels = ids % model.config.num_labels if "Token" in head.__name__ else ids
    for taken_out in (False, True, None):
        model.config.unpad = taken_out
        norms[taken_out] = gradient_norm(model, model(ids, mask, labels=labels).loss)
    assert max(norms.values()) < 2 * min(norms.values()), norms


@pytest.mark.parametrize("taken_out", [True, None], ids=str)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_the_loss_is_the_same_up_to_the_share_of_padding(mask_type, taken_out):
    model, (ids, mask) = build(lion_hf.LionForMaskedLM, mask_type, torch.float64).train(), batch(expanded=True)
    read, results = ids != 0, []
    for model.config.unpad in (False, taken_out):
        logits = model(ids, mask).logits
        by_token = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        grads = torch.autograd.grad(by_token[read].sum(), list(model.parameters()), allow_unused=True)
        loss = model(ids, mask, labels=ids).loss
        torch.testing.assert_close(loss, by_token.mean(), check_dtype=False)
        results.append([by_token[read], *(torch.zeros(()) if g is None else g for g in grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("taken_out", [None, True, False], ids=str)
@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_tokens_that_expand_a_query_are_alike_in_training_and_evaluation(mask_type, embedded, taken_out):
    """These tokens are masked, so that no other token reads them, but the loss reads their outputs."""
    model = build(lion_hf.LionModel, mask_type, torch.float64, unpad=taken_out)
    ids, mask = batch(expanded=True)
    inputs, read = {"input_ids": ids}, ids != 0
    if embedded:  # padding cannot be recognised, so by default it stays
        inputs, read = {"inputs_embeds": model.embeddings.word_embeddings(ids)}, torch.ones_like(ids).bool()
    found = [model.train(mode)(**inputs, attention_mask=mask).last_hidden_state for mode in (True, False)]
    torch.testing.assert_close(found[0][read], found[1][read], rtol=1e-9, atol=1e-12)
    model.config.unpad = False
    expected = model(**inputs, attention_mask=mask).last_hidden_state
    if not (embedded and taken_out):  # with unpad=True, everything masked is removed
        torch.testing.assert_close(found[0][read], expected[read], rtol=1e-9, atol=1e-12)


def test_without_a_padding_token_the_mask_tells_only_where_asked():
    model, (ids, mask) = build(lion_hf.LionModel, pad_token_id=None).train(), batch()
    states = {}
    for model.config.unpad in (False, None, True):
        states[model.config.unpad] = model(ids, mask).last_hidden_state
    assert torch.equal(states[None], states[False]) and not torch.equal(states[True], states[False])


def test_padding_comes_back_as_it_went_in_and_without_a_gradient():
    blocks = Encoder(8, 2, 2, unpad=True).double().train()
    x, mask = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True), torch.tensor(ENDS).bool()
    out = unpad(mask)
    kept = torch.zeros(24).bool().index_fill(0, out.index, True).view(4, 6)
    assert torch.equal(kept, torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6]).bool())
    states = encoder.run_blocks(blocks.layers, x, mask, unpadding=True)
    assert torch.equal(states[~kept], x[~kept]) and not torch.equal(states[kept], x[kept])
    (gradient,) = torch.autograd.grad(states.sum(), x)
    assert (gradient[~kept] == 0).all() and (gradient[kept] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_trains_with_labels_on_padding(dtype):
    model = lion_hf.LionForMaskedLM(text_config("decay", unpad=True)).to(dtype).train()
    ids, mask = batch()
    model(ids, mask, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
