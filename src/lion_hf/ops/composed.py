"""The operator from PyTorch's own operators, which support derivatives of any order, with O(L^2) memory."""

import torch
from torch import Tensor

from .attention import differentiable_weights
from .dense import dense_weights
from .masks import unpacked
from .sides import Side
from .tokens import accumulation_dtype, over_heads, without_autocast


def composed(query, key, value, key_mask, options, *log_decays) -> Tensor | tuple[Tensor, Tensor]:
    """Return n, y or (n, c) in the accumulation dtype. Arguments are those of `autograd.lion`."""
    scale, result = options.scale, options.result
    dtype = accumulation_dtype(query, key, value)
    with without_autocast(query.device):
        query, key, value = (over_heads(x.to(dtype), value.shape[1]) for x in (query, key, value))
        if key_mask is not None:
            keep = key_mask[:, None, :, None].bool()
            key, value = torch.where(keep, key, 0), torch.where(keep, value, 0)
        weights = scale * _weights(options, log_decays, query.shape[2], dtype)
        scores = torch.matmul(query, key.transpose(-1, -2)) * weights
        numerator, denominator = torch.matmul(scores, value), scores.sum(-1)
        if result == "normalized":
            denominator = denominator + options.eps
            return numerator / torch.where(denominator == 0, 1, denominator).unsqueeze(-1)
        return numerator if result == "numerator" else (numerator, denominator)


def _weights(options, tensors, length: int, dtype: torch.dtype) -> Tensor | float:
    """Return the mask, of the mean of all scans; 1 without decay."""
    if options.layout is not None:
        left, right, own = unpacked(tensors, options.layout)
        sides = [dense_weights(Side(*side, reverse), dtype) for side, reverse in ((left, False), (right, True)) if side]
        return sum(sides) if own is None else sum(sides) + torch.diag_embed(own.to(dtype))
    scans = list(zip(tensors, options.orders or [None] * len(tensors), strict=True))
    return sum(differentiable_weights(*scan, length, 1.0, dtype) for scan in scans) / len(scans) if scans else 1.0
