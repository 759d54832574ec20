"""The operator with decays per channel of the key, in linear time and with linear memory, and its gradients.

Inside chunks of 2^p tokens scores are computed by halving (halving.py). Chunks exchange states of D x V, in which every
row has its own decay. All chunks are computed at once, or a few at a time from one end of the row to the other.

Multiply-adds of the forward pass for both sides, per batch element and head, for L tokens, head widths D (query, key)
and V (value), and chunks of K tokens::

    attention   L^2 (D + V)             a single chunk
    chunk       L (K (D + V) + 4 D V)
    rnn         L (K (D + V) + 4 D V)   a few chunks at a time, O(D V) memory

and 2 log2(K) + 4 multiplications by decays for each token and channel of query and key.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import _fold, _partial, _pushed, _unfold, call_function
from .checks import is_abstract, is_exporting, values_can_be_read
from .chunk import propagate
from .decays import CUT, FLOOR, Flow, cumulative_sums, differentiable_exp, flow, sum_dtype
from .halving import (
    FACTOR_CUT,
    Blocks,
    Gradients,
    Level,
    channel_decays,
    closed,
    cut,
    fast_channel_decays,
    inner_gradients,
    inner_output,
    levels,
    ones,
    small_masks,
)
from .tokens import ALL, slices, without_autocast


# Elements of each buffer of the walk over chunks, at most, if one chunk of all heads fits: about 20 buffers are in use.
GROUP_ELEMENTS = 3 * 2**15

SIDES = {False: (False,), True: (True,), None: (False, True)}


def diagonal_scan(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, *, reverse: bool | None, form: str, chunk_size: int
) -> Tensor:
    """Return n_i = sum_j sum_c q_ic k_jc exp(sum of the gates of channel c of the tokens strictly between i and j) v_j.

    The sum is over all j < i; over all j > i if `reverse`; over all j != i if it is None.

    Args:
        query: (batch, heads, length, head_dim), in the accumulation dtype, float32 or float64.
        key: the same.
        value: (batch, heads, length, value_dim), in the same dtype.
        gates: (batch or 1, heads, length, head_dim), <= 0, -inf is allowed. They may be expanded over the tokens.
        reverse: which side is read.
        form: "attention", "chunk" or "rnn". In graphs all of them are the chunk form.
        chunk_size: maximum number of tokens per chunk; chunks have the largest power of two below it.

    Returns:
        (batch, heads, length, value_dim), in the dtype of `value`.
    """
    functions = _forward, DiagonalFunction, _TransformableFunction
    return call_function(*functions, query, key, value, gates, (reverse, form, chunk_size))


class _Inputs(NamedTuple):
    """The tensors of `diagonal_scan`, and the gradient of its result."""

    query: Tensor
    key: Tensor
    value: Tensor
    gates: Tensor  # where a few chunks are computed at a time: the decays, exp(gates)
    dy: Tensor | None = None

    def rows(self, rows: slice) -> "_Inputs":
        """Return some rows of the batch."""
        shared = self.gates.shape[0] < self.query.shape[0]
        return _Inputs(*(x if x is None or (i == 3 and shared) else x[rows] for i, x in enumerate(self)))

    def chunks(self, tokens: slice, size: int) -> "_Inputs":
        """Return chunks (N, size, width) of some tokens, with zeros after the last token."""
        gates = self.gates.expand_as(self.query)
        return _Inputs(*(None if x is None else _split(x[:, :, tokens], size) for x in self._replace(gates=gates)))


def _split(x: Tensor, size: int) -> Tensor:
    """Split (B, H, L, D) into chunks (n B H, size, D), with zeros after the last token."""
    chunks = (x.shape[2] + size - 1) // size  # not -(-a // b): ONNX divides integers towards 0
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if is_abstract(x) or padding else x
    return _copied(x.unflatten(2, (chunks, size)).permute(2, 0, 1, 3, 4)).flatten(0, 2)


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Invert `_split` for `like` (B, H, L, any)."""
    batch, heads, length = like.shape[:3]
    x = _copied(x.unflatten(0, (-1, batch, heads)).permute(1, 2, 0, 3, 4)).flatten(2, 3)
    return F.pad(x, (0, 0, 0, length - x.shape[2])) if is_abstract(x) else x[:, :, :length]


def _copied(x: Tensor) -> Tensor:
    """Return a contiguous copy. `contiguous` and `reshape` would ask whether one is needed, which graphs depend on."""
    return x.clone(memory_format=torch.contiguous_format)


