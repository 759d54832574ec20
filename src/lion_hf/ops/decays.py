"""Decay factors of the forms: cumulative sums, weights of pairs of tokens, factors of chunks.

Every factor is the exponential of a number <= 0, and a token reads products of several factors. No product may come
near the smallest normal number of its dtype (e**-87 in float32), because a CPU is many times slower below it. The cut
leaves room for queries, keys and values between 1e-3 and 1e3 in size: M_ij is 0 if its exponent, the sum of the
log-decays between i and j, is below `CUT`. Where tokens are read through a state, the strongest token in it decides.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


# Natural logarithm of the smallest M_ij that is not set to 0: M_ij is 4e-18 there in float32, 1e-261 in float64.
CUT = {torch.float32: -40.0, torch.float64: -600.0}

# Gates are clamped here. This is beyond the cut, so no result changes, and sums stay finite for log_decay = -inf.
FLOOR = {torch.float32: -104.0, torch.float64: -746.0}


# Graphs call these functions: torch.compile(dynamic=True) makes inputs of numbers in global variables, and cannot pass
# such an input to several autograd Functions.


def cut_of(dtype: torch.dtype) -> float:
    """Return `CUT` of a dtype."""
    return -600.0 if dtype == torch.float64 else -40.0


def floor_of(dtype: torch.dtype) -> float:
    """Return `FLOOR` of a dtype."""
    return -746.0 if dtype == torch.float64 else -104.0


def above(x):
    """Return a bit more than x: exp of a number at the cut, however it is rounded, is at most that."""
    return 1.001 * x


def clamped_gates(log_decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return clamped log-decays in the dtype of their sums: (1, H, L), a view, for LION-D, (B, H, L) for LION-S."""
    gates = log_decay.to(sum_dtype(log_decay.device)).clamp(min=floor_of(dtype))
    return gates[None, :, None].expand(1, -1, length) if gates.dim() == 1 else gates


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums of log-decays: float64, or float32 on MPS, which has no float64.

    Differences of float32 sums are off by 5e-5 at 1025 tokens, and by more after a saturated gate.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def cumulative_sums(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exclusive and the inclusive cumulative sums over the last dimension."""
    inclusive = gates.cumsum(-1)
    return inclusive - gates, inclusive


def pair_weights(exclusive: Tensor, inclusive: Tensor, dtype: torch.dtype, rank: Tensor | None = None) -> Tensor:
    """Return M of one tile, (..., K, K).

    M_ij has two candidate exponents; the correct one is <= 0 and therefore the smaller. Both can be 0. Autograd has to
    select the correct one even then, so it is given `rank`, the position of each token in the order of the sums.
    """
    backwards = -inclusive
    left, right = differences(exclusive, exclusive, dtype), differences(backwards, backwards, dtype)
    if rank is None:
        return exp_(left.clamp_(max=right))
    return differentiable_exp(torch.where(rank.unsqueeze(-1) > rank, left, right))


def tile_weights(gates: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return M inside chunks with gates (b, H, n, K), times the scale: (b, H, n, K, K)."""
    return pair_weights(*cumulative_sums(gates), dtype).mul_(scale)


def exp_(x: Tensor) -> Tensor:
    """Return exp(x), or 0 below the cut, where exp is slow. May overwrite x."""
    if torch.jit.is_tracing():  # autograd differentiates the traced graph
        return differentiable_exp(x)
    cut = cut_of(x.dtype)
    return F.threshold_(x.clamp_(min=cut).exp_(), above(math.exp(cut)), 0.0)


def differentiable_exp(x: Tensor) -> Tensor:
    """Return `exp_` of x without in-place changes, for autograd."""
    cut = cut_of(x.dtype)
    return torch.where(x < cut, 0.0, x.clamp(min=cut).exp())


def cut_exp(exponent: Tensor, beyond: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return exp(exponent) in a dtype, or 0 where exponent + beyond is below the cut.

    `beyond` is the largest exponent of what the factor is multiplied with, and 0 if it is None.
    """
    exponent = exponent.to(dtype, copy=True)
    if beyond is None:
        return exp_(exponent)
    y = exponent.clamp_(min=cut_of(dtype)).exp_()
    least = above((cut_of(dtype) - beyond).exp_()).to(dtype)
    return torch.where(y <= least, 0, y)


def differences(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows_i - columns_j (..., K, K), with the rounding error of the difference rather than of the sums.

    Float64 sums are split into two float32 parts, which avoids a K x K tensor in float64.
    """
    high = rows.to(dtype)
    high_columns = high if columns is rows else columns.to(dtype)
    difference = high.unsqueeze(-1) - high_columns.unsqueeze(-2)
    if dtype != rows.dtype:
        low = (rows - high).to(dtype)
        low_columns = low if columns is rows else (columns - high_columns).to(dtype)
        difference.add_(low.unsqueeze(-1)).sub_(low_columns.unsqueeze(-2))
    return difference


class Flow(NamedTuple):
    """Exponents (b, H, n) of the largest terms of the states that chunks exchange in one direction."""

    sent: Tensor  # of the state of each chunk as it leaves the chunk; -inf if it has none
    arriving: Tensor  # of the states of all chunks before it, as they reach it; -inf if there is none


def flow(exponents: Tensor, total: Tensor, reverse: bool) -> Flow:
    """Return the flow of states that tokens write with factors exp(exponents), (b, H, n, K).

    `total` (b, H, n) is the sum of the gates of each chunk. n = 1 stands for any number of identical chunks.
    """
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
    """The flows of all chunks: of the states, which keys write, and of their gradients, which queries write."""

    left: Flow | None  # states that come from the left. None, like `right`, if nothing is read from there
    right: Flow | None  # states that come from the right
    dleft: Flow | None  # gradients of the states from the left; they come from the right. None: treated as large
    dright: Flow | None  # gradients of the states from the right; they come from the left. None: treated as large


class Exponents(NamedTuple):
    """Logarithms of the factors of chunks with K tokens in one direction, (b, H, n, K) and (b, H, n, 1)."""

    read: Tensor  # a query reads the state that enters the chunk
    write: Tensor  # a key enters the state that leaves the chunk
    total: Tensor  # a state crosses the chunk


class Factors(NamedTuple):
    """The factors of chunks with K tokens; None for a direction from which nothing is read."""

    read_left: Tensor | None  # (b, H, n, K, 1)  a query reads the state that comes from the left, with the scale
    write_right: Tensor | None  # (b, H, n, K, 1)  a key enters the state that leaves to the right
    cross_right: Tensor | None  # (b, H, n, 1, 1)  a state crosses the chunk to the right
    read_right: Tensor | None  # (b, H, n, K, 1)  a query reads the state that comes from the right, with the scale
    write_left: Tensor | None  # (b, H, n, K, 1)  a key enters the state that leaves to the left
    cross_left: Tensor | None  # (b, H, n, 1, 1)  a state crosses the chunk to the left

    def of_chunks(self, parts: list[slice]) -> list["Factors"]:
        """Return the factors of each chunk. The last of the `parts` of the row may be shorter."""
        fields = [_of_chunks(x, len(parts)) for x in self]
        chunks = [Factors(*chunk) for chunk in zip(*fields, strict=True)]
        tokens = parts[-1].stop - parts[-1].start
        chunks[-1] = Factors(*(None if x is None else x[:, :, :, :tokens] for x in chunks[-1]))
        return chunks


def _of_chunks(x: Tensor | None, chunks: int) -> Sequence[Tensor | None]:
    return [x] * chunks if x is None or x.shape[2] == 1 else x.split(1, 2)


def decay_factors(
    to_right: Exponents | None,
    to_left: Exponents | None,
    keys: Tensor | None,
    queries: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    all_large: bool = False,
) -> tuple[Factors, Flows]:
    """Return the factors of chunks and the flows between them.

    keys and queries, (B, H or 1, n, K) or None, mark the keys that are not masked and the outputs whose gradient is not
    0. With `all_large`, no state is checked for being too small.
    """
    sides, flows = [], []
    for x, reverse in ((to_right, False), (to_left, True)):
        if x is None:
            sides += [None, None, None]
            flows += [None, None]
            continue
        if all_large:
            there = back = Flow(*[x.total.new_zeros(1, 1, 1)] * 2)
        else:
            there, back = _there_and_back(x.write, x.read, keys, queries, x.total, reverse, cut_of(dtype))
        sides.append(_factor(x.read, dtype, there).mul_(scale))
        sides.append(_factor(x.write, dtype, back))
        sides.append(_factor(x.total, dtype, there, back))
        flows += [there, back]
    left, dleft, right, dright = flows
    return Factors(*sides), Flows(left, right, dleft, dright)


def _factor(exponent: Tensor, dtype: torch.dtype, *flows: Flow | None) -> Tensor:
    beyond = [x.arriving.unsqueeze(-1) for x in flows if x is not None]
    return cut_exp(exponent, sum(beyond) if beyond else None, dtype).unsqueeze(-1)


def _there_and_back(write, read, keys, queries, total, reverse: bool, cut: float) -> tuple[Flow, Flow | None]:
    """Return the flow of the states, which keys write, and of their gradients, which queries write."""
    sums = total.squeeze(-1)
    write = write if keys is None else torch.where(keys, write, -math.inf)
    there = flow(write, sums, reverse)
    if queries is None:
        return there, None
    read = torch.where(queries, read, -math.inf)
    back = flow(read, sums, not reverse)
    # Keys that reach no query, and queries that reach no key, write no state.
    write = torch.where(write + back.arriving.unsqueeze(-1) < cut, -math.inf, write)
    read = torch.where(read + there.arriving.unsqueeze(-1) < cut, -math.inf, read)
    return flow(write, sums, reverse), flow(read, sums, not reverse)


def gate_gradient(de: Tensor, df: Tensor, dtotal: Tensor) -> Tensor:
    """Return the gradient of the gates from those of the exclusive sums e, the inclusive sums f and the total.

    Gate t is a summand of e_i for i > t, and of f_i for i >= t.
    """
    both = (de + df).to(sum_dtype(de.device))
    return both.flip(-1).cumsum(-1).flip(-1) - de + dtotal


def split_sums(pairs: Tensor, rank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradients (de, df) of the sums of a tile from pairs_ij = dM_ij M_ij, which is overwritten.

    Below the diagonal the exponent is e_i - e_j: e_i is positive in row i and negative in column i. Above it the
    exponent is f_j - f_i: f_i is positive in column i and negative in row i. `rank` is the order of the tokens, by
    default that of their indices.
    """
    rest = pairs.sum(-2) - pairs.sum(-1)
    lower = pairs.tril_() if rank is None else pairs.mul_(rank.unsqueeze(-1) > rank)
    de = lower.sum(-1) - lower.sum(-2)
    return de, de + rest


def unclamped_gradient(gradient: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the log-decays from that of the clamped log-decays of all tokens."""
    gradient = gradient.sum(-1) if log_decay.dim() == 1 else gradient
    return torch.where(log_decay >= floor_of(dtype), gradient, 0).to(log_decay.dtype)
