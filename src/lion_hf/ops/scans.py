"""Orders in which an image encoder reads the patches of a grid (arXiv 2502.16249, the natural variants)."""

import torch
from torch import Tensor


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
