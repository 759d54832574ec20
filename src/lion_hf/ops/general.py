"""The general operator: what each token reads from its left, from its right and from itself, with any decays.

It covers the linear transformers of arXiv 2502.16249, appendix B.6, in both directions. `two_sided_attention` (api.py)
calls it for everything that is not LION's own operator.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dense import dense_scores
from .sides import DIRECTIONS, Side, make_side, stabilise
from .tokens import accumulation_dtype, without_autocast


class Inputs(NamedTuple):
    """What a token reads on one side, see `two_sided_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    log_weight: Tensor | None


class Settings(NamedTuple):
    """The options that are not tensors, see `two_sided_attention`."""

    convention: str
    direction: str
    normalize: bool | str
    return_denominator: bool
    scale: float
    eps: float
    form: str
    chunk_size: int


def general(
    forward: Inputs, backward: Inputs, diagonal: Tensor | float | None, key_mask: Tensor | None, settings: Settings
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `two_sided_attention` for checked arguments."""
    dtype = accumulation_dtype(*forward[:3], *backward[:3])
    with without_autocast(forward.value.device):
        mask = None if key_mask is None else key_mask.bool()
        inputs = [(forward, backward)[reverse] for reverse in DIRECTIONS[settings.direction]]
        sides = [
            make_side(x.log_decay, x.value, settings.convention, reverse, dtype)
            for x, reverse in zip(inputs, DIRECTIONS[settings.direction], strict=True)
        ]
        weight, maximum = None, None
        if any(x.log_weight is not None for x in (forward, *inputs)):
            weight = torch.zeros_like(forward.value[..., 0]) if forward.log_weight is None else forward.log_weight
            own = (
                [weight, torch.zeros_like(weight)] if isinstance(diagonal, Tensor) and diagonal.dim() == 3 else [weight]
            )
            sides, maximum = stabilise(sides, [x.log_weight for x in inputs], own, mask)
        own = _own(diagonal, weight, maximum, forward.value, mask, dtype)
        n, c = _sums(forward, inputs, sides, own, mask, dtype, settings)
        n, c = _finished(n, c, maximum, dtype, settings)
        return (n, c) if settings.return_denominator else n.to(forward.value.dtype)


class Own(NamedTuple):
    """What a token reads from itself, (b, heads, length)."""

    factor: Tensor  # of its score, or of its value if the diagonal is given
    given: bool
    mask: Tensor  # the entry of the mask, for normalize="mask"


def _own(diagonal, weight: Tensor | None, maximum: Tensor | None, value: Tensor, mask: Tensor | None, dtype) -> Own:
    heads, length = value.shape[1:3]
    given = isinstance(diagonal, Tensor) and diagonal.dim() == 3
    factor = 1.0 if diagonal is None else diagonal
    if not isinstance(factor, Tensor):
        factor = value.new_full((heads,), factor, dtype=dtype)
    factor = (factor if factor.dim() == 3 else factor[None, :, None]).to(dtype)
    unit = value.new_ones(1, heads, 1, dtype=dtype)
    if maximum is not None:
        # Masked keys can exceed the maximum of their row.
        unit = ((weight.to(maximum.dtype) - maximum).clamp(max=0)).exp().to(dtype)
        factor = factor * (torch.exp(-maximum.clamp(min=0)).to(dtype) if given else unit)
    factor, unit = (x.expand(-1, -1, length) for x in (factor, unit))
    if mask is not None:
        factor, unit = (torch.where(mask[:, None], x, 0) for x in (factor, unit))
    return Own(factor, given, unit)


def _sums(forward: Inputs, inputs: list[Inputs], sides: list[Side], own: Own, mask, dtype, s: Settings):
    """Return n and c, without c if nothing divides by it."""
    heads = forward.value.shape[1]

    def tensors(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _grouped(x.query.to(dtype), heads), _grouped(x.key.to(dtype), heads), x.value.to(dtype)
        return q, _kept(k, mask), _kept(v, mask)

    by_mask = s.normalize == "mask"
    divided = not by_mask and (s.normalize or s.return_denominator)
    q, k, v = tensors(forward)
    score = own.factor if own.given else own.factor * (q * k).sum(-1)
    n, c = score.unsqueeze(-1) * v, own.mask if by_mask else score if divided else None
    for x, side in zip(inputs, sides, strict=True):
        q, k, v = tensors(x)
        scores = dense_scores(q, k, side)
        n = n + torch.matmul(scores, v)
        if by_mask:
            width = q.shape[-1] if side.by_channel else 1
            ones = torch.ones_like(q[..., :width])
            scores = dense_scores(ones / width, _kept(ones, mask), side)
        c = None if c is None else c + scores.sum(-1)
    return n, c if c is None else c.expand(n.shape[:3])


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of x (batch, groups, length, width) to `heads`, each for a block of consecutive heads."""
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask[:, None, :, None], x, 0)


def _finished(n: Tensor, c: Tensor | None, maximum: Tensor | None, dtype: torch.dtype, s: Settings):
    """Apply the scale, divide as `normalize` says, and leave the units of the maximum."""
    n = n * s.scale
    c = c if c is None or s.normalize == "mask" else c * s.scale
    if s.normalize and not s.return_denominator:
        one = 1.0 if maximum is None else torch.exp(-maximum).to(dtype)
        below = c.abs().clamp(min=one) if s.normalize == "clamp" else c + s.eps * one
        return n / below.unsqueeze(-1), c
    if maximum is None:
        return n, c
    # In two halves, so that 0 times an overflow is 0.
    half = (maximum / 2).to(dtype).clamp(max=math.log(torch.finfo(dtype).max) - 1).exp()
    return n * half.unsqueeze(-1) * half.unsqueeze(-1), c if c is None else c * half * half
