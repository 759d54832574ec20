"""One autograd Function for all forms. It supports graphs, torch.func and forward mode."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import LionScan, SidedScan, attention_backward, attention_forward
from .chunk import chunk_backward, chunk_forward
from .composed import composed
from .decays import unclamped_gradient
from .global_state import global_backward, global_forward
from .masks import Layout, LionMask, SidedMask
from .recurrent import rnn_backward, rnn_forward
from .tokens import Tokens, accumulation_dtype, summed_over_groups, without_autocast


_FORMS = {"chunk": (chunk_forward, chunk_backward), "rnn": (rnn_forward, rnn_backward)}


class Options(NamedTuple):
    """The arguments of the operator that are not tensors.

    Args:
        form: "attention", "chunk", "rnn", or "global" without decay.
        chunk_size: maximum number of tokens per chunk.
        scale: the factor of all scores.
        result: what is returned: "numerator" (n), "normalized" (y) or "both" (n, c).
        eps: added to c before the division.
        orders: orders of the tokens, one per log-decay, for the mean of several scans in the attention form.
        layout: None for log-decays of LION's operator. Otherwise the tensors are those of `masks.SidedMask`.
    """

    form: str
    chunk_size: int | None
    scale: float
    result: str
    eps: float = 0.0
    orders: Sequence | None = None
    layout: Layout | None = None


def lion(query, key, value, key_mask, options, *log_decays) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the operator differentiably, see `Options`."""
    functions = _forward, LionFunction, _TransformableFunction
    outputs = call_function(*functions, query, key, value, key_mask, options, *log_decays)
    return outputs[0] if options.result == "normalized" else outputs


def call_function(forward: Callable, function: type, transformable: type, *arguments):
    """Call an autograd Function in the way that the surrounding context supports.

    TorchScript cannot store a Function, and graphs without gradients need none: both call `forward` alone. Compiled
    graphs with gradients use `function`, everything else uses `transformable`, which also supports forward mode.
    """
    if torch.compiler.is_compiling():
        differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        return function.apply(*arguments) if differentiable and torch.is_grad_enabled() else forward(*arguments)
    return forward(*arguments) if torch.jit.is_tracing() else transformable.apply(*arguments)


def _forward(query, key, value, key_mask, options, *log_decays):
    """Return n, (n, c), or (y, c + eps) for a normalised result."""
    result = options.result
    if torch.jit.is_tracing():  # ONNX would store decays per head with a fixed length
        row = torch.zeros_like(query[:1, :, :, 0], dtype=torch.float32)
        log_decays = [x.unsqueeze(-1) + row if x.dim() == 1 else x for x in log_decays]
    x = _tokens(query, key, value, key_mask, result)
    out, row_sums = _run(x, options, log_decays)
    if result == "normalized":
        row_sums.add_(options.eps)
        if not options.eps:  # a row that reads no key is 0
            row_sums.masked_fill_(row_sums == 0, 1.0)
        out.div_(row_sums.unsqueeze(-1))
    return out if result == "numerator" else (out, row_sums)


def _gradients(query, key, value, key_mask, out, row_sums, dy, dc, options, *log_decays):
    """Return the gradients of query, key, value and log-decays.

    `out` and `row_sums` are given for the result "normalized" only, `dc` for "both" only.
    """
    result = options.result
    x = _tokens(query, key, value, key_mask, result)
    with without_autocast(query.device):
        dy = dy.to(x.dtype)
        if result == "normalized":  # y = n / m, m = c + eps
            dy = dy / row_sums.unsqueeze(-1)
            dc = (dy * out).sum(-1).neg_()
        dq, dk, dv, *dgates = _run(x, options, log_decays, dy, dc)
    if dv.shape[-1] > value.shape[-1]:  # drop the column of ones
        dv = dv[..., :-1]
    if key_mask is not None:
        keep = key_mask[:, None, :, None].bool()
        dk, dv = torch.where(keep, dk, 0), torch.where(keep, dv, 0)
    if options.layout is None:
        dgates = (unclamped_gradient(gradient, g, x.dtype) for gradient, g in zip(dgates, log_decays, strict=True))
    else:
        dgates = (gradient.to(g.dtype) for gradient, g in zip(dgates, log_decays, strict=True))
    dq, dk = summed_over_groups(dq, query.shape[1]), summed_over_groups(dk, key.shape[1])
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), *dgates


