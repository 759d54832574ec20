"""The feature map of image encoders on a GPU: silu(x) + 1/2, normalised to length 1.

Forward and backward each take one pass over memory, where PyTorch's operators take a dozen, in float32. Only x is saved
for the gradient.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from .parts import tl, triton


_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)
_ROWS = 32  # rows per program


@triton.jit
def _load_rows(pointer, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32), place, inside


@triton.jit
def _features(x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return silu(x) + 1/2, the inverse of its norm, and the sigmoid of x for the gradient."""
    gate = 1 / (1 + tl.exp(-x))
    y = tl.where((tl.arange(0, BLOCK) < WIDTH)[None, :], x * gate + 0.5, 0.0)
    return y, tl.rsqrt(tl.sum(y * y, 1))[:, None], gate


@triton.jit
def unit_silu_kernel(x, y, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    x_tile, place, inside = _load_rows(x, rows, WIDTH, BLOCK, ROWS)
    y_tile, inverse, _ = _features(x_tile, WIDTH, BLOCK)
    tl.store(y + place, (y_tile * inverse).to(y.dtype.element_ty), mask=inside)


@triton.jit
def unit_silu_backward_kernel(x, dy, dx, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    x_tile, place, inside = _load_rows(x, rows, WIDTH, BLOCK, ROWS)
    dy_tile = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    y_tile, inverse, gate = _features(x_tile, WIDTH, BLOCK)
    y_tile *= inverse
    d_tile = (dy_tile - y_tile * tl.sum(dy_tile * y_tile, 1)[:, None]) * inverse
    d_tile *= gate * (1 + x_tile * (1 - gate))
    tl.store(dx + place, d_tile.to(dx.dtype.element_ty), mask=inside)


def _launch(kernel, *tensors: Tensor) -> None:
    """Launch a kernel on tensors with the same strides, whose rows (last dimension) fill memory one after another."""
    width = tensors[0].shape[-1]
    rows = tensors[0].numel() // width if width else 0
    if rows:
        with torch.cuda.device_of(tensors[0]):
            kernel[(triton.cdiv(rows, _ROWS),)](
                *tensors, rows, WIDTH=width, BLOCK=triton.next_power_of_2(width), ROWS=_ROWS
            )


@torch.library.custom_op(f"{_NAMESPACE}::unit_silu", mutates_args=())
def unit_silu(x: Tensor) -> Tensor:
    """Apply the feature map to x (..., width). The result has the same shape, dtype and strides."""
    x = _dense(x)
    y = torch.empty_like(x)
    _launch(unit_silu_kernel, x, y)
    return y


@torch.library.custom_op(f"{_NAMESPACE}::unit_silu_backward", mutates_args=())
def _backward(x: Tensor, dy: Tensor) -> Tensor:
    x = _dense(x)
    dx = torch.empty_like(x)
    _launch(unit_silu_backward_kernel, x, torch.empty_like(x).copy_(dy) if dy.stride() != x.stride() else dy, dx)
    return dx


@unit_silu.register_fake
def _(x):
    return torch.empty_like(_dense(x))


@_backward.register_fake
def _(x, dy):
    return torch.empty_like(_dense(x))


def _dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if its rows do not fill memory one after another."""
    dense = torch.empty_like(x).stride() == x.stride()
    return x if dense and x.stride(-1) == 1 else x.contiguous()


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: from operators with second derivatives
        features = F.normalize(F.silu(x.float()) + 0.5, dim=-1).to(x.dtype)
        return torch.autograd.grad(features, x, dy, create_graph=True)[0]
    return _backward(x, dy)


unit_silu.register_autograd(_differentiate, setup_context=_save)
