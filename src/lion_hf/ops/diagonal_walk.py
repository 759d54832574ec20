"""Decays per channel, a few chunks at a time: buffers, and states that walk from one end of the row to the other.

It is the fast way on a CPU. diagonal.py computes all chunks at once from the same parts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import is_abstract
from .halving import (
    FACTOR_CUT,
    Blocks,
    Gradients,
    Level,
    Rules,
    cut,
    fast_channel_decays,
    inner_gradients,
    inner_output,
    levels,
)
from .tokens import slices


# Elements of each buffer of the walk over chunks, at most, if one chunk of all heads fits: about 20 buffers are in use.
GROUP_ELEMENTS = 3 * 2**15

# A factor that counts as 1 when the weight of a row of a state is estimated. The cut of factors has room for it.
NEAR = 0.25


class Inputs(NamedTuple):
    """The tensors of `diagonal_scan`, and the gradient of its result."""

    query: Tensor
    key: Tensor
    value: Tensor
    gates: Tensor  # where a few chunks are computed at a time: the decays, exp(gates), or their roots
    own: Tensor | None = None  # (batch, heads, length, 1)
    dy: Tensor | None = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, gates: Tensor, own: Tensor | None = None, dy=None):
        """Return the inputs with gates and weights `own` for each row of the batch."""
        own = None if own is None else own.unsqueeze(-1).expand(query.shape[0], -1, -1, -1)
        return cls(query, key, value, gates.expand_as(query), own, dy)

    def chunks(self, size: int) -> "Inputs":
        """Return chunks (N, size, width) of all tokens, with zeros after the last token."""
        return Inputs(*(None if x is None else split(x, size) for x in self))


def split(x: Tensor, size: int) -> Tensor:
    """Split (B, H, L, D) into chunks (n B H, size, D), with zeros after the last token."""
    chunks = (x.shape[2] + size - 1) // size  # not -(-a // b): ONNX divides integers towards 0
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if is_abstract(x) or padding else x
    return copied(x.unflatten(2, (chunks, size)).permute(2, 0, 1, 3, 4)).flatten(0, 2)


def joined_chunks(x: Tensor, like: Tensor) -> Tensor:
    """Invert `split` for `like` (B, H, L, any)."""
    batch, heads, length = like.shape[:3]
    x = copied(x.unflatten(0, (-1, batch, heads)).permute(1, 2, 0, 3, 4)).flatten(2, 3)
    return F.pad(x, (0, 0, 0, length - x.shape[2])) if is_abstract(x) else x[:, :, :length]


def copied(x: Tensor) -> Tensor:
    """Return a contiguous copy. `contiguous` and `reshape` would ask whether one is needed, which graphs depend on."""
    return x.clone(memory_format=torch.contiguous_format)


def strongest(factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the largest factors (N, D) of tokens that write x (N, K, D) times the factor and y (N, K, V), not 0."""
    alive = y.abs().amax(-1, keepdim=True).sign()  # numbers, because comparisons are many times slower on a CPU
    return (x.sign().abs() * factor * alive).amax(1)


