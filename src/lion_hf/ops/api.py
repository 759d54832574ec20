"""LION's operator: bidirectional linear attention with decay, in three equivalent forms.

Source: "Linear Attention for Efficient Bidirectional Sequence Modeling", arXiv 2502.16249.

With log-decays `g <= 0` (one per token), the decay mask multiplies the weight of key `j` for query `i` by ::

    M_ij = exp(g_j + ... + g_{i-1})   for i > j     (the token being left decays, the one being entered does not)
         = 1                          for i = j
         = exp(g_{i+1} + ... + g_j)   for i < j

The output is `y_i = s n_i`, or `y_i = s n_i / (s c_i + eps)` if it is normalised, with the scale `s` and ::

    n_i = sum_j M_ij (q_i . k_j) v_j        c_i = sum_j M_ij (q_i . k_j)

Multiply-adds of the forward pass per batch element and head, for L tokens, head widths D (query, key) and V (value),
and chunks of K tokens::

    attention   L^2 (D + V)                 O(L^2) memory while it runs, nothing quadratic is stored for backward
    chunk       L (K (D + V) + 4 D V)       linear in L, all chunks at once
    rnn         L (K (D + V) + 4 D V)       linear in L, one chunk after another, O(D V) memory
    LIT         2 L D V                     no decay: chunk and rnn are one global product

Each form and its gradient are in one file of this folder; triton/ holds the kernels that replace them on a GPU.
Second derivatives and forward mode are computed from the definition (composed.py) with O(L^2) memory. The kernels
support neither.

Graphs (torch.compile, torch.export, torch.jit.trace) cannot contain the loop over chunks, so they compute the rnn form
as the chunk form.
"""

import torch
from torch import Tensor

from .attention import differentiable_weights
from .autograd import Options, lion
from .backend import fused_kernels, state_no_kernels, warn_once
from .checks import check_arguments, check_cu_seqlens, check_two_sided, is_exporting, makes_graph
from .general import Inputs, Settings, general
from .packing import map_sequences
from .tokens import accumulation_dtype, default_scale, walks_chunks, without_autocast


# format="auto" uses the attention form up to this many tokens and the chunk form beyond, by device and kind of
# decay (forward + backward, head width 64). The CPU values were measured on two cores of an AMD EPYC (family 26
# model 2, AVX512) with `python benchmarks/bench_ops.py --crossover`. The accelerator values apply where the fused
# kernels do not run, and were measured on an H100 with `python benchmarks/bench_gpu.py autotune`.
CROSSOVER = {
    "cpu": {"none": 96, "head": 272, "token": 248},
    "accelerator": {"none": 0, "head": 512, "token": 256},
}


# The same for decays per channel: up to one chunk of the default size both forms compute the same.
CHANNEL_CROSSOVER = 64


