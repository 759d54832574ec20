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


class Sums(NamedTuple):
    """Sums of gradients over tiles and states, from which follow those of the exponents of a mask.

    Tensors are (b, H, n, K), or (b, H, n, 1) for totals; b = 1 if all rows have the same mask. None: nothing is read.
    """

    lower_rows: Tensor | None  # of dM_ij M_ij over the row, below the diagonal
    lower_columns: Tensor | None  # over the column, below the diagonal
    upper_rows: Tensor | None  # over the row, above the diagonal
    upper_columns: Tensor | None  # over the column, above the diagonal
    own: Tensor | None  # dM_ii
    read_left: Tensor | None  # of the exponents of what queries read from the left
    write_right: Tensor | None  # of what keys write to the right
    cross_right: Tensor | None  # of the totals with which states cross chunks to the right
    read_right: Tensor | None  # the same of the other direction
    write_left: Tensor | None
    cross_left: Tensor | None

    @staticmethod
    def joined(chunks: list["Sums"], size: int) -> "Sums":
        """Join the sums of consecutive chunks. The last chunk may have fewer than `size` tokens."""
        last = chunks[-1]
        short = size - next(x for x in last if x is not None).shape[-1]
        if short:
            kept = ("cross_right", "cross_left")
            padded = {k: x if x is None or k in kept else F.pad(x, (0, short)) for k, x in last._asdict().items()}
            chunks = [*chunks[:-1], Sums(**padded)]
        return Sums(*(None if parts[0] is None else torch.cat(parts, 2) for parts in zip(*chunks, strict=True)))


def split_chunks(x: Tensor, chunks: int, size: int) -> Tensor:
    """Split (..., length) into (..., chunks, size), with zeros after the last token."""
    return F.pad(x, (0, chunks * size - x.shape[-1])).unflatten(-1, (chunks, size))


def _marks(x: Tokens, dy: Tensor | None, dc: Tensor | None, chunks: int, size: int):
    """Return the keys that are not masked, and the outputs whose gradient is not 0."""
    keys = None if x.key_mask is None else split_chunks(x.key_mask[:, None].bool(), chunks, size)
    if dy is None:
        return keys, None
    # In the usual case no gradient is 0. LION-D then shares factors across rows. Largest and smallest entries need no
    # temporary tensor, and one of them is usually enough.
    queries = dy.amax(-1) != 0
    if not _all_true(queries):
        queries = queries | (dy.amin(-1) != 0)
        queries = queries if dc is None else queries | (dc != 0)
    return keys, queries.new_ones(1, 1, 1, 1) if _all_true(queries) else split_chunks(queries, chunks, size)


def _all_true(x: Tensor) -> bool:
    """Whether all entries are true, if they can be read."""
    return values_can_be_read(x) and bool(x.all())


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

    def factors(self, dy: Tensor | None = None, dc: Tensor | None = None) -> tuple[Factors, Flows]:
        """Return the factors of chunks. The backward pass gives `dy` (B, H, L, V) as well, and may give `dc`."""
        e, f = cumulative_sums(self.gates)
        total = f[..., -1:]
        exponents = Exponents(e, total - e, total), Exponents(total - f, f, total)
        return _factors(self, exponents, dy, dc)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the sums of the gates of chunks (b, H, n) to the right and to the left."""
        total = self.gates.sum(-1)
        return total, total

    def own_weights(self, raw: Tensor, d_raw: Tensor) -> None:
        """The diagonal of this mask is 1, so it has no gradient."""
        return None

    def reduced(self, x: Tensor | None) -> Tensor | None:
        """Return gradients of single weights, summed over those that all rows and chunks share."""
        return x if x is None or not self.shared else x.sum((0, 2), keepdim=True)

    def pair_sums(self, pairs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the first four fields of `Sums` of a tile: only the differences that this mask needs."""
        de, df = split_sums(self.reduced(pairs))
        return de, None, None, df

    def gradients(self, sums: Sums) -> tuple[Tensor]:
        """Return the gradient of the gates (b, H, n, K). It is summed over batch and chunks if they share them."""
        de, df = sums.lower_rows, sums.upper_columns  # both are differences here, see `pair_sums`
        if sums.read_left is None:
            return (gate_gradient(de, df, 0),)
        de = de + sums.read_left - sums.write_right
        df = df + sums.write_left - sums.read_right
        inward = (sums.write_right + sums.read_right).sum(-1, keepdim=True)
        return (gate_gradient(de, df, sums.cross_right + sums.cross_left + inward),)


