"""LION's operator on a GPU: launches of the kernels in kernels.py, as operators of PyTorch with gradients.

Tested in Triton's interpreter; not yet timed on a GPU.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import (
    INTERPRETED,
    delta_kernel,
    gate_gradient_kernel,
    mix_kernel,
    propagate_kernel,
    states_kernel,
    sums_kernel,
)
from .parts import FLOOR, triton


# PyTorch's operators have one name in a process, and a second definition frees the first. A copy of this file that came
# with a checkpoint is another module, and so has another name.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)

NONE, HEAD, TOKEN = 0, 1, 2  # kinds of decay
NUMERATOR, NORMALIZED, BOTH = 0, 1, 2  # kinds of results

# Wider heads would need more registers than a program has.
MAX_WIDTH = 128

# Tokens in a chunk, where not the whole text is one: enough that few states reach memory. Tokens in a tile at most.
_CHUNK = 256
_TILE = 64
# The same in float32 without tensor cores, whose products need the registers that larger tiles would fill, and where
# operands in float32 are wide: larger tiles of them do not fit into shared memory.
_FLOAT32_TILE = 32

# Warps of a program whose heads have at most 64 features, half as many as of one with more; stages of its loads.
_WARPS = 4
_STAGES = 3


# ------------------------------------------------------------------------------------------------ launches


class _Tiling(NamedTuple):
    """How tokens are cut."""

    tile: int  # tokens in a tile
    tiles: int  # tiles in a chunk
    chunks: int  # chunks of a text; unused for packed ones
    all_chunks: int  # chunks of the batch; for packed sequences as many as there can be at most
    sequences: int
    table: Tensor | None  # (all_chunks, 3) int32: start, stop, first chunk of the sequence; packed sequences only
    borders: Tensor | None  # (sequences + 1,) int32: the sequences' first chunks


def _tiling(batch: int, length: int, cu_seqlens: Tensor | None, full: bool, largest: int) -> _Tiling:
    """Cuts a batch of texts, or a row of packed sequences, into tiles of at most `largest` tokens and into chunks."""
    tile = min(largest, max(16, triton.next_power_of_2(length)))
    tiles = triton.cdiv(length if full else min(_CHUNK, length), tile)
    size = tiles * tile
    if cu_seqlens is None:
        chunks = triton.cdiv(length, size)
        return _Tiling(tile, tiles, chunks, batch * chunks, batch, None, None)
    # No length is read back: the number of chunks is bounded by what the whole row needs and one more per sequence.
    sequences = cu_seqlens.numel() - 1
    all_chunks = length // size + sequences
    counts = (cu_seqlens.diff() + size - 1) // size
    borders = F.pad(counts.cumsum(0), (1, 0))
    chunk = torch.arange(all_chunks, device=cu_seqlens.device)
    sequence = torch.searchsorted(borders[1:], chunk, right=True).clamp(max=sequences - 1)
    start = cu_seqlens[sequence] + (chunk - borders[sequence]) * size
    stop = torch.minimum(start + size, cu_seqlens[sequence + 1])
    table = torch.stack([start, torch.maximum(start, stop), borders[sequence]], 1)
    return _Tiling(tile, tiles, 0, all_chunks, sequences, table.int(), borders.int())


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token of a (batch, heads, length, ...) tensor."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _heads_last(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised (batch, heads, length, width), in memory (batch, length, heads, width): what follows is a view."""
    batch, heads, length = x.shape[:3]
    return x.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


def _block(width: int) -> int:
    """The power of two that holds so many features: products take 16 at least."""
    return max(16, triton.next_power_of_2(width))


