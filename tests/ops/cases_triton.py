"""What the tests of the fused kernels share: inputs, the textbook, and a fixture that forces the kernels."""

import pytest
import torch

from lion_hf.ops import backend
from lion_hf.ops.api import bidirectional_linear_attention


lion_triton = pytest.importorskip("lion_hf.ops.triton.launch", reason="Triton is not installed", exc_type=ImportError)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
# Relative error of the whole tensor; bfloat16 rounds scores and states to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DECAYS = ["none", "head", "token", "saturated"]
RESULTS = {"numerator": {}, "normalized": {"normalize": True}, "both": {"return_denominator": True}}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Force the kernels, and fill new memory with NaN.

    Without a GPU tiles are small, so that few tokens make several tiles and chunks.
    """
    monkeypatch.setattr(backend, "BACKEND", "triton")
    if not ON_GPU:
        monkeypatch.setattr(lion_triton, "_FORWARD", (16, 4))
        monkeypatch.setattr(lion_triton, "_BACKWARD", (16, 4))
        monkeypatch.setattr(lion_triton, "_ONE_TILE", (32, 8))
        monkeypatch.setattr(lion_triton, "_GROUP", 2)
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


def poisoned(new):
    def full_of_nan(self, *shape, **options):
        made = new(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return full_of_nan


def inputs(length, decay, *, batch=1, heads=2, head_dim=16, value_dim=24, dtype=torch.float32, seed=0):
    """Return leaves with the strides of a layer, views of (batch, length, heads, width), and a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    widths = head_dim, head_dim, value_dim
    leaves = [torch.randn(batch, length, heads, w, generator=generator).to(dtype).transpose(1, 2) for w in widths]
    gates = -0.5 * torch.rand(batch, length, heads, generator=generator)
    if decay == "head":
        leaves.append(-0.5 * torch.rand(heads, generator=generator))
    elif decay != "none":
        if decay == "saturated":
            gates[torch.rand(gates.shape, generator=generator) < 0.2] = -1e4
            gates[:, -1] = -torch.inf
        leaves.append(gates.transpose(1, 2))
    mask = torch.rand(batch, length, generator=generator) < 0.8
    return [x.to(DEVICE).requires_grad_() for x in leaves], mask.to(DEVICE)


def run(leaves, **options):
    """Return the outputs and the gradients of a fixed weighted sum of them."""
    query, key, value, *decay = leaves
    out = bidirectional_linear_attention(query, key, value, *decay, **options)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.double).to(x.device)).sum() for x in out
    )
    return [*out, *torch.autograd.grad(total, leaves)]


def textbook(leaves, monkeypatch, **options):
    """Return the same from the attention form in float64."""
    with monkeypatch.context() as patch:
        patch.setattr(backend, "BACKEND", "torch")
        return run([x.detach().double().requires_grad_() for x in leaves], **options | {"format": "attention"})


def assert_close(results, expected, dtype=torch.float32):
    for result, want in zip(results, expected, strict=True):
        assert result.isfinite().all()
        error = (result.double() - want).norm() / want.norm().clamp(min=1e-6)
        assert error < TOLERANCE[dtype]