class LionFunction(torch.autograd.Function):
    """The operator. It saves its inputs and, if normalised, its output; the backward pass recomputes the rest."""

    @staticmethod
    def forward(*arguments):
        outputs = _forward(*arguments)
        return tuple(map(_no_view, outputs)) if isinstance(outputs, tuple) else _no_view(outputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, key_mask, ctx.options, *log_decays = inputs
        normalized = None, None
        if ctx.options.result == "normalized":
            normalized = output
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, key_mask, *normalized, *log_decays)

    @staticmethod
    def backward(ctx, dy, dc=None):
        query, key, value, key_mask, out, row_sums, *log_decays = ctx.saved_tensors
        dc = dc if ctx.options.result == "both" else None
        gradient = _gradients if torch.compiler.is_compiling() else LionGradient.apply
        dq, dk, dv, *dgates = gradient(query, key, value, key_mask, out, row_sums, dy, dc, ctx.options, *log_decays)
        return dq, dk, dv, None, None, *dgates


class _TransformableFunction(LionFunction):
    """`LionFunction` with support for torch.func and forward mode, which compiled graphs reject."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        LionFunction.setup_context(ctx, inputs, output)
        query, key, value, key_mask, _, *log_decays = inputs
        ctx.save_for_forward(query, key, value, key_mask, *log_decays)

    @staticmethod
    def jvp(ctx, *tangents):
        query, key, value, key_mask, *log_decays = ctx.saved_tensors
        arguments = query, key, value, key_mask, ctx.options, *log_decays
        out = _pushed(composed, arguments, tangents)
        return (out, None) if ctx.options.result == "normalized" else out

    @staticmethod
    def vmap(info, in_dims, query, key, value, key_mask, options, *log_decays):
        size, (*dims, _, _), decay_dims = info.batch_size, in_dims[:5], in_dims[5:]
        query, key, value = (_fold(x, dim, size) for x, dim in zip((query, key, value), dims, strict=True))
        key_mask = None if key_mask is None else _fold(key_mask, in_dims[3], size)
        if any(x.dim() > 1 for x in log_decays):  # otherwise decays per head, shared by all elements
            log_decays = _decays_of_tokens(log_decays, decay_dims, size, query)
        outputs = _TransformableFunction.apply(query, key, value, key_mask, options, *log_decays)
        if isinstance(outputs, tuple):
            return tuple(_unfold(x, size) for x in outputs), (0, 0)
        return _unfold(outputs, size), 0


class LionGradient(torch.autograd.Function):
    """The gradients of query, key, value and log-decays. No matrix of the form outlives the call.

    Its own derivatives are those of `composed`, with O(L^2) memory.
    """

    @staticmethod
    def forward(*arguments):  # names would take longer: PyTorch binds the arguments to the signature in every call
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs[:9]
        ctx.save_for_backward(*tensors, *inputs[9:])
        ctx.save_for_forward(*tensors, *inputs[9:])

    @staticmethod
    def backward(ctx, *cotangents):
        arguments = _gradient_arguments(ctx)
        places = [i for i, needed in enumerate(ctx.needs_input_grad) if needed and i not in (4, 5)]
        _, pull = torch.func.vjp(*_partial(_composed_gradients, arguments, places))
        gradients = dict(zip(places, pull(cotangents), strict=True))
        return tuple(gradients.get(i) for i in range(len(arguments)))

    @staticmethod
    def jvp(ctx, *tangents):
        tangents = [None if i in (4, 5) else x for i, x in enumerate(tangents)]
        return _pushed(_composed_gradients, _gradient_arguments(ctx), tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        size, options, log_decays = info.batch_size, inputs[8], inputs[9:]
        batched = [None if x is None else _fold(x, dim, size) for x, dim in zip(inputs[:8], in_dims[:8], strict=True)]
        # Each element needs its own gradients, also those of decays per head.
        decays = _decays_of_tokens(log_decays, in_dims[9:], size, batched[0])
        gradients = [_unfold(x, size) for x in LionGradient.apply(*batched, options, *decays)]
        for i, (log_decay, dim) in enumerate(zip(log_decays, in_dims[9:], strict=True), 3):
            if log_decay.dim() - (dim is not None) == 1:
                gradients[i] = gradients[i].sum((1, 3))
        return tuple(gradients), (0,) * len(gradients)


def _no_view(x: Tensor) -> Tensor:
    """Return the same memory as a tensor that is not a view, for forward mode and in-place changes.

    Both would need the base of a view.
    """
    return torch.unsafe_split(x, x.shape[1], 1)[0]  # a single part, which PyTorch does not mark as a view


def _run(x: Tokens, options: Options, tensors: Sequence[Tensor], *gradients):
    """Run the forward pass of a form or, given the gradients dy and dc, its backward pass."""
    form, chunk_size, scale, _, _, orders, layout = options
    backward = bool(gradients)
    if form == "global":
        return (global_forward, global_backward)[backward](x, *gradients, scale, chunk_size)
    if form == "attention":
        if layout is not None:
            scans = [SidedScan(tensors, layout)]
        else:
            scans = list(map(LionScan, tensors, orders or [None] * len(tensors)))
        return (attention_forward, attention_backward)[backward](x, scans, *gradients, scale)

    def make_mask(x: Tokens, chunks: int, size: int):
        if layout is None:
            return LionMask(x, tensors[0], chunks, size, scale)
        return SidedMask(x, tensors, layout, chunks, size, scale)

    if form == "rnn" and backward:
        return rnn_backward(x, make_mask, *gradients, chunk_size, 2 if layout is None else sum(layout[:2]))
    return _FORMS[form][backward](x, make_mask, *gradients, chunk_size)


def _tokens(query, key, value, key_mask, result) -> Tokens:
    return Tokens(query, key, value, key_mask, result != "numerator", accumulation_dtype(query, key, value))


# ------------------------------------------------------------------------------------------------ transforms


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge the dimension `dim` that torch.vmap maps over into the batch, (size * batch, ...). None repeats x."""
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.unflatten(0, (size, -1))


