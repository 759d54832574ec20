"""Outputs that are not divided by row sums can be changed in place, whatever form computed them."""

import itertools

import pytest
import torch

from lion_hf.ops import averaged_scans, bidirectional_linear_attention, snake_orders
from lion_hf.ops import tokens as lion_tokens


FORMS = ("attention", "rnn", "chunk", "auto")


def inputs(kind, batch, length, dtype=torch.float32):
    shape = batch, 2, length
    tensors = [torch.rand(*shape, 4, dtype=dtype) for _ in range(3)]
    gates = {"none": None, "head": -torch.rand(2), "token": -torch.rand(shape)}[kind]
    return [None if x is None else x.requires_grad_() for x in (*tensors, gates)]


def assert_takes_changes(function, tensors):
    """Check that adding 1 in place does not change the gradients."""
    given = [x for x in tensors if x is not None]

    def gradients(change):
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for y in outputs:
            if change:
                y += 1
        return torch.autograd.grad(sum(y.sum() for y in outputs), given)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "head", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_without_division_may_be_changed_in_place(form, kind, dtype, monkeypatch):
    for batch, length, masked, both in itertools.product((1, 2, 5), (1, 4, 9), (False, True), (False, True)):
        # Rows and chunks are computed one by one for a batch of 5, otherwise all at once.
        monkeypatch.setattr(lion_tokens, "CPU_CACHE_ELEMENTS", 2 if batch == 5 else 2**18)
        mask = torch.arange(length).expand(batch, length) < max(1, length - 2) if masked else None
        options = {"format": form, "chunk_size": 4, "return_denominator": both, "key_mask": mask}
        assert_takes_changes(
            lambda q, k, v, g, options=options: bidirectional_linear_attention(q, k, v, g, **options),
            inputs(kind, batch, length, dtype),
        )


@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 9]])
@pytest.mark.parametrize("kind", ["none", "head", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_packed_rows_may_be_changed_in_place(form, kind, bounds):
    options = {"format": form, "chunk_size": 4, "cu_seqlens": torch.tensor(bounds)}
    assert_takes_changes(lambda q, k, v, g: bidirectional_linear_attention(q, k, v, g, **options), inputs(kind, 1, 9))


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_several_scans_may_be_changed_in_place(form, kind):
    orders = snake_orders(2, 4)
    assert_takes_changes(
        lambda q, k, v, g: averaged_scans(q, k, v, [g, g], orders, format=form, chunk_size=4, normalize=False),
        inputs(kind, 2, 9),
    )


@pytest.mark.parametrize("form", FORMS[:3])
def test_outputs_may_be_changed_in_place_within_a_graph(form):
    def function(q, k, v, g):
        y = bidirectional_linear_attention(q, k, v, g, format=form, chunk_size=4)
        y += 1
        return y

    tensors = inputs("token", 2, 9)
    y = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
    expected = function(*tensors)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
