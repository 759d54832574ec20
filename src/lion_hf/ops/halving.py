"""Decays per channel inside chunks of 2^p tokens, by halving: products of decays, scores, and their gradients.

The weight of two tokens is the product of the decays between them, for each channel. A pair is met at one level: where
a block of 2h tokens, halved, has one of them on its left and the other one on its right. The decays from the middle of
the block to either token are factors of the queries and keys, and the scores of all such pairs are a matrix product.
Factors are products of decays, never quotients, so they are at most 1, and a decay of 0 is a number like the others.
They are built by doubling: from h to 2h, half of them are multiplied by the product of a block of h tokens.

Cost for chunks of K tokens, per token, head and side: (K / 2) (D + V) multiply-adds, and log2(K) multiplications of
all channels for each of query, key and factors. There is no tensor of all pairs times all channels.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


# Natural logarithm of the smallest factor that is not set to 0. A weight is the product of two factors, so that
# weights times two to four numbers of at least 1e-3 are not denormal, which would be slow on a CPU.
FACTOR_CUT = {torch.float32: -29.0, torch.float64: -300.0}

# Blocks of fewer tokens than this are too small for fast products. Levels below it share blocks of this size, in which
# a mask selects their pairs.
SMALL = 4

ABOVE = 1e-3  # the exponential of a number at the cut, however it is rounded, is below that of the cut plus this


def cut(x: Tensor, in_place: bool = False) -> Tensor:
    """Return a product of decays, or 0 where it is below the cut."""
    least = math.exp(FACTOR_CUT[x.dtype])
    if torch.jit.is_tracing():
        return torch.where(x < least, 0, x)
    return F.threshold(x, least * (1 - 1e-6), 0.0, in_place)


def channel_decays(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the decays, exp(gates), or 0 where `closed`, for autograd."""
    least = FACTOR_CUT[dtype]
    return torch.where(closed(gates, dtype), 0, gates.to(dtype).clamp(min=least).exp())