def _decays_of_tokens(log_decays: Sequence[Tensor], dims: Sequence, size: int, query: Tensor) -> list[Tensor]:
    """Expand log-decays to the batch that `_fold` returns: (size * batch, heads, length)."""
    rows, heads, length, _ = query.shape
    decays = []
    for x, dim in zip(log_decays, dims, strict=True):
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x[:, None, :, None].expand(size, rows // size, heads, length) if x.dim() == 2 else x
        decays.append(x.flatten(0, 1))
    return decays


def _partial(function: Callable, arguments: Sequence, places: Sequence[int]) -> tuple:
    """Return `function` as a function of the arguments at `places` only, followed by those arguments."""

    def of_places(*chosen):
        filled = list(arguments)
        for place, x in zip(places, chosen, strict=True):
            filled[place] = x
        return function(*filled)

    return of_places, *(arguments[place] for place in places)


def _pushed(function: Callable, arguments: Sequence, tangents: Sequence):
    """Return the tangents of the outputs from those of the arguments.

    The vector-Jacobian product is linear in its vector, so its own vector-Jacobian product is the Jacobian times the
    tangents. This works inside forward mode, of which PyTorch supports only one level.
    """
    places = [i for i, tangent in enumerate(tangents) if tangent is not None]
    outputs, pull = torch.func.vjp(*_partial(function, arguments, places))
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, outputs)
    _, push = torch.func.vjp(pull, zeros)
    return push(tuple(tangents[place] for place in places))[0]


def _gradient_arguments(ctx) -> tuple:
    """Return the arguments of `LionGradient` in their order."""
    saved = ctx.saved_tensors
    return *saved[:8], ctx.options, *saved[8:]


def _composed_gradients(query, key, value, key_mask, out, row_sums, dy, dc, options, *log_decays):
    """Compute `LionGradient` from PyTorch's own operators."""
    arguments = query, key, value, key_mask, options, *log_decays
    _, pull = torch.func.vjp(*_partial(composed, arguments, (0, 1, 2, *range(5, len(arguments)))))
    return pull((dy, dc) if options.result == "both" else dy)
