"""torch.func, forward mode and higher derivatives of the operator agree with autograd, row by row."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from lion_hf.nn.features import unit_silu
from lion_hf.ops.api import bidirectional_linear_attention
from lion_hf.ops.scans import averaged_scans, snake_orders


FORMS = ("attention", "rnn", "chunk")
KINDS = ("none", "head", "token", "snake-head", "snake-token")
BATCH, HEADS, LENGTH = 2, 3, 10


def operator(kind, form, normalize, masked=True):
    def function(query, key, value, *log_decays):
        options = {"format": form, "chunk_size": 4, "normalize": normalize}
        if kind.startswith("snake"):
            return averaged_scans(query, key, value, log_decays, snake_orders(3, 3), **options)
        key_mask = torch.arange(LENGTH) < torch.tensor([[7], [LENGTH]])
        options["key_mask"] = key_mask if masked else None
        return bidirectional_linear_attention(query, key, value, *log_decays, **options)

    return function


def operands(kind):
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = (HEADS,) if kind.endswith("head") else (BATCH, HEADS, LENGTH)
    decays = [-rand(*shape) for _ in range(0 if kind == "none" else 2 if kind.startswith("snake") else 1)]
    return [
        rand(BATCH, HEADS, LENGTH, 4) + 0.1,
        rand(BATCH, HEADS, LENGTH, 4) + 0.1,
        rand(BATCH, HEADS, LENGTH, 5),
        *decays,
    ]


def tangents_of(tensors):
    return tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in tensors)


def by_autograd(loss, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def close(actual, expected):
    actual, expected = (torch.utils._pytree.tree_leaves(x) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


every_case = pytest.mark.parametrize(
    "kind, form, normalize",
    [(kind, form, (i + j) % 2 == 0) for i, kind in enumerate(KINDS) for j, form in enumerate(FORMS)],
)


@every_case
def test_gradients_of_batches_samples_and_ensembles(kind, form, normalize):
    function, inputs = operator(kind, form, normalize), operands(kind)
    places = tuple(range(len(inputs)))

    def loss(*tensors):
        return function(*tensors).sin().sum()

    close(grad(loss, places)(*inputs), by_autograd(loss, inputs))

    single = operator(kind, form, normalize, masked=False)

    def loss_of_row(*row):
        return single(*(x if x.dim() == 1 else x[None] for x in row)).sin().sum()

    dims = tuple(None if x.dim() == 1 else 0 for x in inputs)
    rows = [by_autograd(loss_of_row, [x if x.dim() == 1 else x[i] for x in inputs]) for i in range(BATCH)]
    close(vmap(grad(loss_of_row, places), dims)(*inputs), [torch.stack(x) for x in zip(*rows, strict=True)])

    members = [torch.stack([x, x / 2]) for x in inputs]
    each = [by_autograd(loss, [x[i] for x in members]) for i in range(2)]
    close(vmap(grad(loss, places))(*members), [torch.stack(x) for x in zip(*each, strict=True)])
    close(vmap(function)(*members)[1], function(*(x[1] for x in members)))


@every_case
def test_forward_mode_and_second_derivatives(kind, form, normalize):
    function, inputs = operator(kind, form, normalize), operands(kind)
    tangents, places = tangents_of(inputs), tuple(range(len(inputs)))

    def loss(*tensors):
        return function(*tensors).sin().sum()

    step = 1e-5
    ahead, behind = ([x + s * step * t for x, t in zip(inputs, tangents, strict=True)] for s in (1, -1))
    pushed = jvp(function, tuple(inputs), tangents)[1]
    inside = [x.dim() > 3 or bool((x < -2 * step).all()) for x in inputs]
    if all(inside):
        torch.testing.assert_close(pushed, (function(*ahead) - function(*behind)) / (2 * step), rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        close(forward_ad.unpack_dual(dual).tangent, pushed)

    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    twice = torch.autograd.grad(sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)), leaves)
    close(jvp(grad(loss, places), tuple(inputs), tangents)[1], twice)


def test_outputs_and_denominators_have_tangents():
    inputs = operands("token")

    def both(*tensors):
        return bidirectional_linear_attention(*tensors, format="chunk", chunk_size=4, return_denominator=True)

    def quotient(*tensors):
        n, c = both(*tensors)
        return n / (c.unsqueeze(-1) + 1e-6)

    tangents = tangents_of(inputs)
    expected = jvp(operator("token", "attention", True, masked=False), tuple(inputs), tangents)[1]
    close(jvp(quotient, tuple(inputs), tangents)[1], expected)


def test_unit_silu_has_derivatives_of_every_kind():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_silu, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(unit_silu, x, check_fwd_over_rev=True)
    rows = vmap(grad(lambda row: unit_silu(row).sin().sum()))(x.detach())
    close(rows, grad(lambda x: unit_silu(x).sin().sum())(x.detach()))
