"""LION's operator on a GPU: PyTorch operators with gradients that launch the kernels of kernels.py."""

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import makes_graph
from .direct import KernelOperator
from .kernels import (
    INTERPRETED,
    backward_kernel,
    delta_kernel,
    forward_kernel,
    propagate_kernel,
    states_kernel,
    sums_kernel,
    walk_kernel,
)


# The name of a PyTorch operator must be unique in a process: a second definition frees the first. A copy of this file
# that comes with a checkpoint is another module, and therefore uses another name.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)

NONE, HEAD, TOKEN = 0, 1, 2  # kinds of decay
NUMERATOR, NORMALIZED, BOTH = 0, 1, 2  # kinds of results

# Wider heads need more registers than a program has.
MAX_WIDTH = 128

# (maximum number of tokens per tile, warps per program) for heads of at most 64 features. Texts of at most
# _ONE_TILE tokens are one tile, because states cost more than larger tiles. Measured on an H100 with
# benchmarks/bench_gpu.py.
_FORWARD = (64, 4)
_BACKWARD = (64, 4)
_ONE_TILE = (128, 8)
# Maximum number of tokens per tile in the forward pass with float32 operands: for heads of at most 64 features on
# tensor cores, and for all others. The backward pass uses half as many. Registers and shared memory limit them;
# benchmarks/kernel_resources.py counts both. These small tiles, and wider heads, use twice the warps.
_FLOAT32_TILES = (64, 32)

_TILES = 4  # tiles per chunk of LION-LIT, whose states are summed in any case
# With at least so many programs, one for each side and head of a sequence, one kernel computes what reaches each chunk.
# It is faster from about 300 programs on an H100: measured with 16,384 tokens and 12 heads, texts of up to 1,024 tokens
# gain 13 %, 2,048 tokens take as long as before, longer ones take longer.
_WALKS = 300
_GROUP = 8  # chunks whose states are propagated at a time


# ------------------------------------------------------------------------------------------------ launches


class _Tiling(NamedTuple):
    """How tokens are divided into tiles and chunks."""

    tile: int  # tokens per tile
    tiles: int  # tiles per chunk
    chunks: int  # chunks per text; unused for packed sequences
    all_chunks: int  # chunks of the batch; an upper bound for packed sequences
    sequences: int  # texts, or packed sequences
    table: Tensor | None  # (all_chunks, 3) int32: start, stop, first chunk of the sequence; packed sequences only
    borders: Tensor | None  # (sequences + 1,) int32: first chunk of each sequence; packed sequences only


# Triton's own cdiv and next_power_of_2 take 2 µs on the host.


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _tiling(batch: int, length: int, cu_seqlens: Tensor | None, largest: int, tiles: int) -> _Tiling:
    """Divide texts or a row of packed sequences into tiles of at most `largest` tokens, chunks of at most `tiles`."""
    tile = min(largest, max(16, _power_of_2(length)))
    tiles = min(tiles, _ceil_div(length, tile))
    size = tiles * tile
    if cu_seqlens is None:
        chunks = _ceil_div(length, size)
        return _Tiling(tile, tiles, chunks, batch * chunks, batch, None, None)
    # No length is read back from the GPU. The row needs at most length // size chunks plus one per sequence.
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
    """Return the strides of batch, head and token of a (batch, heads, length, ...) tensor; zeros for None."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _heads_last(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised (batch, heads, length, width), which is (batch, length, heads, width) in memory.

    The next layer can therefore view it as (batch, length, heads * width). It is not a view itself, so it can be
    changed in place.
    """
    batch, heads, length = x.shape[:3]
    strides = length * heads * width, width, heads * width, 1
    return x.new_empty_strided((batch, heads, length, width), strides, dtype=dtype)


def _block(width: int) -> int:
    """Return the smallest power of two that holds `width` features, at least 16 as matrix products require."""
    return max(16, _power_of_2(width))


