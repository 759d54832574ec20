"""Scans of a grid along several paths, and their mean: the natural variants of image encoders (arXiv 2502.16249)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import bidirectional_linear_attention, resolve_format
from .autograd import lion
from .backend import fused_kernels
from .checks import check_arguments
from .tokens import without_autocast


def snake_orders(height: int, width: int, device: torch.device | str | None = None) -> list[tuple[Tensor, Tensor]]:
    """The two snake scans of a height x width grid with a class token before it.

    The first walks the rows boustrophedon (row 0 rightward, row 1 leftward, ...), the second the columns (column 0
    downward, column 1 upward, ...). The class token stays at position 0 of both.

    Returns:
        Two pairs `(order, inverse)` of int64 tensors (1 + height * width,): `tokens[order]` is the sequence along the
        curve when `tokens` is in raster order, `sequence[inverse]` is in raster order again.
    """
    raster = torch.arange(height * width, device=device).view(height, width)
    orders = []
    for lines in (raster, raster.transpose(0, 1)):
        odd = torch.arange(lines.shape[0], device=device).remainder(2).bool().unsqueeze(1)
        curve = torch.where(odd, lines.flip(1), lines).flatten()
        order = torch.cat([curve.new_zeros(1), curve + 1])
        orders.append((order, order.argsort()))
    return orders


def averaged_scans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decays: Sequence[Tensor],
    orders: Sequence[tuple[Tensor, Tensor]],
    *,
    format: str = "attention",
    chunk_size: int = 64,
    normalize: bool = True,
    eps: float = 1e-6,
    check_values: bool = True,
) -> Tensor:
    """The operator under the mean of several masks, each along its own order: the snake scans of images.

    The attention form builds the mean mask and multiplies once; the others run one scan after the other and add
    numerators and denominators before the one division.

    Args:
        query: (batch, heads, length, head_dim), as in [`bidirectional_linear_attention`], and so `key` and `value`.
        log_decays: one for each scan, all (heads,), or all (batch, heads, length) with the tokens in the order of
            `query`.
        orders: one for each scan, see [`snake_orders`].
        format: as in [`bidirectional_linear_attention`], and so `chunk_size`.
        normalize: divide by the mean row sums.
        eps: added to the mean row sums before the division.
        check_values: as in [`bidirectional_linear_attention`].

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
        form = check_arguments(query, key, value, log_decay, format, chunk_size, None, None, check_values)
    form = resolve_format(form, query.shape[2], query.device, log_decays[0])
    if form == "attention" and fused_kernels(query, key, value, form) is None:
        result = "normalized" if normalize else "numerator"
        options = form, chunk_size, query.shape[-1] ** -0.5, result, eps, list(orders)
        with without_autocast(query.device):
            return lion(query, key, value, None, options, *log_decays).to(value.dtype)
    numerator = denominator = 0
    for log_decay, (order, inverse) in zip(log_decays, orders, strict=True):
        log_decay = log_decay if log_decay.dim() == 1 else log_decay.index_select(2, order)
        along = (x.index_select(2, order) for x in (query, key, value))
        n, c = bidirectional_linear_attention(
            *along, log_decay, format=form, chunk_size=chunk_size, return_denominator=True, check_values=False
        )
        numerator = numerator + n.index_select(2, inverse)
        denominator = denominator + c.index_select(2, inverse)
    scans = len(log_decays)
    return (numerator / (denominator.unsqueeze(-1) + scans * eps if normalize else scans)).to(value.dtype)
