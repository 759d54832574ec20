"""Feature maps on a GPU: silu(x) + 1/2, or silu(x), normalised to length 1. See nn/features.py for their definitions.

Forward and backward each take one pass over memory, where PyTorch's operators take a dozen, in float32. Only x is saved
for the gradient. One launch serves query and key.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from .direct import KernelOperator
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
def _unnormed(x, SHIFT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return silu(x) + SHIFT, the inverse of its norm, and the sigmoid of x for the gradient."""
    gate = 1 / (1 + tl.exp(-x))
    y = tl.where((tl.arange(0, BLOCK) < WIDTH)[None, :], x * gate + SHIFT, 0.0)
    return y, tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None], gate


@triton.jit
def _forward_rows(
    x, y, rows,
    SHIFT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x_tile, place, inside = _load_rows(x, rows, WIDTH, BLOCK, ROWS)
    y_tile, inverse, _ = _unnormed(x_tile, SHIFT, EPS, WIDTH, BLOCK)
    tl.store(y + place, (y_tile * inverse).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows(
    x, dy, dx, rows,
    SHIFT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x_tile, place, inside = _load_rows(x, rows, WIDTH, BLOCK, ROWS)
    dy_tile = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    y_tile, inverse, gate = _unnormed(x_tile, SHIFT, EPS, WIDTH, BLOCK)
    y_tile *= inverse
    d_tile = (dy_tile - y_tile * tl.sum(dy_tile * y_tile, 1)[:, None]) * inverse
    d_tile *= gate * (1 + x_tile * (1 - gate))
    tl.store(dx + place, d_tile.to(dx.dtype.element_ty), mask=inside)


# In both kernels, programs with index 1 on the second axis compute the second set of tensors.


@triton.jit
def features_kernel(
    x, y, x_2, y_2, rows,
    SHIFT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _forward_rows(x, y, rows, SHIFT, EPS, WIDTH, BLOCK, ROWS)
    else:
        _forward_rows(x_2, y_2, rows, SHIFT, EPS, WIDTH, BLOCK, ROWS)


@triton.jit
def features_backward_kernel(
    x, dy, dx, x_2, dy_2, dx_2, rows,
    SHIFT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _backward_rows(x, dy, dx, rows, SHIFT, EPS, WIDTH, BLOCK, ROWS)
    else:
        _backward_rows(x_2, dy_2, dx_2, rows, SHIFT, EPS, WIDTH, BLOCK, ROWS)


def _launch(kernel, first: list[Tensor], second: list[Tensor] | None, shift: float, eps: float) -> None:
    """Launch a kernel on one set of tensors or two. Rows (last dimension) fill memory one after another."""
    width = first[0].shape[-1]
    rows = first[0].numel() // width if width else 0
    if rows:
        kernel[-(-rows // _ROWS), 1 if second is None else 2](
            *first, *(second or first), rows,
            SHIFT=shift, EPS=eps, WIDTH=width, BLOCK=1 << (width - 1).bit_length(), ROWS=_ROWS,
        )  # fmt: skip


def _with_result(x: Tensor) -> list[Tensor]:
    """Return x, or a contiguous copy if its rows do not fill memory one after another, and an empty tensor like it."""
    result = torch.empty_like(x)
    if result.stride() == x.stride() and x.stride(-1) == 1:
        return [x, result]
    x = x.contiguous()
    return [x, torch.empty_like(x)]


def _launch_features(x: Tensor, x_2: Tensor | None, shift: float, eps: float) -> tuple[Tensor, Tensor]:
    """Apply the feature map to one tensor or two of one shape (..., width). The second result is empty without x_2.

    Results have the shape and dtype of the inputs, and their strides where rows fill memory.
    """
    first = _with_result(x)
    second = None if x_2 is None else _with_result(x_2)
    _launch(features_kernel, first, second, shift, eps)
    return first[-1], x.new_empty(0) if second is None else second[-1]


def _launch_backward(
    x: Tensor, x_2: Tensor | None, dy: Tensor, dy_2: Tensor, shift: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and x_2 (empty without x_2) from those of the results."""
    first = _with_gradients(x, dy)
    second = None if x_2 is None else _with_gradients(x_2, dy_2)
    _launch(features_backward_kernel, first, second, shift, eps)
    return first[-1], x.new_empty(0) if second is None else second[-1]


def _with_gradients(x: Tensor, dy: Tensor) -> list[Tensor]:
    x, dx = _with_result(x)
    return [x, dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy), dx]


def _fake(x, x_2, *_):
    return _with_result(x)[1], x.new_empty(0) if x_2 is None else _with_result(x_2)[1]


def _save(ctx, inputs, output) -> None:
    x, x_2, *ctx.constants = inputs
    ctx.save_for_backward(x, x_2)


def _differentiate(ctx, dy, dy_2):
    x, x_2 = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: from operators with second derivatives
        return _composed(x, dy, *ctx.constants), _composed(x_2, dy_2, *ctx.constants), None, None
    dx, dx_2 = _backward(x, x_2, dy, dy_2, *ctx.constants)
    return dx, None if x_2 is None else dx_2, None, None


def _composed(x: Tensor | None, dy: Tensor, shift: float, eps: float) -> Tensor | None:
    if x is None or not x.requires_grad:
        return None
    y = F.silu(x.float()) + shift
    y = (y / (y.square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    return torch.autograd.grad(y, x, dy, create_graph=True)[0]


_backward = KernelOperator(f"{_NAMESPACE}::features_backward", _launch_backward, fake=_fake)
_features = KernelOperator(
    f"{_NAMESPACE}::features", _launch_features, fake=_fake, save=_save, differentiate=_differentiate
)


def normed_silu(x: Tensor, *, shift: float, eps: float) -> Tensor:
    """Return silu(x) + shift, divided by sqrt(n + eps) with its squared norm n over the last dimension."""
    return _features(x, None, shift, eps)[0]


def normed_silu_of_both(query: Tensor, key: Tensor, *, shift: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return `normed_silu` of two tensors of the same shape, from one launch."""
    return _features(query, key, shift, eps)
