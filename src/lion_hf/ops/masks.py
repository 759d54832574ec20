"""Decay masks as the forms use them: weights of tiles, factors of chunks, and gradients of what determines them.

`LionMask` is LION's mask of one sequence of log-decays. `SidedMask` has separate exponents for the tokens to the left
and to the right (sides.py), and its own diagonal.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import is_exporting, values_can_be_read
from .decays import (
    Exponents,
    Factors,
    Flows,
    clamped_gates,
    cumulative_sums,
    decay_factors,
    differences,
    exp_,
    gate_gradient,
    split_sums,
    tile_weights,
)
from .tokens import ALL, Tokens


Layout = tuple[bool, bool, bool]  # whether there is a left side, a right side, and a diagonal


class Crossings(NamedTuple):
    """Gradients of the exponents of chunks in one direction: of reads and writes (b, H, n, K), of the total."""

    read: Tensor
    write: Tensor
    total: Tensor


def split_chunks(x: Tensor, chunks: int, size: int) -> Tensor:
    """Split (..., length) into (..., chunks, size), with zeros after the last token."""
    return F.pad(x, (0, chunks * size - x.shape[-1])).unflatten(-1, (chunks, size))


def _marks(x: Tokens, dy: Tensor | None, chunks: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the keys that are not masked, and the outputs whose gradient is not 0."""
    keys = None if x.key_mask is None else split_chunks(x.key_mask[:, None].bool(), chunks, size)
    if dy is None:
        return keys, None
    queries = dy.abs().amax(-1) != 0
    every = values_can_be_read(dy) and bool(queries.all())  # the usual case; LION-D then shares factors across rows
    return keys, queries.new_ones(1, 1, 1, 1) if every else split_chunks(queries, chunks, size)


