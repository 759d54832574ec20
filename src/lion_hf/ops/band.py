"""Softmax attention in a band: each token reads the tokens near it, in time and memory linear in the length.

Blocks of queries read their neighbourhood, the block itself and `reach` tokens on both sides of it, in one call of
PyTorch's `scaled_dot_product_attention`. Its mask has one small part per block, so no (length, length) tensor exists.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import is_exporting, is_transformed, makes_graph


# Fewest queries of a block. Larger blocks read more keys outside the band, smaller ones leave less to each product.
# Measured on a CPU for reach 64, `benchmarks/bench_local.py --sizes`.
BLOCK = 64


def band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: int,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each token i to the tokens j with `|i - j| <= reach`, scaled by `head_dim**-0.5`.

    Args:
        query: (batch, heads, length, head_dim), any floating dtype and any strides.
        key: same shape as `query`.
        value: (batch, heads, length, value_dim).
        reach: number of tokens that are read on each side, 0 or more.
        key_mask: (batch, length), bool, True for real tokens; None without padding. A masked key has weight 0, and its
            key and value may be NaN. The output of a token that reads no key is 0.
        cu_seqlens: (sequences + 1,), bounds of the sequences of a packed row (batch 1), which do not read each other.
            NaN in one sequence may reach the tokens of the next one that are near it.
        dropout: dropout rate of the attention weights, in [0, 1).

    Returns:
        (batch, heads, length, value_dim). The softmax of low precision is computed in float32.
    """
    batch, _, length, _ = query.shape
    key, value = zero_masked(key_mask, key, value)
    margin, size = _sizes(reach)
    # One graph serves all lengths, so it always computes blocks.
    if not makes_graph() and length <= size + 2 * margin:
        visible = _visible_in_row(length, reach, key_mask, cu_seqlens, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
    # An exported graph has at least two blocks, because torch.export makes a constant of a size that is 1.
    count = -(-length // size) + (1 if torch.jit.is_tracing() or is_exporting() else 0)
    plain = makes_graph() or is_transformed(query, key, value)
    around = _neighbourhoods if plain else _Neighbourhoods.apply
    queries = _blocks(query.transpose(1, 2), size, count).flatten(0, 1).transpose(1, 2)
    keys, values = (around(x.transpose(1, 2), size, margin, count).flatten(0, 1).transpose(1, 2) for x in (key, value))
    owners = _owners(length, key_mask, cu_seqlens, query.device)
    visible = _visible_in_blocks(*owners, reach, size, margin, count)
    visible = visible.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, dropout_p=dropout)
    mixed = mixed.transpose(1, 2).unflatten(0, (batch, count)).flatten(1, 2)
    return mixed[:, :length].transpose(1, 2)


def zero_masked(key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors (batch, heads, length, width) with 0 at masked tokens, where they may be NaN."""
    if key_mask is None:
        return tensors
    masked = ~key_mask[:, None, :, None]
    return tuple(x.masked_fill(masked, 0) for x in tensors)


def band(length: int, reach: int, device: torch.device) -> Tensor:
    """Return the mask (length, length), True where `|i - j| <= reach`."""
    token = torch.arange(length, device=device)
    return (token[:, None] - token).abs() <= reach


def sequence_of_tokens(cu_seqlens: Tensor, length: int, device: torch.device) -> Tensor:
    """Return the index (length,) of the sequence that each token of a packed row belongs to."""
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int64)
    return torch.searchsorted(cu_seqlens, torch.arange(length, device=device), right=True) - 1


def _sizes(reach: int) -> tuple[int, int]:
    """Return how many keys a block reads on each side, and how many queries it has."""
    margin = -(-reach // 8) * 8  # kernels prefer aligned masks
    return margin, max(BLOCK, margin)


def _owners(length: int, key_mask, cu_seqlens, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Return who owns queries and keys, (1 or batch, length) each, and whether keys are masked.

    Queries read keys with the same owner. Owners are sequences, counted from 1; that of masked keys is 0.
    """
    if cu_seqlens is None:
        queries = torch.ones(1, length, dtype=torch.int32, device=device)
    else:
        queries = (sequence_of_tokens(cu_seqlens, length, device) + 1).to(torch.int32)[None]
    return queries, queries if key_mask is None else queries * key_mask, key_mask is not None


def _visible_in_row(length: int, reach: int, key_mask, cu_seqlens, device: torch.device) -> Tensor | None:
    """Return the mask of a whole row, (1 or batch, 1, length or 1, length), or None if each token reads all."""
    if cu_seqlens is None and reach >= length - 1:
        if key_mask is None:
            return None
        visible = key_mask[:, None, None, :]
        return visible | ~visible.any(-1, keepdim=True)
    queries, keys, masked = _owners(length, key_mask, cu_seqlens, device)
    visible = (band(length, reach, device) & (queries[:, :, None] == keys[:, None, :]))[:, None]
    own = torch.eye(length, dtype=torch.bool, device=device)
    return _with_own(visible, own) if masked else visible


def _visible_in_blocks(
    queries: Tensor, keys: Tensor, masked: bool, reach: int, size: int, margin: int, count: int
) -> Tensor:
    """Return the mask of all blocks, (1 or batch, count, size, size + 2 * margin), for the owners of queries and keys.

    Tokens beyond the end of a row have owner 0 and read each other.
    """
    token = torch.arange(size, device=queries.device)[:, None]
    distance = torch.arange(size + 2 * margin, device=queries.device) - margin - token
    queries, keys = _blocks(queries, size, count), _neighbourhoods(keys, size, margin, count)
    visible = (distance.abs() <= reach) & (queries.unsqueeze(-1) == keys.unsqueeze(-2))
    return _with_own(visible, distance == 0) if masked else visible


def _with_own(visible: Tensor, own: Tensor) -> Tensor:
    """Let queries that read no key read their own, so that the softmax is finite. Its value is 0, as it is masked."""
    return visible | (own & ~visible.any(-1, keepdim=True))


def _padded(x: Tensor, left: int, right: int) -> Tensor:
    """Return x (batch, length, ...) with zeros on both sides of the tokens."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (left, right))


def _blocks(x: Tensor, size: int, count: int) -> Tensor:
    """Return (batch, count, size, ...) for x (batch, length, ...)."""
    return _padded(x, 0, count * size - x.shape[1]).unflatten(1, (count, size))


def _neighbourhoods(x: Tensor, size: int, margin: int, count: int) -> Tensor:
    """Return each block with `margin <= size` tokens on both sides, (batch, count, margin + size + margin, ...)."""
    x = _padded(x, size, (count + 1) * size - x.shape[1]).unflatten(1, (count + 2, size))
    return torch.cat([x[:, :-2, size - margin :], x[:, 1:-1], x[:, 2:, :margin]], 2)


class _Neighbourhoods(torch.autograd.Function):
    """`_neighbourhoods` as views, with a gradient that adds the three parts of each block without further copies."""

    @staticmethod
    def forward(ctx, x, size, margin, count):
        ctx.sizes, ctx.length = (size, margin, count), x.shape[1]
        x = _padded(x, margin, margin + count * size - x.shape[1])
        return x.unfold(1, size + 2 * margin, size).movedim(-1, 2)

    @staticmethod
    def backward(ctx, grad):
        size, margin, count = ctx.sizes
        before, own, after = grad.split((margin, size, margin), 2)
        own = own.clone(memory_format=torch.contiguous_format)
        own[:, : count - 1, size - margin :] += before[:, 1:]
        own[:, 1:, :margin] += after[:, : count - 1]
        return own.flatten(1, 2)[:, : ctx.length], None, None, None
