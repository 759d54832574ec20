"""Norms of tokens by the name of their type, and norms of the output of a mixer over its heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .names import BLOCK_OPTIONS, require_name, require_size
from .registry import at_least_float32


def token_norm(kind: str, dim: int, eps: float = 1e-5, bias: bool = True) -> nn.Module:
    """Return a new norm of tokens (..., dim).

    Args:
        kind: "layer": LayerNorm. "rms": RMSNorm, which divides tokens by their root mean square, and has no bias.
        dim: width of the tokens.
        eps: added to the variance or mean square.
        bias: whether a LayerNorm has a bias.

    Raises:
        ValueError: if the name is unknown, or `eps` is negative or not finite.
    """
    require_name("norm_type", kind, BLOCK_OPTIONS["norm_type"])
    require_size("norm_eps", eps)
    return nn.RMSNorm(dim, eps=eps) if kind == "rms" else nn.LayerNorm(dim, eps=eps, bias=bias)


class OutputNorm(nn.Module):
    """Norm of (batch, length, dim), computed in float32 or wider, with a `weight` (dim,) and no bias.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        kind: "rms": RMS norm over all heads. "group_rms": RMS norm over the heads that share a query and a key.
            "head_rms": RMS norm over each head. "head_layer": each head minus its mean, divided by its standard
            deviation (group norm).
        eps: added to the mean square or variance.
        key_heads: number of heads of query and key, for "group_rms"; `heads` by default.
    """

    def __init__(self, dim: int, heads: int, kind: str, eps: float = 1e-5, key_heads: int | None = None):
        super().__init__()
        self.parts = {"rms": 1, "group_rms": key_heads or heads}.get(kind, heads)
        self.heads, self.kind, self.eps = heads, kind, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x (batch, length, dim), in the dtype of x."""
        y = at_least_float32(x)
        if self.parts > 1:
            y = y.unflatten(-1, (self.parts, -1))
        if self.kind == "head_layer":
            y = F.layer_norm(y, y.shape[-1:], eps=self.eps)
        else:  # not F.rms_norm, which has no form in ONNX before opset 23
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y.flatten(2) if self.parts > 1 else y).mul(self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the options that `repr` shows."""
        return f"{len(self.weight)}, heads={self.heads}, kind={self.kind!r}, eps={self.eps}"