class LionMask:
    """The mask of one sequence of log-decays, (heads,) or (batch, heads, length), for chunks.

    Attributes:
        gates: (b, H, n, K): (1, H, 1, K) for LION-D, (B, H, chunks, size) for LION-S, 0 after the last token.
        shared: whether all rows and chunks have the same weights (LION-D).
    """

    def __init__(self, x: Tokens, log_decay: Tensor, chunks: int, size: int, scale: float):
        self.x, self.chunks, self.size, self.scale = x, chunks, size, scale
        self.shared = log_decay.dim() == 1
        length = x.query.shape[2]
        if self.shared:
            self.gates = clamped_gates(log_decay, size, x.dtype).unsqueeze(2)
        else:
            gates = F.pad(clamped_gates(log_decay, length, x.dtype), (0, chunks * size - length))
            self.gates = gates.view(*gates.shape[:2], chunks, size)

    def tiles(self, part: slice = ALL) -> Tensor:
        """Return the weights inside chunks, times the scale, (b, H, n, K, K)."""
        return tile_weights(self.gates[:, :, part], self.scale, self.x.dtype)

    def factors(self, dy: Tensor | None = None) -> tuple[Factors, Flows]:
        """Return the factors of chunks. The backward pass gives `dy` (B, H, L, V) as well."""
        e, f = cumulative_sums(self.gates)
        total = f[..., -1:]
        exponents = Exponents(e, total - e, total), Exponents(total - f, f, total)
        return _factors(self, exponents, dy)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the sums of the gates of chunks (b, H, n) to the right and to the left."""
        total = self.gates.sum(-1)
        return total, total

    def own_weights(self, raw: Tensor, d_raw: Tensor) -> None:
        """The diagonal of this mask is 1, so it has no gradient."""
        return None

    def gradients(self, pairs: Tensor, own, right: Crossings | None, left: Crossings | None) -> tuple[Tensor]:
        """Return the gradient of the gates: (b, H, n, K), or (1, H, 1, K) if shared, summed over batch and chunks.

        Args:
            pairs: (B, H, n, K, K), dM_ij M_ij inside chunks, which is overwritten.
            own: None.
            right: gradients of the exponents to the right; None for a single chunk.
            left: gradients of the exponents to the left.
        """
        reduce = self._reduced
        de, df = split_sums(reduce(pairs))
        if right is None:
            return (gate_gradient(de, df, 0),)
        to_right, to_left, from_left, from_right = (reduce(x) for x in (right.write, left.write, right.read, left.read))
        dtotal = reduce(right.total + left.total) + to_right.sum(-1, keepdim=True) + from_right.sum(-1, keepdim=True)
        return (gate_gradient(de + from_left - to_right, df + to_left - from_right, dtotal),)

    def _reduced(self, x: Tensor) -> Tensor:
        return x.sum((0, 2), keepdim=True) if self.shared else x


class SidedMask:
    """The mask of exponents (B, H, L) for each side, and the weights of the diagonal, for chunks.

    `tensors` are the gates, reads and writes of the left side, the same of the right side, and the diagonal; `layout`
    tells which of the three groups there are.
    """

    shared = False

    def __init__(self, x: Tokens, tensors: Sequence[Tensor], layout: Layout, chunks: int, size: int, scale: float):
        self.x, self.chunks, self.size, self.scale = x, chunks, size, scale
        left, right, self.own = unpacked(tuple(split_chunks(t, chunks, size) for t in tensors), layout)
        self.left, self.right = (
            None if side is None else Sums(*side, right=i == 1) for i, side in enumerate((left, right))
        )

    def tiles(self, part: slice = ALL) -> Tensor:
        """Return the weights inside chunks, times the scale, (B, H, n, K, K)."""
        dtype = self.x.dtype
        own = None if self.own is None else self.own[:, :, part]
        left, right = (None if side is None else side.pairs(dtype, part) for side in (self.left, self.right))
        return joined_weights(left, right, own, dtype).mul_(self.scale)

    def factors(self, dy: Tensor | None = None) -> tuple[Factors, Flows]:
        """Return the factors of chunks. The backward pass gives `dy` (B, H, L, V) as well."""
        exponents = [None if side is None else side.exponents() for side in (self.left, self.right)]
        return _factors(self, exponents, dy)

    def totals(self) -> list[Tensor | None]:
        """Return the sums of the gates of chunks (B, H, n) to the right and to the left."""
        return [None if side is None else side.total.squeeze(-1) for side in (self.left, self.right)]

    def own_weights(self, raw: Tensor, d_raw: Tensor) -> Tensor | None:
        """Return the gradient of the diagonal (B, H, n, K) from scores without mask and their gradients."""
        return None if self.own is None else own_gradient(raw, d_raw, self.scale)

    def gradients(self, pairs: Tensor, own, right: Crossings | None, left: Crossings | None) -> tuple[Tensor, ...]:
        """Return the gradients of all tensors, (B, H, n, K) each. `own` is the result of `own_weights`."""
        found = []
        below, above = sided_sums(pairs)
        if self.left is not None:
            found += self.left.gradients(*below, right)
        if self.right is not None:
            found += self.right.gradients(*above, left)
        return (*found, own) if self.own is not None else tuple(found)


class Sums:
    """The exponents of one side, summed up along (..., K) tokens, from its gates, reads and writes.

    The weight of key j for query i is exp(read_i - write_j), or exp(write_j - read_i) if keys are to the right.
    """

    def __init__(self, gates: Tensor, read: Tensor, write: Tensor, right: bool):
        self.right = right  # whether keys are to the right of the query
        e, f = cumulative_sums(gates)
        self.total = f[..., -1:]
        self.read, self.write = (f - read, e + write) if right else (e + read, f - write)

    def pairs(self, dtype: torch.dtype, part: slice = ALL) -> Tensor:
        """Return the exponents of all pairs, (..., K, K). Those of the other side are not meaningful."""
        read, write = self.read[:, :, part], self.write[:, :, part]
        return differences(-read, -write, dtype) if self.right else differences(read, write, dtype)

    def exponents(self) -> Exponents:
        if self.right:
            return Exponents(self.total - self.read, self.write, self.total)
        return Exponents(self.read, self.total - self.write, self.total)

    def gradients(self, rows: Tensor, columns: Tensor, crossings: Crossings | None) -> list[Tensor]:
        """Return the gradients of gates, reads and writes from the sums of dM_ij M_ij over the rows and columns."""
        dtotal = 0
        if crossings is not None:
            rows, columns = rows + crossings.read, columns + crossings.write
            inward = crossings.read if self.right else crossings.write
            dtotal = crossings.total + inward.sum(-1, keepdim=True)
        de, df = (columns, rows.neg()) if self.right else (rows, columns.neg())
        return [gate_gradient(de, df, dtotal), rows, columns]


def unpacked(tensors: Sequence[Tensor], layout: Layout):
    """Return (gates, read, write) of the left side, of the right side, and the diagonal; None for what is not there."""
    rest = list(tensors)
    left, right = (tuple(rest.pop(0) for _ in range(3)) if there else None for there in layout[:2])
    return left, right, rest.pop(0) if layout[2] else None


def joined_weights(left: Tensor | None, right: Tensor | None, own: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return weights (..., K, K) from the exponents of both sides and the diagonal, which is 0 if it is None."""
    exponent = right if left is None else left
    lower = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).tril(-1)
    if left is None:
        exponent = right.masked_fill(lower, -math.inf)
    elif right is None:
        exponent = left.masked_fill(~lower, -math.inf)
    else:
        exponent = torch.where(lower, left, right)
    weights = exp_(exponent)
    if torch.jit.is_tracing():  # ONNX has no views
        diagonal = torch.zeros_like(weights[..., 0]) if own is None else own.to(dtype)
        return torch.where(torch.eye(len(lower), dtype=torch.bool), diagonal.unsqueeze(-1), weights)
    diagonal = weights.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_() if own is None else diagonal.copy_(own)
    return weights


def sided_sums(pairs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the sums over rows and columns of the pairs below the diagonal and above it. Overwrites `pairs`."""
    pairs.diagonal(dim1=-2, dim2=-1).zero_()
    rows, columns = pairs.sum(-1), pairs.sum(-2)
    lower = pairs.tril_()
    below = lower.sum(-1), lower.sum(-2)
    return [below, (rows - below[0], columns - below[1])]


def own_gradient(raw: Tensor, d_raw: Tensor, scale: float) -> Tensor:
    """Return the gradient of the diagonal from the scores without mask and their gradients."""
    return (raw.diagonal(dim1=-2, dim2=-1) * d_raw.diagonal(dim1=-2, dim2=-1)).mul_(scale)


def _factors(mask: LionMask | SidedMask, exponents, dy: Tensor | None) -> tuple[Factors, Flows]:
    # Runtimes of exported graphs treat denormal numbers in their own way, and lack the operators that avoid them.
    if torch.jit.is_tracing() or is_exporting():
        return decay_factors(*exponents, None, None, mask.scale, mask.x.dtype, all_large=True)
    keys, queries = _marks(mask.x, dy, mask.chunks, mask.size)
    return decay_factors(*exponents, keys, queries, mask.scale, mask.x.dtype)
