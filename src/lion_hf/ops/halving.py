"""Decays per channel inside chunks of 2^p tokens, by halving: products of decays, scores, and their gradients.

The weight of two tokens is the product of the decays between them, for each channel. A pair meets at one level: where a
block of 2h tokens, halved, has one of them on its left and the other one on its right. The decays from the middle of
the block to either token are factors of the queries and keys, and the scores of all such pairs are a matrix product.
Factors are products of decays, never quotients, so they are at most 1, and a decay of 0 is a number like the others.
They are built by doubling: from h to 2h, half of them are multiplied by the product of a block of h tokens.

Cost for chunks of K tokens, per token, head and side: (K / 2) (D + V) multiply-adds, and log2(K) multiplications of
all channels for each of query, key and factors. There is no tensor of all pairs times all channels.

Tensors of chunks are (N, K, width), where N counts the chunks of all rows and heads.
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

_ABOVE = 1e-3  # the exponential of a number at the cut, however it is rounded, is below that of the cut plus this

# Blocks of fewer tokens than this are too small for fast products. Levels below it share blocks of this size, in which
# a mask selects their pairs.
SMALL = 4


def cut(x: Tensor, in_place: bool = False) -> Tensor:
    """Return a product of decays, or 0 where it is below the cut."""
    least = math.exp(FACTOR_CUT[x.dtype])
    if torch.jit.is_tracing():
        return torch.where(x < least, 0, x)
    return F.threshold(x, least * (1 - 1e-6), 0.0, in_place)


def channel_decays(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the decays, exp(gates), or 0 where `closed`."""
    return torch.where(closed(gates, dtype), 0, gates.to(dtype).clamp(min=FACTOR_CUT[dtype]).exp())


