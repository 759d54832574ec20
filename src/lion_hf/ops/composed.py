"""The operator from PyTorch's own operators, which support derivatives of any order, with O(L^2) memory."""

import torch
from torch import Tensor

from .attention import differentiable_weights
from .tokens import accumulation_dtype, without_autocast


def composed(query, key, value, key_mask, options, *log_decays) -> Tensor | tuple[Tensor, Tensor]:
    """Return n, y or (n, c) in the accumulation dtype. Arguments are those of `autograd.lion`."""
    _, _, scale, result, eps, orders = options
    dtype = accumulation_dtype(query, key, value)
    with without_autocast(query.device):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if key_mask is not None:
            keep = key_mask[:, None, :, None].bool()
            key, value = torch.where(keep, key, 0), torch.where(keep, value, 0)
        weights, scale = scale, scale / max(1, len(log_decays))
        if log_decays:
            scans = zip(log_decays, orders or [None] * len(log_decays), strict=True)
            weights = sum(differentiable_weights(*scan, query.shape[2], scale, dtype) for scan in scans)
        scores = torch.matmul(query, key.transpose(-1, -2)) * weights
        numerator, denominator = torch.matmul(scores, value), scores.sum(-1)
        if result == "normalized":
            return numerator / (denominator.unsqueeze(-1) + eps)
        return numerator if result == "numerator" else (numerator, denominator)
