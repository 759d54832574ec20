"""LION's operator: bidirectional linear attention with decay, in three exactly equal forms.

Source: "Linear Attention for Efficient Bidirectional Sequence Modeling", arXiv 2502.16249.

With log-decays ``g <= 0`` (one per token), row ``i`` reads key ``j`` with weight

    M_ij = exp(g_j + ... + g_{i-1})   for i > j     (the token being left decays, never the one entered)
         = 1                          for i = j
         = exp(g_{i+1} + ... + g_j)   for i < j

and the output is ``y_i = s n_i``, or ``s n_i / (s c_i + eps)`` when normalised, where

    n_i = sum_j M_ij (q_i . k_j) v_j        c_i = sum_j M_ij (q_i . k_j)

Cost per batch element and head, for L tokens, widths D and E, chunks of K tokens (multiply-adds, forward):

    attention   L^2 (D + E)                 O(L^2) memory while it runs, nothing quadratic is kept for backward
    chunk       L (K (D + E) + 4 D E)       linear in L, all chunks at once
    rnn         L (K (D + E) + 4 D E)       linear in L, one chunk after the other, O(D E) memory
    LIT         2 L D E                     (no decay: chunk and rnn are one global product)

The forms and their gradients stand in lion_forms.py, the kernels that take their place on a GPU in lion_triton.py.
Second derivatives are not implemented and raise.
"""

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from .lion_checks import check_arguments, check_cu_seqlens, is_exporting
from .lion_forms import LionFunction, accumulation_dtype, attention_weights, walks_chunks
from .lion_packing import map_sequences


logger = logging.get_logger(__name__)

# "torch" or "triton" forces the forms of this file or the kernels of lion_triton; read once, at import.
_BACKEND = os.environ.get("LION_BACKEND", "").lower()

# format="auto" uses the attention form up to this many tokens and the chunk form beyond, by device and kind of
# decay. Measured on 2 CPU cores by `python benchmarks/bench_ops.py --crossover` (forward + backward, head width 64).
# The accelerator row is an estimate from arithmetic intensity: not yet timed on a GPU.
CROSSOVER = {
    "cpu": {"none": 80, "head": 224, "token": 208},
    "accelerator": {"none": 256, "head": 1024, "token": 1024},
}


