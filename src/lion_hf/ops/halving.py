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


def factor_cut(dtype: torch.dtype) -> float:
    """Return `FACTOR_CUT` of a dtype. It is a function for the same reason as `decays.cut_of`."""
    return -300.0 if dtype == torch.float64 else -29.0


def closing_gate(dtype: torch.dtype) -> float:
    """Return the largest gate that is closed: a bit more than the cut, because exponentials are rounded."""
    return factor_cut(dtype) + 1e-3


# Blocks of fewer tokens than this are too small for fast products. Levels below it share blocks of this size, in which
# a mask selects their pairs.
SMALL = 4


def cut(x: Tensor, in_place: bool = False) -> Tensor:
    """Return a product of decays, or 0 where it is below the cut."""
    least = math.exp(factor_cut(x.dtype))
    if torch.jit.is_tracing():
        return torch.where(x < least, 0, x)
    return F.threshold(x, least * (1 - 1e-6), 0.0, in_place)


def channel_decays(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the decays, exp(gates), or 0 where `closed`."""
    return torch.where(closed(gates, dtype), 0, gates.to(dtype).clamp(min=factor_cut(dtype)).exp())


def fast_channel_decays(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `channel_decays` by operators that change tensors in place."""
    least = factor_cut(dtype)
    return F.threshold_(gates.to(dtype).clamp(min=least).exp_(), math.exp(closing_gate(dtype)), 0.0)


def closed(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where decays are set to 0."""
    return gates <= closing_gate(dtype)


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


class Rules(NamedTuple):
    """What is the same in all chunks of a call."""

    sides: tuple[bool, ...]  # False if queries read keys on their left, True if they read keys on their right
    shares: tuple[float, float]  # the powers, 0, 1/2 or 1, of its own decay with which a token reads, and writes
    masks: list[Tensor]  # `small_masks`

    @property
    def halved(self) -> bool:
        """Whether a token reads and writes with the root of its own decay. It is then a factor of all products."""
        return self.shares == (0.5, 0.5)


class Level(NamedTuple):
    """The products of decays in blocks of h tokens."""

    size: int  # h
    before: Blocks  # (N, K, D), the decays from the first token of its block up to, but not including, a token
    after: Blocks  # (N, K, D), the decays from the token after it to the last token of its block
    total: Tensor  # (N K / h, D), all decays of a block
    decays: Blocks  # (N, K, D)
    in_place: bool  # whether tensors may change in place

    def factor(self, half: int, share: float) -> Tensor:
        """Return the factors of the left (0) or right (1) halves of blocks of 2h tokens, with a share of each token."""
        x = (self.after, self.before)[half].halves(self.size)[half]
        return cut(x * self.decays.halves(self.size)[half], self.in_place) if share == 1 else x

    def small_factor(self, block: int, share: float) -> Tensor | None:
        """Return the factors of both halves, joined to small blocks. None is 1."""
        if self.size == 1 and share != 0.5:
            return self.decays.of(block) if share == 1 else None
        x = joined(self.after.halves(self.size)[0], self.before.halves(self.size)[1], block)
        return cut(x * self.decays.of(block), self.in_place) if share == 1 else x

    def directions(self, reverse: bool, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Return the factors with which keys are written to the state of a side, and with which queries read it."""
        write, read = (self.before, self.after) if reverse else (self.after, self.before)
        factors = zip((write, read), reversed(shares), strict=True)
        return tuple(cut(x.x * self.decays.x, self.in_place) if share == 1 else x.x for x, share in factors)


def levels(decays: Blocks, before: Blocks, after: Blocks, in_place: bool) -> Iterator[Level]:
    """Yield the levels of h = 1, 2, 4, ..., K tokens of chunks with decays (N, K, D).

    `before` and `after` are `products` at first. With `in_place` they are overwritten, level by level.
    """
    tokens, width, size = *decays.x.shape[-2:], 1
    total = decays.x.reshape(-1, width)
    while True:
        yield Level(size, before, after, total, decays, in_place)
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


def decays_and_products(gates: Tensor, dtype: torch.dtype, rules: Rules) -> tuple[Blocks, tuple[Blocks, Blocks]]:
    """Return the decays of gates (N, K, D), and the products `before` and `after` of blocks of one token."""
    decays = channel_decays(gates, dtype)
    single = channel_decays(gates / 2, dtype) if rules.halved else torch.ones_like(decays)
    return Blocks(decays), (Blocks(single), Blocks(single.clone()))


def small_masks(tokens: int, sides: tuple[bool, ...], like: Tensor) -> list[Tensor]:
    """Return which pairs (query, key) of a small block meet at the levels below its size, as matrices of 0 and 1.

    The last one is the identity matrix, of the pairs of a token and itself.
    """
    block, masks, size = min(SMALL, tokens), [], 1
    while size < block:
        token = torch.arange(block, device=like.device) // size  # the number of the block of h tokens
        odd, even = (token % 2 == 1).to(like.dtype), (token % 2 == 0).to(like.dtype)
        near = (token.unsqueeze(-1) // 2 == token // 2).to(like.dtype)
        right_reads = near * odd.unsqueeze(-1) * even
        masks.append(sum(right_reads.T if reverse else right_reads for reverse in sides))
        size *= 2
    return [*masks, torch.eye(block, dtype=like.dtype, device=like.device)]


class _Small(NamedTuple):
    """The queries and keys of a level in small blocks, times their factors; a factor of None is 1."""

    factors: tuple[Tensor | None, Tensor | None]
    query: Tensor
    key: Tensor

    @classmethod
    def make(cls, q: Blocks, k: Blocks, level: Level, block: int, shares: tuple[float, float]) -> "_Small":
        read = level.small_factor(block, shares[0])
        write = read if shares[0] == shares[1] else level.small_factor(block, shares[1])
        q, k = (x.of(block) if f is None else x.of(block) * f for x, f in ((q, read), (k, write)))
        return cls((read, write), q, k)

    def scores(self) -> Tensor:
        return torch.bmm(self.query, self.key.transpose(1, 2))


def inner_output(
    q: Blocks, k: Blocks, v: Blocks, decays: Blocks, own: Blocks | None, rules: Rules, products, in_place: bool
) -> tuple[Tensor, Level]:
    """Return what the tokens of chunks read inside their chunk, (N, K, V), and the level of whole chunks.

    q and k are (N, K, D), v is (N, K, V), decays are (N, K, D). `own` (N, K, 1) are the weights with which tokens read
    themselves. `products` are those of blocks of one token. They change if `in_place`. Otherwise nothing changes in
    place, as autograd needs it.
    """
    tokens, width = v.x.shape[1:]
    block, scores, y = min(SMALL, tokens), None, None
    if own is not None:
        itself = torch.bmm(q.of(block), k.of(block).transpose(1, 2))
        scores = itself * (own.of(block) * rules.masks[-1])
    for level in levels(decays, *products, in_place):
        size = level.size
        if size >= block and y is None and scores is not None:
            y = Blocks(torch.bmm(scores, v.of(block)).reshape(-1, tokens, width))
        if size == tokens:
            break
        if size < block:
            part = _Small.make(q, k, level, block, rules.shares)
            plain = own is not None and part.factors == (None, None)
            small = (itself if plain else part.scores()) * rules.masks[size.bit_length() - 1]
            scores = small if scores is None else scores + small
            continue
        read = [None, None]
        for reverse in rules.sides:
            here, there = (0, 1) if reverse else (1, 0)
            a = q.halves(size)[here] * level.factor(here, rules.shares[0])
            b = k.halves(size)[there] * level.factor(there, rules.shares[1])
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
        self.itself = None  # of what tokens read from themselves: of their weight, and of their score, (N, K, 1)
        tokens = q.shape[1]
        self.later = torch.ones(tokens, tokens, dtype=q.dtype, device=q.device).triu_(1)

    def reset(self) -> None:
        for x in (*self.dq, *self.dk, self.dv):
            x.x.zero_()
        self.dtotal = 0

    def results(self, q: Tensor, k: Tensor, rules: Rules, closed: Tensor | None) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v, the gates and, if there are any, the weights `own`. The sums are lost.

        `closed` says which decays were set to 0.
        """
        # Gate t is a summand of e_i (exclusive sum) for i > t and of f_i (inclusive sum) for i >= t. The exponent of
        # `before` is e_i, or f_i with the gate of the token itself. That of `after` is - f_i, or - e_i with this gate.
        (dq_after, dq_before), (dk_after, dk_before) = ([x.x for x in pair] for pair in (self.dq, self.dk))
        inclusive, exclusive = [], []
        for x, after, before, share in zip(
            (q, k), (dq_after, dk_after), (dq_before, dk_before), rules.shares, strict=True
        ):
            last, first = (x, after, -1), (x, before, 1)
            inclusive.append(first if share == 1 else last)
            exclusive.append(last if share == 1 else first)
        df = _signed(*inclusive)
        both = _signed(*exclusive).add_(df)
        dgates = torch.matmul(self.later, both).add_(self.dtotal)
        if rules.halved:  # half of the gate of the token itself is in every exponent
            dgates.add_(both, alpha=0.5)
            if closed is not None:  # it may be read by itself where the decay is 0, but not its root
                dgates = torch.where(closed, (both / 2).sub_(df), dgates)
        else:
            dgates = dgates.add_(df) if closed is None else torch.where(closed, 0, dgates.add_(df))
        dq, dk = dq_after.add_(dq_before), dk_after.add_(dk_before)
        if self.itself is None:
            return dq, dk, self.dv.x, dgates
        down, dscore = self.itself
        return dq.addcmul_(k, dscore), dk.addcmul_(q, dscore), self.dv.x, dgates, down


def _signed(first, second) -> Tensor:
    """Return the sum of two products, (factor, factor, sign) each."""
    (a, b, sign), (c, d, other) = first, second
    y = a * b
    return (y.neg_() if sign < 0 else y).addcmul_(c, d, value=other)


def inner_gradients(
    q: Blocks,
    k: Blocks,
    v: Blocks,
    dy: Blocks,
    decays: Blocks,
    own: Blocks | None,
    rules: Rules,
    products,
    sums: Gradients,
) -> Level:
    """Add the gradients of `inner_output` to sums that are 0, and return the level of whole chunks."""
    tokens, scores, itself = q.x.shape[1], None, None
    block = min(SMALL, tokens)
    dpairs = torch.bmm(dy.of(block), v.of(block).transpose(1, 2)) if tokens > 1 or own is not None else None
    if own is not None:
        itself = torch.bmm(q.of(block), k.of(block).transpose(1, 2))
        scores = itself * (own.of(block) * rules.masks[-1])
        dscore, score = (x.diagonal(dim1=1, dim2=2).reshape(-1, tokens, 1) for x in (dpairs, itself))
        sums.itself = dscore * score, dscore * own.x
    for level in levels(decays, *products, in_place=True):
        size = level.size
        if size == block and scores is not None:
            sums.dv.of(block).add_(torch.bmm(scores.transpose(1, 2), dy.of(block)))
        if size == tokens:
            break
        if size < block:
            part = _Small.make(q, k, level, block, rules.shares)
            mask = rules.masks[size.bit_length() - 1]
            small = (part.scores() if itself is None or part.factors != (None, None) else itself) * mask
            scores = small if scores is None else scores.add_(small)
            dscores = dpairs * mask
            da, db = torch.bmm(dscores, part.key), torch.bmm(dscores.transpose(1, 2), part.query)
            da, db = (Blocks(x if f is None else x.mul_(f)) for x, f in zip((da, db), part.factors, strict=True))
            for half in (0, 1):
                sums.dq[half].halves(size)[half].add_(da.halves(size)[half])
                sums.dk[half].halves(size)[half].add_(db.halves(size)[half])
            continue
        for reverse in rules.sides:
            here, there = (0, 1) if reverse else (1, 0)
            read, write = level.factor(here, rules.shares[0]), level.factor(there, rules.shares[1])
            a, b = q.halves(size)[here] * read, k.halves(size)[there] * write
            above = dy.halves(size)[here]
            inside = torch.bmm(a, b.transpose(1, 2))
            dscores = torch.bmm(above, v.halves(size)[there].transpose(1, 2))
            sums.dv.halves(size)[there].add_(torch.bmm(inside.transpose(1, 2), above))
            sums.dq[here].halves(size)[here].addcmul_(torch.bmm(dscores, b), read)
            sums.dk[there].halves(size)[there].addcmul_(torch.bmm(dscores.transpose(1, 2), a), write)
    return level
