"""Decays as the forms multiply with them: cumulative sums, weights of pairs of tokens, factors of chunks.

Every factor is the exponential of a number <= 0."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


# exp(floor) is 0 in the dtype: clamping there changes no result and keeps every sum finite for log_decay = -inf.
FLOOR = {torch.float32: -104.0, torch.float64: -746.0}


def clamped_gates(log_decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Clamped log-decays in the dtype their sums need: (1, H, L) without memory for LION-D, (B, H, L) for LION-S."""
    gates = log_decay.to(sum_dtype(log_decay.device)).clamp(min=FLOOR[dtype])
    return gates[None, :, None].expand(1, -1, length) if gates.dim() == 1 else gates


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64: differences of float32 sums lose 5e-5 at 1025 tokens, more after a saturated gate. (MPS has none.)"""
    return torch.float32 if device.type == "mps" else torch.float64


def cumulative_sums(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Exclusive and inclusive cumulative sums over the last dimension."""
    inclusive = gates.cumsum(-1)
    return inclusive - gates, inclusive


def pair_weights(exclusive: Tensor, inclusive: Tensor, dtype: torch.dtype) -> Tensor:
    """M of one tile, (..., K, K). Of the two exponents the right one is the one <= 0, hence the smaller."""
    return exp_(differences(exclusive, dtype).clamp_(max=differences(-inclusive, dtype)))


def exp_(x: Tensor) -> Tensor:
    """exp, and 0 for what comes near the dtype's smallest normal number: exp and products below it are slow."""
    smallest = math.log(torch.finfo(x.dtype).tiny) + 0.5
    y = x.clamp_(min=smallest).exp_()
    return F.threshold(y, 1.01 * math.exp(smallest), 0.0, inplace=not y.requires_grad)


def differences(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums_i - sums_j (..., K, K), exact to the rounding of the difference and not of the sums.

    A float64 sum is split into two float32 parts, so that no K x K tensor in float64 is made.
    """
    high = sums.to(dtype)
    difference = high.unsqueeze(-1) - high.unsqueeze(-2)
    if dtype != sums.dtype:
        low = (sums - high).to(dtype)
        difference.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    return difference


class Factors(NamedTuple):
    """What a chunk with K tokens and local sums e (exclusive), f (inclusive), G (total) multiplies with."""

    tile: Tensor | None  # (b, H, n, K, K)  M inside the chunk, times the scale
    read_left: Tensor  # (b, H, n, K, 1)  s exp(e)      a query reads the state that comes from the left
    write_right: Tensor  # (b, H, n, K, 1)  exp(G - e)    a key enters the state that goes on to the right
    read_right: Tensor  # (b, H, n, K, 1)  s exp(G - f)  a query reads the state that comes from the right
    write_left: Tensor  # (b, H, n, K, 1)  exp(f)        a key enters the state that goes on to the left
    cross: Tensor  # (b, H, n, 1, 1)  exp(G)        a state crosses the chunk
    total: Tensor  # (b, H, n)        G

    def of_chunk(self, i: int) -> "Factors":
        return Factors(*(None if t is None else t[:, :, i : i + 1] for t in self))


def decay_factors(gates: Tensor, scale: float, dtype: torch.dtype, tile: bool = True) -> Factors:
    """Decay factors of chunks from gates (b, H, n, K); b is 1 for LION-D. Without the largest if not `tile`."""
    e, f = cumulative_sums(gates)
    total = f[..., -1:]
    return Factors(
        # Every factor is exp of a number <= 0.
        tile=pair_weights(e, f, dtype).mul_(scale) if tile else None,
        read_left=exp_(e.to(dtype, copy=True)).mul_(scale).unsqueeze(-1),
        write_right=exp_((total - e).to(dtype)).unsqueeze(-1),
        read_right=exp_((total - f).to(dtype)).mul_(scale).unsqueeze(-1),
        write_left=exp_(f.to(dtype, copy=True)).unsqueeze(-1),
        cross=exp_(total.to(dtype, copy=True)).unsqueeze(-1),
        total=total.squeeze(-1),
    )


def gate_gradient(de: Tensor, df: Tensor, dtotal: Tensor) -> Tensor:
    """d gates from d(exclusive sums), d(inclusive sums) and d(total): gate t enters e_i for i > t, f_i for i >= t."""
    both = (de + df).to(sum_dtype(de.device))
    return both.flip(-1).cumsum(-1).flip(-1) - de + dtotal


def split_sums(pairs: Tensor, rank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(de, df) of a tile from pairs_ij = dM_ij M_ij: e_i enters row i and leaves column i below the diagonal, f_i
    enters column i and leaves row i above it. `rank` tells which token comes first if not by index. `pairs` is
    overwritten."""
    rest = pairs.sum(-2) - pairs.sum(-1)
    lower = pairs.tril_() if rank is None else pairs.mul_(rank.unsqueeze(-1) > rank)
    de = lower.sum(-1) - lower.sum(-2)
    return de, de + rest


def unclamped_gradient(gradient: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of log-decays from that of the clamped ones, token by token."""
    gradient = gradient.sum(-1) if log_decay.dim() == 1 else gradient
    return torch.where(log_decay >= FLOOR[dtype], gradient, 0).to(log_decay.dtype)