def chunk_tokens(form: str, length: int | None, chunk_size: int, backward: bool = False) -> int:
    """Return the tokens per chunk, a power of two. In graphs it depends on `chunk_size` alone: `length` is None."""
    size = 1 << (chunk_size.bit_length() - 1)
    if length is None:
        return size
    if form == "rnn" and backward:  # stores a state per chunk
        size = max(size, 1 << round(math.log2(math.isqrt(max(1, length)))))
    enough = 1 << max(0, length - 1).bit_length()
    return enough if form == "attention" else min(size, enough)


def _forward(query, key, value, gates, options):
    reverse, form, chunk_size = options
    x, sides = _Inputs(query, key, value, gates), SIDES[reverse]
    with without_autocast(query.device):
        if not is_abstract(query) and (query.numel() == 0 or value.numel() == 0):
            return torch.zeros_like(value)
        size = chunk_tokens(form, _length(query), chunk_size)
        return _walk_forward(x, sides, size) if _walks(query, form) else _forward_at_once(x, sides, size)


def _gradients(query, key, value, gates, dy, options):
    """Return the gradients of query, key, value and gates."""
    reverse, form, chunk_size = options
    x, sides = _Inputs(query, key, value, gates, dy.to(value.dtype)), SIDES[reverse]
    with without_autocast(query.device):
        if not is_abstract(query) and (query.numel() == 0 or value.numel() == 0):
            return tuple(torch.zeros_like(t) for t in x[:4])
        size = chunk_tokens(form, _length(query), chunk_size, backward=True)
        *grads, dgates = (_walk_backward if _walks(query, form) else _gradients_at_once)(x, sides, size)
        if gates.shape[0] < query.shape[0]:
            dgates = dgates.sum(0, keepdim=True)
        dgates = dgates.to(gates.dtype)
        if not (values_can_be_read(gates) and bool(gates.amin() > FACTOR_CUT[query.dtype] + 1)):  # none is closed
            dgates = torch.where(closed(gates, query.dtype), 0, dgates)
    return *grads, dgates


def _length(query: Tensor) -> int | None:
    """Return the number of tokens, or None where it must not decide what is computed."""
    return None if is_abstract(query) else query.shape[2]


def _walks(query: Tensor, form: str) -> bool:
    """Whether a few chunks are computed at a time, which is faster on a CPU, but impossible in graphs."""
    return not is_abstract(query) and (form == "rnn" or query.device.type == "cpu")


# ------------------------------------------------------------------------------------------------ states