class _State:
    """A state that walks over chunks: its value (rows, D, V) and the largest weight in each of its rows (rows, D).

    The weight decides when a row is set to 0, before its numbers become denormal. It is None, for 1, while every row
    has just got something with a factor that is near 1.
    """

    def __init__(self, rows: int, reverse: bool):
        self.rows, self.reverse, self.value, self.weight = rows, reverse, None, None

    def walk(self, factor: Tensor, x: Tensor, y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Walk over chunks of tokens that write x (N, K, D) times a factor and y (N, K, V).

        Returns what enters each chunk, (N, D, V), and the decays (N, D) with which it crosses it.
        """
        update = torch.bmm((x * factor).transpose(1, 2), y)
        crossing = self._crossing(factor, x, y, total)
        updates, decays = (t.unflatten(0, (-1, self.rows)).unbind(0) for t in (update, crossing.unsqueeze(-1)))
        chunks = len(updates)
        places = update.new_empty(chunks + 1, *updates[0].shape)
        entering, order = places[:-1], range(chunks)
        if self.reverse:
            entering, order = places[1:], reversed(order)
        steps = places.unbind(0)
        first = steps[-1 if self.reverse else 0]
        first.zero_() if self.value is None else first.copy_(self.value)
        for i in order:
            here, there = (i + 1, i) if self.reverse else (i, i + 1)
            torch.addcmul(updates[i], steps[here], decays[i], out=steps[there])
        self.value = steps[0 if self.reverse else -1]
        return entering.flatten(0, 1), crossing

    def _crossing(self, factor: Tensor, x: Tensor, y: Tensor, total: Tensor) -> Tensor:
        """Return the decays (N, D) of chunks, or 0 where a row of the state becomes too small."""
        nearest = 0 if self.reverse else -1  # the factors of these tokens are the largest
        # In a form that NaN does not change, so that other rows keep their bits.
        far = (factor[:, nearest] < NEAR).any()
        alive = (x[:, nearest] != 0).all() & (y[:, nearest] != 0).any(-1).all()
        if self.weight is None and bool(alive & ~far):
            return total
        sent, decays = (t.unflatten(0, (-1, self.rows)) for t in (strongest(factor, x, y), total))
        weight = torch.ones_like(decays[0]) if self.weight is None else self.weight
        crossing = torch.empty_like(decays)
        chunks = range(len(decays))
        for i in reversed(chunks) if self.reverse else chunks:
            weight = cut(weight * decays[i])
            crossing[i] = decays[i].masked_fill(weight == 0, 0)
            weight = torch.maximum(weight, sent[i])
        last = sent[0 if self.reverse else -1]
        self.weight = weight if bool((torch.maximum(weight, last / NEAR) < 1).any()) else None
        return crossing.flatten(0, 1)


def add_state(sums: Gradients, x: Inputs, directions, state, dstate, crossing, reverse: bool) -> None:
    """Add the gradients of what chunks read from a state and write to it."""
    write, read = directions
    before, after = (0, 1) if reverse else (1, 0)  # places in the lists of `Gradients`
    dq = torch.bmm(x.dy, state.transpose(1, 2)).mul_(read)
    dk = torch.bmm(x.value, dstate.transpose(1, 2)).mul_(write)
    sums.dq[before].x.add_(dq)
    sums.dk[after].x.add_(dk)
    sums.dv.x.baddbmm_(x.key * write, dstate)
    # `after` is the exponential of the total minus a sum.
    to_end = dq.mul_(x.query) if reverse else dk.mul_(x.key)
    dtotal = (state * crossing.unsqueeze(-1)).mul_(dstate).sum(-1).unsqueeze(1)
    sums.dtotal = sums.dtotal + dtotal + to_end.sum(1, keepdim=True)


class _Part:
    """Buffers for a few chunks, and views of them, which are made once and used for all chunks."""

    def __init__(self, x: Inputs, rows: int, chunks: int, size: int, rules: Rules, scale: float):
        self.shape, self.rules, self.scale = (chunks, rows, x.query.shape[1], size), rules, scale
        self.buffers = Inputs(*(None if t is None else self._buffer(t) for t in x))
        self.q, self.k, self.v, self.decays, self.own, self.dy = self.buffers
        self.root = self._buffer(x.query) if rules.halved else None
        self.products = self._buffer(x.query), self._buffer(x.query)
        self.sums = None if x.dy is None else Gradients(self.q.x, self.k.x, self.v.x)

    def _buffer(self, like: Tensor) -> Blocks:
        chunks, rows, heads, size = self.shape
        return Blocks(like.new_empty(chunks * rows * heads, size, like.shape[-1]))

    def load(self, x: Inputs, rows: slice, tokens: slice) -> None:
        """Copy tokens into the buffers, with zeros after the last one."""
        chunks, _, _, size = self.shape
        for buffer, t in zip(self.buffers, x, strict=True):
            if buffer is not None:
                t = t[rows, :, tokens]
                t = F.pad(t, (0, 0, 0, chunks * size - t.shape[2])) if chunks * size > t.shape[2] else t
                t = t.unflatten(2, (chunks, size)).permute(2, 0, 1, 3, 4)
                buffer.x.view(t.shape).copy_(t)
        if self.root is not None:
            self.root.x.copy_(self.decays.x)
            cut(self.decays.x.square_(), in_place=True)
        if self.dy is not None and self.scale != 1:
            self.dy.x.mul_(self.scale)

    def store(self, y: Tensor, out: Tensor, add: bool = False) -> None:
        """Copy or add the output of chunks (N, K, V) to their place out (rows, heads, tokens, V)."""
        y = y.view(*self.shape, -1).permute(1, 2, 0, 3, 4)
        if out.shape[2] < y.shape[2] * y.shape[3]:
            y = y.flatten(2, 3)[:, :, : out.shape[2]]
        else:
            out = out.unflatten(2, y.shape[2:4])
        out.add_(y) if add else out.copy_(y)

    def output(self) -> tuple[Tensor, Level]:
        tensors = self.q, self.k, self.v, self.decays, self.own
        return inner_output(*tensors, self.rules, self._products(), in_place=True)

    def gradients(self) -> Level:
        """Overwrite the sums with the gradients of `output`."""
        self.sums.reset()
        tensors = self.q, self.k, self.v, self.dy, self.decays, self.own
        return inner_gradients(*tensors, self.rules, self._products(), self.sums)

    def results(self, closed: bool) -> tuple[Tensor, ...]:
        return self.sums.results(self.q.x, self.k.x, self.rules, self.decays.x == 0 if closed else None)

    def outer_level(self) -> Level:
        """Return the level of whole chunks."""
        *_, level = levels(self.decays, *self._products(), in_place=True)
        return level

    def _products(self) -> tuple[Blocks, Blocks]:
        for x in self.products:
            x.x.fill_(1) if self.root is None else x.x.copy_(self.root.x)
        return self.products

    def inputs(self) -> Inputs:
        return Inputs(*(None if x is None else x.x for x in self.buffers))


class _Walk:
    """Walks over the chunks of a few rows at a time, with as many chunks as fit into the cache."""

    def __init__(self, x: Inputs, size: int, rules: Rules, scale: float):
        self.x, self.size, self.rules, self.scale, self.parts = x, size, rules, scale, {}
        batch, heads, length, width = x.query.shape
        chunk = heads * size * max(width, x.value.shape[-1])
        rows = max(1, GROUP_ELEMENTS // chunk)
        tokens = size * max(1, GROUP_ELEMENTS // (min(batch, rows) * chunk))
        self.rows, self.tokens = slices(0, batch, rows), slices(0, length, tokens)

    def over(self, rows: slice, reverse: bool) -> Iterator[tuple[_Part, slice]]:
        for tokens in reversed(self.tokens) if reverse else self.tokens:
            key = rows.stop - rows.start, -(-(tokens.stop - tokens.start) // self.size)
            if key not in self.parts:
                self.parts[key] = _Part(self.x, *key, self.size, self.rules, self.scale)
            self.parts[key].load(self.x, rows, tokens)
            yield self.parts[key], tokens

    def state(self, rows: slice, reverse: bool) -> _State:
        return _State((rows.stop - rows.start) * self.x.query.shape[1], reverse)


def _empty(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same shape that is (batch, length, heads, width) in memory."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _with_decays(x: Inputs, rules: Rules) -> Inputs:
    """Replace the gates by decays (B, H, L, D), or their roots if tokens read and write with them."""
    gates = x.gates[:1] if x.gates.stride(0) == 0 else x.gates
    gates = gates[:, :, :1] if gates.stride(2) == 0 else gates
    gates = gates / 2 if rules.halved else gates
    return x._replace(gates=fast_channel_decays(gates, x.query.dtype).expand_as(x.query))


def walk_forward(x: Inputs, rules: Rules, size: int, scale: float) -> Tensor:
    walk, y, sides = _Walk(_with_decays(x, rules), size, rules, scale), _empty(x.value), rules.sides
    exchange = x.query.shape[2] > size
    for rows in walk.rows:
        for sweep, reverse in enumerate(sides if exchange else sides[:1]):
            state = walk.state(rows, reverse)
            for part, tokens in walk.over(rows, reverse):
                out, level = (None, part.outer_level()) if sweep else part.output()
                if exchange:
                    write, read = level.directions(reverse, rules.shares)
                    entering, _ = state.walk(write, part.k.x, part.v.x, level.total)
                    q = part.q.x * read
                    out = torch.bmm(q, entering) if sweep else out.baddbmm_(q, entering)
                part.store(out if scale == 1 else out.mul_(scale), y[rows, :, tokens], add=sweep > 0)
    return y


def walk_backward(x: Inputs, rules: Rules, size: int, scale: float) -> tuple[Tensor, ...]:
    walk, sides, exchange = _Walk(_with_decays(x, rules), size, rules, scale), rules.sides, x.query.shape[2] > size
    grads = [_empty(t) for t in (x.query, x.key, x.value, x.query, x.own) if t is not None]
    closed = not bool(x.gates.amin() >= FACTOR_CUT[x.query.dtype] + 1)  # whether any may be; also with NaN
    for rows in walk.rows:
        stored = _states_from_the_left(walk, rows) if exchange else None
        states = {reverse: walk.state(rows, True) for reverse in sides}
        for part, tokens in walk.over(rows, True):
            level = part.gradients()
            for reverse in sides if exchange else ():
                directions = write, read = level.directions(reverse, rules.shares)
                known, crossing = stored[reverse].pop()
                if reverse:  # the state comes from the right, its gradient from the left
                    state, crossing = states[reverse].walk(write, part.k.x, part.v.x, level.total)
                    dstate = known
                else:
                    state, (dstate, _) = known, states[reverse].walk(read, part.q.x, part.dy.x, level.total)
                add_state(part.sums, part.inputs(), directions, state, dstate, crossing, reverse)
            for grad, step in zip(grads, part.results(closed), strict=True):
                part.store(step, grad[rows, :, tokens])
    return tuple(grads)


def _states_from_the_left(walk: _Walk, rows: slice) -> dict[bool, list]:
    """Return what comes from the left: the state of the left side, the gradient of the state of the right side."""
    states, stored = {reverse: walk.state(rows, False) for reverse in walk.rules.sides}, {}
    for part, _ in walk.over(rows, False):
        level = part.outer_level()
        for reverse, state in states.items():
            write, read = level.directions(reverse, walk.rules.shares)
            tensors, factor = ((part.q, part.dy), read) if reverse else ((part.k, part.v), write)
            step = state.walk(factor, *(t.x for t in tensors), level.total)
            stored.setdefault(reverse, []).append(step)
    return stored