def bidirectional_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    format: str = "attention",
    chunk_size: int = 64,
    normalize: bool = False,
    return_denominator: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bidirectional linear attention with a decay mask (arXiv 2502.16249, sections 3 and 4).

    Args:
        query: (batch, heads, length, head_dim), any floating dtype. Any strides are accepted.
        key: same shape as `query`.
        value: (batch, heads, length, value_dim).
        log_decay: natural logarithm of the decays, every entry <= 0 (-inf allowed).
            `None` is LION-LIT (no decay), (heads,) is LION-D, (batch, heads, length) is LION-S. float32 or wider is
            advised: half precision cannot hold a decay close to 1.
        format: "attention" (quadratic time), "rnn" (linear time, memory independent of length), "chunk" (linear
            time, all chunks at once; on a CPU one after the other where they outgrow the cache) or "auto" (attention
            up to a measured length, chunk beyond: see `CROSSOVER`), in any case.
        chunk_size: most tokens in one chunk of the chunk and rnn forms. Chunks are made equally long, so that 65
            tokens become 33 + 32 rather than 64 + 1. The rnn backward uses chunks of at least sqrt(length) tokens
            and stores one state per chunk and direction; the rnn forward stores none.
        normalize: divide by the row sums (the image models); otherwise return `s n` (the text models).
        return_denominator: return `(s n, s c)` undivided, whatever `normalize` says: (batch, heads, length,
            value_dim) and (batch, heads, length), both in the accumulation dtype (float32 or wider), so that
            several scans can be added before one division.
        key_mask: (batch, length), True or 1 for a real token, False or 0 for padding. A padded key reaches neither
            numerator nor denominator; its decay still acts on what passes through it. Rows that see no key are 0.
        scale: s, positive; `head_dim ** -0.5` by default.
        eps: added to `s c` before the division.
        cu_seqlens: (sequences + 1,), for several sequences packed into one row (batch 1): integers from 0 to length
            that never decrease; tokens `cu_seqlens[n]` up to `cu_seqlens[n + 1]` are sequence n and read no other.
            Each is computed on its own, in the form that "auto" picks for its length, for which the bounds are read;
            `torch.compile` breaks its graph there. The fused kernels take all at once and read no bounds.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`. float64 is computed in float64, anything else in
        float32, also under autocast.

    Raises:
        ValueError: for shapes that do not fit, an unknown format, chunk_size < 1, scale <= 0, a mask that holds
            anything but 0 and 1, a positive log_decay, or a `cu_seqlens` that does not divide the row. The last three
            look at values: they are checked on the CPU outside compiled graphs only, since on an accelerator they
            would wait for the device.
    """
    form = check_arguments(query, key, value, log_decay, format, chunk_size, key_mask, scale)
    length, head_dim = query.shape[2:]
    fused = _fused_kernels(query, key, value, form)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, query.shape[0], length)
        if fused is None:
            options = {"format": form, "chunk_size": chunk_size, "scale": scale, "eps": eps}
            options |= {"normalize": normalize, "return_denominator": return_denominator}
            alone = functools.partial(bidirectional_linear_attention, **options)
            return map_sequences(alone, cu_seqlens, key_mask, query, key, value, log_decay)
    scale = head_dim**-0.5 if scale is None else float(scale)
    result = "both" if return_denominator else "normalized" if normalize else "numerator"
    if form == "auto":
        form = resolve_format(form, length, query.device, log_decay)
    if fused is not None:
        with torch.autocast(query.device.type, enabled=False):
            return fused(query, key, value, log_decay, key_mask, cu_seqlens, scale, eps, result, form == "attention")
    if log_decay is None and form != "attention":  # both scans end in the same state, sum_j k_j v_j^T
        walk = form == "rnn" or walks_chunks(query)
        form, chunk_size = "global", chunk_size if walk else max(1, length)
    if length == 0:
        form = "attention"
    elif form == "chunk" and walks_chunks(query):
        form = "rnn"
    options = form, chunk_size, scale, result, eps, None
    with torch.autocast(query.device.type, enabled=False):
        decays = () if log_decay is None else (log_decay,)
        output = LionFunction.apply(query, key, value, key_mask, options, *decays)
        return output if return_denominator else output.to(value.dtype)


def averaged_scans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decays: Sequence[Tensor],
    orders: Sequence[tuple[Tensor, Tensor]],
    *,
    format: str = "attention",
    chunk_size: int = 64,
    eps: float = 1e-6,
) -> Tensor:
    """The normalised operator under the mean of several masks, each along an order of its own: the snake scans of images.

    The attention form builds the mean mask and multiplies once; the others run one scan after the other and add
    numerators and denominators before the one division.

    Args:
        query: (batch, heads, length, head_dim), as in [`bidirectional_linear_attention`], and so `key` and `value`.
        log_decays: one for each scan, all (heads,), or all (batch, heads, length) with the tokens in the order of `query`.
        orders: one for each scan, see [`snake_orders`].
        format: as in [`bidirectional_linear_attention`], and so `chunk_size`.
        eps: added to the mean row sums before the division.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`.

    Raises:
        ValueError: as [`bidirectional_linear_attention`], and for log-decays of two kinds, or none.
    """
    if len({log_decay.dim() for log_decay in log_decays}) != 1:
        raise ValueError(
            f"log_decays have the shapes {[tuple(x.shape) for x in log_decays]}; give one for each scan, all of them "
            "(heads,) or all (batch, heads, length)."
        )
    for log_decay in log_decays:
        form = check_arguments(query, key, value, log_decay, format, chunk_size, None, None)
    form = resolve_format(form, query.shape[2], query.device, log_decays[0])
    if form == "attention" and _fused_kernels(query, key, value, form) is None:
        options = form, chunk_size, query.shape[-1] ** -0.5, "normalized", eps, list(orders)
        with torch.autocast(query.device.type, enabled=False):
            return LionFunction.apply(query, key, value, None, options, *log_decays).to(value.dtype)
    numerator = denominator = 0
    for log_decay, (order, inverse) in zip(log_decays, orders, strict=True):
        log_decay = log_decay if log_decay.dim() == 1 else log_decay.index_select(2, order)
        along = (x.index_select(2, order) for x in (query, key, value))
        n, c = bidirectional_linear_attention(
            *along, log_decay, format=form, chunk_size=chunk_size, return_denominator=True
        )
        numerator = numerator + n.index_select(2, inverse)
        denominator = denominator + c.index_select(2, inverse)
    return (numerator / (denominator.unsqueeze(-1) + len(log_decays) * eps)).to(value.dtype)


def _fused_kernels(query: Tensor, key: Tensor, value: Tensor, form: str) -> Callable | None:
    """The operator in lion_triton, where it is wanted and takes these inputs. A GPU without it is told why, once."""
    if _BACKEND not in ("", "torch", "triton"):
        raise ValueError(f"LION_BACKEND is {_BACKEND!r}; allowed are 'torch' and 'triton', or leave it unset.")
    # The rnn form promises memory independent of the length, which states of chunks are not.
    if _BACKEND == "torch" or not (_BACKEND or query.is_cuda) or form == "rnn" or is_exporting():
        return None
    try:
        from .lion_triton import fused_linear_attention, unsupported
    except ImportError as error:
        reason = str(error)
    else:
        reason = unsupported(query, key, value)
        if reason is None:
            return fused_linear_attention
    if _BACKEND == "triton":
        raise ValueError(
            f"LION_BACKEND=triton, but the fused kernels cannot be used: {reason}. Unset it to go without."
        )
    logger.warning_once(f"LION runs without its fused GPU kernels: {reason}. LION_BACKEND=torch silences this warning.")
    return None


def resolve_format(format: str, length: int, device: torch.device, log_decay: Tensor | None) -> str:
    """The form that `format="auto"` stands for; any other format is returned as it is.

    Under `torch.export` the answer is always "attention", because a graph holds one form and only this one takes any
    length; set `format="chunk"` before the export to have the linear form at a fixed length instead.
    """
    if format != "auto":
        return format
    if is_exporting():
        logger.warning_once(
            "format='auto' is exported as the attention form, which takes any length. Set format='chunk' before the "
            "export for linear time at one fixed length."
        )
        return "attention"
    kind = "none" if log_decay is None else "head" if log_decay.dim() == 1 else "token"
    return "attention" if length <= CROSSOVER["cpu" if device.type == "cpu" else "accelerator"][kind] else "chunk"


def attention_scores(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The matrix of the attention form, `s (q k^T) * M`, for users who want to see it or to drop entries of it.

    Arguments as in [`bidirectional_linear_attention`]. Returns (batch, heads, length, length) in the accumulation
    dtype (float32 or wider), not normalised. Differentiable, at O(length^2) memory.
    """
    check_arguments(query, key, key, log_decay, "attention", 1, key_mask, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(query.device.type, enabled=False):
        dtype, length = accumulation_dtype(query, key), query.shape[2]
        weights = scale if log_decay is None else attention_weights(log_decay, None, length, scale, dtype)
        scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * weights
        if key_mask is not None:
            scores = torch.where(key_mask.to(torch.bool)[:, None, None, :], scores, 0)
        return scores
