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

import torch
from torch import Tensor

from .autograd import _fold, _no_view, _partial, _pushed, _unfold, call_function
from .checks import is_abstract, is_exporting, values_can_be_read
from .chunk import propagate
from .decays import CUT, FLOOR, Flow, cumulative_sums, differentiable_exp, flow, sum_dtype
from .diagonal_walk import Inputs, add_state, copied, directions, joined_chunks, strongest, walk_backward, walk_forward
from .halving import (
    FACTOR_CUT,
    Blocks,
    Gradients,
    channel_decays,
    closed,
    inner_gradients,
    inner_output,
    ones,
    small_masks,
)
from .tokens import ALL, without_autocast


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
    x, sides = Inputs(query, key, value, gates), SIDES[reverse]
    with without_autocast(query.device):
        if not is_abstract(query) and (query.numel() == 0 or value.numel() == 0):
            return torch.zeros_like(value)
        size = chunk_tokens(form, _length(query), chunk_size)
        return walk_forward(x, sides, size) if _walks(query, form) else _forward_at_once(x, sides, size)


def _gradients(query, key, value, gates, dy, options):
    """Return the gradients of query, key, value and gates."""
    reverse, form, chunk_size = options
    x, sides = Inputs(query, key, value, gates, dy.to(value.dtype)), SIDES[reverse]
    with without_autocast(query.device):
        if not is_abstract(query) and (query.numel() == 0 or value.numel() == 0):
            return tuple(torch.zeros_like(t) for t in x[:4])
        size = chunk_tokens(form, _length(query), chunk_size, backward=True)
        *grads, dgates = (walk_backward if _walks(query, form) else _gradients_at_once)(x, sides, size)
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


def _at_once(factor: Tensor, x: Tensor, y: Tensor, total: Tensor, gates: Tensor, shape, reverse: bool):
    """Return what `_State.walk` does, from operators that graphs support. `shape` is (batch, heads)."""
    update = torch.bmm((x * factor).transpose(1, 2), y)
    gates = gates.to(sum_dtype(gates.device)).clamp(min=FLOOR[x.dtype]).sum(1)

    def as_heads(t: Tensor) -> Tensor:  # (n B H, D, ...) -> (B, H D, n, ...)
        return copied(t.unflatten(0, (-1, *shape)).movedim(0, 3)).flatten(1, 2)

    def as_chunks(t: Tensor) -> Tensor:
        return copied(t.unflatten(1, (shape[1], -1)).movedim(3, 0)).flatten(0, 2)

    sums = as_heads(gates)
    if torch.jit.is_tracing() or is_exporting():
        return as_chunks(_propagated(as_heads(update), sums, reverse)), total
    sent = as_heads(strongest(factor, x, y).detach().to(gates.dtype).log())
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


# ------------------------------------------------------------------------------------------------ all chunks at once


def _forward_at_once(x: Inputs, sides, size: int) -> Tensor:
    """Compute all chunks at once, from operators of which autograd knows derivatives of any order."""
    shape, length = x.query.shape[:2], x.query.shape[2]
    q, k, v, gates, _ = x.chunks(ALL, size)
    decays, masks = channel_decays(gates, q.dtype), small_masks(size, sides, q)
    y, level = inner_output(Blocks(q), Blocks(k), Blocks(v), decays, masks, sides)
    if is_abstract(q) or length > size:
        for reverse in sides:
            write, read = directions(level, reverse)
            state, _ = _at_once(write, k, v, level.total, gates, shape, reverse)
            y = y + torch.bmm(q * read, state)
    return joined_chunks(y, x.value)


def _gradients_at_once(x: Inputs, sides, size: int) -> tuple[Tensor, ...]:
    shape, length = x.query.shape[:2], x.query.shape[2]
    part = x.chunks(ALL, size)
    q, k, v, gates, dy = part
    sums, decays, masks = Gradients(q, k, v), channel_decays(gates, q.dtype), small_masks(size, sides, q)
    level = inner_gradients(*map(Blocks, (q, k, v, dy)), decays, masks, sides, ones(q), sums)
    if is_abstract(q) or length > size:
        for reverse in sides:
            write, read = directions(level, reverse)
            state, crossing = _at_once(write, k, v, level.total, gates, shape, reverse)
            dstate, _ = _at_once(read, q, dy, level.total, gates, shape, not reverse)
            add_state(sums, part, level, state, dstate, crossing, reverse)
    return tuple(joined_chunks(t, x.query) for t in sums.results(q, k))


# ------------------------------------------------------------------------------------------------ autograd


class DiagonalFunction(torch.autograd.Function):
    """`diagonal_scan`. It saves its inputs; the backward pass recomputes the rest."""

    @staticmethod
    def forward(*arguments):
        return _no_view(_forward(*arguments))

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
        return _forward_at_once(Inputs(query, key, value, gates), SIDES[reverse], size)


def _composed_gradients(query, key, value, gates, dy, options):
    arguments = query, key, value, gates, options
    _, pull = torch.func.vjp(*_partial(_composed, arguments, range(4)))
    return pull(dy)
