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
from .checks import is_exporting, makes_graph, values_can_be_read
from .chunk import propagate
from .decays import CUT, FLOOR, Flow, flow, sum_dtype
from .halving import (
    FACTOR_CUT,
    Gradients,
    Level,
    channel_decays,
    channel_decays_in_place,
    closed,
    cut,
    inner_gradients,
    inner_output,
    levels,
)
from .tokens import ALL, CPU_CACHE_ELEMENTS, slices, without_autocast


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
    """The tensors of `diagonal_scan`, and further ones with as many tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    gates: Tensor  # where a few chunks are computed at a time: the decays, exp(gates)
    dy: Tensor | None = None

    def chunks(self, tokens: slice, size: int) -> "_Inputs":
        """Return chunks of some tokens, (batch, heads, chunks, size, width), with zeros after the last token.

        Gates that are the same for all tokens are those of a single chunk.
        """
        parts = [None if x is None or i == 3 else _split(x[:, :, tokens], size) for i, x in enumerate(self)]
        if _constant(self.gates):
            parts[3] = self.gates[:, :, :1].unsqueeze(2).expand(-1, -1, -1, size, -1)
        else:
            parts[3] = _split(self.gates[:, :, tokens], size)
        return _Inputs(*parts)

    def with_decays(self) -> "_Inputs":
        """Replace the gates by the decays."""
        gates = self.gates[:, :, :1] if _constant(self.gates) else self.gates
        return self._replace(gates=channel_decays_in_place(gates, self.query.dtype).expand_as(self.gates))


def _constant(gates: Tensor) -> bool:
    """Whether the gates are seen to be the same for all tokens, without reading them."""
    return not makes_graph() and gates.stride(2) == 0


def _split(x: Tensor, size: int) -> Tensor:
    """Split (B, H, L, D) into contiguous chunks (B, H, n, size, D), with zeros after the last token."""
    chunks = (x.shape[2] + size - 1) // size  # not -(-a // b): ONNX divides integers towards 0
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if makes_graph() or padding else x
    return x.reshape(*x.shape[:2], chunks, size, x.shape[-1]).contiguous()


def chunk_tokens(form: str, length: int, chunk_size: int, backward: bool = False) -> int:
    """Return the tokens per chunk, a power of two. In graphs it depends on `chunk_size` alone."""
    size = 1 << (chunk_size.bit_length() - 1)
    if makes_graph():
        return size
    if form == "rnn" and backward:  # stores a state per chunk
        size = max(size, 1 << round(math.log2(math.isqrt(max(1, length)))))
    enough = 1 << max(0, length - 1).bit_length()
    return enough if form == "attention" else min(size, enough)


def _forward(query, key, value, gates, options):
    reverse, form, chunk_size = options
    x, sides = _Inputs(query, key, value, gates), SIDES[reverse]
    with without_autocast(query.device):
        if not makes_graph() and (query.numel() == 0 or value.numel() == 0):
            return torch.zeros_like(value)
        size = chunk_tokens(form, query.shape[2], chunk_size)
        return _walk_forward(x, sides, size) if _walks(query, form) else _forward_at_once(x, sides, size)


def _gradients(query, key, value, gates, dy, options):
    """Return the gradients of query, key, value and gates."""
    reverse, form, chunk_size = options
    x, sides = _Inputs(query, key, value, gates, dy.to(value.dtype)), SIDES[reverse]
    with without_autocast(query.device):
        if not makes_graph() and (query.numel() == 0 or value.numel() == 0):
            return tuple(torch.zeros_like(t) for t in x[:4])
        size = chunk_tokens(form, query.shape[2], chunk_size, backward=True)
        *grads, dgates = (_walk_backward if _walks(query, form) else _gradients_at_once)(x, sides, size)
        if gates.shape[0] < query.shape[0]:
            dgates = dgates.sum(0, keepdim=True)
        dgates = dgates.to(gates.dtype)
        if not (values_can_be_read(gates) and bool(gates.amin() > FACTOR_CUT[query.dtype] + 1)):  # none is closed
            dgates = torch.where(closed(gates, query.dtype), 0, dgates)
    return *grads, dgates


def _walks(query: Tensor, form: str) -> bool:
    """Whether a few chunks are computed at a time, which is faster on a CPU, but impossible in graphs."""
    return not makes_graph() and (form == "rnn" or query.device.type == "cpu")


# ------------------------------------------------------------------------------------------------ states


def _directions(level: Level, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the factors with which keys are written to the state of a side, and with which queries read it."""
    return (level.before, level.after) if reverse else (level.after, level.before)


def _strongest(x: Tensor, factor: Tensor) -> Tensor:
    """Return the largest factors (..., D) of tokens that are not 0, of x (..., K, D)."""
    return factor.masked_fill(x == 0, 0).amax(-2)


