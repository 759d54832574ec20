"""Softmax attention in a band on a GPU: PyTorch operators with gradients that launch the kernels of band.py."""

import math
import re

import torch
from torch import Tensor

from ..tokens import default_scale
from .band import forward_kernel, keys_kernel, queries_kernel
from .direct import KernelOperator
from .launch import _block, _heads_last, _last_contiguous, _power_of_2, _strides, _tf32_is_allowed


_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)  # as in launch.py

# (tokens of a program, tokens that it reads at a time, warps, stages of the pipeline) of each kernel, by the precision
# of products, for heads of at most 64 features. Registers and shared memory limit them; benchmarks/kernel_resources.py
# counts both. Those of half precision were measured on an H100 with a reach of 64. Wider heads take the tiles of _WIDE.
_NARROW = {
    "half": {"forward": (64, 64, 4, 3), "queries": (64, 64, 4, 3), "keys": (64, 32, 4, 3)},
    "tf32": {"forward": (64, 32, 4, 2), "queries": (64, 32, 4, 2), "keys": (64, 32, 4, 2)},
    "ieee": {"forward": (32, 32, 4, 2), "queries": (32, 32, 4, 2), "keys": (32, 32, 8, 2)},
}
_WIDE = {
    "half": {"forward": (64, 64, 4, 2), "queries": (64, 32, 4, 2), "keys": (64, 32, 4, 2)},
    "tf32": {"forward": (32, 32, 4, 2), "queries": (32, 32, 4, 2), "keys": (32, 32, 4, 2)},
    "ieee": {"forward": (32, 16, 8, 2), "queries": (32, 16, 4, 2), "keys": (32, 16, 4, 2)},
}


class _Launcher:
    """The launches for one set of inputs; see the docstring of band.py."""

    def __init__(self, query, key, value, key_mask, bounds, reach):
        self.tensors = query, key, value
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.value_dim = value.shape[-1]
        self.key_mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
        self.bounds = bounds
        self.reach = min(reach, self.length)
        self.scale = default_scale(query) if self.head_dim else 1.0
        dtypes = {query.dtype, key.dtype, value.dtype}
        low = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(query.dtype) if len(dtypes) == 1 else None
        self.precision = low or ("tf32" if _tf32_is_allowed() else "ieee")
        tables = _WIDE if max(self.head_dim, self.value_dim) > 64 else _NARROW
        self.tiles = tables["half" if low else self.precision]

    def launch(self, name: str, kernel, *tensors: Tensor, strided: tuple[Tensor, ...], numbers: tuple[float, ...]):
        """Launch a kernel. `strided` are the tensors whose strides it takes, `numbers` its last ones."""
        tile, step, warps, stages = self.tiles[name]
        longest = max(16, _power_of_2(self.length))
        tile = min(tile, longest)
        tiles = -(-self.length // tile)
        kernel[(self.batch * tiles * self.heads,)](
            *tensors, self.key_mask, self.bounds, *(stride for x in strided for stride in _strides(x)),
            self.length, tiles, self.heads, self.reach, self.scale * math.log2(math.e), *numbers,
            WIDTH_K=self.head_dim, WIDTH_V=self.value_dim,
            BLOCK_K=_block(self.head_dim), BLOCK_V=_block(self.value_dim),
            TILE=tile, STEP=min(step, longest), PRECISION=self.precision,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Fill `out`, made by `_heads_last`, and `lse`."""
        self.launch("forward", forward_kernel, *self.tensors, out, lse, strided=self.tensors, numbers=())

    def backward(self, out: Tensor, lse: Tensor, d_out: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor):
        """Fill the gradients, made by `_heads_last`."""
        delta = torch.empty_like(lse)
        self.launch(
            "queries", queries_kernel, *self.tensors, out, d_out, d_query, lse, delta,
            strided=(*self.tensors, out, d_out), numbers=(self.scale,),
        )  # fmt: skip
        self.launch(
            "keys", keys_kernel, *self.tensors, d_out, d_key, d_value, lse, delta,
            strided=(*self.tensors, d_out), numbers=(self.scale,),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ operators of PyTorch


def _launch_band(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, bounds: Tensor | None, reach: int
) -> tuple[Tensor, Tensor]:
    """Return the output and the logarithms to base 2 of the sums of the weights, (batch, heads, length)."""
    out, lse = _outputs(query, value)
    if lse.numel():
        query, key, value = (_last_contiguous(x) for x in (query, key, value))
        _Launcher(query, key, value, key_mask, bounds, reach).forward(out, lse)
    return out, lse


def _fake_band(query, key, value, key_mask, bounds, reach):
    return _outputs(query, value)


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = _heads_last(value, value.shape[-1], value.dtype)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _launch_band_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    bounds: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grads = _gradients(query, key, value)
    if lse.numel():
        query, key, value, out, d_out = (_last_contiguous(x) for x in (query, key, value, out, d_out))
        _Launcher(query, key, value, key_mask, bounds, reach).backward(out, lse, d_out, *grads)
    return grads


def _fake_band_backward(query, key, value, key_mask, bounds, out, lse, d_out, reach):
    return _gradients(query, key, value)


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads_last(x, x.shape[-1], x.dtype) for x in tensors)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.reach = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, d_out, _):
    return *_band_backward(*ctx.saved_tensors, d_out, ctx.reach), None, None, None


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "The fused kernels of local attention do not support second derivatives. Leave create_graph out. For second "
        "derivatives, set LION_BACKEND=torch in the environment."
    )


_band = KernelOperator(f"{_NAMESPACE}::band", _launch_band, fake=_fake_band, differentiate=_differentiate, save=_save)
_band_backward = KernelOperator(
    f"{_NAMESPACE}::band_backward", _launch_band_backward, fake=_fake_band_backward, differentiate=_refuse
)


def fused_band(
    query: Tensor, key: Tensor, value: Tensor, reach: int, key_mask: Tensor | None, bounds: Tensor | None
) -> Tensor:
    """Compute softmax attention in a band on a GPU.

    `bounds` (2, length), int32, holds the first token and the end of the sequence of each token of a packed row. The
    other arguments are those of `band_attention`. The result is (batch, length, heads, value_dim) in memory.
    """
    return _band(query, key, value, key_mask, bounds, reach)[0]
