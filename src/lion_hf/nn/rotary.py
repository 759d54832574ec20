"""Rotary position embeddings (RoPE, arXiv 2104.09864), in the convention of Transformers: halves of heads rotate."""

import math
from numbers import Real

import torch
from torch import Tensor

from ..ops.band import sequence_of_tokens
from ..ops.checks import is_abstract, values_can_be_read


# Cosines and sines by (width, theta, device, dtype), for the longest row so far. They are no part of any module, so
# that state dicts, copies and pickles do not hold them, and all layers share them.
_TABLES: dict[tuple, Tensor] = {}
_MOST_TABLES = 32
_LEAST_LENGTH = 128


def require_theta(rope_theta: object, head_dim: int) -> None:
    """Raise ValueError unless `rope_theta` is None, or a positive number and heads have an even width."""
    if rope_theta is None:
        return
    if not isinstance(rope_theta, Real) or isinstance(rope_theta, bool) or not 0 < rope_theta < math.inf:
        raise ValueError(
            f"rope_theta is {rope_theta!r}; it must be a positive number, for instance 10000.0, or None for no RoPE."
        )
    if head_dim % 2:
        raise ValueError(
            f"rope_theta is {rope_theta!r}, but heads are {head_dim} wide; RoPE rotates pairs of features, so the "
            "width must be even. Change dim or heads, or leave out rope_theta."
        )


def apply_rotary(
    query: Tensor,
    key: Tensor,
    theta: float,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate query and key, so that their products depend on the distance of the tokens.

    The features i and `i + head_dim // 2` of the token at position p rotate by the angle
    `p * theta**(-2 * i / head_dim)`. Rotations are computed in float32, in float64 for float64.

    Args:
        query: (batch, heads, length, head_dim), with an even head_dim.
        key: same shape as `query`.
        theta: base of the angles, positive; 10000.0 is usual.
        cu_seqlens: (sequences + 1,), bounds of the sequences of a packed row, whose positions start from 0 in each
            sequence. Otherwise positions are indices in the row.
        key_mask: (batch, length), bool, True for real tokens. If it is given, positions count from the first real token
            of each row or sequence. Products of rotated queries and keys do not depend on where positions start, but
            other functions of them do.

    Returns:
        Query and key, in their shape and dtype.
    """
    length = query.shape[2]
    cosine, sine = _table(length, query.shape[3], float(theta), query)
    positions = _positions(length, cu_seqlens, key_mask, query.device)
    if positions is not None:
        cosine, sine = cosine[positions], sine[positions]
    return _rotated(query, cosine, sine), _rotated(key, cosine, sine)


def _positions(length: int, cu_seqlens: Tensor | None, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the positions of the tokens of a packed row (length,), or of each row (batch, 1, length) if some begin
    with padding; None if they are 0, 1, 2, ..."""
    token = torch.arange(length, device=device)
    if cu_seqlens is not None:
        owner = sequence_of_tokens(cu_seqlens, length, device)
        first = cu_seqlens.to(device, torch.int64)
        if key_mask is not None:
            places = token.masked_fill(~key_mask[0], length)
            first = torch.full_like(first, length).scatter_reduce(0, owner, places, "amin")
        return (token - first[owner]).clamp(min=0)
    if key_mask is None or not length or (values_can_be_read(key_mask) and bool(key_mask[:, 0].all())):
        return None
    return (token - key_mask.to(torch.int32).argmax(1, keepdim=True)).clamp(min=0).unsqueeze(1)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    wide = x.to(cosine.dtype)
    return torch.addcmul(wide * cosine, wide.roll(x.shape[-1] // 2, -1), sine).to(x.dtype)


def _table(length: int, width: int, theta: float, like: Tensor) -> Tensor:
    """Return cosines and signed sines of positions from 0, (2, length, width)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if is_abstract(like):
        return _new_table(length, width, theta, like.device, dtype)
    key = width, theta, like.device, dtype
    table = _TABLES.get(key)
    if table is None or table.shape[1] < length:
        if len(_TABLES) >= _MOST_TABLES:
            _TABLES.clear()
        with torch.inference_mode(False):  # a table made for inference could not be used in training
            table = _TABLES[key] = _new_table(max(length, _LEAST_LENGTH), width, theta, like.device, dtype)
    return table[:, :length]


def _new_table(length: int, width: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    rates = 1 / theta ** (torch.arange(0, width, 2, device=device, dtype=dtype) / width)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None] * rates
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])
