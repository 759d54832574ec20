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
    Blocks,
    Gradients,
    Level,
    cut,
    fast_channel_decays,
    inner_gradients,
    inner_output,
    levels,
    small_masks,
)
from .tokens import slices


# Elements of each buffer of the walk over chunks, at most, if one chunk of all heads fits: about 20 buffers are in use.
GROUP_ELEMENTS = 3 * 2**15


class Inputs(NamedTuple):
    """The tensors of `diagonal_scan`, and the gradient of its result."""

    query: Tensor
    key: Tensor
    value: Tensor
    gates: Tensor  # where a few chunks are computed at a time: the decays, exp(gates)
    dy: Tensor | None = None

    def rows(self, rows: slice) -> "Inputs":
        """Return some rows of the batch."""
        shared = self.gates.shape[0] < self.query.shape[0]
        return Inputs(*(x if x is None or (i == 3 and shared) else x[rows] for i, x in enumerate(self)))

    def chunks(self, tokens: slice, size: int) -> "Inputs":
        """Return chunks (N, size, width) of some tokens, with zeros after the last token."""
        gates = self.gates.expand_as(self.query)
        return Inputs(*(None if x is None else split(x[:, :, tokens], size) for x in self._replace(gates=gates)))


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


def directions(level: Level, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the factors with which keys are written to the state of a side, and with which queries read it."""
    return (level.before.x, level.after.x) if reverse else (level.after.x, level.before.x)


def strongest(factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the largest factors (N, D) of tokens that write x (N, K, D) times the factor and y (N, K, V), not 0."""
    alive = y.abs().amax(-1, keepdim=True).sign()  # numbers, because comparisons are many times slower on a CPU
    return (x.sign().abs() * factor * alive).amax(1)


class _State:
    """A state that walks over chunks: its value (rows, D, V) and the largest weight in each of its rows (rows, D).

    The weight decides when a row is set to 0, before its numbers become denormal. It is None while it is 1 everywhere.
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
        nearest = 0 if self.reverse else -1  # the factor of these tokens is 1
        if self.weight is None and bool((x[:, nearest] != 0).all()) and bool((y[:, nearest] != 0).any(-1).all()):
            return total
        sent, decays = (t.unflatten(0, (-1, self.rows)) for t in (strongest(factor, x, y), total))
        weight = torch.ones_like(decays[0]) if self.weight is None else self.weight
        crossing = torch.empty_like(decays)
        chunks = range(len(decays))
        for i in reversed(chunks) if self.reverse else chunks:
            weight = cut(weight * decays[i])
            crossing[i] = decays[i].masked_fill(weight == 0, 0)
            weight = torch.maximum(weight, sent[i])
        self.weight = None if bool((weight == 1).all()) else weight
        return crossing.flatten(0, 1)


def add_state(sums: Gradients, x: Inputs, level: Level, state, dstate, crossing, reverse: bool) -> None:
    """Add the gradients of what chunks read from a state and write to it."""
    write, read = directions(level, reverse)
    before, after = (0, 1) if reverse else (1, 0)  # places in the lists of `Gradients`
    dq = torch.bmm(x.dy, state.transpose(1, 2)).mul_(read)
    dk = torch.bmm(x.value, dstate.transpose(1, 2)).mul_(write)
    sums.dq[before].x.add_(dq)
    sums.dk[after].x.add_(dk)
    sums.dv.x.baddbmm_(x.key * write, dstate)
    # `after` is the exponential of the total minus an inclusive sum.
    to_end = dq.mul_(x.query) if reverse else dk.mul_(x.key)
    dtotal = (state * crossing.unsqueeze(-1)).mul_(dstate).sum(-1).unsqueeze(1)
    sums.dtotal = sums.dtotal + dtotal + to_end.sum(1, keepdim=True)


class _Part:
    """Buffers for a few chunks, and views of them, which are made once and used for all chunks."""

    def __init__(self, x: Inputs, rows: int, chunks: int, size: int, sides):
        self.shape, self.sides = (chunks, rows, x.query.shape[1], size), sides
        self.q, self.k, self.v, self.decays, self.dy = (None if t is None else self._buffer(t) for t in x)
        self.products = self._buffer(x.query), self._buffer(x.query)
        self.masks = small_masks(size, sides, x.query)
        self.sums = None if x.dy is None else Gradients(self.q.x, self.k.x, self.v.x)

    def _buffer(self, like: Tensor) -> Blocks:
        chunks, rows, heads, size = self.shape
        return Blocks(like.new_empty(chunks * rows * heads, size, like.shape[-1]))

    def load(self, x: Inputs, rows: slice, tokens: slice) -> None:
        """Copy tokens into the buffers, with zeros after the last one."""
        chunks, _, _, size = self.shape
        for buffer, t in zip((self.q, self.k, self.v, self.decays, self.dy), x, strict=True):
            if buffer is not None:
                t = t[rows, :, tokens]
                t = F.pad(t, (0, 0, 0, chunks * size - t.shape[2])) if chunks * size > t.shape[2] else t
                t = t.unflatten(2, (chunks, size)).permute(2, 0, 1, 3, 4)
                buffer.x.view(t.shape).copy_(t)

    def store(self, y: Tensor, out: Tensor, add: bool = False) -> None:
        """Copy or add the output of chunks (N, K, V) to their place out (rows, heads, tokens, V)."""
        y = y.view(*self.shape, -1).permute(1, 2, 0, 3, 4)
        if out.shape[2] < y.shape[2] * y.shape[3]:
            y = y.flatten(2, 3)[:, :, : out.shape[2]]
        else:
            out = out.unflatten(2, y.shape[2:4])
        out.add_(y) if add else out.copy_(y)

    def output(self) -> tuple[Tensor, Level]:
        return inner_output(self.q, self.k, self.v, self.decays.x, self.masks, self.sides, self._ones())

    def gradients(self) -> Level:
        """Overwrite the sums with the gradients of `output`."""
        self.sums.reset()
        return inner_gradients(
            self.q, self.k, self.v, self.dy, self.decays.x, self.masks, self.sides, self._ones(), self.sums
        )

    def outer_level(self) -> Level:
        """Return the level of whole chunks."""
        *_, level = levels(self.decays.x, *self._ones(), in_place=True)
        return level

    def _ones(self) -> tuple[Blocks, Blocks]:
        for x in self.products:
            x.x.fill_(1)
        return self.products

    def inputs(self) -> Inputs:
        return Inputs(self.q.x, self.k.x, self.v.x, self.decays.x, None if self.dy is None else self.dy.x)


class _Walk:
    """Walks over the chunks of a few rows at a time, with as many chunks as fit into the cache."""

    def __init__(self, x: Inputs, size: int, sides):
        self.x, self.size, self.sides, self.parts = x, size, sides, {}
        batch, heads, length, width = x.query.shape
        chunk = heads * size * max(width, x.value.shape[-1])
        rows = max(1, GROUP_ELEMENTS // chunk)
        tokens = size * max(1, GROUP_ELEMENTS // (min(batch, rows) * chunk))
        self.rows, self.tokens = slices(0, batch, rows), slices(0, length, tokens)

    def over(self, rows: slice, reverse: bool) -> Iterator[tuple[_Part, slice]]:
        for tokens in reversed(self.tokens) if reverse else self.tokens:
            key = rows.stop - rows.start, -(-(tokens.stop - tokens.start) // self.size)
            if key not in self.parts:
                self.parts[key] = _Part(self.x, *key, self.size, self.sides)
            self.parts[key].load(self.x, rows, tokens)
            yield self.parts[key], tokens

    def state(self, rows: slice, reverse: bool) -> _State:
        return _State((rows.stop - rows.start) * self.x.query.shape[1], reverse)


def _empty(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same shape that is (batch, length, heads, width) in memory."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _with_decays(x: Inputs) -> Inputs:
    """Replace the gates by decays (B, H, L, D)."""
    gates = x.gates[:, :, :1] if x.gates.stride(2) == 0 else x.gates
    return x._replace(gates=fast_channel_decays(gates, x.query.dtype).expand_as(x.query))


def walk_forward(x: Inputs, sides, size: int) -> Tensor:
    walk, y, exchange = _Walk(_with_decays(x), size, sides), _empty(x.value), x.query.shape[2] > size
    for rows in walk.rows:
        for sweep, reverse in enumerate(sides if exchange else sides[:1]):
            state = walk.state(rows, reverse)
            for part, tokens in walk.over(rows, reverse):
                out, level = (None, part.outer_level()) if sweep else part.output()
                if exchange:
                    write, read = directions(level, reverse)
                    entering, _ = state.walk(write, part.k.x, part.v.x, level.total)
                    q = part.q.x * read
                    out = torch.bmm(q, entering) if sweep else out.baddbmm_(q, entering)
                part.store(out, y[rows, :, tokens], add=sweep > 0)
    return y


def walk_backward(x: Inputs, sides, size: int) -> tuple[Tensor, ...]:
    walk, exchange = _Walk(_with_decays(x), size, sides), x.query.shape[2] > size
    grads = [_empty(t) for t in (x.query, x.key, x.value, x.query)]
    for rows in walk.rows:
        stored = _states_from_the_left(walk, rows) if exchange else None
        states = {reverse: walk.state(rows, True) for reverse in sides}
        for part, tokens in walk.over(rows, True):
            level = part.gradients()
            for reverse in sides if exchange else ():
                write, read = directions(level, reverse)
                known, crossing = stored[reverse].pop()
                if reverse:  # the state comes from the right, its gradient from the left
                    state, crossing = states[reverse].walk(write, part.k.x, part.v.x, level.total)
                    dstate = known
                else:
                    state, (dstate, _) = known, states[reverse].walk(read, part.q.x, part.dy.x, level.total)
                add_state(part.sums, part.inputs(), level, state, dstate, crossing, reverse)
            for grad, step in zip(grads, part.sums.results(part.q.x, part.k.x), strict=True):
                part.store(step, grad[rows, :, tokens])
    return tuple(grads)


def _states_from_the_left(walk: _Walk, rows: slice) -> dict[bool, list]:
    """Return what comes from the left: the state of the left side, the gradient of the state of the right side."""
    states, stored = {reverse: walk.state(rows, False) for reverse in walk.sides}, {}
    for part, _ in walk.over(rows, False):
        level = part.outer_level()
        for reverse, state in states.items():
            tensors = (part.q, part.dy) if reverse else (part.k, part.v)
            step = state.walk(level.after.x, *(t.x for t in tensors), level.total)
            stored.setdefault(reverse, []).append(step)
    return stored