def _tf32_is_allowed() -> bool:
    """Whether products of float32 may round to tf32.

    This reads the setting of PyTorch 2.9 if it exists: once that has been set, reading the older one raises an error.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"


class _Operator:
    """The launches for one set of inputs; see the docstring of kernels.py."""

    def __init__(self, query, key, value, log_decay, key_mask, cu_seqlens, path, scale, backward=False):
        self.query, self.key, self.value, self.decay = query, key, value, log_decay
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.value_dim = value.shape[-1]
        self.kind = NONE if log_decay is None else HEAD if log_decay.dim() == 1 else TOKEN
        self.decay_strides = (0, log_decay.stride(0), 0) if self.kind == HEAD else _strides(log_decay)
        self.key_mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
        self.path = None if path is None else path.to(torch.int32)
        self.scale = scale
        dtypes = {query.dtype, key.dtype, value.dtype}
        exact = torch.float32 in dtypes and not _tf32_is_allowed()
        # The mantissa of tf32 holds float16 exactly, and its range holds decay factors that float16 cannot represent.
        self.precision = "bf16" if dtypes == {torch.bfloat16} else "ieee" if exact else "tf32"
        wide = max(self.head_dim, self.value_dim) > 64
        self.early = self.precision == "bf16" and not wide
        self.may_walk = not wide or self.precision == "bf16"  # larger states do not fit in registers for a whole walk
        tile, warps = _BACKWARD if backward else _FORWARD
        if self.early and tile < self.length <= _ONE_TILE[0] and cu_seqlens is None:
            tile, warps = _ONE_TILE
        largest = tile
        if self.precision != "bf16":
            largest = min(tile, _FLOAT32_TILES[exact or wide] // (2 if backward else 1))
        tiles = _TILES if self.kind == NONE else 1
        self.tiling = _tiling(self.batch, self.length, cu_seqlens, largest, tiles)
        self.has_states = self.length > self.tiling.tile or cu_seqlens is not None
        self.sizes = {
            "WIDTH_K": self.head_dim,
            "WIDTH_V": self.value_dim,
            "BLOCK_K": _block(self.head_dim),
            "BLOCK_V": _block(self.value_dim),
            "TILE": self.tiling.tile,
            "DECAY": self.kind,
            "PRECISION": self.precision,
            "num_warps": min(8, 2 * warps) if wide or largest < tile else warps,
            "num_stages": 2,
        }

    def _sum_gates(self) -> Tensor | None:
        """Return the sums of the gates of each tile, for gates of tokens."""
        if self.kind != TOKEN:
            return None
        tiling = self.tiling
        sums = self.decay.new_empty(self.batch, self.heads, self.length, 2, dtype=torch.float32)
        sums_kernel[tiling.all_chunks, self.heads](
            sums, self.decay, tiling.table, self.path, *self.decay_strides, self.length, tiling.chunks,
            TILE=tiling.tile, num_warps=1,
        )  # fmt: skip
        return sums

    def _states(self, y, z, wants_vectors, bias=None, row_sums=None, queries=False) -> tuple:
        """Return what reaches each chunk: states (chunks, H, sides, D, E) and vectors (chunks, H, sides, D) or None."""
        if not self.has_states:
            return None, None
        tiling, sides = self.tiling, 1 if self.kind == NONE else 2
        # With bf16, products round states to bfloat16 anyway. The sum without decay is small and stays float32.
        dtype = torch.bfloat16 if self.precision == "bf16" and self.kind != NONE else torch.float32
        shape = tiling.all_chunks, self.heads, sides, self.head_dim
        states = y.new_empty(*shape, self.value_dim, dtype=dtype)
        vectors = y.new_empty(shape, dtype=torch.float32) if wants_vectors else None
        if self.kind != NONE and self.may_walk and 2 * tiling.sequences * self.heads >= _WALKS:
            walk_kernel[2 * tiling.sequences, self.heads](
                y, z, states, vectors, bias, row_sums, self.key_mask, self.decay, self.sums, tiling.table, self.path,
                tiling.borders, *_strides(y), *_strides(z), *self.decay_strides, self.length, tiling.chunks,
                **self.sizes | {"num_stages": 2 if wants_vectors else 3}, QUERIES=queries,
            )  # fmt: skip
            return states, vectors
        totals = None if self.kind == NONE else y.new_empty(shape[:2], dtype=torch.float32)
        states_kernel[tiling.all_chunks, self.heads](
            y, z, states, vectors, totals, bias, row_sums, self.key_mask, self.decay, self.sums,
            tiling.table, self.path,
            *_strides(y), *_strides(z), *self.decay_strides, self.length, tiling.chunks, tiling.tiles,
            **self.sizes, QUERIES=queries,
        )  # fmt: skip
        if self.kind == NONE and tiling.chunks == 1:
            return states, vectors  # the sum over one chunk
        size, block = self.head_dim * self.value_dim, 256
        propagate_kernel[tiling.sequences * self.heads, _ceil_div(size, block) + wants_vectors, sides](
            states, vectors, totals, tiling.borders, self.heads, tiling.chunks,
            SIZE=size, WIDTH=self.head_dim, BLOCK=block, GROUP=_GROUP, DECAY=self.kind, num_warps=1,
        )  # fmt: skip
        return states, vectors

    def _grid(self) -> tuple[int, int]:
        return self.tiling.all_chunks * self.tiling.tiles, self.heads

    def forward(self, out: Tensor, row_sums: Tensor, result: int, eps: float) -> None:
        """Fill `out`, made by `_heads_last`, and `row_sums` unless `result` is NUMERATOR."""
        query, key, value, tiling = self.query, self.key, self.value, self.tiling
        self.sums = self._sum_gates()
        states, vectors = self._states(key, value, result != NUMERATOR)
        forward_kernel[self._grid()](
            query, key, value, out, row_sums, states, vectors, self.key_mask, self.decay, self.sums,
            tiling.table, self.path,
            *_strides(query), *_strides(key), *_strides(value), *self.decay_strides,
            self.length, tiling.chunks, tiling.tiles, self.scale, eps, **self.sizes, RESULT=result, EARLY=self.early,
        )  # fmt: skip

    def delta(self, out: Tensor, d_out: Tensor) -> Tensor:
        """Return -d_out_i . out_i, (batch, heads, length)."""
        delta = out.new_empty(self.batch, self.heads, self.length, dtype=torch.float32)
        tile = self.tiling.tile
        tiles = _ceil_div(self.length, tile)
        delta_kernel[self.batch * tiles, self.heads](
            out, d_out, delta, *_strides(out), *_strides(d_out), self.length, tiles,
            WIDTH=self.value_dim, BLOCK=self.sizes["BLOCK_V"], TILE=tile,
        )  # fmt: skip
        return delta

    def backward(self, d_out, d_query, d_key, d_value, d_decay, bias, row_sums) -> None:
        """Fill the gradients, made by `_gradients`."""
        query, key, value, tiling = self.query, self.key, self.value, self.tiling
        self.sums = self._sum_gates()
        key_states, key_vectors = self._states(key, value, bias is not None)
        query_states, query_vectors = self._states(query, d_out, bias is not None, bias, row_sums, queries=True)
        shares = d_decay
        if self.kind == HEAD:
            shares = query.new_empty(self._grid(), dtype=torch.float32)
        backward_kernel[self._grid()](
            query, key, value, d_out, d_query, d_key, d_value, shares,
            key_states, key_vectors, query_states, query_vectors, bias, row_sums, self.key_mask, self.decay, self.sums,
            tiling.table, self.path, *_strides(query), *_strides(key), *_strides(value), *_strides(d_out),
            *self.decay_strides, self.length, tiling.chunks, tiling.tiles, self.scale, **self.sizes,
            EARLY=self.early,
        )  # fmt: skip
        if self.kind == HEAD:
            d_decay.copy_(shares.sum(0))


# ------------------------------------------------------------------------------------------------ operators of PyTorch


def _launch_mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    path: Tensor | None,
    scale: float,
    eps: float,
    result: int,
) -> tuple[Tensor, Tensor]:
    """Return the output (numerator or normalised) and the row sums: c for BOTH, c + eps for NORMALIZED, else empty."""
    query, key, value = _last_contiguous(query), _last_contiguous(key), _last_contiguous(value)
    out, row_sums = _outputs(query, value, result)
    if out.numel() or row_sums.numel():
        operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, path, scale)
        operator.forward(out, row_sums if result else None, result, eps)
    return out, row_sums


def _fake_mix(query, key, value, log_decay, key_mask, cu_seqlens, path, scale, eps, result):
    return _outputs(query, value, result)


def _outputs(query: Tensor, value: Tensor, result: int) -> tuple[Tensor, Tensor]:
    out = _heads_last(value, value.shape[-1], torch.float32 if result == BOTH else value.dtype)
    return out, query.new_empty(query.shape[:3] if result else (0,), dtype=torch.float32)


def _launch_mix_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    path: Tensor | None,
    out: Tensor | None,
    row_sums: Tensor | None,
    d_out: Tensor,
    d_row_sums: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and log_decay; the last is empty without log_decay.

    `out` and `row_sums` are given for NORMALIZED only, `d_row_sums` for BOTH only.
    """
    grads = _gradients(query, key, value, log_decay)
    if not query.numel():
        return tuple(g.zero_() for g in grads)
    query, key, value, d_out = (_last_contiguous(x) for x in (query, key, value, d_out))
    operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, path, scale, backward=True)
    bias = operator.delta(out, d_out) if row_sums is not None else d_row_sums
    bias = bias if bias is None else bias.float().contiguous()
    operator.backward(d_out, *grads, bias, row_sums)
    return grads


