"""Query, key and value as the forms read them, a few tokens or a few rows of the batch at a time."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import makes_graph


# What stays in the cache of a CPU, about 1 MiB in float32. The chunk form walks its chunks one after the other (the rnn
# functions) once a query has more elements, so that no buffer is paged in anew for every step. The attention form takes
# as many rows of a batch at a time as have no more scores, and the walk makes as many decay factors.
CPU_CACHE_ELEMENTS = 2**18

ALL = slice(None)


class Tokens(NamedTuple):
    """Query, key and value as the forms read them: contiguous, in the accumulation dtype, padding zeroed in key and
    value alike, and a column of ones beside the value where a denominator is wanted (c is n for v = 1).

    A form that reads a few tokens at a time copies no more than those. The attention form reads whole rows of the batch
    instead, and takes sums of its scores for c.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    denominator: bool
    dtype: torch.dtype

    def queries(self, part: slice = ALL) -> Tensor:
        return self.query[:, :, part].to(self.dtype).contiguous()

    def keys(self, part: slice = ALL) -> Tensor:
        return self._unmasked(self.key[:, :, part].to(self.dtype), part).contiguous()

    def values(self, part: slice = ALL) -> Tensor:
        value = self._unmasked(self.value[:, :, part].to(self.dtype), part)
        return F.pad(value, (0, 1), value=1.0) if self.denominator else value.contiguous()

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of some rows of the batch."""
        row = self._replace(key_mask=None if self.key_mask is None else self.key_mask[rows])
        key, value = (row._unmasked(t[rows].to(self.dtype), ALL) for t in (self.key, self.value))
        return tuple(for_products(t) for t in (self.query[rows].to(self.dtype), key, value))

    def _unmasked(self, x: Tensor, part: slice) -> Tensor:
        return x if self.key_mask is None else torch.where(self.key_mask[:, None, part, None].bool(), x, 0)

    def empty_output(self, width: int | None = None) -> Tensor:
        """As wide as the values, in memory (batch, length, heads, width): joining the heads needs no copy then."""
        batch, heads, length, value_dim = self.value.shape
        width = value_dim + int(self.denominator) if width is None else width
        return self.value.new_empty(batch, length, heads, width, dtype=self.dtype).transpose(1, 2)

    def empty_state(self) -> Tensor:
        shape = *self.query.shape[:2], 1, self.query.shape[-1], self.value.shape[-1] + int(self.denominator)
        return self.query.new_zeros(shape, dtype=self.dtype)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """n and c of an output that is as wide as the values."""
        return (y[..., :-1], y[..., -1]) if self.denominator else (y, None)

    def join(self, dy: Tensor, dc: Tensor | None) -> Tensor:
        """The opposite of `split`, for gradients."""
        return (torch.cat([dy, dc.unsqueeze(-1)], -1) if self.denominator else dy).contiguous()


def walks_chunks(query: Tensor) -> bool:
    """Whether the chunk form takes one chunk after the other here, which the cache of a CPU makes faster."""
    return query.device.type == "cpu" and not makes_graph() and query.numel() > CPU_CACHE_ELEMENTS


def fitting_cache(elements: int) -> int:
    """How many pieces of so many elements the cache of a CPU holds, at least 1."""
    return max(1, CPU_CACHE_ELEMENTS // max(1, elements))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, on devices that have it: the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Consecutive slices of `size`, the last one shorter where `size` does not divide the range."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def for_products(x: Tensor) -> Tensor:
    """Products read the heads of a single row where they lie, and copy those of several rows every time."""
    return x if not torch.jit.is_tracing() and x.shape[0] == 1 else x.contiguous()
