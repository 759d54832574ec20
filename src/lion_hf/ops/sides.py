"""The two sides of the general operator: what a token reads from its left, and what it reads from its right.

On each side the weight of key j for query i is the exponential of ::

    read_i + (sum of the gates of the tokens strictly between j and i) + write_j

All conventions have this form: the gate of the token itself is a part of `write`, of `read`, or of neither. So have
log-weights of the keys, once the running maximum is subtracted. Every summand is then <= 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .decays import floor_of, sum_dtype


# The shares of its own gate that a token puts into what it reads and into what it writes.
CONVENTIONS = {"left": (0.0, 1.0), "entered": (1.0, 0.0), "between": (0.0, 0.0), "edge": (0.5, 0.5)}

DIRECTIONS = {"both": (False, True), "forward": (False,), "backward": (True,)}

_LEAST_WEIGHT = -1e30  # replaces a log-weight of -inf, so that differences are numbers
_LEAST_GATE = -1e7  # replaces a gate of -inf before weights of keys, up to 1e6 in size, are added


class Side(NamedTuple):
    """The exponents of one side, (b, heads, length), or (b, heads, length, head_dim) for a decay per channel.

    b is 1 or the batch.
    """

    gates: Tensor
    read: Tensor | None  # None is 0
    write: Tensor | None
    reverse: bool  # whether keys are to the right of the query

    def exponents(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gates, reads and writes, with zeros in place of None."""
        zero = self.gates.new_zeros((1,) * self.gates.dim()).expand_as(self.gates)
        return self.gates, zero if self.read is None else self.read, zero if self.write is None else self.write

    @property
    def by_channel(self) -> bool:
        """Whether there is a decay for every channel of the key."""
        return self.gates.dim() == 4


def make_side(
    log_decay: Tensor | None, like: Tensor, reverse: bool, convention: str, dtype: torch.dtype, weighted: bool = False
) -> Side:
    """Return the exponents of a side for queries `like` (batch, heads, length, head_dim) and any log-decay.

    `weighted`: whether log-weights of keys are still to be added (`stabilise`).
    """
    heads, length = like.shape[1:3]
    if log_decay is None:
        gates = torch.zeros(1, heads, 1, dtype=sum_dtype(like.device), device=like.device).expand(-1, -1, length)
        return Side(gates, None, None, reverse)
    by_channel = log_decay.dim() in (2, 4)
    floor = _LEAST_GATE if weighted else floor_of(dtype)
    gates = log_decay.to(dtype if by_channel and not weighted else sum_dtype(like.device)).clamp(min=floor)
    if log_decay.dim() == 1:
        gates = gates[None, :, None].expand(1, heads, length)
    elif log_decay.dim() == 2:
        gates = gates[None, :, None].expand(1, heads, length, -1)
    read, write = CONVENTIONS[convention]
    return Side(gates, _share(gates, read), _share(gates, write), reverse)


def _share(gates: Tensor, share: float) -> Tensor | None:
    return gates if share == 1 else gates * share if share else None


def stabilise(
    sides: list[Side], log_weights: list[Tensor | None], own: list[Tensor], key_mask: Tensor | None, dtype: torch.dtype
) -> tuple[list[Side], Tensor]:
    """Multiply keys by exp(log_weight), in units in which no exponent exceeds 0.

    M_t is the largest exponent with which a key reaches token t. It turns the gates into g_t + M_t - M_{t+1}, and
    cancels in every product, so it takes no part in the gradient.

    Args:
        sides: the sides.
        log_weights: (batch, heads, length) for each side, of any sign; None is 0.
        own: exponents (batch, heads, length) of what tokens read from themselves.
        key_mask: (batch, length), bool; masked keys do not count.
        dtype: the accumulation dtype.

    Returns:
        The sides in units of exp(maximum), and the maximum (batch, heads, length), the largest exponent of a row.
    """
    walks = [_walk(side, log_weight, key_mask, dtype) for side, log_weight in zip(sides, log_weights, strict=True)]
    rows = [read.amax(-1) if read.dim() == 4 else read for _, read, _ in walks]
    for exponent in own:
        exponent = exponent.to(rows[0].dtype).clamp(min=_LEAST_WEIGHT)
        rows.append(exponent if key_mask is None else exponent.masked_fill(~key_mask[:, None], _LEAST_WEIGHT))
    maximum = torch.stack(torch.broadcast_tensors(*rows)).amax(0).detach()
    stable = [
        Side(gates, read - (maximum.unsqueeze(-1) if side.by_channel else maximum), write, side.reverse)
        for side, (gates, read, write) in zip(sides, walks, strict=True)
    ]
    return stable, maximum


def _walk(side: Side, log_weight: Tensor | None, key_mask: Tensor | None, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gates and writes of a side in units of the running maximum, and what tokens read, with the maximum."""
    wide = sum_dtype(side.gates.device)
    gates, read, write = (x.to(wide) for x in side.exponents())
    if log_weight is not None:
        weight = log_weight.to(wide).clamp(min=_LEAST_WEIGHT)
        write = write + (weight.unsqueeze(-1) if side.by_channel else weight)
    if key_mask is not None:
        keep = key_mask[:, None]
        write = torch.where(keep.unsqueeze(-1) if side.by_channel else keep, write, _LEAST_WEIGHT)
    with torch.no_grad():
        flow = (gates.flip(2), write.flip(2)) if side.reverse else (gates, write)
        sums = flow[0].cumsum(2)
        after = sums + (flow[1] - sums).cummax(2).values  # M_{t+1}
        before = F.pad(after, (0, 0, 1, 0) if side.by_channel else (1, 0), value=_LEAST_WEIGHT)[:, :, :-1]  # M_t
        if side.reverse:
            after, before = after.flip(2), before.flip(2)
    return (gates + (before - after)).clamp(min=floor_of(dtype)), read + before, write - after