class SidedMask:
    """The mask of exponents (B, H, L) for each side, and the weights of the diagonal, for chunks.

    `tensors` are the gates, reads and writes of the left side, the same of the right side, and the diagonal; `layout`
    tells which of the three groups there are.
    """

    shared = False

    def __init__(self, x: Tokens, tensors: Sequence[Tensor], layout: Layout, chunks: int, size: int, scale: float):
        self.x, self.chunks, self.size, self.scale = x, chunks, size, scale
        left, right, self.own = unpacked(tuple(split_chunks(t, chunks, size) for t in tensors), layout)
        self.left, self.right = left and SideSums(*left, right=False), right and SideSums(*right, right=True)

    def tiles(self, part: slice = ALL) -> Tensor:
        """Return the weights inside chunks, times the scale, (B, H, n, K, K)."""
        dtype = self.x.dtype
        own = None if self.own is None else self.own[:, :, part]
        left, right = (None if side is None else side.pairs(dtype, part) for side in (self.left, self.right))
        return joined_weights(left, right, own, dtype).mul_(self.scale)

    def factors(self, dy: Tensor | None = None, dc: Tensor | None = None) -> tuple[Factors, Flows]:
        """Return the factors of chunks. The backward pass gives `dy` (B, H, L, V) as well, and may give `dc`."""
        exponents = [None if side is None else side.exponents() for side in (self.left, self.right)]
        return _factors(self, exponents, dy, dc)

    def totals(self) -> list[Tensor | None]:
        """Return the sums of the gates of chunks (B, H, n) to the right and to the left."""
        return [None if side is None else side.total.squeeze(-1) for side in (self.left, self.right)]

    def own_weights(self, raw: Tensor, d_raw: Tensor) -> Tensor | None:
        """Return the gradient of the diagonal (B, H, n, K) from scores without mask and their gradients."""
        return None if self.own is None else own_gradient(raw, d_raw, self.scale)

    def reduced(self, x: Tensor | None) -> Tensor | None:
        """Return x: every row and chunk has its own weights."""
        return x

    def pair_sums(self, pairs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the sums of the pairs of a tile, the first four fields of `Sums`."""
        return pair_sums(pairs, self.left is not None, self.right is not None)

    def gradients(self, sums: Sums) -> tuple[Tensor, ...]:
        """Return the gradients of all tensors, (B, H, n, K) each."""
        found = []
        if self.left is not None:
            found += self.left.gradients(sums)
        if self.right is not None:
            found += self.right.gradients(sums)
        return tuple(found) if self.own is None else (*found, sums.own)


class SideSums:
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

    def gradients(self, sums: Sums) -> list[Tensor]:
        """Return the gradients of gates, reads and writes."""
        if self.right:
            rows, columns = sums.upper_rows, sums.upper_columns
            read, write, total = sums.read_right, sums.write_left, sums.cross_left
        else:
            rows, columns = sums.lower_rows, sums.lower_columns
            read, write, total = sums.read_left, sums.write_right, sums.cross_right
        dtotal = 0
        if read is not None:
            rows, columns = rows + read, columns + write
            dtotal = total + (read if self.right else write).sum(-1, keepdim=True)
        de, df = (columns, rows.neg()) if self.right else (rows, columns.neg())
        return [gate_gradient(de, df, dtotal), rows, columns]


def unpacked(tensors: Sequence[Tensor], layout: Layout):
    """Return (gates, read, write) of the left side, of the right side, and the diagonal; None for what is not there."""
    rest = list(tensors)
    left, right = (tuple(rest.pop(0) for _ in range(3)) if there else None for there in layout[:2])
    return left, right, rest.pop(0) if layout[2] else None


def joined_weights(left: Tensor | None, right: Tensor | None, own: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return weights (..., K, K) from the exponents of both sides, which are overwritten, and the diagonal or 0."""
    if torch.jit.is_tracing():  # ONNX has no views
        return _traced_weights(left, right, own, dtype)
    # Triangles are selected by tril_ and triu_: torch.where is many times slower on a CPU. The other triangle of an
    # exponent may be positive, so it is cleared before exp as well.
    if left is None:
        weights = exp_(right.triu_(1)).triu_(1)
    elif right is None:
        weights = exp_(left.tril_(-1)).tril_(-1)
    else:
        weights = exp_(left.tril_(-1).add_(right.triu_(1)))
    diagonal = weights.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_() if own is None else diagonal.copy_(own)
    return weights


def _traced_weights(left: Tensor | None, right: Tensor | None, own: Tensor | None, dtype: torch.dtype) -> Tensor:
    exponent = right if left is None else left
    token = torch.arange(exponent.shape[-1], device=exponent.device)  # not torch.ones: a trace would fix its size
    lower = token.unsqueeze(-1) > token
    if left is None:
        exponent = right.masked_fill(lower, -math.inf)
    elif right is None:
        exponent = left.masked_fill(~lower, -math.inf)
    else:
        exponent = torch.where(lower, left, right)
    weights = exp_(exponent)
    diagonal = torch.zeros_like(weights[..., 0]) if own is None else own.to(dtype)
    return torch.where(token.unsqueeze(-1) == token, diagonal.unsqueeze(-1), weights)


def pair_sums(pairs: Tensor, left: bool = True, right: bool = True) -> tuple[Tensor | None, ...]:
    """Return the first four fields of `Sums` from dM_ij M_ij (..., K, K), which is overwritten."""
    diagonal = pairs.diagonal(dim1=-2, dim2=-1).clone()
    rows, columns = pairs.sum(-1) - diagonal, pairs.sum(-2) - diagonal
    if not left:
        return None, None, rows, columns
    if not right:
        return rows, columns, None, None
    lower = pairs.tril_(-1)
    lower_rows, lower_columns = lower.sum(-1), lower.sum(-2)
    return lower_rows, lower_columns, rows.sub_(lower_rows), columns.sub_(lower_columns)


def own_gradient(raw: Tensor, d_raw: Tensor, scale: float) -> Tensor:
    """Return the gradient of the diagonal from the scores without mask and their gradients."""
    return (raw.diagonal(dim1=-2, dim2=-1) * d_raw.diagonal(dim1=-2, dim2=-1)).mul_(scale)


def _factors(mask: LionMask | SidedMask, exponents, dy: Tensor | None, dc: Tensor | None) -> tuple[Factors, Flows]:
    # Runtimes of exported graphs treat denormal numbers in their own way, and lack the operators that avoid them.
    if torch.jit.is_tracing() or is_exporting():
        return decay_factors(*exponents, None, None, mask.scale, mask.x.dtype, all_large=True)
    keys, queries = _marks(mask.x, dy, dc, mask.chunks, mask.size)
    return decay_factors(*exponents, keys, queries, mask.scale, mask.x.dtype)
