"""Access to query, key and value for the forms, a few tokens or a few rows of the batch at a time."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import makes_graph


# Elements that stay in the cache of a CPU, about 1 MiB in float32. If a query has more, the chunk form computes one
# chunk after another (with the functions of the rnn form), so that buffers stay in the cache. The attention form
# computes as many rows of the batch at a time as have at most this many scores, and the walk over chunks builds at most
# this many entries of masks at a time.
CPU_CACHE_ELEMENTS = 2**18

ALL = slice(None)


def default_scale(query: Tensor) -> float:
    """Return 1 / sqrt(head_dim), the default scale of the scores."""
    return int(query.shape[-1]) ** -0.5  # int: torch.jit.trace would compute the power in float32


class Tokens(NamedTuple):
    """Query, key and value, which the methods return contiguous and in the accumulation dtype.

    Query and key may have fewer heads than value: each then serves a group of consecutive heads.

    Keys and values of padding are 0. If a denominator is needed, the values get a column of ones, because c is n for
    v = 1. A form that reads a few tokens at a time copies only those. The attention form reads whole rows of the batch
    instead, and computes c as the sums of its scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    denominator: bool
    dtype: torch.dtype

    def queries(self, part: slice = ALL) -> Tensor:
        return self._heads(self.query[:, :, part].to(self.dtype)).contiguous()

    def keys(self, part: slice = ALL) -> Tensor:
        return self._heads(self._unmasked(self.key[:, :, part].to(self.dtype), part)).contiguous()

    def values(self, part: slice = ALL) -> Tensor:
        value = self._unmasked(self.value[:, :, part].to(self.dtype), part)
        return F.pad(value, (0, 1), value=1.0) if self.denominator else value.contiguous()

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of some rows of the batch."""
        row = self._replace(key_mask=None if self.key_mask is None else self.key_mask[rows])
        key, value = (row._unmasked(t[rows].to(self.dtype), ALL) for t in (self.key, self.value))
        query, key = self._heads(self.query[rows].to(self.dtype)), self._heads(key)
        return tuple(for_products(t) for t in (query, key, value))

    def _heads(self, x: Tensor) -> Tensor:
        return over_heads(x, self.value.shape[1])

    def _unmasked(self, x: Tensor, part: slice) -> Tensor:
        return x if self.key_mask is None else torch.where(self.key_mask[:, None, part, None].bool(), x, 0)

    def empty_output(self, width: int | None = None) -> Tensor:
        """Return uninitialised (batch, heads, length, width), by default as wide as the values.

        In memory it is (batch, length, heads, width), so that joining the heads needs no copy.
        """
        batch, heads, length, value_dim = self.value.shape
        width = value_dim + int(self.denominator) if width is None else width
        return self.value.new_empty(batch, length, heads, width, dtype=self.dtype).transpose(1, 2)

    def empty_state(self) -> Tensor:
        shape = *self.value.shape[:2], 1, self.query.shape[-1], self.value.shape[-1] + int(self.denominator)
        return self.query.new_zeros(shape, dtype=self.dtype)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split an output that is as wide as the values into n and c."""
        return (y[..., :-1], y[..., -1]) if self.denominator else (y, None)

    def join(self, dy: Tensor, dc: Tensor | None, part: slice = ALL) -> Tensor:
        """Invert `split`, for gradients of some tokens."""
        dy = dy[:, :, part]
        return (torch.cat([dy, dc[:, :, part].unsqueeze(-1)], -1) if self.denominator else dy).contiguous()


def over_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of x (batch, groups, length, width) to `heads`, each for a group of consecutive heads."""
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def summed_over_groups(x: Tensor, groups: int) -> Tensor:
    """Return the gradient of a tensor with fewer heads, the transpose of `over_heads`."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def walks_chunks(query: Tensor) -> bool:
    """Whether the chunk form computes one chunk after another, which is faster on a CPU for large inputs."""
    return query.device.type == "cpu" and not makes_graph() and query.numel() > CPU_CACHE_ELEMENTS


def fitting_cache(elements: int) -> int:
    """Return how many pieces of `elements` elements fit into the cache of a CPU, at least 1."""
    return max(1, CPU_CACHE_ELEMENTS // max(1, elements))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor is float64, otherwise float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context that disables autocast. The meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Return consecutive slices of `size`; the last one is shorter if `size` does not divide the range."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def for_products(x: Tensor) -> Tensor:
    """Return x in the fastest layout for products: a single row as it is, several rows contiguous.

    Matrix products read the heads of a single row without a copy, but copy those of several rows in each product.
    """
    return x if not torch.jit.is_tracing() and x.shape[0] == 1 else x.contiguous()