class _State:
    """A state that walks over chunks: its value (B, H, D, V) and the largest weight in each of its rows (B, H, D).

    The weight decides when a row is set to 0, before its numbers become denormal.
    """

    def __init__(self, reverse: bool):
        self.reverse, self.value, self.weight = reverse, None, None

    def walk(self, factor: Tensor, x: Tensor, y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Walk over chunks of tokens that write x (B, H, n, K, D) times a factor and y (B, H, n, K, V).

        Returns what enters each chunk, (B, H, n, D, V), and the decays (B, H, n, D) with which it crosses it.
        """
        update = torch.matmul((x * factor).transpose(-1, -2), y)
        total = total.expand(*x.shape[:3], -1)
        if bool((x[..., 0 if self.reverse else -1, :] != 0).all()):  # the factor of the last token on the way is 1
            sent = torch.ones_like(total)
        else:
            sent = _strongest(x, factor)
        entering, crossing = torch.empty_like(update), torch.empty_like(sent)
        if self.value is None:
            self.value, self.weight = torch.zeros_like(update[:, :, 0]), torch.zeros_like(sent[:, :, 0])
        chunks = range(update.shape[2])
        for i in reversed(chunks) if self.reverse else chunks:
            weight = cut(self.weight * total[:, :, i])
            cross = torch.where(weight == 0, 0, total[:, :, i])
            entering[:, :, i], crossing[:, :, i] = self.value, cross
            self.value = torch.addcmul(update[:, :, i], self.value, cross.unsqueeze(-1))
            self.weight = torch.maximum(weight, sent[:, :, i])
        return entering, crossing


def _at_once(factor: Tensor, x: Tensor, y: Tensor, total: Tensor, gates: Tensor, reverse: bool):
    """Return what `_State.walk` does for all chunks, from operators that graphs support."""
    update = torch.matmul((x * factor).transpose(-1, -2), y)
    batch, heads, chunks, channels, width = update.shape
    gates = gates.to(sum_dtype(gates.device)).clamp(min=FLOOR[x.dtype]).sum(-2).expand(-1, -1, chunks, -1)
    crossing = total.expand(*update.shape[:-1])

    def as_heads(t: Tensor) -> Tensor:
        return t.transpose(2, 3).flatten(1, 2)

    if torch.jit.is_tracing() or is_exporting():
        flows = Flow(*[as_heads(gates.new_zeros(1, 1, 1, 1))] * 2)
    else:
        sent = _strongest(x, factor).detach().to(gates.dtype).log()
        least = CUT[x.dtype] - FACTOR_CUT[x.dtype]  # `propagate` cuts at CUT
        flows = flow(as_heads(sent).unsqueeze(-1), as_heads(gates.detach()), reverse)
        weight = flows.arriving.exp().unflatten(1, (heads, channels)).transpose(2, 3).to(x.dtype)
        crossing = torch.where(cut(weight * crossing) == 0, 0, crossing)
        flows = Flow(*(t + least for t in flows))
    entering = propagate(as_heads(update).unsqueeze(-2), as_heads(gates), flows, reverse)
    return entering.squeeze(-2).unflatten(1, (heads, channels)).transpose(2, 3), crossing


# ------------------------------------------------------------------------------------------------ all chunks at once


def _forward_at_once(x: _Inputs, sides, size: int) -> Tensor:
    """Compute all chunks at once, from operators of which autograd knows derivatives of any order."""
    length = x.query.shape[2]
    q, k, v, gates, _ = x.chunks(ALL, size)
    y, level = inner_output(q, k, v, channel_decays(gates, q.dtype), sides, in_place=False)
    if makes_graph() or length > size:
        total = level.total.squeeze(-2)
        for reverse in sides:
            write, read = _directions(level, reverse)
            state, _ = _at_once(write, k, v, total, gates, reverse)
            y = y + torch.matmul(q * read, state)
    return y.flatten(2, 3).narrow(2, 0, length)


def _gradients_at_once(x: _Inputs, sides, size: int) -> tuple[Tensor, ...]:
    length = x.query.shape[2]
    q, k, v, gates, dy = x.chunks(ALL, size)
    sums, level = inner_gradients(q, k, v, dy, channel_decays(gates, q.dtype), sides)
    if makes_graph() or length > size:
        total = level.total.squeeze(-2)
        for reverse in sides:
            write, read = _directions(level, reverse)
            state, crossing = _at_once(write, k, v, total, gates, reverse)
            dstate, _ = _at_once(read, q, dy, total, gates, not reverse)
            _add_state(sums, q, k, v, dy, write, read, state, dstate, crossing, reverse)
    return tuple(t.flatten(2, 3).narrow(2, 0, length) for t in _results(sums))


def _add_state(sums: Gradients, q, k, v, dy, write, read, state, dstate, crossing, reverse: bool) -> None:
    """Add the gradients of what chunks read from a state and write to it."""
    before, after = (0, 1) if reverse else (1, 0)  # places in the lists of `Gradients`
    dq, dk = torch.matmul(dy, state.transpose(-1, -2)).mul_(read), torch.matmul(v, dstate.transpose(-1, -2)).mul_(write)
    sums.dq[before].add_(dq)
    sums.dk[after].add_(dk)
    sums.dv.add_(torch.matmul(k * write, dstate))
    # `after` is the exponential of the total minus an inclusive sum.
    to_end = (dq * q) if reverse else (dk * k)
    dtotal = (state * crossing.unsqueeze(-1)).mul_(dstate).sum(-1).unsqueeze(-2)
    sums.dtotal = sums.dtotal + dtotal + to_end.sum(-2, keepdim=True)


def _results(sums: Gradients) -> tuple[Tensor, ...]:
    dgates = sums.gates()
    return sums.dq[0].add_(sums.dq[1]), sums.dk[0].add_(sums.dk[1]), sums.dv, dgates


# ------------------------------------------------------------------------------------------------ a few chunks at a time


def _groups(x: _Inputs, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield blocks of rows of the batch, and the parts of their tokens, that are computed at a time."""
    batch, heads, length, width = x.query.shape
    chunk = heads * size * max(width, x.value.shape[-1])
    rows = min(batch, max(1, GROUP_ELEMENTS // chunk))
    parts = slices(0, length, size * max(1, GROUP_ELEMENTS // (rows * chunk)))
    for block in slices(0, batch, rows):
        yield block, parts


GROUP_ELEMENTS = CPU_CACHE_ELEMENTS


def _rows(x: _Inputs, rows: slice) -> _Inputs:
    shared = x.gates.shape[0] < x.query.shape[0]
    return _Inputs(*(t if t is None or (i == 3 and shared) else t[rows] for i, t in enumerate(x)))


def _outer_level(decays: Tensor) -> Level:
    *_, level = levels(decays, in_place=True)
    return level


def _empty(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same shape that is (batch, length, heads, width) in memory."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _walk_forward(x: _Inputs, sides, size: int) -> Tensor:
    x = x.with_decays()
    y, exchange = _empty(x.value), x.query.shape[2] > size
    for rows, parts in _groups(x, size):
        for sweep, reverse in enumerate(sides if exchange else sides[:1]):
            state = _State(reverse)
            for part in reversed(parts) if reverse else parts:
                q, k, v, decays, _ = _rows(x, rows).chunks(part, size)
                out, level = (0, _outer_level(decays)) if sweep else inner_output(q, k, v, decays, sides, in_place=True)
                if exchange:
                    write, read = _directions(level, reverse)
                    entering, _ = state.walk(write, k, v, level.total.squeeze(-2))
                    out = torch.matmul(q * read, entering).add_(out)
                out = out.flatten(2, 3)[:, :, : part.stop - part.start]
                if sweep:
                    y[rows, :, part] += out
                else:
                    y[rows, :, part] = out
    return y


def _walk_backward(x: _Inputs, sides, size: int) -> tuple[Tensor, ...]:
    grads = [_empty(t) for t in (x.query, x.key, x.value)] + [_empty(x.query)]
    x, exchange = x.with_decays(), x.query.shape[2] > size
    for rows, parts in _groups(x, size):
        block = _rows(x, rows)
        stored = _states_from_the_left(block, sides, size, parts) if exchange else None
        states = {reverse: _State(True) for reverse in sides}
        for part in reversed(parts):
            q, k, v, decays, dy = block.chunks(part, size)
            sums, level = inner_gradients(q, k, v, dy, decays, sides)
            for reverse in sides if exchange else ():
                write, read = _directions(level, reverse)
                known, crossing = stored[reverse].pop()
                total = level.total.squeeze(-2)
                if reverse:  # the state comes from the right, its gradient from the left
                    state, crossing = states[reverse].walk(write, k, v, total)
                    dstate = known
                else:
                    state, (dstate, _) = known, states[reverse].walk(read, q, dy, total)
                _add_state(sums, q, k, v, dy, write, read, state, dstate, crossing, reverse)
            for grad, step in zip(grads, _results(sums), strict=True):
                grad[rows, :, part] = step.flatten(2, 3)[:, :, : part.stop - part.start]
    return tuple(grads)


def _states_from_the_left(x: _Inputs, sides, size: int, parts: list[slice]) -> dict[bool, list]:
    """Return what comes from the left: the state of the left side, the gradient of the state of the right side."""
    states, stored = {reverse: _State(False) for reverse in sides}, {reverse: [] for reverse in sides}
    for part in parts:
        q, k, v, decays, dy = x.chunks(part, size)
        level = _outer_level(decays)
        for reverse, state in states.items():
            tensors = (q, dy) if reverse else (k, v)
            stored[reverse].append(state.walk(level.after, *tensors, level.total.squeeze(-2)))
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
    reverse, form, chunk_size = options
    with without_autocast(query.device):
        size = chunk_tokens("chunk", query.shape[2], chunk_size)
        return _forward_at_once(_Inputs(query, key, value, gates), SIDES[reverse], size)


def _composed_gradients(query, key, value, gates, dy, options):
    arguments = query, key, value, gates, options
    _, pull = torch.func.vjp(*_partial(_composed, arguments, range(4)))
    return pull(dy)
