"""The operator from PyTorch's own operators, which have derivatives of every order, at O(L^2) memory."""

import torch
from torch import Tensor

from .decays import clamped_gates, cumulative_sums
from .tokens import accumulation_dtype, without_autocast


def composed(query, key, value, key_mask, options, *log_decays) -> Tensor | tuple[Tensor, Tensor]:
    """n, y or (n, c) in the accumulation dtype, as `options` say; arguments as those of `autograd.lion`."""
    _, _, scale, result, eps, orders = options
    dtype = accumulation_dtype(query, key, value)
    with without_autocast(query.device):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if key_mask is not None:
            keep = key_mask[:, None, :, None].bool()
            key, value = torch.where(keep, key, 0), torch.where(keep, value, 0)
        scores = torch.matmul(query, key.transpose(-1, -2)) * scale
        if log_decays:
            orders = orders or [None] * len(log_decays)
            shares = (_mask(g, o, query.shape[2], dtype) for g, o in zip(log_decays, orders, strict=True))
            scores = scores * sum(shares) / len(log_decays)
        numerator, denominator = torch.matmul(scores, value), scores.sum(-1)
        if result == "normalized":
            return numerator / (denominator.unsqueeze(-1) + eps)
        return numerator if result == "numerator" else (numerator, denominator)


def _mask(log_decay: Tensor, order, length: int, dtype: torch.dtype) -> Tensor:
    """M (b, heads, length, length) along an order of the tokens, with the tokens as they lie."""
    gates = clamped_gates(log_decay, length, dtype)
    token = torch.arange(length, device=gates.device)
    if order is not None:
        gates, token = gates.index_select(-1, order[0]), order[1]
    exclusive, inclusive = (x.index_select(-1, token) for x in cumulative_sums(gates))
    left = exclusive.unsqueeze(-1) - exclusive.unsqueeze(-2)
    right = inclusive.unsqueeze(-2) - inclusive.unsqueeze(-1)
    return torch.where(token.unsqueeze(-1) > token, left, right).to(dtype).exp()
