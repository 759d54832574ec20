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
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import _fold, _no_view, _partial, _pushed, _unfold, call_function
from .checks import is_abstract, is_exporting
from .chunk import propagate
from .decays import Flow, cumulative_sums, cut_of, differentiable_exp, floor_of, flow, sum_dtype
from .diagonal_walk import Inputs, add_state, copied, joined_chunks, strongest, walk_backward, walk_forward
from .halving import (
    Blocks,
    Gradients,
    Rules,
    decays_and_products,
    factor_cut,
    inner_gradients,
    inner_output,
    small_masks,
)
from .tokens import without_autocast


SIDES = {False: (False,), True: (True,), None: (False, True)}


class Options(NamedTuple):
    """The arguments of `diagonal_scan` that are not tensors."""

    reverse: bool | None
    form: str
    chunk_size: int
    shares: tuple[float, float]
    scale: float


def diagonal_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    own: Tensor | None = None,
    *,
    reverse: bool | None,
    form: str,
    chunk_size: int,
    shares: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
) -> Tensor:
    """Return n_i = s sum_j sum_c q_ic k_jc w_ijc v_j, plus s own_i sum_c q_ic k_ic v_i if `own` is given.

    w_ijc is the exponential of the sum of the gates of channel c of the tokens strictly between i and j, of a share of
    the gate of i, and of a share of the gate of j. The sum is over all j < i; over all j > i if `reverse`; over all
    j != i if it is None.

    Args:
        query: (batch, heads, length, head_dim), in the accumulation dtype, float32 or float64.
        key: the same.
        value: (batch, heads, length, value_dim), in the same dtype.
        gates: (batch or 1, heads, length, head_dim), <= 0, -inf is allowed. They may be expanded over the tokens.
        own: (batch or 1, heads, length), in the same dtype, the weight with which a token reads itself.
        reverse: which side is read.
        form: "attention", "chunk" or "rnn". In graphs all of them are the chunk form.
        chunk_size: maximum number of tokens per chunk; chunks have the largest power of two below it.
        shares: the shares of i, which reads, and of j, which writes: (0, 0), (0, 1), (1, 0), (1, 1) or (0.5, 0.5).
        scale: s.

    Returns:
        (batch, heads, length, value_dim), in the dtype of `value`.
    """
    functions, tensors = (_forward, DiagonalFunction, _TransformableFunction), (query, key, value, gates)
    tensors = tensors if own is None else (*tensors, own)
    return call_function(*functions, *tensors, Options(reverse, form, chunk_size, shares, scale))


def chunk_tokens(form: str, length: int | None, chunk_size: int, backward: bool = False) -> int:
    """Return the tokens per chunk, a power of two. In graphs it depends on `chunk_size` alone: `length` is None."""
    size = 1 << (chunk_size.bit_length() - 1)
    if length is None:
        return size
    if form == "rnn" and backward:  # stores a state per chunk
        size = max(size, 1 << round(math.log2(math.isqrt(max(1, length)))))
    enough = 1 << max(0, length - 1).bit_length()
    return enough if form == "attention" else min(size, enough)


def _forward(*arguments):
    *tensors, options = arguments
    x = Inputs.of(*tensors)
    with without_autocast(x.query.device):
        if _is_empty(x):
            return torch.zeros_like(x.value)
        size = chunk_tokens(options.form, _length(x.query), options.chunk_size)
        run = walk_forward if _walks(x.query, options.form) else _forward_at_once
        return run(x, _rules(x, options, size), size, options.scale)


def _gradients(*arguments):
    """Return the gradients of query, key, value, gates and, if they are given, of `own`."""
    *tensors, dy, options = arguments
    x = Inputs.of(*tensors)._replace(dy=dy.to(tensors[2].dtype))
    with without_autocast(x.query.device):
        if _is_empty(x):
            return tuple(torch.zeros_like(t) for t in tensors)
        size = chunk_tokens(options.form, _length(x.query), options.chunk_size, backward=True)
        run = walk_backward if _walks(x.query, options.form) else _gradients_at_once
        grads = list(run(x, _rules(x, options, size), size, options.scale))
    if len(tensors) > 4:
        grads[4] = grads[4].squeeze(-1)
    for i, t in enumerate(tensors[3:], 3):
        grads[i] = (grads[i].sum(0, keepdim=True) if t.shape[0] < x.query.shape[0] else grads[i]).to(t.dtype)
    return tuple(grads)


def _is_empty(x: Inputs) -> bool:
    return not is_abstract(x.query) and (x.query.numel() == 0 or x.value.numel() == 0)


def _rules(x: Inputs, options: Options, size: int) -> Rules:
    sides = SIDES[options.reverse]
    return Rules(sides, options.shares, small_masks(size, sides, x.query))


def _length(query: Tensor) -> int | None:
    """Return the number of tokens, or None where it must not decide what is computed."""
    return None if is_abstract(query) else query.shape[2]


def _walks(query: Tensor, form: str) -> bool:
    """Whether a few chunks are computed at a time, which is faster on a CPU, but impossible in graphs."""
    return not is_abstract(query) and (form == "rnn" or query.device.type == "cpu")