def _tf32_is_allowed() -> bool:
    """Whether products of float32 may round to tf32, by the setting of PyTorch 2.9 where there is one: once it has been
    used, reading the older one raises."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"


class _Operator:
    """The launches for one set of inputs; see the head of kernels.py."""

    def __init__(self, query, key, value, log_decay, key_mask, cu_seqlens, scale, full):
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.value_dim = value.shape[-1]
        self.kind = NONE if log_decay is None else HEAD if log_decay.dim() == 1 else TOKEN
        self.decay = log_decay
        self.decay_strides = (0, log_decay.stride(0), 0) if self.kind == HEAD else _strides(log_decay)
        self.key_mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
        self.scale = scale
        dtypes = {query.dtype, key.dtype, value.dtype}
        exact = torch.float32 in dtypes and not _tf32_is_allowed()
        # float16 fits into the mantissa of tf32, whose range holds the factors that its own does not.
        self.precision = "bf16" if dtypes == {torch.bfloat16} else "ieee" if exact else "tf32"
        wide = max(self.head_dim, self.value_dim) > 64
        small = exact or (wide and self.precision != "bf16")
        largest = min(_TILE, _FLOAT32_TILE) if small else _TILE
        self.tiling = _tiling(self.batch, self.length, cu_seqlens, full, largest)
        self.resources = {"num_warps": 2 * _WARPS if exact or wide else _WARPS, "num_stages": _STAGES}
        self.has_states = self.tiling.table is not None or self.tiling.chunks > 1
        self.sums = self.totals = self.chunk_totals = None
        if self.kind == TOKEN:
            self._sum()

    def _grid(self, programs_per_chunk: int) -> tuple[int, int]:
        return self.tiling.all_chunks * programs_per_chunk, self.heads

    def _sum(self) -> None:
        """Makes `sums`, (batch, heads, 2, length), and `totals`, (heads, tiles, 2), of the gates."""
        tiling = self.tiling
        self.sums = self.decay.new_empty(self.batch, self.heads, 2, self.length, dtype=torch.float32)
        self.totals = self.decay.new_empty(self.heads, tiling.all_chunks * tiling.tiles, 2, dtype=torch.float32)
        sums_kernel[self._grid(tiling.tiles)](
            self.decay, self.sums, self.totals, tiling.table, *self.decay_strides,
            self.length, tiling.chunks, tiling.tiles, TILE=tiling.tile,
        )  # fmt: skip

    def states(self, y, z, bias=None, weight=None, transposed=False) -> Tensor | None:
        """What reaches each chunk, (chunks, heads, sides, D * E + D); None in the full form."""
        if not self.has_states:
            return None
        tiling = self.tiling
        sides, size = 1 if self.kind == NONE else 2, self.head_dim * (self.value_dim + 1)
        states = y.new_empty(tiling.all_chunks, self.heads, sides, size, dtype=torch.float32)
        if self.kind != NONE:
            self.chunk_totals = y.new_empty(tiling.all_chunks, self.heads, dtype=torch.float32)
        blocks = _block(y.shape[-1]), _block(z.shape[-1])
        states_kernel[self._grid(1)](
            y, z, states, self.chunk_totals, bias, weight, self.key_mask, self.decay, self.sums, self.totals,
            tiling.table, *_strides(y), *_strides(z), *self.decay_strides, self.length, tiling.chunks, tiling.tiles,
            WIDTH_Y=y.shape[-1], WIDTH_Z=z.shape[-1], BLOCK_Y=blocks[0], BLOCK_Z=blocks[1], TILE=tiling.tile,
            DECAY=self.kind, TRANSPOSED=transposed, PRECISION=self.precision, **self.resources,
        )  # fmt: skip
        block = 256
        propagate_kernel[(tiling.sequences * self.heads, triton.cdiv(size, block), sides)](
            states, self.chunk_totals, tiling.borders, self.heads, tiling.chunks,
            SIZE=size, BLOCK=block, DECAY=self.kind,
        )  # fmt: skip
        return states

    def mix(
        self, x, y, z, out, states, *, flipped=False, transposed=False, bias=None, weight=None,
        result=NUMERATOR, eps=0.0, row_sums=None, reference=None, split=None,
    ) -> None:  # fmt: skip
        """Fills `out`, which lies in memory as `_heads_last` makes it, and `row_sums` and `split` where given.
        `flipped`: x has the width of values, not of queries."""
        tiling, width_x, width_z = self.tiling, x.shape[-1], z.shape[-1]
        blocks = _block(width_x), _block(width_z)
        mix_kernel[self._grid(tiling.tiles)](
            x, y, z, out, row_sums, states, bias, weight, self.key_mask, self.decay, self.sums, self.totals,
            tiling.table, reference, split,
            *_strides(x), *_strides(y), *_strides(z), *self.decay_strides, *_strides(reference),
            self.length, tiling.chunks, tiling.tiles, self.scale, eps,
            WIDTH_X=width_x, WIDTH_Z=width_z, BLOCK_X=blocks[0], BLOCK_Z=blocks[1], TILE=tiling.tile, DECAY=self.kind,
            TRANSPOSED=transposed, FLIPPED=flipped, RESULT=result, PRECISION=self.precision, **self.resources,
        )  # fmt: skip

    def delta(self, out: Tensor, d_out: Tensor) -> Tensor:
        """-d_out_i . out_i, (batch, heads, length)."""
        delta = out.new_empty(self.batch, self.heads, self.length, dtype=torch.float32)
        width, tile = self.value_dim, self.tiling.tile
        tiles = triton.cdiv(self.length, tile)
        delta_kernel[self.batch * tiles, self.heads](
            out, d_out, delta, *_strides(out), *_strides(d_out), self.length, tiles,
            WIDTH=width, BLOCK=_block(width), TILE=tile,
        )  # fmt: skip
        return delta

    def gate_gradient(self, query_split, key_split, states, query_states, biased: bool) -> Tensor:
        """The gradient of the log-decays, (batch, heads, length), from the splits that `mix` has filled."""
        tiling, size = self.tiling, self.head_dim * self.value_dim
        out = query_split.new_empty(self.batch, self.heads, self.length)
        gate_gradient_kernel[self._grid(1)](
            query_split, key_split, states, query_states, self.chunk_totals, out, tiling.table,
            self.length, tiling.chunks, tiling.tiles, self.scale,
            SIZE=size + self.head_dim, USED=size + biased * self.head_dim, BLOCK=1024, TILE=tiling.tile,
        )  # fmt: skip
        return out


# ------------------------------------------------------------------------------------------------ operators of PyTorch


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device, which may be another one."""

    @functools.wraps(launch)
    def on_device(query, *arguments):
        with torch.cuda.device_of(query):
            return launch(query, *arguments)

    return on_device