def _directions(level: Level, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the factors with which keys are written to the state of a side, and with which queries read it."""
    return (level.before.x, level.after.x) if reverse else (level.after.x, level.before.x)


def _strongest(factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the largest factors (N, D) of tokens that write x (N, K, D) times the factor and y (N, K, V), not 0."""
    nothing = (x == 0) | (y == 0).all(-1, keepdim=True)
    return factor.masked_fill(nothing, 0).amax(1)


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
        sent, decays = (t.unflatten(0, (-1, self.rows)) for t in (_strongest(factor, x, y), total))
        weight = torch.ones_like(decays[0]) if self.weight is None else self.weight
        crossing = torch.empty_like(decays)
        chunks = range(len(decays))
        for i in reversed(chunks) if self.reverse else chunks:
            weight = cut(weight * decays[i])
            crossing[i] = decays[i].masked_fill(weight == 0, 0)
            weight = torch.maximum(weight, sent[i])
        self.weight = None if bool((weight == 1).all()) else weight
        return crossing.flatten(0, 1)


def _at_once(factor: Tensor, x: Tensor, y: Tensor, total: Tensor, gates: Tensor, shape, reverse: bool):
    """Return what `_State.walk` does, from operators that graphs support. `shape` is (batch, heads)."""
    update = torch.bmm((x * factor).transpose(1, 2), y)
    gates = gates.to(sum_dtype(gates.device)).clamp(min=FLOOR[x.dtype]).sum(1)

    def as_heads(t: Tensor) -> Tensor:  # (n B H, D, ...) -> (B, H D, n, ...)
        return _copied(t.unflatten(0, (-1, *shape)).movedim(0, 3)).flatten(1, 2)

    def as_chunks(t: Tensor) -> Tensor:
        return _copied(t.unflatten(1, (shape[1], -1)).movedim(3, 0)).flatten(0, 2)

    sums = as_heads(gates)
    if torch.jit.is_tracing() or is_exporting():
        return as_chunks(_propagated(as_heads(update), sums, reverse)), total
    sent = as_heads(_strongest(factor, x, y).detach().to(gates.dtype).log())
    flows = flow(sent.unsqueeze(-1), sums.detach(), reverse)
    lost = as_chunks(flows.arriving + sums < FACTOR_CUT[x.dtype])
    least = CUT[x.dtype] - FACTOR_CUT[x.dtype]  # `propagate` cuts at CUT
    entering = propagate(as_heads(update).unsqueeze(-2), sums, Flow(*(t + least for t in flows)), reverse)
    return as_chunks(entering.squeeze(-2)), torch.where(lost, 0, total)


def _propagated(update: Tensor, sums: Tensor, reverse: bool) -> Tensor:
    """Compute `propagate` for update (B, H, n, V) as one product, for exported graphs of any number of chunks.

    Their runtimes treat denormal numbers in their own way.
    """
    exclusive, inclusive = cumulative_sums(sums)
    exponent = exclusive.unsqueeze(-1) - inclusive.unsqueeze(-2)
    exponent = exponent.transpose(-1, -2) if reverse else exponent
    before = torch.ones_like(exponent, dtype=torch.bool)
    before = before.triu(1) if reverse else before.tril(-1)
    return torch.matmul(differentiable_exp(exponent.to(update.dtype).masked_fill(~before, -math.inf)), update)


def _add_state(sums: Gradients, x: _Inputs, level: Level, state, dstate, crossing, reverse: bool) -> None:
    """Add the gradients of what chunks read from a state and write to it."""
    write, read = _directions(level, reverse)
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


# ------------------------------------------------------------------------------------------------ all chunks at once


def _forward_at_once(x: _Inputs, sides, size: int) -> Tensor:
    """Compute all chunks at once, from operators of which autograd knows derivatives of any order."""
    shape, length = x.query.shape[:2], x.query.shape[2]
    q, k, v, gates, _ = x.chunks(ALL, size)
    decays, masks = channel_decays(gates, q.dtype), small_masks(size, sides, q)
    y, level = inner_output(Blocks(q), Blocks(k), Blocks(v), decays, masks, sides)
    if is_abstract(q) or length > size:
        for reverse in sides:
            write, read = _directions(level, reverse)
            state, _ = _at_once(write, k, v, level.total, gates, shape, reverse)
            y = y + torch.bmm(q * read, state)
    return _joined(y, x.value)


def _gradients_at_once(x: _Inputs, sides, size: int) -> tuple[Tensor, ...]:
    shape, length = x.query.shape[:2], x.query.shape[2]
    part = x.chunks(ALL, size)
    q, k, v, gates, dy = part
    sums, decays, masks = Gradients(q, k, v), channel_decays(gates, q.dtype), small_masks(size, sides, q)
    level = inner_gradients(*map(Blocks, (q, k, v, dy)), decays, masks, sides, ones(q), sums)
    if is_abstract(q) or length > size:
        for reverse in sides:
            write, read = _directions(level, reverse)
            state, crossing = _at_once(write, k, v, level.total, gates, shape, reverse)
            dstate, _ = _at_once(read, q, dy, level.total, gates, shape, not reverse)
            _add_state(sums, part, level, state, dstate, crossing, reverse)
    return tuple(_joined(t, x.query) for t in sums.results(q, k))


# ---------------------------------------------------------------------------------------- a few chunks at a time


class _Part:
    """Buffers for a few chunks, and views of them, which are made once and used for all chunks."""

    def __init__(self, x: _Inputs, rows: int, chunks: int, size: int, sides):
        self.shape, self.sides = (chunks, rows, x.query.shape[1], size), sides
        self.q, self.k, self.v, self.decays, self.dy = (None if t is None else self._buffer(t) for t in x)
        self.products = self._buffer(x.query), self._buffer(x.query)
        self.masks = small_masks(size, sides, x.query)
        self.sums = None if x.dy is None else Gradients(self.q.x, self.k.x, self.v.x)

    def _buffer(self, like: Tensor) -> Blocks:
        chunks, rows, heads, size = self.shape
        return Blocks(like.new_empty(chunks * rows * heads, size, like.shape[-1]))

    def load(self, x: _Inputs, rows: slice, tokens: slice) -> None:
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

    def inputs(self) -> _Inputs:
        return _Inputs(self.q.x, self.k.x, self.v.x, self.decays.x, None if self.dy is None else self.dy.x)


class _Walk:
    """Walks over the chunks of a few rows at a time, with as many chunks as fit into the cache."""

    def __init__(self, x: _Inputs, size: int, sides):
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


def _with_decays(x: _Inputs) -> _Inputs:
    """Replace the gates by decays (B, H, L, D)."""
    gates = x.gates[:, :, :1] if x.gates.stride(2) == 0 else x.gates
    return x._replace(gates=fast_channel_decays(gates, x.query.dtype).expand_as(x.query))


def _walk_forward(x: _Inputs, sides, size: int) -> Tensor:
    walk, y, exchange = _Walk(_with_decays(x), size, sides), _empty(x.value), x.query.shape[2] > size
    for rows in walk.rows:
        for sweep, reverse in enumerate(sides if exchange else sides[:1]):
            state = walk.state(rows, reverse)
            for part, tokens in walk.over(rows, reverse):
                out, level = (None, part.outer_level()) if sweep else part.output()
                if exchange:
                    write, read = _directions(level, reverse)
                    entering, _ = state.walk(write, part.k.x, part.v.x, level.total)
                    q = part.q.x * read
                    out = torch.bmm(q, entering) if sweep else out.baddbmm_(q, entering)
                part.store(out, y[rows, :, tokens], add=sweep > 0)
    return y


def _walk_backward(x: _Inputs, sides, size: int) -> tuple[Tensor, ...]:
    walk, exchange = _Walk(_with_decays(x), size, sides), x.query.shape[2] > size
    grads = [_empty(t) for t in (x.query, x.key, x.value, x.query)]
    for rows in walk.rows:
        stored = _states_from_the_left(walk, rows) if exchange else None
        states = {reverse: walk.state(rows, True) for reverse in sides}
        for part, tokens in walk.over(rows, True):
            level = part.gradients()
            for reverse in sides if exchange else ():
                write, read = _directions(level, reverse)
                known, crossing = stored[reverse].pop()
                if reverse:  # the state comes from the right, its gradient from the left
                    state, crossing = states[reverse].walk(write, part.k.x, part.v.x, level.total)
                    dstate = known
                else:
                    state, (dstate, _) = known, states[reverse].walk(read, part.q.x, part.dy.x, level.total)
                _add_state(part.sums, part.inputs(), level, state, dstate, crossing, reverse)
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


# ------------------------------------------------------------------------------------------------ autograd


class DiagonalFunction(torch.autograd.Function):
    """`diagonal_scan`. It saves its inputs; the backward pass recomputes the rest."""

    @staticmethod
    def forward(*arguments):
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        gradient = _gradients if torch.compiler.is_compiling() else _Gradient.apply
        return *gradient(*ctx.saved_tensors, dy, ctx.options), None


class _TransformableFunction(DiagonalFunction):
    """`DiagonalFunction` with support for torch.func and forward mode, which compiled graphs reject."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        DiagonalFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:-1])

    @staticmethod
    def jvp(ctx, *tangents):
        return _pushed(_composed, (*ctx.saved_tensors, ctx.options), tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        folded = _folded(info.batch_size, in_dims, inputs)
        return _unfold(_TransformableFunction.apply(*folded), info.batch_size), 0


class _Gradient(torch.autograd.Function):
    """The gradients of `diagonal_scan`. Its own derivatives are those of `_composed`."""

    forward = staticmethod(_gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        _, pull = torch.func.vjp(lambda *tensors: _composed_gradients(*tensors, ctx.options), *ctx.saved_tensors)
        return *pull(cotangents), None

    @staticmethod
    def jvp(ctx, *tangents):
        return _pushed(_composed_gradients, (*ctx.saved_tensors, ctx.options), tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        grads = _Gradient.apply(*_folded(info.batch_size, in_dims, inputs))
        *grads, dgates = (_unfold(x, info.batch_size) for x in grads)
        shared = inputs[3].movedim(in_dims[3] or 0, 0).shape[0 if in_dims[3] is None else 1] < dgates.shape[1]
        return (*grads, dgates.sum(1, keepdim=True) if shared else dgates), (0, 0, 0, 0)


def _folded(size: int, dims, inputs) -> list:
    """Return the inputs with the dimensions that torch.vmap maps over in the batch, which gates get too."""
    query, key, value, gates, *dy, options = inputs
    batch = query.shape[0] if dims[0] is None else query.movedim(dims[0], 0).shape[1]
    if dims[3] is None:
        gates, place = gates.expand(batch, -1, -1, -1), None
    else:
        gates, place = gates.movedim(dims[3], 0).expand(-1, batch, -1, -1, -1), 0
    tensors, places = (query, key, value, gates, *dy), (*dims[:3], place, *dims[4:-1])
    return [*(_fold(x, dim, size) for x, dim in zip(tensors, places, strict=True)), options]


def _composed(query, key, value, gates, options) -> Tensor:
    reverse, _, chunk_size = options
    with without_autocast(query.device):
        size = chunk_tokens("chunk", _length(query), chunk_size)
        return _forward_at_once(_Inputs(query, key, value, gates), SIDES[reverse], size)


def _composed_gradients(query, key, value, gates, dy, options):
    arguments = query, key, value, gates, options
    _, pull = torch.func.vjp(*_partial(_composed, arguments, range(4)))
    return pull(dy)