def _fake_mix_backward(
    query, key, value, log_decay, key_mask, cu_seqlens, path, out, row_sums, d_out, d_row_sums, scale
):
    return _gradients(query, key, value, log_decay)


def _gradients(query, key, value, log_decay) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (_heads_last(x, x.shape[-1], x.dtype) for x in (query, key, value))
    return *like, query.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, scale, _, result = inputs
    normalized = output if result == NORMALIZED else (None, None)
    ctx.save_for_backward(*tensors, *normalized)
    ctx.options = result, scale


def _differentiate(ctx, d_out, d_row_sums):
    result, scale = ctx.options
    d_row_sums = d_row_sums if result == BOTH else None
    saved = ctx.saved_tensors
    *grads, d_decay = _mix_backward(*saved, d_out, d_row_sums, scale)
    return *grads, None if saved[3] is None else d_decay, *[None] * 6


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "LION's fused kernels do not support second derivatives. Leave create_graph out. For second derivatives, set "
        "LION_BACKEND=torch in the environment, or compute the output from lion_hf.ops.attention_scores."
    )


_mix = KernelOperator(f"{_NAMESPACE}::mix", _launch_mix, fake=_fake_mix, differentiate=_differentiate, save=_save)
_mix_backward = KernelOperator(
    f"{_NAMESPACE}::mix_backward", _launch_mix_backward, fake=_fake_mix_backward, differentiate=_refuse
)


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
    path: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the operator on a GPU.

    `path` (length,) is the order of a scan; inputs and outputs keep their own order. `result` is "numerator",
    "normalized" or "both". The other arguments are those of `bidirectional_linear_attention`, which has checked them.
    """
    kind = ("numerator", "normalized", "both").index(result)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(query.device)
    out, row_sums = _mix(query, key, value, log_decay, key_mask, cu_seqlens, path, scale, float(eps), kind)
    return (out, row_sums) if kind == BOTH else out


_capability = functools.cache(torch.cuda.get_device_capability)  # that of a device never changes


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do."""
    dtypes = {x.dtype for x in (query, key, value)}
    if not query.is_cuda and not INTERPRETED:
        return f"they run on a GPU (or, with TRITON_INTERPRET=1, in Triton's interpreter), not on {query.device.type}"
    if not query.is_cuda and torch.bfloat16 in dtypes:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    capability = torch.cuda.get_device_capability if makes_graph() else _capability
    if query.is_cuda and torch.version.hip is None and capability(query.device) < (8, 0):
        return f"they need compute capability 8.0 or newer, which {torch.cuda.get_device_name(query.device)} lacks"
    if dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        return f"they support float32, bfloat16 and float16, not {', '.join(map(str, dtypes))}"
    if max(query.shape[-1], value.shape[-1]) > MAX_WIDTH:
        return f"they support heads of at most {MAX_WIDTH} features, not {max(query.shape[-1], value.shape[-1])}"
    return None