@torch.library.custom_op(f"{_NAMESPACE}::mix", mutates_args=())
@_on_its_device
def _mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    eps: float,
    result: int,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """The output (numerator, or normalised) and the row sums: c for BOTH, c + eps for NORMALIZED, else empty."""
    query, key, value = (_last_contiguous(x) for x in (query, key, value))
    out, row_sums = _outputs(query, value, result)
    if out.numel() or row_sums.numel():
        operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, scale, full)
        states = operator.states(key, value)
        operator.mix(query, key, value, out, states, result=result, eps=eps, row_sums=row_sums if result else None)
    return out, row_sums


@_mix.register_fake
def _(query, key, value, log_decay, key_mask, cu_seqlens, scale, eps, result, full):
    return _outputs(query, value, result)


def _outputs(query: Tensor, value: Tensor, result: int) -> tuple[Tensor, Tensor]:
    out = _heads_last(value, value.shape[-1], torch.float32 if result == BOTH else value.dtype)
    return out, query.new_empty(query.shape[:3] if result else (0,), dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::mix_backward", mutates_args=())
@_on_its_device
def _mix_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    row_sums: Tensor | None,
    d_out: Tensor,
    d_row_sums: Tensor | None,
    scale: float,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and log_decay (empty where there is none). `out` and `row_sums` are those of a
    normalised result, `d_row_sums` is that of BOTH."""
    grads = _gradients(query, key, value, log_decay)
    dq, dk, dv, d_decay = grads
    if not query.numel():
        return tuple(g.zero_() for g in grads)
    query, key, value, d_out = (_last_contiguous(x) for x in (query, key, value, d_out))
    operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, scale, full)
    bias, weight = d_row_sums, None
    if row_sums is not None:
        bias, weight = operator.delta(out, d_out), row_sums.reciprocal()
    elif bias is not None:
        bias = bias.float().contiguous()
    split = {}
    if log_decay is not None:
        split = {
            name: query.new_empty(*query.shape[:2], 3, query.shape[2], dtype=torch.float32) for name in ("dq", "dk")
        }
    options = {"bias": bias, "weight": weight}
    states = operator.states(key, value)
    query_states = operator.states(query, d_out, transposed=True, **options)
    operator.mix(d_out, value, key, dq, states, flipped=True, reference=query, split=split.get("dq"), **options)
    operator.mix(
        value,
        d_out,
        query,
        dk,
        query_states,
        flipped=True,
        transposed=True,
        reference=key,
        split=split.get("dk"),
        **options,
    )
    operator.mix(key, query, d_out, dv, query_states, transposed=True, weight=weight)
    if log_decay is not None:
        gradient = operator.gate_gradient(split["dq"], split["dk"], states, query_states, biased=bias is not None)
        gradient = gradient.sum((0, 2)) if log_decay.dim() == 1 else gradient
        d_decay = torch.where(log_decay >= FLOOR.value, gradient, 0).to(log_decay.dtype)
    return dq, dk, dv, d_decay


@_mix_backward.register_fake
def _(query, key, value, log_decay, key_mask, cu_seqlens, out, row_sums, d_out, d_row_sums, scale, full):
    return _gradients(query, key, value, log_decay)


def _gradients(query, key, value, log_decay) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (_heads_last(x, x.shape[-1], x.dtype) for x in (query, key, value))
    return *like, query.new_empty(0) if log_decay is None else torch.empty_like(log_decay)


def _save(ctx, inputs, output) -> None:
    *tensors, scale, _, result, full = inputs
    normalized = output if result == NORMALIZED else (None, None)
    ctx.save_for_backward(*tensors, *normalized)
    ctx.options = result, scale, full


def _differentiate(ctx, d_out, d_row_sums):
    result, scale, full = ctx.options
    d_row_sums = d_row_sums if result == BOTH else None
    *grads, d_decay = _mix_backward(*ctx.saved_tensors, d_out, d_row_sums, scale, full)
    return *grads, None if ctx.saved_tensors[3] is None else d_decay, *[None] * 6


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "LION's fused kernels have no second derivative. Leave create_graph out, or build the output from "
        "lion_hf.ops.attention_scores, which has one."
    )


_mix.register_autograd(_differentiate, setup_context=_save)
_mix_backward.register_autograd(_refuse)


def fused_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    eps: float,
    result: str,
    full: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator on a GPU, in the full form or in chunks. Other arguments as in `bidirectional_linear_attention`,
    which has checked them; `result` is "numerator", "normalized" or "both"."""
    kind = ("numerator", "normalized", "both").index(result)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(query.device)
    out, row_sums = _mix(query, key, value, log_decay, key_mask, cu_seqlens, scale, float(eps), kind, full)
    return (out, row_sums) if kind == BOTH else out


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    dtypes = {x.dtype for x in (query, key, value)}
    if not query.is_cuda and not INTERPRETED:
        return f"they run on a GPU (or, with TRITON_INTERPRET=1, in Triton's interpreter), not on {query.device.type}"
    if not query.is_cuda and torch.bfloat16 in dtypes:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"they need compute capability 8.0, and {torch.cuda.get_device_name(query.device)} has less"
    if dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        return f"they take float32, bfloat16 and float16, not {', '.join(map(str, dtypes))}"
    if max(query.shape[-1], value.shape[-1]) > MAX_WIDTH:
        return f"they take heads of at most {MAX_WIDTH} features, not {max(query.shape[-1], value.shape[-1])}"
    return None