def _at_once(factor: Tensor, x: Tensor, y: Tensor, total: Tensor, gates: Tensor, shape, reverse: bool):
    """Return what `_State.walk` does, from operators that graphs support. `shape` is (batch, heads)."""
    update = torch.bmm((x * factor).transpose(1, 2), y)
    gates = gates.to(sum_dtype(gates.device)).clamp(min=floor_of(x.dtype)).sum(1)

    def as_heads(t: Tensor) -> Tensor:  # (n B H, D, ...) -> (B, H D, n, ...)
        return copied(t.unflatten(0, (-1, *shape)).movedim(0, 3)).flatten(1, 2)

    def as_chunks(t: Tensor) -> Tensor:
        return copied(t.unflatten(1, (shape[1], -1)).movedim(3, 0)).flatten(0, 2)

    sums = as_heads(gates)
    if torch.jit.is_tracing() or is_exporting():
        return as_chunks(_propagated(as_heads(update), sums, reverse)), total
    sent = as_heads(strongest(factor, x, y).detach().to(gates.dtype).log())
    flows = flow(sent.unsqueeze(-1), sums.detach(), reverse)
    lost = as_chunks(flows.arriving + sums < factor_cut(x.dtype))
    least = cut_of(x.dtype) - factor_cut(x.dtype)  # `propagate` cuts at `CUT`
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


def _blocks(x: Tensor | None) -> Blocks | None:
    return None if x is None else Blocks(x)


def _forward_at_once(x: Inputs, rules: Rules, size: int, scale: float) -> Tensor:
    """Compute all chunks at once, from operators of which autograd knows derivatives of any order."""
    shape, length = x.query.shape[:2], x.query.shape[2]
    q, k, v, gates, own, _ = x.chunks(size)
    decays, products = decays_and_products(gates, q.dtype, rules)
    y, level = inner_output(*map(Blocks, (q, k, v)), decays, _blocks(own), rules, products, in_place=False)
    if is_abstract(q) or length > size:
        for reverse in rules.sides:
            write, read = level.directions(reverse, rules.shares)
            state, _ = _at_once(write, k, v, level.total, gates, shape, reverse)
            y = y + torch.bmm(q * read, state)
    return joined_chunks(y if scale == 1 else y * scale, x.value)


def _gradients_at_once(x: Inputs, rules: Rules, size: int, scale: float) -> tuple[Tensor, ...]:
    shape, length = x.query.shape[:2], x.query.shape[2]
    part = x.chunks(size)
    part = part if scale == 1 else part._replace(dy=part.dy * scale)
    q, k, v, gates, own, dy = part
    decays, products = decays_and_products(gates, q.dtype, rules)
    sums = Gradients(q, k, v)
    level = inner_gradients(*map(Blocks, (q, k, v, dy)), decays, _blocks(own), rules, products, sums)
    if is_abstract(q) or length > size:
        for reverse in rules.sides:
            directions = write, read = level.directions(reverse, rules.shares)
            state, crossing = _at_once(write, k, v, level.total, gates, shape, reverse)
            dstate, _ = _at_once(read, q, dy, level.total, gates, shape, not reverse)
            add_state(sums, part, directions, state, dstate, crossing, reverse)
    return tuple(joined_chunks(t, x.query) for t in sums.results(q, k, rules, decays.x == 0))


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
        grads = [_unfold(x, info.batch_size) for x in _Gradient.apply(*_folded(info.batch_size, in_dims, inputs))]
        batch = grads[0].shape[1]
        for i in range(3, len(grads)):  # `_folded` expands what is shared by the rows of the batch
            if _rows(inputs[i], in_dims[i]) < batch:
                grads[i] = grads[i].sum(1, keepdim=True)
        return tuple(grads), (0,) * len(grads)


def _rows(x: Tensor, dim: int | None) -> int:
    """Return the size of the batch of a tensor, of which torch.vmap maps over the dimension `dim`."""
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _folded(size: int, dims, inputs) -> list:
    """Return the inputs with the dimensions that torch.vmap maps over in the batch."""
    *tensors, options = inputs
    batch = _rows(tensors[0], dims[0])
    folded = []
    for x, dim in zip(tensors, dims[:-1], strict=True):
        x = x if dim is None else x.movedim(dim, 0)
        x = x.expand(*(() if dim is None else (-1,)), batch, *(-1,) * (x.dim() - (1 if dim is None else 2)))
        folded.append(_fold(x, None if dim is None else 0, size))
    return [*folded, options]


def _composed(*arguments) -> Tensor:
    *tensors, options = arguments
    x = Inputs.of(*tensors)
    with without_autocast(x.query.device):
        size = chunk_tokens("chunk", _length(x.query), options.chunk_size)
        return _forward_at_once(x, _rules(x, options, size), size, options.scale)


def _composed_gradients(*arguments):
    *tensors, dy, options = arguments
    _, pull = torch.func.vjp(*_partial(_composed, (*tensors, options), range(len(tensors))))
    return pull(dy)
