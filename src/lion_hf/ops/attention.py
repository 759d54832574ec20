"""The attention form: the matrix of all pairs of tokens, O(L^2) time. Nothing quadratic is stored for backward."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import makes_graph
from .decays import clamped_gates, cumulative_sums, gate_gradient, pair_weights, split_sums
from .masks import Layout, SideSums, Sums, joined_weights, own_gradient, pair_sums, unpacked
from .tokens import ALL, Tokens, fitting_cache, for_products, slices


def attention_weights(log_decay: Tensor, order, length: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the decay mask along an order of the tokens, times the scale.

    Rows and columns keep the order of the inputs: only the cumulative sums of the decays follow `order`.
    """
    return pair_weights(*_sums_along(log_decay, order, length, dtype), dtype).mul_(scale)


def differentiable_weights(log_decay: Tensor, order, length: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return `attention_weights` from operators that autograd can differentiate."""
    rank = torch.arange(length, device=log_decay.device) if order is None else order[1]
    return pair_weights(*_sums_along(log_decay, order, length, dtype), dtype, rank) * scale


def _sums_along(log_decay: Tensor, order, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    sums = cumulative_sums(_along(clamped_gates(log_decay, length, dtype), order, 0))
    return tuple(_along(x, order, 1) for x in sums)


def _along(x: Tensor, order: tuple[Tensor, Tensor] | None, direction: int) -> Tensor:
    """Permute x (..., length) into an order (direction 0), or back to the order of the inputs (direction 1)."""
    return x if order is None else x.index_select(-1, order[direction])


class LionScan(NamedTuple):
    """The mask of one sequence of log-decays, (heads,) or (batch, heads, length), along an order of the tokens."""

    log_decay: Tensor
    order: tuple[Tensor, Tensor] | None = None

    @property
    def by_head(self) -> bool:
        """Whether all rows have the same mask."""
        return self.log_decay.dim() == 1

    def of_rows(self, rows: slice) -> "LionScan":
        return self if self.by_head else LionScan(self.log_decay[rows], self.order)

    def weights(self, length: int, scale: float, dtype: torch.dtype) -> Tensor:
        return attention_weights(self.log_decay, self.order, length, scale, dtype)

    def own_weights(self, raw: Tensor, d_raw: Tensor, scale: float) -> None:
        return None

    def gradients(self, pairs: Tensor, own) -> tuple[Tensor]:
        return (_decay_gradient(pairs, self.log_decay, self.order),)


class SidedScan(NamedTuple):
    """The mask of exponents (batch, heads, length) for each side, and of a diagonal, see `masks.SidedMask`."""

    tensors: Sequence[Tensor]
    layout: Layout
    by_head = False

    def of_rows(self, rows: slice) -> "SidedScan":
        return SidedScan([x[rows] for x in self.tensors], self.layout)

    def weights(self, length: int, scale: float, dtype: torch.dtype) -> Tensor:
        left, right, own = self._sides()
        left, right = (None if side is None else side.pairs(dtype) for side in (left, right))
        return joined_weights(left, right, own, dtype).mul_(scale)

    def own_weights(self, raw: Tensor, d_raw: Tensor, scale: float) -> Tensor | None:
        return own_gradient(raw, d_raw, scale) if self.layout[2] else None

    def gradients(self, pairs: Tensor, own: Tensor | None) -> tuple[Tensor, ...]:
        sums = Sums(*pair_sums(pairs, *self.layout[:2]), own, *[None] * 6)
        left, right, _ = self._sides()
        found = [g for side in (left, right) if side is not None for g in side.gradients(sums)]
        return (*found, own) if self.layout[2] else tuple(found)

    def _sides(self):
        left, right, own = unpacked(self.tensors, self.layout)
        return left and SideSums(*left, right=False), right and SideSums(*right, right=True), own


Scan = LionScan | SidedScan


def _decay_masks(scans: Sequence[Scan], length: int, scale: float, dtype) -> tuple[Tensor | float, list[Tensor]]:
    """Return the mean mask of the scans, times the scale, and each scan's summand; only the scale without scans."""
    shares = [scan.weights(length, scale / len(scans), dtype) for scan in scans]
    return functools.reduce(torch.add, shares) if shares else scale, shares


def _row_blocks(x: Tokens) -> list[slice]:
    """Split the batch into blocks that are computed at a time: on a CPU as many rows as fit into the cache."""
    batch, heads, length = x.query.shape[:3]
    if x.query.device.type != "cpu" or makes_graph() or batch == 0:
        return [ALL]
    return slices(0, batch, fitting_cache(heads * length**2))


def _decay_masks_of_rows(x: Tokens, scans: Sequence[Scan], scale: float) -> Callable:
    """Return a function from a block of rows to its masks. Masks that are the same for all rows are built once."""
    length = x.query.shape[2]
    if all(scan.by_head for scan in scans):
        masks = _decay_masks(scans, length, scale, x.dtype)
        return lambda rows: masks
    return lambda rows: _decay_masks([scan.of_rows(rows) for scan in scans], length, scale, x.dtype)


def attention_forward(x: Tokens, scans: Sequence[Scan], scale: float):
    """Return n and c. `scans` is empty without decay; several scans use their mean mask."""
    masks = _decay_masks_of_rows(x, scans, scale)

    def attend(rows):
        q, k, v = x.rows(rows)
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(masks(rows)[0])
        return torch.matmul(scores, v), scores.sum(-1) if x.denominator else None

    blocks = _row_blocks(x)
    if len(blocks) == 1:
        return attend(ALL)
    numerator = x.empty_output(x.value.shape[-1])
    denominators = []
    for rows in blocks:
        numerator[rows], denominator = attend(rows)
        denominators.append(denominator)
    return numerator, torch.cat(denominators) if x.denominator else None


def attention_backward(x: Tokens, scans: Sequence[Scan], dy, dc, scale: float):
    masks = _decay_masks_of_rows(x, scans, scale)

    def gradients_of(rows):
        q, k, v = x.rows(rows)
        dn = for_products(dy[rows])
        scores = torch.matmul(q, k.transpose(-1, -2))
        dscores = torch.matmul(dn, v.transpose(-1, -2))
        if dc is not None:
            dscores += dc[rows].unsqueeze(-1)
        mask, shares = masks(rows)
        own = [scan.own_weights(scores, dscores, scale) for scan in scans]
        masked = scores * mask if len(scans) > 1 else scores.mul_(mask)
        dv = torch.matmul(masked.transpose(-1, -2), dn)
        scores.mul_(dscores)  # dM_ij for several scans, dM_ij M_ij for a single one
        pairs = [scores] * len(scans) if len(scans) < 2 else [scores * share for share in shares]
        parts = [scan.of_rows(rows) for scan in scans]
        dgates = [g for scan in zip(parts, pairs, own, strict=True) for g in scan[0].gradients(*scan[1:])]
        dscores.mul_(mask)
        return torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q), dv, dgates

    blocks = _row_blocks(x)
    if len(blocks) == 1:
        *gradients, dgates = gradients_of(ALL)
        return *gradients, *dgates
    gradients = [x.empty_output(t.shape[-1]) for t in (x.query, x.key, x.value)]
    dgates = []
    for rows in blocks:
        *parts, gates = gradients_of(rows)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[rows] = part
        dgates.append(gates)
    by_head = all(scan.by_head for scan in scans)
    return *gradients, *(sum(parts) if by_head else torch.cat(parts) for parts in zip(*dgates, strict=True))


def _decay_gradient(pairs: Tensor, log_decay: Tensor, order) -> Tensor:
    """Return the gradient of the log-decays of one scan from `pairs`, dM_ij M_ij, which is overwritten."""
    rank = None if order is None else order[1]
    if log_decay.dim() == 1:  # M_ij contains the same decay |i - j| times
        token = torch.arange(pairs.shape[-1], device=pairs.device) if rank is None else rank
        token = token.to(pairs.dtype)
        return (pairs.sum(0) * (token - token.unsqueeze(-1)).abs()).sum(-1)
    de, df = (_along(x, order, 0) for x in split_sums(pairs, rank))
    return _along(gate_gradient(de, df, 0), order, 1)