def two_sided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    convention: str = "left",
    direction: str = "both",
    diagonal: Tensor | float | None = None,
    log_weight: Tensor | None = None,
    backward_query: Tensor | None = None,
    backward_key: Tensor | None = None,
    backward_value: Tensor | None = None,
    backward_log_decay: Tensor | str | None = "same",
    backward_log_weight: Tensor | str | None = "same",
    normalize: bool | str = False,
    return_denominator: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    format: str = "auto",
    chunk_size: int = 64,
    check_values: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Two-sided linear attention with any decays: the operator in which linear transformers become encoders.

    Token i reads itself, the tokens on its left (F) and the tokens on its right (B)::

        n_i = s (d_i v_i + F_i + B_i)        F_i = sum_{j<i} sum_c q_ic k_jc M_ijc v_j        B_i the same for j > i

    `M_ijc` is the product of the decays of channel c of the key between j and i. B uses the backward tensors.
    `convention` selects which of the two ends belongs to the product. `c_i` is `n_i` for v = 1.

    Source: arXiv 2502.16249, theorem 3.1 and appendix B.6, which maps the recurrences of RetNet, xLSTM, Mamba-2,
    RWKV-6, HGRN-2 and others to this form.

    Args:
        query: (batch, groups, length, head_dim), any floating dtype and any strides. `groups` is the number of heads,
            or a divisor of it. Each group then serves the same number of consecutive heads.
        key: same shape as `query`.
        value: (batch, heads, length, value_dim).
        log_decay: natural logarithm of the decays, every entry <= 0 (-inf is allowed): None is no decay, (heads,) one
            per head, (heads, head_dim) one per head and channel of the key, (batch, heads, length) one per token,
            (batch, heads, length, head_dim) one per token and channel. Its values count exactly, as in
            `bidirectional_linear_attention`.
        convention: the decays in the product for j < i (for j > i the mirror image):
            "left" (default): of j to i - 1, as in LION; "entered": of j + 1 to i, as in causal recurrences that decay
            the state and then add the key (RetNet, Mamba-2, GLA); "between": of j + 1 to i - 1, as in RWKV; "edge": the
            square roots of those of j and i, and all of those between, so that M is symmetric.
        direction: "both" (default); "forward": the diagonal and F, the causal layer; "backward": the diagonal and B.
        diagonal: the coefficient `d_i`. None (default): `q_i . k_i` times `exp(log_weight_i)`, from the forward
            tensors. A number or (heads,): a factor of that. (batch, heads, length): `d_i` itself.
        log_weight: (batch, heads, length), any sign: keys are multiplied by its exponential (mLSTM's input gate). A
            running maximum is subtracted, so that no intermediate result overflows.
        backward_query: query of B, by default `query`.
        backward_key: key of B, by default `key`.
        backward_value: value of B, by default `value`.
        backward_log_decay: log-decay of B. "same" (default): `log_decay`. None: no decay in B.
        backward_log_weight: log-weight of B. "same" (default): `log_weight`. None: no weights in B.
        normalize: False (default): the result is `n_i`. True: `n_i / (c_i + eps)`, for positive scores. "mask":
            `n_i / (m_i + eps)` with the sum of the mask `m_i = sum_j M_ij exp(log_weight_j)`, for scores of any sign.
            Its entry at j = i is `exp(log_weight_i)` whatever `diagonal` is, and decays per channel use the mean of
            their masks over the channels. "clamp": `n_i / max(|c_i|, 1)`, as in mLSTM.
        return_denominator: return the pair `(n, c)`, undivided, or `(n, m)` for "mask".
        key_mask: (batch, length), True or 1 for real tokens, False or 0 for padding. A padded token writes nothing, and
            its diagonal term is 0, also if `diagonal` is given. Its decay still acts on what passes through it. A row
            that reads no key is 0.
        cu_seqlens: (sequences + 1,), int32 or int64, the bounds of several sequences packed into one row (batch 1). No
            sequence reads another one. See `bidirectional_linear_attention`.
        scale: the factor `s`, positive; `head_dim**-0.5` by default. It multiplies n (the diagonal too) and c, but
            not m.
        eps: added to the denominator.
        format: "attention", "rnn", "chunk" or "auto" (default), as in `bidirectional_linear_attention`.
        chunk_size: maximum number of tokens per chunk. Decays per channel use the largest power of two below it.
        check_values: whether to check the values of log-decays and `key_mask` where that is cheap: on a CPU, outside
            graphs and torch.func.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`. With `return_denominator` a pair of
        (batch, heads, length, value_dim) and (batch, heads, length) in the accumulation dtype: float64 if one of the
        queries, keys and values is float64, otherwise float32, also under autocast.

    Raises:
        ValueError: if shapes or dtypes do not match, a name is unknown, `chunk_size` < 1, `scale` <= 0, or
            `cu_seqlens` does not divide the row into sequences; with `check_values`, if a log-decay is positive or NaN
            anywhere or `key_mask` holds anything but 0 and 1; and if LION_BACKEND is unknown, or is "triton" and the
            fused kernels do not support the inputs.
    """
    same = all(isinstance(x, str) and x == "same" for x in (backward_log_decay, backward_log_weight))
    own = diagonal, log_weight, backward_query, backward_key, backward_value
    if same and direction == "both" and all(x is None for x in own) and normalize in (False, True):
        constant = log_decay is None or log_decay.dim() == 1  # it does not matter which token a decay belongs to
        if _fits_lion(query, value, log_decay) and (
            convention == "left" or (constant and convention in ("entered", "edge"))
        ):
            result = "both" if return_denominator else "normalized" if normalize else "numerator"
            form = check_arguments(query, key, value, log_decay, format, chunk_size, key_mask, scale, check_values)
            return _lion(query, key, value, log_decay, key_mask, cu_seqlens, form, chunk_size, scale, eps, result)

    log_decay, log_weight, backward_log_decay, backward_log_weight = (
        _wide(x) for x in (log_decay, log_weight, backward_log_decay, backward_log_weight)
    )
    forward = Inputs(query, key, value, log_decay, log_weight)
    backward = Inputs(
        query if backward_query is None else backward_query,
        key if backward_key is None else backward_key,
        value if backward_value is None else backward_value,
        log_decay if isinstance(backward_log_decay, str) else backward_log_decay,
        log_weight if isinstance(backward_log_weight, str) else backward_log_weight,
    )
    form = check_two_sided(
        forward, backward, (backward_log_decay, backward_log_weight), diagonal, convention, direction, normalize,
        format, chunk_size, key_mask, scale, check_values,
    )  # fmt: skip
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, query.shape[0], query.shape[2])
    state_no_kernels(value)
    scale = default_scale(query) if scale is None else float(scale)
    settings = Settings(convention, direction, normalize, return_denominator, scale, eps, form, int(chunk_size))

    def run(*tensors, key_mask):
        ahead, back, given = Inputs(*tensors[:5]), Inputs(*tensors[5:10]), tensors[10]
        decays = [x for x in (ahead.log_decay, back.log_decay) if x is not None]
        by_channel = next((x for x in decays if x.dim() in (2, 4)), decays[0] if decays else None)
        chosen = resolve_format(form, ahead.value.shape[2], value.device, by_channel)
        return general(ahead, back, given, key_mask, settings._replace(form=chosen))

    if cu_seqlens is None:
        return run(*forward, *backward, diagonal, key_mask=key_mask)
    factor = None if isinstance(diagonal, Tensor) else diagonal
    if factor is not None:
        diagonal = value.new_full((value.shape[1],), factor, dtype=torch.float64)
    return map_sequences(run, cu_seqlens, key_mask, *forward, *backward, diagonal)


def _wide(x: Tensor | str | None) -> Tensor | str | None:
    """Return logarithms of half precision in float32, which is exact, so that parts of their gradient sum in float32.

    Anything else is returned as it is, for the checks."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def _fits_lion(query: Tensor, value: Tensor, log_decay: Tensor | None) -> bool:
    """Whether the shapes are those of LION's own operator."""
    if query.dim() != 4 or query.shape[:3] != value.shape[:3]:
        return False
    if log_decay is None:
        return True
    expected = {1: query.shape[1:2], 3: query.shape[:3]}.get(log_decay.dim())
    return log_decay.is_floating_point() and expected is not None and log_decay.shape == expected


def _lion(query, key, value, log_decay, key_mask, cu_seqlens, form, chunk_size, scale, eps, result):
    """Compute LION's own operator, with the fused kernels where they support the inputs."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, query.shape[0], query.shape[2])
    scale, log_decay = default_scale(query) if scale is None else float(scale), _wide(log_decay)
    chunk_size = int(chunk_size)  # the check accepts numpy's integers
    kernels = fused_kernels(form, query, key, value, log_decay)
    if kernels is not None:
        with without_autocast(query.device):
            return kernels(query, key, value, log_decay, key_mask, cu_seqlens, scale, eps, result)

    def run(query, key, value, log_decay, key_mask):
        return _run_form(query, key, value, log_decay, key_mask, form, chunk_size, scale, result, eps)

    if cu_seqlens is None:
        return run(query, key, value, log_decay, key_mask)
    return map_sequences(run, cu_seqlens, key_mask, query, key, value, log_decay)


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

    The result is `y_i = s n_i`, or `y_i = s n_i / (s c_i + eps)` if `normalize` is True, with
    `n_i = sum_j M_ij (q_i . k_j) v_j` and `c_i = sum_j M_ij (q_i . k_j)`. `M_ij` is the product of the decays of all
    tokens from j up to, but not including, i.

    Args:
        query: (batch, heads, length, head_dim), any floating dtype and any strides.
        key: same shape as `query`.
        value: (batch, heads, length, value_dim).
        log_decay: natural logarithm of the decays, every entry <= 0 (-inf is allowed). None is no decay (LION-LIT),
            (heads,) a decay per head (LION-D), (batch, heads, length) a decay per token and head (LION-S). The values
            that are given count exactly, in any floating dtype. Compute them in float32 or wider: rounding to half
            precision changes a logarithm by up to 0.4 % (bfloat16) or 0.05 % (float16), and with it the reach of the
            decay.
        format: how the result is computed, in any letter case. "attention" takes quadratic time. "rnn" takes linear
            time, and its state takes memory independent of the length (forward). "chunk" takes linear time and computes
            all chunks at once, or one after another if they do not fit into the cache of a CPU. "auto" is "attention"
            up to a measured length and "chunk" beyond it, see `resolve_format`.
        chunk_size: maximum number of tokens per chunk of the chunk and rnn forms. Chunks are equally long: 65 tokens
            become 33 + 32 rather than 64 + 1. The backward pass of the rnn form uses chunks of at least sqrt(length)
            tokens and stores one state per chunk and direction; its forward pass stores none.
        normalize: whether to divide by the row sums. The paper's image models do, its text models do not.
        return_denominator: return the pair `(s n, s c)`, undivided whatever `normalize` is, so that several scans can
            be added before one division.
        key_mask: (batch, length), True or 1 for real tokens, False or 0 for padding; None (default) without padding. A
            padded key contributes neither to the numerator nor to the denominator, but its decay still applies between
            the tokens on both sides of it. If all keys are masked, outputs are 0. Outside the fused kernels, output `i`
            is also 0 if `M_ij` is less than `e**-40` (`e**-600` in float64) for all keys that are not masked.
        scale: the factor `s`, positive; `head_dim**-0.5` by default.
        eps: added to `s c` before the division.
        cu_seqlens: (sequences + 1,), int32 or int64, the bounds of several sequences packed into one row (batch 1).
            They begin with 0, end with the length and never decrease. Sequence n is `cu_seqlens[n]:cu_seqlens[n + 1]`
            and reads no token of another sequence. Outside the fused kernels the bounds are read, which breaks the
            graph of `torch.compile`. Each sequence is then computed separately, and "auto" uses its length. The fused
            kernels compute all sequences at once and read no bounds.
        check_values: whether to check the values of `log_decay` and `key_mask` where that is cheap: on a CPU, outside
            graphs and torch.func. The models pass False, so that NaN in one row does not fail the whole batch.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`. With `return_denominator` a pair of
        (batch, heads, length, value_dim) and (batch, heads, length) in the accumulation dtype. That dtype is float64
        if query, key or value is float64, otherwise float32, also under autocast.

    Raises:
        ValueError: if shapes or dtypes do not match, `format` is unknown, `chunk_size` < 1, `scale` <= 0, or
            `cu_seqlens` does not divide the row into sequences (on a CPU, its values are checked too); with
            `check_values`, if `log_decay` is positive or NaN anywhere or `key_mask` holds anything but 0 and 1; and if
            LION_BACKEND is unknown, or is "triton" and the fused kernels do not support the inputs.
    """
    if not _fits_lion(query, value, log_decay):  # raises an error
        check_arguments(query, key, value, log_decay, format, chunk_size, key_mask, scale, check_values)
    return two_sided_attention(
        query, key, value, log_decay, normalize=bool(normalize), return_denominator=return_denominator,
        key_mask=key_mask, cu_seqlens=cu_seqlens, scale=scale, eps=eps, format=format, chunk_size=chunk_size,
        check_values=check_values,
    )  # fmt: skip


def _run_form(
    query, key, value, log_decay, key_mask, form: str, chunk_size: int, scale: float, result: str, eps: float
):
    length = query.shape[2]
    form = resolve_format(form, length, query.device, log_decay)
    if form == "rnn" and makes_graph():
        form = "chunk"  # a graph cannot contain a loop over a variable number of chunks
    if not torch.jit.is_tracing() and length == 0:
        form = "attention"
    elif form != "attention" and log_decay is None:  # every token reads the same state, sum_j k_j v_j^T
        walk = form == "rnn" or walks_chunks(query)
        form, chunk_size = "global", chunk_size if walk else None
    elif form == "chunk" and walks_chunks(query):
        form = "rnn"
    decays = () if log_decay is None else (log_decay,)
    with without_autocast(query.device):
        output = lion(query, key, value, key_mask, Options(form, chunk_size, scale, result, eps), *decays)
        return output if result == "both" else output.to(value.dtype)


def resolve_format(format: str, length: int, device: torch.device, log_decay: Tensor | None) -> str:
    """Return the form that `format="auto"` selects; any other format is returned unchanged.

    The threshold depends on the device and the kind of decay, see `lion_hf.ops.api.CROSSOVER`. Under `torch.export` and
    `torch.jit.trace` "auto" always selects "attention" and logs a warning once: a graph contains one form, and this is
    the only one that accepts any length in both. Set `format="chunk"` before exporting for linear time, at one fixed
    length in exports.

    Args:
        format: "attention", "rnn", "chunk" or "auto", in lower case.
        length: number of tokens.
        device: device of the inputs.
        log_decay: None or any log-decay of `two_sided_attention`; only its number of dimensions matters.

    Returns:
        "attention" or "chunk" for "auto", otherwise `format`.
    """
    if format != "auto":
        return format
    if is_exporting() or torch.jit.is_tracing():
        warn_once(
            "format='auto' is exported as the attention form, which accepts any length. Set format='chunk' before the "
            "export for linear time at one fixed length."
        )
        return "attention"
    kind = "none" if log_decay is None else "head" if log_decay.dim() == 1 else "token"
    longest = CROSSOVER["cpu" if device.type == "cpu" else "accelerator"][kind]
    if log_decay is not None and log_decay.dim() in (2, 4):
        longest = CHANNEL_CROSSOVER
    return "attention" if length <= longest else "chunk"


def attention_scores(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    check_values: bool = True,
) -> Tensor:
    """Return the matrix of the attention form, `s (q k^T) * M`, to inspect it or to apply dropout to it.

    It supports derivatives of any order. Time and memory are O(length^2).

    Args:
        query: (batch, heads, length, head_dim), any floating dtype.
        key: same shape as `query`.
        log_decay: None, (heads,) or (batch, heads, length), <= 0, as in `bidirectional_linear_attention`.
        key_mask: (batch, length), True or 1 for real tokens. Columns of padding are 0.
        scale: the factor `s`, positive; `head_dim**-0.5` by default.
        check_values: as in `bidirectional_linear_attention`.

    Returns:
        (batch, heads, length, length), not normalised, in float64 if query or key is float64, else in float32.

    Raises:
        ValueError: if shapes, dtypes, the scale or checked values are invalid, as in
            `bidirectional_linear_attention`.
    """
    check_arguments(query, key, key, log_decay, "attention", 1, key_mask, scale, check_values)
    scale = default_scale(query) if scale is None else float(scale)
    with without_autocast(query.device):
        dtype, length = accumulation_dtype(query, key), query.shape[2]
        weights = scale if log_decay is None else differentiable_weights(log_decay, None, length, scale, dtype)
        scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * weights
        if key_mask is not None:
            scores = torch.where(key_mask.to(torch.bool)[:, None, None, :], scores, 0)
        return scores
