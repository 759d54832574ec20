"""Scans of a grid along several paths, and their mean, for image encoders (arXiv 2502.16249)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import bidirectional_linear_attention, resolve_format
from .autograd import Options, lion
from .backend import fused_kernels
from .checks import check_arguments
from .tokens import without_autocast


def snake_orders(
    height: int, width: int, device: torch.device | str | None = None, *, prefix_tokens: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Return the two snake scans of a grid of patches, by default with a class token before it.

    The first scan follows the rows (row 0 to the right, row 1 to the left, ...), the second the columns (column 0 down,
    column 1 up, ...). Prefix tokens, such as the class token, come first in both.

    Args:
        height: number of rows of patches.
        width: number of patches in each row.
        device: device of the returned tensors; PyTorch's default device if None.
        prefix_tokens: number of tokens before the patches; 1 by default, 0 for a grid alone.

    Returns:
        Two pairs `(order, inverse)` of int64 tensors (prefix_tokens + height * width,). For tokens in raster order,
        `tokens[order]` is the sequence along the scan; `sequence[inverse]` is in raster order again.
    """
    raster = torch.arange(height * width, device=device).view(height, width)
    orders = []
    for lines in (raster, raster.transpose(0, 1)):
        odd = torch.arange(lines.shape[0], device=device).remainder(2).bool().unsqueeze(1)
        curve = torch.where(odd, lines.flip(1), lines).flatten()
        order = torch.cat([torch.arange(prefix_tokens, device=device), curve + prefix_tokens])
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
    """Compute linear attention with the mean of several decay masks, each along its own order of the tokens.

    This is how image encoders use the snake scans. The attention form builds the mean mask once. The other forms
    compute one scan after another, add numerators and denominators, and divide once.

    Args:
        query: (batch, heads, length, head_dim), any floating dtype.
        key: same shape as `query`.
        value: (batch, heads, length, value_dim).
        log_decays: one per scan, <= 0, all (heads,) or all (batch, heads, length) with the tokens in the order of
            `query`.
        orders: a pair `(order, inverse)` per scan, see `snake_orders`.
        format: as in `bidirectional_linear_attention`.
        chunk_size: as in `bidirectional_linear_attention`.
        normalize: whether to divide by the mean row sums.
        eps: added to the mean row sums before the division.
        check_values: as in `bidirectional_linear_attention`.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`. The scale is `head_dim**-0.5`.

    Raises:
        ValueError: for invalid arguments as in `bidirectional_linear_attention`; if `log_decays` is empty or its shapes
            are of both kinds; if there are not as many `orders` as `log_decays`.
    """
    if len({log_decay.dim() for log_decay in log_decays}) != 1:
        raise ValueError(
            f"log_decays has the shapes {[tuple(x.shape) for x in log_decays]}; it must hold one for each scan, all of "
            "them (heads,) or all (batch, heads, length)."
        )
    for log_decay in log_decays:
        form = check_arguments(query, key, value, log_decay, format, chunk_size, None, None, check_values)
    form, chunk_size = resolve_format(form, query.shape[2], query.device, log_decays[0]), int(chunk_size)
    kernels = fused_kernels(form, query, key, value, *log_decays)
    if form == "attention" and kernels is None:
        result = "normalized" if normalize else "numerator"
        options = Options(form, chunk_size, query.shape[-1] ** -0.5, result, eps, list(orders))
        with without_autocast(query.device):
            return lion(query, key, value, None, options, *log_decays).to(value.dtype)
    numerator = denominator = 0
    for log_decay, (order, inverse) in zip(log_decays, orders, strict=True):
        if kernels is not None:
            n, c = kernels(query, key, value, log_decay, None, None, query.shape[-1] ** -0.5, eps, "both", path=order)
        else:
            n, c = _along(order, inverse, query, key, value, log_decay, form, chunk_size)
        numerator, denominator = numerator + n, denominator + c
    scans = len(log_decays)
    return (numerator / (denominator.unsqueeze(-1) + scans * eps if normalize else scans)).to(value.dtype)


def _along(order, inverse, query, key, value, log_decay, form: str, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the numerator and the denominator of one scan."""
    log_decay = log_decay if log_decay.dim() == 1 else log_decay.index_select(2, order)
    n, c = bidirectional_linear_attention(
        *(x.index_select(2, order) for x in (query, key, value)),
        log_decay,
        format=form,
        chunk_size=chunk_size,
        return_denominator=True,
        check_values=False,
    )
    return n.index_select(2, inverse), c.index_select(2, inverse)