def fast_channel_decays(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `channel_decays` by operators that change tensors in place."""
    least = FACTOR_CUT[dtype]
    return F.threshold_(gates.to(dtype).clamp(min=least).exp_(), math.exp(least + _ABOVE), 0.0)


def closed(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where decays are set to 0."""
    return gates <= FACTOR_CUT[dtype] + _ABOVE


class Blocks:
    """A tensor of chunks (N, K, width), and views of it that are made once."""

    def __init__(self, x: Tensor):
        self.x, self._views = x, {}

    def of(self, size: int) -> Tensor:
        """Return blocks of tokens, (N K / size, size, width)."""
        if size not in self._views:
            self._views[size] = self.x.reshape(-1, size, self.x.shape[-1])
        return self._views[size]

    def halves(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the left and the right halves of all blocks of 2 `size` tokens, (N K / (2 size), size, width) each."""
        if -size not in self._views:
            self._views[-size] = self.x.reshape(-1, 2, size, self.x.shape[-1]).unbind(1)
        return self._views[-size]


def joined(left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """Return the chunks (N, K, width) whose blocks have these halves."""
    return torch.stack((left, right), 1).reshape(-1, tokens, left.shape[-1])


class Level(NamedTuple):
    """The products of decays in blocks of h tokens."""

    size: int  # h
    before: Blocks  # (N, K, D), the decays from the first token of its block up to, but not including, a token
    after: Blocks  # (N, K, D), the decays from the token after it to the last token of its block
    total: Tensor  # (N K / h, D), all decays of a block

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the left and of the right halves of blocks of 2h tokens."""
        return self.after.halves(self.size)[0], self.before.halves(self.size)[1]


def levels(decays: Tensor, before: Blocks, after: Blocks, in_place: bool) -> Iterator[Level]:
    """Yield the levels of h = 1, 2, 4, ..., K tokens of chunks with decays (N, K, D).

    `before` and `after` are filled with 1. With `in_place` they are overwritten, level by level.
    """
    tokens, width, size = *decays.shape[-2:], 1
    total = decays.reshape(-1, width)
    while True:
        yield Level(size, before, after, total)
        if size == tokens:
            return
        left, right = total.reshape(-1, 2, 1, width).unbind(1)
        if in_place:
            cut(before.halves(size)[1].mul_(left), in_place)
            cut(after.halves(size)[0].mul_(right), in_place)
        else:
            first, second = before.halves(size)
            before = Blocks(joined(first, cut(second * left), tokens))
            first, second = after.halves(size)
            after = Blocks(joined(cut(first * right), second, tokens))
        total = cut((left * right).squeeze(1), in_place)
        size *= 2


def ones(like: Tensor) -> tuple[Blocks, Blocks]:
    return Blocks(torch.ones_like(like)), Blocks(torch.ones_like(like))


def small_masks(tokens: int, sides: tuple[bool, ...], like: Tensor) -> list[Tensor]:
    """Return which pairs (query, key) of a small block meet at the levels below its size, as matrices of 0 and 1.

    `sides` has False if queries read keys on their left, True if they read keys on their right.
    """
    block, masks, size = min(SMALL, tokens), [], 1
    while size < block:
        token = torch.arange(block, device=like.device) // size  # the number of the block of h tokens
        odd, even = (token % 2 == 1).to(like.dtype), (token % 2 == 0).to(like.dtype)
        near = (token.unsqueeze(-1) // 2 == token // 2).to(like.dtype)
        right_reads = near * odd.unsqueeze(-1) * even
        masks.append(sum(right_reads.T if reverse else right_reads for reverse in sides))
        size *= 2
    return masks


def _small_operands(q: Blocks, k: Blocks, level: Level, block: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the factors of a level in small blocks, None for 1, and small blocks of q and k times them."""
    if level.size == 1:
        return None, q.of(block), k.of(block)
    factor = joined(*level.factors(), block)
    return factor, q.of(block) * factor, k.of(block) * factor


def inner_output(
    q: Blocks, k: Blocks, v: Blocks, decays: Tensor, masks: list[Tensor], sides, products=None
) -> tuple[Tensor, Level]:
    """Return what the tokens of chunks read inside their chunk, (N, K, V), and the level of whole chunks.

    q and k are (N, K, D), v is (N, K, V), decays are (N, K, D). `products` are two tensors of 1 like them that may be
    changed. Without them nothing changes in place, as autograd needs it.
    """
    tokens, width, in_place = *v.x.shape[1:], products is not None
    block, scores, y = min(SMALL, tokens), None, None
    for level in levels(decays, *(products or ones(decays)), in_place):
        size = level.size
        if size == tokens:
            break
        if size < block:
            _, a, b = _small_operands(q, k, level, block)
            small = torch.bmm(a, b.transpose(1, 2)) * masks[size.bit_length() - 1]
            scores = small if scores is None else scores + small
            if 2 * size == block:
                y = Blocks(torch.bmm(scores, v.of(block)).reshape(-1, tokens, width))
            continue
        factors, read = level.factors(), [None, None]
        for reverse in sides:
            here, there = (0, 1) if reverse else (1, 0)
            a, b = q.halves(size)[here] * factors[here], k.halves(size)[there] * factors[there]
            read[here] = torch.bmm(torch.bmm(a, b.transpose(1, 2)), v.halves(size)[there])
            if in_place:
                y.halves(size)[here].add_(read[here])
        if not in_place:
            left, right = (torch.zeros_like(read[1 - i]) if x is None else x for i, x in enumerate(read))
            y = Blocks(y.x + joined(left, right, tokens))
    return torch.zeros_like(v.x) if y is None else y.x, level


class Gradients:
    """Sums of the gradients of chunks.

    Those of queries and keys are kept apart by the factor that they were multiplied with, because the gradients of the
    gates follow from them: the exponent of `before` is a sum of the gates of the tokens before a token, that of `after`
    a sum of the gates of the tokens after it.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.dq = [Blocks(torch.zeros_like(q)), Blocks(torch.zeros_like(q))]  # through `after`, through `before`
        self.dk = [Blocks(torch.zeros_like(k)), Blocks(torch.zeros_like(k))]
        self.dv = Blocks(torch.zeros_like(v))
        self.dtotal = 0  # (N, 1, D)
        tokens = q.shape[1]
        self.later = torch.ones(tokens, tokens, dtype=q.dtype, device=q.device).triu_(1)

    def reset(self) -> None:
        for x in (*self.dq, *self.dk, self.dv):
            x.x.zero_()
        self.dtotal = 0

    def results(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v and the gates. The sums are lost."""
        # Gate t is a summand of e_i (exclusive sum) for i > t and of f_i (inclusive sum) for i >= t.
        (dq_after, dq_before), (dk_after, dk_before) = ([x.x for x in pair] for pair in (self.dq, self.dk))
        df = (q * dq_after).addcmul_(k, dk_after).neg_()
        both = (q * dq_before).addcmul_(k, dk_before).add_(df)
        dgates = torch.matmul(self.later, both).add_(df).add_(self.dtotal)
        return dq_after.add_(dq_before), dk_after.add_(dk_before), self.dv.x, dgates


def inner_gradients(
    q: Blocks, k: Blocks, v: Blocks, dy: Blocks, decays: Tensor, masks: list[Tensor], sides, products, sums: Gradients
) -> Level:
    """Add the gradients of `inner_output` to sums that are 0, and return the level of whole chunks."""
    tokens, scores = q.x.shape[1], None
    block = min(SMALL, tokens)
    dpairs = torch.bmm(dy.of(block), v.of(block).transpose(1, 2)) if tokens > 1 else None
    for level in levels(decays, *products, in_place=True):
        size = level.size
        if size == tokens:
            break
        if size < block:
            factor, a, b = _small_operands(q, k, level, block)
            mask = masks[size.bit_length() - 1]
            small = torch.bmm(a, b.transpose(1, 2)).mul_(mask)
            scores = small if scores is None else scores.add_(small)
            dscores = dpairs * mask
            da, db = torch.bmm(dscores, b), torch.bmm(dscores.transpose(1, 2), a)
            da, db = (Blocks(x if factor is None else x.mul_(factor)) for x in (da, db))
            for half in (0, 1):
                sums.dq[half].halves(size)[half].add_(da.halves(size)[half])
                sums.dk[half].halves(size)[half].add_(db.halves(size)[half])
            if 2 * size == block:
                sums.dv.of(block).add_(torch.bmm(scores.transpose(1, 2), dy.of(block)))
            continue
        factors = level.factors()
        for reverse in sides:
            here, there = (0, 1) if reverse else (1, 0)
            a, b = q.halves(size)[here] * factors[here], k.halves(size)[there] * factors[there]
            above = dy.halves(size)[here]
            scores = torch.bmm(a, b.transpose(1, 2))
            dscores = torch.bmm(above, v.halves(size)[there].transpose(1, 2))
            sums.dv.halves(size)[there].add_(torch.bmm(scores.transpose(1, 2), above))
            sums.dq[here].halves(size)[here].addcmul_(torch.bmm(dscores, b), factors[here])
            sums.dk[there].halves(size)[there].addcmul_(torch.bmm(dscores.transpose(1, 2), a), factors[there])
    return level
