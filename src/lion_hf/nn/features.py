"""Feature maps: functions of query and key before the operator, from (..., head_dim) to the same shape."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.autograd import call_function
from ..ops.backend import fused_normed_silu
from .registry import at_least_float32


# Added to the squared length of silu(x), which is 0 where x is 0.
COSINE_EPS = 1e-6


class UnitSiLU(torch.autograd.Function):
    """silu(x) + 1/2, divided by its norm over the last dimension, computed in float32 or wider.

    It takes few passes over memory and saves x, the output and the norm. The norm is never 0, because silu(x) > -0.28.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        y = F.silu(at_least_float32(x)).add_(0.5)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        return y.div_(norm).to(x.dtype), norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx, dy, dnorm):
        x, y, norm = ctx.saved_tensors
        dy, y = dy.to(norm.dtype), y.to(norm.dtype)
        dx = torch.addcmul(dy, y, (dy * y).sum(-1, keepdim=True) - dnorm * norm, value=-1)
        if torch.is_grad_enabled():  # create_graph=True: from operators with second derivatives
            return (dx / norm * _silu_slope(x.to(norm.dtype))).to(x.dtype)
        return torch.ops.aten.silu_backward(dx.div_(norm), x.to(norm.dtype)).to(x.dtype)


class _TransformableUnitSiLU(UnitSiLU):
    """`UnitSiLU` with support for forward mode, which compiled graphs reject."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        UnitSiLU.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def jvp(ctx, dx):
        x, y, norm = ctx.saved_tensors
        wide = y.to(norm.dtype)
        du = dx.to(norm.dtype) * _silu_slope(x.to(norm.dtype))
        dnorm = (du * wide).sum(-1, keepdim=True)
        return ((du - wide * dnorm) / norm).to(y.dtype), dnorm


class CosineSiLU(UnitSiLU):
    """silu(x), divided by its norm over the last dimension, computed in float32 or wider.

    `COSINE_EPS` is added to the squared norm, so that outputs and gradients of x = 0 are finite. The derivatives are
    those of `UnitSiLU`, in terms of the output and the norm.
    """

    @staticmethod
    def forward(x):
        y = F.silu(at_least_float32(x))
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square().add_(COSINE_EPS).sqrt_()
        return y.div_(norm).to(x.dtype), norm


class _TransformableCosineSiLU(CosineSiLU, _TransformableUnitSiLU):
    """`CosineSiLU` with support for forward mode, which compiled graphs reject."""

    setup_context = staticmethod(_TransformableUnitSiLU.setup_context)


class PositiveELU(torch.autograd.Function):
    """elu(x) + 1, computed as exp(min(x, 0)) + max(x, 0). Below 0, elu(x) + 1 would lose its digits in half precision.

    It saves only its output, which the operator saves as well.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(max=0).exp_().add_(x.clamp(min=0))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * y.clamp(max=1)


class _TransformablePositiveELU(PositiveELU):
    """`PositiveELU` with support for forward mode, which compiled graphs reject."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        PositiveELU.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, dx):
        (y,) = ctx.saved_tensors
        return dx * y.clamp(max=1)


def _silu_slope(x: Tensor) -> Tensor:
    """Return the derivative of silu, from operators that are differentiable themselves."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def identity(x: Tensor) -> Tensor:
    """Return x. Its sign varies, so outputs must not be divided by their row sums."""
    return x


def elu(x: Tensor) -> Tensor:
    """Return elu(x) + 1, which is positive."""
    return call_function(PositiveELU.forward, PositiveELU, _TransformablePositiveELU, x)


def unit_silu(x: Tensor) -> Tensor:
    """Return silu(x) + 1/2, normalised to length 1. All its entries are positive."""
    fused = fused_normed_silu(x)
    if fused is not None:
        return fused[0](x, **_NORMED["unit_silu"])
    return call_function(UnitSiLU.forward, UnitSiLU, _TransformableUnitSiLU, x)[0]


def silu(x: Tensor) -> Tensor:
    """Return silu(x), normalised to length 1. Its sign varies, so outputs must not be divided by their row sums."""
    fused = fused_normed_silu(x)
    if fused is not None:
        return fused[0](x, **_NORMED["silu"])
    return call_function(CosineSiLU.forward, CosineSiLU, _TransformableCosineSiLU, x)[0]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "elu": elu,
    "unit_silu": unit_silu,
    "silu": silu,
}

# What is added to silu(x) and to its squared norm, for the maps that have fused kernels.
_NORMED = {"unit_silu": {"shift": 0.5, "eps": 0.0}, "silu": {"shift": 0.0, "eps": COSINE_EPS}}


def of_both(name: str, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return a feature map of `FUNCTIONS` of query and key, which have one shape and dtype."""
    fused = fused_normed_silu(query, key) if name in _NORMED else None
    if fused is not None:
        return fused[1](query, key, **_NORMED[name])
    function = FUNCTIONS[name]
    return function(query), function(key)
