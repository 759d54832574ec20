"""One side of the general operator from PyTorch's own operators, which support derivatives of any order.

It needs O(L^2) memory, times the head width if decays are per channel.
"""

import math

import torch
from torch import Tensor

from .decays import cumulative_sums, differentiable_exp
from .sides import Side


def dense_weights(side: Side, dtype: torch.dtype) -> Tensor:
    """Return the weights of all pairs, (b, heads, length, length) or (b, heads, length, length, head_dim)."""
    token = 2 if side.by_channel else -1
    gates, read, write = (x.movedim(token, -1) for x in side.exponents())
    exclusive, inclusive = cumulative_sums(gates.to(torch.promote_types(gates.dtype, dtype)))
    if side.reverse:
        exponent = (exclusive + write).unsqueeze(-2) - (inclusive - read).unsqueeze(-1)
    else:
        exponent = (exclusive + read).unsqueeze(-1) - (inclusive - write).unsqueeze(-2)
    before = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device)
    before = before.triu(1) if side.reverse else before.tril(-1)
    weights = differentiable_exp(exponent.to(dtype).masked_fill(~before, -math.inf))
    return weights.movedim(2, -1) if side.by_channel else weights


def dense_scores(query: Tensor, key: Tensor, side: Side) -> Tensor:
    """Return the scores (batch, heads, length, length) of one side."""
    weights = dense_weights(side, query.dtype)
    if side.by_channel:
        return torch.einsum("bhid,bhjd,bhijd->bhij", query, key, weights.expand(query.shape[0], *weights.shape[1:]))
    return torch.matmul(query, key.transpose(-1, -2)) * weights
