"""Feature maps: functions of query and key before the operator, (..., head_dim) to (..., head_dim)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.backend import fused_unit_silu
from .variants import at_least_float32


class UnitSiLU(torch.autograd.Function):
    """silu(x) + 1/2, divided by its norm over the last dimension: few passes over memory, and two tensors kept.

    Computed in float32 or wider. The norm is never 0, since silu(x) > -0.28."""

    @staticmethod
    def forward(ctx, x):
        y = F.silu(at_least_float32(x)).add_(0.5)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y = y.div_(norm).to(x.dtype)
        ctx.save_for_backward(x, y, norm)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, norm = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: the norm kept has no graph
            features = F.normalize(F.silu(at_least_float32(x)) + 0.5, dim=-1).to(x.dtype)
            return torch.autograd.grad(features, x, dy, create_graph=True)[0]
        dy, y = dy.to(norm.dtype), y.to(norm.dtype)
        dx = torch.addcmul(dy, y, (dy * y).sum(-1, keepdim=True), value=-1).div_(norm)
        return torch.ops.aten.silu_backward(dx, x.to(norm.dtype)).to(x.dtype)


def identity(x: Tensor) -> Tensor:
    """x itself, of either sign: only for outputs that are not divided by their row sums."""
    return x


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, which is positive."""
    return F.elu(x).add_(1)


def unit_silu(x: Tensor) -> Tensor:
    """silu(x) + 1/2 at length 1: products of two of them are positive."""
    return (fused_unit_silu(x) or UnitSiLU.apply)(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": identity, "elu": elu, "unit_silu": unit_silu}
