"""The general operator: what each token reads from its left, from its right and from itself, with any decays.

It covers the linear transformers of arXiv 2502.16249, appendix B.6, in both directions. `two_sided_attention` (api.py)
calls it for everything that is not LION's own operator.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import Options, lion
from .checks import is_exporting, makes_graph
from .decays import differentiable_exp
from .dense import dense_scores
from .diagonal import diagonal_scan
from .sides import CONVENTIONS, DIRECTIONS, Side, make_side, stabilise
from .tokens import accumulation_dtype, over_heads, walks_chunks, without_autocast


class Inputs(NamedTuple):
    """What a token reads on one side, see `two_sided_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    log_weight: Tensor | None


class Settings(NamedTuple):
    """The options that are not tensors, see `two_sided_attention`."""

    convention: str | None  # None if log-weights made the exponents of the sides different
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
        weighted = any(x.log_weight is not None for x in (forward, *inputs))
        kind = settings.convention, dtype, weighted
        sides = [make_side(x.log_decay, x.value, x is not forward, *kind) for x in inputs]
        if len(inputs) == 2 and forward.log_decay is backward.log_decay:
            sides[1] = sides[0]._replace(reverse=True)
        weight, maximum = None, None
        if weighted:
            weight = torch.zeros_like(forward.value[..., 0]) if forward.log_weight is None else forward.log_weight
            weight = weight if mask is None else torch.where(mask[:, None], weight, 0)
            own = _own_exponents(diagonal, weight, settings.normalize == "mask")
            sides, maximum = stabilise(sides, [x.log_weight for x in inputs], own, mask, dtype)
            settings = settings._replace(convention=None)
        own = _own(diagonal, weight, maximum, forward.value, mask, dtype)
        n, c = _sums(forward, inputs, sides, own, mask, dtype, settings)
        n, c = _finished(n, c, maximum, dtype, settings)
        return (n, c) if settings.return_denominator else n.to(forward.value.dtype)


class Own(NamedTuple):
    """What a token reads from itself, (b, heads, length)."""

    factor: Tensor  # of its score, or of its value if the diagonal is given
    given: bool
    mask: Tensor  # the entry of the mask, for normalize="mask"


def _own_exponents(diagonal: Tensor | float | None, weight: Tensor, by_mask: bool) -> list[Tensor]:
    """Return the exponents of what tokens read from themselves. A diagonal of 0 reads nothing."""
    if isinstance(diagonal, Tensor) and diagonal.dim() == 3:
        given = torch.zeros_like(weight)
        return [given, weight] if by_mask else [given]
    if by_mask or diagonal is None:
        return [weight]
    factor = diagonal.unsqueeze(-1) if isinstance(diagonal, Tensor) else weight.new_full((1,), diagonal)
    return [torch.where(factor == 0, -math.inf, weight)]


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
    """Return s n and s c, or the sum of the mask in place of s c; None in its place if nothing divides by it."""
    by_mask = s.normalize == "mask"
    divided = not by_mask and (bool(s.normalize) or s.return_denominator)
    parts, rest = [], own
    groups = _groups(inputs, sides)
    if len(groups) == 2:  # half of each tile is not read, so smaller tiles cost less
        s = s._replace(chunk_size=max(1, s.chunk_size // 2))
    for x, together in groups:
        explicit = together[0].by_channel and s.convention is None  # exponents of queries and keys change their scores
        takes_own = rest is not None and not own.given and not explicit and _same(x, forward)
        parts.append(_read(x, together, own.factor if takes_own else None, mask, dtype, divided, s))
        rest = None if takes_own else rest
    if rest is not None:
        parts.append(_read_itself(forward, own, mask, dtype, s.scale))
    n = sum_of(n for n, _ in parts)
    if by_mask:
        return n, _mask_sums(forward, sides, own, mask, dtype, s)
    return n, sum_of(c for _, c in parts) if divided else None


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _groups(inputs: list[Inputs], sides: list[Side]) -> list[tuple[Inputs, list[Side]]]:
    """Return the sides that are computed together, because they have the same tensors and kind of decay."""
    if len(sides) == 2 and _same(*inputs) and sides[0].by_channel == sides[1].by_channel:
        return [(inputs[0], sides)]
    return [(x, [side]) for x, side in zip(inputs, sides, strict=True)]


def _same(a: Inputs, b: Inputs) -> bool:
    return a.query is b.query and a.key is b.key and a.value is b.value


def _read(x: Inputs, sides: list[Side], own: Tensor | None, mask, dtype, divided: bool, s: Settings):
    """Return s n and s c of one or two sides with the same tensors, and of the diagonal if it is given."""
    if sides[0].by_channel:
        return _read_channels(x, sides, own, mask, dtype, divided, s)
    batch, _, length, _ = x.value.shape
    left = next((side for side in sides if not side.reverse), None)
    right = next((side for side in sides if side.reverse), None)
    tensors = [t.expand(batch, -1, -1) for side in (left, right) if side is not None for t in side.exponents()]
    if own is not None:
        tensors.append(own.expand(batch, -1, -1))
    form = s.form
    if form == "rnn" and makes_graph():
        form = "chunk"  # a graph cannot contain a loop over a variable number of chunks
    elif not torch.jit.is_tracing() and length == 0:
        form = "attention"
    elif form == "chunk" and walks_chunks(x.value):
        form = "rnn"
    layout = left is not None, right is not None, own is not None
    options = Options(form, s.chunk_size, s.scale, "both" if divided else "numerator", layout=layout)
    result = lion(x.query, x.key, x.value, mask, options, *tensors)
    return result if divided else (result, None)


def _read_channels(x: Inputs, sides: list[Side], own: Tensor | None, mask, dtype, divided: bool, s: Settings):
    """Return s n and s c of sides with a decay per channel, and of the diagonal if it is given."""
    query, key, value = _tensors(x, mask, dtype)
    value = F.pad(value, (0, 1), value=1.0) if divided else value
    if s.form == "attention" and is_exporting():  # halving needs a known length
        scores = sum_of(dense_scores(query, key, side) for side in sides)
        if own is not None:
            scores = scores + torch.diag_embed(own * (query * key).sum(-1))
        n = s.scale * torch.matmul(scores, value)
        return (n[..., :-1], n[..., -1]) if divided else (n, None)
    shares = CONVENTIONS.get(s.convention, (0.0, 0.0))
    once = len(sides) == 2 and all(a is b for a, b in zip(sides[0][:3], sides[1][:3], strict=True))
    scans = [(sides[0], None)] if once else [(side, side.reverse) for side in sides]

    def scan(side: Side, reverse: bool | None, own: Tensor | None) -> Tensor:
        q, k = query, key
        if s.convention is None:
            q, k = _times(query, side.read), _times(key, side.write)
        options = {"form": s.form, "chunk_size": s.chunk_size, "shares": shares, "scale": s.scale}
        return diagonal_scan(q, k, value, side.gates.to(dtype), own, reverse=reverse, **options)

    n = sum_of(scan(side, reverse, None if i else own) for i, (side, reverse) in enumerate(scans))
    return (n[..., :-1], n[..., -1]) if divided else (n, None)


def _times(x: Tensor, exponent: Tensor | None) -> Tensor:
    """Return x times the exponential of an exponent <= 0; None is 0."""
    return x if exponent is None else x * differentiable_exp(exponent.to(x.dtype))


def _tensors(x: Inputs, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads = x.value.shape[1]
    q, k, v = over_heads(x.query.to(dtype), heads), over_heads(x.key.to(dtype), heads), x.value.to(dtype)
    return (q, k, v) if mask is None else (q, *(torch.where(mask[:, None, :, None], t, 0) for t in (k, v)))


def _read_itself(x: Inputs, own: Own, mask: Tensor | None, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """Return s n and s c of the diagonal alone."""
    q, k, v = _tensors(x, mask, dtype)
    score = scale * (own.factor if own.given else own.factor * (q * k).sum(-1))
    return score.unsqueeze(-1) * v, score.expand(v.shape[:3])


def _mask_sums(x: Inputs, sides: list[Side], own: Own, mask, dtype: torch.dtype, s: Settings) -> Tensor:
    """Return the sums of the mask, (batch, heads, length): what is read if all queries, keys and values are 1."""
    ones = torch.ones_like(x.value[..., :1], dtype=dtype)
    s = s._replace(scale=1.0)
    parts = []
    for by_channel in (False, True):
        chosen = [side for side in sides if side.by_channel == by_channel]
        if chosen:
            width = x.query.shape[-1] if by_channel else 1
            key = ones.expand(-1, -1, -1, width)
            inputs = Inputs(key / width, key, ones, None, None)
            parts.append(_read(inputs, chosen, None, mask, dtype, False, s)[0])
    return sum_of(parts).squeeze(-1) + own.mask


def _finished(n: Tensor, c: Tensor | None, maximum: Tensor | None, dtype: torch.dtype, s: Settings):
    """Divide as `normalize` says, and leave the units of the maximum."""
    if s.normalize and not s.return_denominator:
        one = 1.0 if maximum is None else torch.exp(-maximum).to(dtype)
        below = c.abs().clamp(min=one) if s.normalize == "clamp" else c + s.eps * one if s.eps else c
        if maximum is not None:  # if all scores of a row are 0 and `one` underflows, the result is 0
            below = torch.where(below == 0, 1, below)
        return n / below.unsqueeze(-1), c
    if maximum is None:
        return n, c
    # In two halves, so that 0 times an overflow is 0.
    half = (maximum / 2).to(dtype).clamp(max=math.log(torch.finfo(dtype).max) - 1).exp()
    return n * half.unsqueeze(-1) * half.unsqueeze(-1), c if c is None else c * half * half
