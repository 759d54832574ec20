"""LION's operator: bidirectional linear attention with decay, in three exactly equal forms.

Source: "Linear Attention for Efficient Bidirectional Sequence Modeling", arXiv 2502.16249.

With log-decays ``g <= 0`` (one per token), row ``i`` reads key ``j`` with weight

    M_ij = exp(g_j + ... + g_{i-1})   for i > j     (the token being left decays, never the one entered)
         = 1                          for i = j
         = exp(g_{i+1} + ... + g_j)   for i < j

and the output is ``y_i = s n_i``, or ``s n_i / (s c_i + eps)`` when normalised, where

    n_i = sum_j M_ij (q_i . k_j) v_j        c_i = sum_j M_ij (q_i . k_j)

Cost per batch element and head, for L tokens, widths D and V, chunks of K tokens (multiply-adds, forward):

    attention   L^2 (D + V)                 O(L^2) memory while it runs, nothing quadratic is kept for backward
    chunk       L (K (D + V) + 4 D V)       linear in L, all chunks at once
    rnn         L (K (D + V) + 4 D V)       linear in L, one chunk after the other, O(D V) memory
    LIT         2 L D V                     (no decay: chunk and rnn are one global product)

Each form and its gradient have a file of their own beside this one; triton/ holds the kernels that replace them on a
GPU. Second derivatives and forward mode are computed by the definition (composed.py), at O(L^2) memory; the kernels
have neither.

Graphs (torch.compile, torch.export, torch.jit.trace) hold no loop over chunks: the rnn form is computed as the chunk
form in them.
"""

import torch
from torch import Tensor

from .attention import differentiable_weights
from .autograd import lion
from .backend import fused_kernels, warn_once
from .checks import check_arguments, check_cu_seqlens, is_exporting, makes_graph
from .packing import map_sequences
from .tokens import accumulation_dtype, walks_chunks, without_autocast


# format="auto" uses the attention form up to this many tokens and the chunk form beyond, by device and kind of
# decay (forward + backward, head width 64). Measured on two cores of an AMD EPYC (family 26 model 2, AVX512) by
# `python benchmarks/bench_ops.py --crossover`, and for what the fused kernels do not take on an H100 by
# `python benchmarks/bench_gpu.py autotune`.
CROSSOVER = {
    "cpu": {"none": 96, "head": 272, "token": 248},
    "accelerator": {"none": 0, "head": 512, "token": 256},
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
    check_values: bool = True,
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
            numerator nor denominator; its decay still acts on what passes through it. Rows that see no key are
            0, and but for the fused kernels those whose nearest key is a decay of less than e**-40 away (e**-600 in
            float64).
        scale: s, positive; `head_dim ** -0.5` by default.
        eps: added to `s c` before the division.
        cu_seqlens: (sequences + 1,), for several sequences packed into one row (batch 1): integers from 0 to length
            that never decrease; tokens `cu_seqlens[n]` up to `cu_seqlens[n + 1]` are sequence n and read no other.
            Each is computed on its own, in the form that "auto" picks for its length, for which the bounds are read;
            `torch.compile` breaks its graph there. The fused kernels take all at once and read no bounds.
        check_values: whether values that cannot be right raise an error, where reading them costs little: on the CPU,
            outside graphs and torch.func. Models leave it out: one row of NaN must not cost them the others.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`. float64 is computed in float64, anything else in
        float32, also under autocast.

    Raises:
        ValueError: for shapes that do not fit, an unknown format, chunk_size < 1, scale <= 0, a mask that holds
            anything but 0 and 1, a log_decay that is positive or NaN, or a `cu_seqlens` that does not divide the row.
            The last three look at values; see `check_values` for the first two of them.
    """
    form = check_arguments(query, key, value, log_decay, format, chunk_size, key_mask, scale, check_values)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, query.shape[0], query.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    result = "both" if return_denominator else "normalized" if normalize else "numerator"
    kernels = fused_kernels(query, key, value, form)
    if kernels is not None:
        with without_autocast(query.device):
            return kernels(query, key, value, log_decay, key_mask, cu_seqlens, scale, eps, result)

    chunk_size = int(chunk_size)  # numpy's are taken

    def run(query, key, value, log_decay, key_mask):
        return _run_form(query, key, value, log_decay, key_mask, form, chunk_size, scale, result, eps)

    if cu_seqlens is None:
        return run(query, key, value, log_decay, key_mask)
    return map_sequences(run, cu_seqlens, key_mask, query, key, value, log_decay)


def _run_form(
    query, key, value, log_decay, key_mask, form: str, chunk_size: int, scale: float, result: str, eps: float
):
    length = query.shape[2]
    form = resolve_format(form, length, query.device, log_decay)
    if form == "rnn" and makes_graph():
        form = "chunk"  # a graph has no loop over chunks, whose number varies
    if not torch.jit.is_tracing() and length == 0:
        form = "attention"
    elif form != "attention" and log_decay is None:  # both directions end in the same state, sum_j k_j v_j^T
        walk = form == "rnn" or walks_chunks(query)
        form, chunk_size = "global", chunk_size if walk else None
    elif form == "chunk" and walks_chunks(query):
        form = "rnn"
    decays = () if log_decay is None else (log_decay,)
    with without_autocast(query.device):
        output = lion(query, key, value, key_mask, (form, chunk_size, scale, result, eps, None), *decays)
        return output if result == "both" else output.to(value.dtype)


def resolve_format(format: str, length: int, device: torch.device, log_decay: Tensor | None) -> str:
    """The form that `format="auto"` stands for; any other format is returned as it is.

    Under `torch.export` and `torch.jit.trace` the answer is always "attention", because a graph holds one form and only
    this one takes any length in both; set `format="chunk"` before to have linear time, at a fixed length in exports.
    """
    if format != "auto":
        return format
    if is_exporting() or torch.jit.is_tracing():
        warn_once(
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
    check_values: bool = True,
) -> Tensor:
    """The matrix of the attention form, `s (q k^T) * M`, for users who want to see it or to drop entries of it.

    Arguments as in [`bidirectional_linear_attention`]. Returns (batch, heads, length, length) in the accumulation
    dtype (float32 or wider), not normalised. Differentiable, at O(length^2) memory.
    """
    check_arguments(query, key, key, log_decay, "attention", 1, key_mask, scale, check_values)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with without_autocast(query.device):
        dtype, length = accumulation_dtype(query, key), query.shape[2]
        weights = scale if log_decay is None else differentiable_weights(log_decay, None, length, scale, dtype)
        scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * weights
        if key_mask is not None:
            scores = torch.where(key_mask.to(torch.bool)[:, None, None, :], scores, 0)
        return scores
