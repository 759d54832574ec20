"""Mixed precision: tokens are cast once for all projections of a mixer, and nothing else changes."""

import pytest
import torch
from small_models import ALL_VARIANTS
from torch.utils._python_dispatch import TorchDispatchMode

from lion_hf.nn import Mixer
from lion_hf.nn.gates import GateLinear


DTYPES = (torch.bfloat16, torch.float16)


class Casts(TorchDispatchMode):
    """Count the copies to another dtype of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cast = function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") not in (None, args[0].dtype)
        self.count += cast and tuple(args[0].shape) == self.shape
        return function(*args, **(kwargs or {}))


def mixer_and_tokens(variant="selective", **options):
    mixer = Mixer(24, 3, variant, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer, torch.randn(2, 9, 24, requires_grad=True)


def cast_in_each_layer(monkeypatch):
    """Leave all casts of a mixer to autocast."""
    monkeypatch.setattr(Mixer, "_in_autocast_dtype", lambda self, x: x)
    monkeypatch.setattr(GateLinear, "forward", lambda self, x: torch.nn.Linear.forward(self, x.to(self.weight.dtype)))


def mixed(mixer, x, dtype):
    """Return the output and the gradients of tokens and weights, under autocast to a dtype if there is one."""
    x.grad = None
    mixer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = mixer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in mixer.parameters())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant, readers", [("lit", 4), ("selective", 5)])
def test_tokens_and_their_gradient_are_cast_once_for_all_projections(monkeypatch, variant, readers, dtype):
    mixer, x = mixer_and_tokens(variant, output_gate="silu")

    def casts():
        with torch.autocast("cpu", dtype), Casts((2, 9, 24)) as forward:
            y = mixer(x * 1, format="chunk")  # the cast of a leaf would be stored
        with Casts((2, 9, 24)) as backward:
            y.float().sum().backward()
        return forward.count, backward.count

    once = casts()
    cast_in_each_layer(monkeypatch)
    each = casts()
    assert once[0] == 1 and [b - a for a, b in zip(once, each, strict=True)] == [readers - 1] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"token_shift": True, "short_conv": 3, "output_gate": "silu"}], ids=str)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_outputs_are_those_of_a_cast_in_each_projection(monkeypatch, variant, options, dtype):
    mixer, x = mixer_and_tokens(variant, **options)
    once, exact = mixed(mixer, x, dtype), mixed(mixer, x, None)
    cast_in_each_layer(monkeypatch)
    each = mixed(mixer, x, dtype)
    assert torch.equal(once[0], each[0])
    assert [g.dtype for g in once] == [g.dtype for g in each]
    # The gradients of x are added in the dtype of autocast, which costs less than the rounding of the projections.
    for a, b, c in zip(once[1:], each[1:], exact[1:], strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 4 * torch.finfo(dtype).eps * c.norm()


def test_gates_keep_float64_and_float32_where_autocast_does():
    gate, x = GateLinear(8, 3), torch.randn(4, 8)
    assert gate(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x), gate(x.bfloat16())) and gate(x).dtype == torch.bfloat16
        assert torch.equal(gate(x.half()), gate(x.half().float()))
        assert gate.double()(x.bfloat16()).dtype == gate(x.double()).dtype == torch.float64