def channel_decays_in_place(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `channel_decays` faster."""
    least = FACTOR_CUT[dtype]
    return F.threshold_(gates.to(dtype).clamp(min=least).exp_(), math.exp(least + ABOVE), 0.0)


def closed(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where decays are set to 0."""
    return gates <= FACTOR_CUT[dtype] + ABOVE


class Level(NamedTuple):
    """The products of decays in blocks of h tokens, for chunks (..., K, D)."""

    size: int  # h
    before: Tensor  # (..., K, D), the decays from the first token of its block up to, but not including, a token
    after: Tensor  # (..., K, D), the decays from the token after it to the last token of its block
    total: Tensor  # (..., K / h, D), all decays of a block


def levels(decays: Tensor, in_place: bool) -> Iterator[Level]:
    """Yield the levels of h = 1, 2, 4, ..., K tokens of chunks with decays (..., K, D).

    With `in_place`, the next level overwrites a level.
    """
    tokens, size = decays.shape[-2], 1
    before, after = torch.ones_like(decays), torch.ones_like(decays)
    total = decays
    while True:
        yield Level(size, before, after, total)
        if size == tokens:
            return
        left, right = total.unflatten(-2, (tokens // (2 * size), 2)).unbind(-2)
        if in_place:
            cut(halves(before, size)[1].mul_(left.unsqueeze(-2)), in_place)
            cut(halves(after, size)[0].mul_(right.unsqueeze(-2)), in_place)
        else:
            first, second = halves(before, size)
            before = joined(first, cut(second * left.unsqueeze(-2)))
            first, second = halves(after, size)
            after = joined(cut(first * right.unsqueeze(-2)), second)
        total = cut(left * right)
        size *= 2


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the left and the right halves (..., K / 2h, h, D) of all blocks of 2h tokens of x (..., K, D)."""
    return x.unflatten(-2, (x.shape[-2] // (2 * size), 2, size)).unbind(-3)


def joined(left: Tensor, right: Tensor) -> Tensor:
    """Invert `halves`."""
    return torch.stack((left, right), -3).flatten(-4, -2)


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (x.shape[-2] // size, size))


def _small_mask(level: Level, block: int, sides: tuple[bool, ...]) -> Tensor:
    """Return which pairs (query, key) of a small block meet at a level, (block, block) of 0 and 1."""
    token = torch.arange(block, device=level.total.device) // level.size  # the number of the block of h tokens
    right, left = token.unsqueeze(-1), token
    pairs = torch.zeros(block, block, dtype=torch.bool, device=token.device)
    for reverse in sides:
        reads, written = (left, right) if reverse else (right, left)
        pairs = pairs | ((reads == written + 1) & (written % 2 == 0))
    return pairs.to(level.total.dtype)


def small_factors(level: Level) -> Tensor | None:
    """Return the factors of all tokens of a level, (..., K, D); None stands for 1."""
    if level.size == 1:
        return None
    return joined(halves(level.after, level.size)[0], halves(level.before, level.size)[1])


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def inner_output(
    q: Tensor, k: Tensor, v: Tensor, decays: Tensor, sides: tuple[bool, ...], in_place: bool
) -> tuple[Tensor, Level]:
    """Return what the tokens of chunks read inside their chunk, (..., K, V), and the level of whole chunks.

    q and k are (..., K, D), v is (..., K, V), and decays (..., K, D) may be 1 in any leading dimension. `sides` has
    False if queries read keys on their left, True if they read keys on their right. Autograd needs `in_place` False.
    """
    tokens, scores, y = q.shape[-2], 0, None
    block = min(SMALL, tokens)
    for level in levels(decays, in_place):
        if level.size == tokens:
            break
        if level.size < block:
            factor = small_factors(level)
            a, b = (_blocks(_times(x, factor), block) for x in (q, k))
            scores = scores + torch.matmul(a, b.transpose(-1, -2)) * _small_mask(level, block, sides)
            if 2 * level.size == block:
                y = torch.matmul(scores, _blocks(v, block)).flatten(-3, -2)
            continue
        after, before = halves(level.after, level.size)[0], halves(level.before, level.size)[1]
        factors, read = (after, before), [None, None]
        for reverse in sides:
            here, there = (0, 1) if reverse else (1, 0)
            a = halves(q, level.size)[here] * factors[here]
            b = halves(k, level.size)[there] * factors[there]
            read[here] = torch.matmul(torch.matmul(a, b.transpose(-1, -2)), halves(v, level.size)[there])
            if in_place:
                halves(y, level.size)[here].add_(read[here])
        if not in_place:
            y = y + joined(*(torch.zeros_like(read[1 - i]) if x is None else x for i, x in enumerate(read)))
    return torch.zeros_like(v) if y is None else y, level


class Gradients:
    """Sums of the gradients of chunks.

    Those of queries and keys are kept apart by the factor that they were multiplied with, because the gradients of the
    gates follow from them: the exponent of `before` is a sum of the gates of the tokens before a token, that of `after`
    a sum of the gates of the tokens after it.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.q, self.k = q, k
        self.dq = [torch.zeros_like(q), torch.zeros_like(q)]  # through `after`, through `before`
        self.dk = [torch.zeros_like(k), torch.zeros_like(k)]
        self.dv = torch.zeros_like(v)
        self.dtotal = 0  # (..., 1, D)

    def gates(self) -> Tensor:
        """Return the gradient of the gates, (..., K, D)."""
        # Gate t is a summand of e_i (exclusive sum) for i > t and of f_i (inclusive sum) for i >= t.
        df = (self.q * self.dq[0]).addcmul_(self.k, self.dk[0]).neg_()
        both = (self.q * self.dq[1]).addcmul_(self.k, self.dk[1]).add_(df)
        tokens = both.shape[-2]
        later = torch.ones(tokens, tokens, dtype=both.dtype, device=both.device).triu_(1)
        return torch.matmul(later, both).add_(df).add_(self.dtotal)


def inner_gradients(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, decays: Tensor, sides: tuple[bool, ...]
) -> tuple[Gradients, Level]:
    """Return the gradients of `inner_output` and the level of whole chunks."""
    tokens, scores, sums = q.shape[-2], 0, Gradients(q, k, v)
    block = min(SMALL, tokens)
    if tokens > 1:
        small = torch.matmul(_blocks(dy, block), _blocks(v, block).transpose(-1, -2))
    for level in levels(decays, in_place=True):
        size = level.size
        if size == tokens:
            break
        if size < block:
            factor, mask = small_factors(level), _small_mask(level, block, sides)
            a, b = (_blocks(_times(x, factor), block) for x in (q, k))
            scores = scores + torch.matmul(a, b.transpose(-1, -2)) * mask
            dscores = small * mask
            da = _times(torch.matmul(dscores, b).flatten(-3, -2), factor)
            db = _times(torch.matmul(dscores.transpose(-1, -2), a).flatten(-3, -2), factor)
            for half in (0, 1):
                halves(sums.dq[half], size)[half].add_(halves(da, size)[half])
                halves(sums.dk[half], size)[half].add_(halves(db, size)[half])
            if 2 * size == block:
                sums.dv = torch.matmul(scores.transpose(-1, -2), _blocks(dy, block)).flatten(-3, -2)
            continue
        factors = halves(level.after, size)[0], halves(level.before, size)[1]
        for reverse in sides:
            here, there = (0, 1) if reverse else (1, 0)
            a, b = halves(q, size)[here] * factors[here], halves(k, size)[there] * factors[there]
            above, values = halves(dy, size)[here], halves(v, size)[there]
            scores = torch.matmul(a, b.transpose(-1, -2))
            dscores = torch.matmul(above, values.transpose(-1, -2))
            halves(sums.dv, size)[there].add_(torch.matmul(scores.transpose(-1, -2), above))
            halves(sums.dq[here], size)[here].addcmul_(torch.matmul(dscores, b), factors[here])
            halves(sums.dk[there], size)[there].addcmul_(torch.matmul(dscores.transpose(-1, -2), a), factors[there])
    return sums, level
