"""Logarithms of decays and weights in half precision: the values that are given count exactly."""

import pytest
import torch
from cases_two_sided import FORMS

from lion_hf.ops import bidirectional_linear_attention, two_sided_attention


SHAPES = {"head": (3,), "head and channel": (3, 4), "token": (1, 3, 70), "token and channel": (1, 3, 70, 4)}


@pytest.mark.parametrize("half", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_logarithms_of_half_precision_count_exactly(form, kind, half):
    """Outputs are those of the same numbers in float32, bit for bit; gradients are rounded once, packed or not."""
    query, key, value = (torch.randn(1, 3, 70, 4) for _ in range(3))
    decay = (-torch.rand(SHAPES[kind]) * torch.rand(SHAPES[kind])).to(half)
    if "token" in kind:
        decay.view(-1)[5] = -torch.inf
    weight = torch.randn(1, 3, 70).to(half)
    own = kind in ("head", "token")
    for bounds in (None, torch.tensor([0, 7, 30, 31, 55, 70])):
        options = {"format": form, "chunk_size": 16, "cu_seqlens": bounds}
        for operator in (two_sided_attention, bidirectional_linear_attention)[: 1 + own]:
            more = {"log_weight": weight} if operator is two_sided_attention else {}
            results = []
            for dtype in (half, torch.float32):
                leaves = {"log_decay": decay.to(dtype), **{k: x.to(dtype) for k, x in more.items()}}
                leaves = {k: x.detach().clone().requires_grad_() for k, x in leaves.items()}
                output = operator(query, key, value, **leaves, **options)
                total = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
                results.append((output, *torch.autograd.grad(total, list(leaves.values()))))
            (output, *gradients), (expected, *wide) = results
            assert torch.equal(output, expected)
            assert all(x.dtype == half and torch.equal(x, y.to(half)) for x, y in zip(gradients, wide, strict=True))
