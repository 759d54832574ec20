"""Decays as the forms multiply with them: cumulative sums, weights of pairs of tokens, factors of chunks.

Every factor is the exponential of a number <= 0. What a token reads is a product of several, and none may come near the
smallest normal number of its dtype, below which a CPU is many times slower: with query, key and value between 1e-3 and
1e3 in size it takes more than e**-87 (float32) to be normal. So M_ij is 0 where its exponent, the decay between i and
j, is below `CUT`. Where a state stands between the two, the strongest token in it decides."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


# Natural logarithm of the smallest decay between two tokens that read each other: 4e-18 in float32, 1e-261 in float64.
CUT = {torch.float32: -40.0, torch.float64: -600.0}

_ABOVE = 1.001  # exp of a number at the cut, however it is rounded, is no more than so many times the exact one

# Clamping gates there changes no result, as it is beyond the cut, and keeps every sum finite for log_decay = -inf.
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


def pair_weights(exclusive: Tensor, inclusive: Tensor, dtype: torch.dtype, rank: Tensor | None = None) -> Tensor:
    """M of one tile, (..., K, K). Of the two exponents the right one is the one <= 0, hence the smaller. Where autograd
    shall know which, both may be 0, and `rank` tells it: the place of each token in the order of the sums."""
    left, right = differences(exclusive, dtype), differences(-inclusive, dtype)
    if rank is None:
        return exp_(left.clamp_(max=right))
    return differentiable_exp(torch.where(rank.unsqueeze(-1) > rank, left, right))


def tile_weights(gates: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """M inside chunks with gates (b, H, n, K), times the scale: (b, H, n, K, K)."""
    return pair_weights(*cumulative_sums(gates), dtype).mul_(scale)


def exp_(x: Tensor) -> Tensor:
    """exp, and 0 below the cut. exp alone would be slow there."""
    if torch.jit.is_tracing():  # the graph has gradients of its own
        return differentiable_exp(x)
    cut = CUT[x.dtype]
    return F.threshold_(x.clamp_(min=cut).exp_(), _ABOVE * math.exp(cut), 0.0)


def differentiable_exp(x: Tensor) -> Tensor:
    """`exp_` for autograd, which changes nothing in place."""
    cut = CUT[x.dtype]
    return torch.where(x < cut, 0.0, x.clamp(min=cut).exp())


def cut_exp(exponent: Tensor, beyond: Tensor | None, dtype: torch.dtype) -> Tensor:
    """exp(exponent) in a dtype, and 0 where it would multiply what is so small that their product is beyond the cut."""
    exponent = exponent.to(dtype, copy=True)
    if beyond is None:
        return exp_(exponent)
    y = exponent.clamp_(min=CUT[dtype]).exp_()
    least = (CUT[dtype] - beyond).exp_().mul_(_ABOVE).to(dtype)
    return torch.where(y <= least, 0, y)


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


class Flow(NamedTuple):
    """How small the states are that chunks exchange in one direction, as exponents (b, H, n) of their largest terms."""

    sent: Tensor  # of the state that each chunk makes, as it leaves the chunk; -inf where it makes none
    arriving: Tensor  # of the states of all chunks before it, as they reach it; -inf where there is none


def flow(exponents: Tensor, total: Tensor, reverse: bool) -> Flow:
    """The flow of what tokens write with factors exp(exponents) (b, H, n, K) past chunks with `total` (b, H, n). n = 1
    stands for many chunks all alike."""
    sent = exponents.amax(-1)
    if sent.shape[-1] == 1:  # the nearest chunk is the strongest
        return Flow(sent, sent)
    total = total.expand(*total.shape[:2], sent.shape[-1])
    if reverse:
        sent, total = sent.flip(-1), total.flip(-1)
    before, through = cumulative_sums(total)
    strongest = (sent - through).cummax(-1).values
    arriving = before + F.pad(strongest[..., :-1], (1, 0), value=-math.inf)
    return Flow(*(t.flip(-1) for t in (sent, arriving))) if reverse else Flow(sent, arriving)


class Flows(NamedTuple):
    """The flows of all chunks: of states that keys make, and of gradients of states, which queries make."""

    left: Flow  # states that come from the left
    right: Flow  # states that come from the right
    dleft: Flow | None  # gradients of the former, which come from the right; None: all of them are large
    dright: Flow | None


class Factors(NamedTuple):
    """What a chunk with K tokens and local sums e (exclusive), f (inclusive), G (total) multiplies with."""

    read_left: Tensor  # (b, H, n, K, 1)  s exp(e)      a query reads the state that comes from the left
    write_right: Tensor  # (b, H, n, K, 1)  exp(G - e)    a key enters the state that goes on to the right
    read_right: Tensor  # (b, H, n, K, 1)  s exp(G - f)  a query reads the state that comes from the right
    write_left: Tensor  # (b, H, n, K, 1)  exp(f)        a key enters the state that goes on to the left
    cross_right: Tensor  # (b, H, n, 1, 1)  exp(G)        a state crosses the chunk to the right
    cross_left: Tensor  # (b, H, n, 1, 1)  exp(G)        a state crosses the chunk to the left

    def of_chunk(self, i: int, tokens: int) -> "Factors":
        return Factors(*((t if t.shape[2] == 1 else t[:, :, i : i + 1])[:, :, :, :tokens] for t in self))


def decay_factors(
    gates: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    all_large: bool = False,
) -> tuple[Factors, Flows]:
    """The factors of chunks from their gates (b, H, n, K), b = n = 1 for LION-D, and from which keys count, and which
    gradients of outputs are not 0, (B, H or 1, n, K), where that is known. `all_large`: no state that is too small is
    to be looked for."""
    e, f = cumulative_sums(gates)
    total = f[..., -1:]
    to_right, from_right = total - e, total - f
    if all_large:
        left = right = dleft = dright = Flow(*[gates.new_zeros(1, 1, 1)] * 2)
    else:
        left, dleft = _there_and_back(to_right, e, keys, queries, total, False, CUT[dtype])
        right, dright = _there_and_back(f, from_right, keys, queries, total, True, CUT[dtype])

    def factor(exponent: Tensor, *flows: Flow | None) -> Tensor:
        beyond = [x.arriving.unsqueeze(-1) for x in flows if x is not None]
        return cut_exp(exponent, sum(beyond) if beyond else None, dtype).unsqueeze(-1)

    factors = Factors(
        read_left=factor(e, left).mul_(scale),
        write_right=factor(to_right, dleft),
        read_right=factor(from_right, right).mul_(scale),
        write_left=factor(f, dright),
        cross_right=factor(total, left, dleft),
        cross_left=factor(total, right, dright),
    )
    return factors, Flows(left, right, dleft, dright)


def _there_and_back(write, read, keys, queries, total, reverse: bool, cut: float) -> tuple[Flow, Flow | None]:
    """The flow of the states that keys make, and of their gradients, from the exponents of both."""
    sums = total.squeeze(-1)
    write = write if keys is None else torch.where(keys, write, -math.inf)
    there = flow(write, sums, reverse)
    if queries is None:
        return there, None
    read = torch.where(queries, read, -math.inf)
    back = flow(read, sums, not reverse)
    # A key that no query reaches makes no state, nor does a query that no key reaches.
    write = torch.where(write + back.arriving.unsqueeze(-1) < cut, -math.inf, write)
    read = torch.where(read + there.arriving.unsqueeze(-1) < cut, -math.inf, read)
    return flow(write, sums, reverse), flow(read, sums, not reverse)


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
