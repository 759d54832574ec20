"""LION's operator on a GPU: launches of the kernels in kernels.py, as operators of PyTorch with gradients."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import (
    INTERPRETED,
    backward_kernel,
    delta_kernel,
    forward_kernel,
    propagate_kernel,
    states_kernel,
)
from .parts import FLOOR, triton


# PyTorch's operators have one name in a process, and a second definition frees the first. A copy of this file that came
# with a checkpoint is another module, and so has another name.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)

NONE, HEAD, TOKEN = 0, 1, 2  # kinds of decay
NUMERATOR, NORMALIZED, BOTH = 0, 1, 2  # kinds of results

# Wider heads would need more registers than a program has.
MAX_WIDTH = 128

# Tokens in a tile at most and warps of a program, for heads of at most 64 features; texts of up to _ONE_TILE tokens are
# one tile, since states cost more than larger tiles do. Measured on an H100 by benchmarks/bench_gpu.py.
_FORWARD = (64, 4)
_BACKWARD = (64, 4)
_ONE_TILE = (128, 8)
# Tokens at most where operands are float32, forward: of heads of at most 64 features on tensor cores, and of others.
# Backward takes half as many. Registers and shared memory hold no more; benchmarks/kernel_resources.py counts them.
# Such small tiles, and wider heads, take twice the warps.
_FLOAT32_TILES = (64, 32)

# Tiles of a chunk of LION-LIT, whose states are summed up anyway; chunks whose states are propagated at a time.
_TILES = 4
_GROUP = 8


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


def _tiling(batch: int, length: int, cu_seqlens: Tensor | None, largest: int, tiles: int) -> _Tiling:
    """Cuts a batch of texts, or a row of packed sequences, into tiles of at most `largest` tokens, and chunks of at
    most so many tiles."""
    tile = min(largest, max(16, triton.next_power_of_2(length)))
    tiles = min(tiles, triton.cdiv(length, tile))
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
    """Uninitialised (batch, heads, length, width), in memory (batch, length, heads, width): what follows is a view, and
    this is none, so that it can be changed in place."""
    batch, heads, length = x.shape[:3]
    strides = length * heads * width, width, heads * width, 1
    return x.new_empty_strided((batch, heads, length, width), strides, dtype=dtype)


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
        # float16 fits into the mantissa of tf32, whose range holds the factors that its own does not.
        self.precision = "bf16" if dtypes == {torch.bfloat16} else "ieee" if exact else "tf32"
        wide = max(self.head_dim, self.value_dim) > 64
        self.early = self.precision == "bf16" and not wide
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

    def _states(self, y, z, wants_vectors, bias=None, row_sums=None, queries=False) -> tuple:
        """What reaches each chunk: states (chunks, H, sides, D, E) and, where wanted, vectors (chunks, H, sides, D)."""
        if not self.has_states:
            return None, None
        tiling, sides = self.tiling, 1 if self.kind == NONE else 2
        # What products round to bfloat16 anyway need not be kept wider; the sum without decay is small.
        dtype = torch.bfloat16 if self.precision == "bf16" and self.kind != NONE else torch.float32
        shape = tiling.all_chunks, self.heads, sides, self.head_dim
        states = y.new_empty(*shape, self.value_dim, dtype=dtype)
        vectors = y.new_empty(shape, dtype=torch.float32) if wants_vectors else None
        totals = None if self.kind == NONE else y.new_empty(shape[:2], dtype=torch.float32)
        states_kernel[tiling.all_chunks, self.heads](
            y, z, states, vectors, totals, bias, row_sums, self.key_mask, self.decay, tiling.table, self.path,
            *_strides(y), *_strides(z), *self.decay_strides, self.length, tiling.chunks, tiling.tiles,
            **self.sizes, QUERIES=queries,
        )  # fmt: skip
        size, block = self.head_dim * self.value_dim, 256
        propagate_kernel[tiling.sequences * self.heads, triton.cdiv(size, block) + wants_vectors, sides](
            states, vectors, totals, tiling.borders, self.heads, tiling.chunks,
            SIZE=size, WIDTH=self.head_dim, BLOCK=block, GROUP=_GROUP, DECAY=self.kind, num_warps=1,
        )  # fmt: skip
        return states, vectors

    def _grid(self) -> tuple[int, int]:
        return self.tiling.all_chunks * self.tiling.tiles, self.heads

    def forward(self, out: Tensor, row_sums: Tensor, result: int, eps: float) -> None:
        """Fills `out`, which lies in memory as `_heads_last` makes it, and `row_sums` unless `result` is NUMERATOR."""
        query, key, value, tiling = self.query, self.key, self.value, self.tiling
        states, vectors = self._states(key, value, result != NUMERATOR)
        forward_kernel[self._grid()](
            query, key, value, out, row_sums, states, vectors, self.key_mask, self.decay, tiling.table, self.path,
            *_strides(query), *_strides(key), *_strides(value), *self.decay_strides,
            self.length, tiling.chunks, tiling.tiles, self.scale, eps, **self.sizes, RESULT=result, EARLY=self.early,
        )  # fmt: skip

    def delta(self, out: Tensor, d_out: Tensor) -> Tensor:
        """-d_out_i . out_i, (batch, heads, length)."""
        delta = out.new_empty(self.batch, self.heads, self.length, dtype=torch.float32)
        tile = self.tiling.tile
        tiles = triton.cdiv(self.length, tile)
        delta_kernel[self.batch * tiles, self.heads](
            out, d_out, delta, *_strides(out), *_strides(d_out), self.length, tiles,
            WIDTH=self.value_dim, BLOCK=self.sizes["BLOCK_V"], TILE=tile,
        )  # fmt: skip
        return delta

    def backward(self, d_out, d_query, d_key, d_value, d_decay, bias, row_sums) -> None:
        """Fills the gradients, which lie in memory as `_gradients` makes them."""
        query, key, value, tiling = self.query, self.key, self.value, self.tiling
        key_states, key_vectors = self._states(key, value, bias is not None)
        query_states, query_vectors = self._states(query, d_out, bias is not None, bias, row_sums, queries=True)
        shares = d_decay
        if self.kind == HEAD:
            shares = query.new_empty(tiling.all_chunks, self.heads, dtype=torch.float32)
        backward_kernel[self._grid()](
            query, key, value, d_out, d_query, d_key, d_value, shares,
            key_states, key_vectors, query_states, query_vectors, bias, row_sums, self.key_mask, self.decay,
            tiling.table, self.path, *_strides(query), *_strides(key), *_strides(value), *_strides(d_out),
            *self.decay_strides, self.length, tiling.chunks, tiling.tiles, self.scale, **self.sizes,
            EARLY=self.early,
        )  # fmt: skip
        if self.kind == HEAD:
            d_decay.copy_(torch.where(self.decay >= FLOOR.value, shares.sum(0), 0))


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
    path: Tensor | None,
    scale: float,
    eps: float,
    result: int,
) -> tuple[Tensor, Tensor]:
    """The output (numerator, or normalised) and the row sums: c for BOTH, c + eps for NORMALIZED, else empty."""
    query, key, value = (_last_contiguous(x) for x in (query, key, value))
    out, row_sums = _outputs(query, value, result)
    if out.numel() or row_sums.numel():
        operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, path, scale)
        operator.forward(out, row_sums if result else None, result, eps)
    return out, row_sums


@_mix.register_fake
def _(query, key, value, log_decay, key_mask, cu_seqlens, path, scale, eps, result):
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
    path: Tensor | None,
    out: Tensor | None,
    row_sums: Tensor | None,
    d_out: Tensor,
    d_row_sums: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and log_decay (empty where there is none). `out` and `row_sums` are those of a
    normalised result, `d_row_sums` is that of BOTH."""
    grads = _gradients(query, key, value, log_decay)
    if not query.numel():
        return tuple(g.zero_() for g in grads)
    query, key, value, d_out = (_last_contiguous(x) for x in (query, key, value, d_out))
    operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, path, scale, backward=True)
    bias = operator.delta(out, d_out) if row_sums is not None else d_row_sums
    bias = bias if bias is None else bias.float().contiguous()
    operator.backward(d_out, *grads, bias, row_sums)
    return grads


@_mix_backward.register_fake
def _(query, key, value, log_decay, key_mask, cu_seqlens, path, out, row_sums, d_out, d_row_sums, scale):
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
    *grads, d_decay = _mix_backward(*ctx.saved_tensors, d_out, d_row_sums, scale)
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
    path: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator on a GPU, in chunks of one tile. `path`, (length,), is the order of a scan: inputs and outputs keep
    their own. Other arguments as in `bidirectional_linear_attention`,
    which has checked them; `result` is "numerator", "normalized" or "both"."""
    kind = ("numerator", "normalized", "both").index(result)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(query.device)
    out, row_sums = _mix(query, key, value, log_decay, key_mask, cu_seqlens, path, scale, float(eps), kind)
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
