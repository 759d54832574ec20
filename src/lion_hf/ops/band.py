"""Softmax attention in a band: each token reads the tokens near it, in time and memory linear in the length.

On a GPU a fused kernel computes it (triton/band.py). Elsewhere, and for what the kernel does not support, blocks of
queries read their neighbourhood, the block itself and `reach` tokens on both sides of it, in one call of PyTorch's
`scaled_dot_product_attention`. Its mask has one small part per block, so no (length, length) tensor exists.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import fused_band_attention
from .checks import is_exporting, is_transformed, makes_graph, values_can_be_read
from .packing import map_sequences
from .tokens import default_scale


# Fewest queries of a block. Larger blocks read more keys outside the band, smaller ones leave less to each product.
# Measured for reach 64 with `benchmarks/bench_local.py --blocks`: one CPU thread in float32, an H100 in bfloat16.
BLOCK = {"cpu": 64, "accelerator": 128}

# One call with a mask of the whole row costs less up to this many neighbourhoods, and up to this many tokens.
SHORT_NEIGHBOURHOODS = 1.5
SHORT_TOKENS = {"cpu": 0, "accelerator": 1024}


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
            NaN in one of them stays there, except in graphs, in torch.func and on accelerators, where it may reach the
            tokens of the next one that are near it; the gradient of NaN from above may reach them everywhere.
        dropout: dropout rate of the attention weights, in [0, 1).

    Returns:
        (batch, heads, length, value_dim). The softmax of low precision is computed in float32. On a GPU with Triton, a
        fused kernel computes outputs and gradients, except with dropout, in float64, for heads wider than 128, in
        exported graphs and in torch.func; it has no second derivatives.
    """
    mixed = _band_attention(query, key, value, reach, key_mask, cu_seqlens, dropout)
    # The weight of a key of another sequence is 0, and 0 times NaN is NaN.
    if cu_seqlens is None or is_transformed(query, key, value) or not values_can_be_read(mixed) or _is_finite(mixed):
        return mixed

    def alone(query, key, value, key_mask):
        return _band_attention(query, key, value, reach, key_mask, None, dropout)

    return map_sequences(alone, cu_seqlens, key_mask, query, key, value)


def _is_finite(x: Tensor) -> bool:
    """Return whether a sum of all values is finite, which is so only if they are. It may overflow if they are large."""
    return bool(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())


def _band_attention(query, key, value, reach: int, key_mask, cu_seqlens, dropout: float) -> Tensor:
    """Attention of a row, or of all sequences of a packed row at once."""
    fused = fused_band_attention(query, key, value, dropout)
    if fused is not None:
        bounds = None if cu_seqlens is None else _bounds(cu_seqlens, query.shape[2], query.device)
        return fused(query, key, value, reach, key_mask, bounds)
    batch, _, length, _ = query.shape
    device = "cpu" if query.device.type == "cpu" else "accelerator"
    blocks = _Blocks.of(reach, length, BLOCK[device], plain=is_transformed(query, key, value))
    key, value = zero_masked(key_mask, key, value)
    # One graph serves all lengths, so it always computes blocks.
    if not makes_graph() and length <= max(SHORT_NEIGHBOURHOODS * blocks.width, SHORT_TOKENS[device]):
        visible = _visible_in_row(length, reach, key_mask, cu_seqlens, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
    if batch > 1 and device == "cpu" and not blocks.plain:
        return _row_by_row(query, key, value, reach, key_mask, dropout)
    visible = _visible_in_blocks(*_owners(length, key_mask, cu_seqlens, query.device), reach, blocks)
    queries = blocks.split(query.transpose(1, 2))
    keys, values = (blocks.around(x.transpose(1, 2)) for x in (key, value))
    if blocks.exported:  # heads before blocks, as torch.export cannot prove that a product of sizes is divisible
        queries, keys, values = (x.permute(0, 3, 1, 2, 4) for x in (queries, keys, values))
        mixed = _plain_attention(queries, keys, values, visible.unsqueeze(1), dropout)
        return blocks.join(mixed.permute(0, 2, 3, 1, 4), length).transpose(1, 2)
    # Fused kernels take four dimensions.
    visible = visible.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    queries, keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, dropout_p=dropout)
    return blocks.join(mixed.transpose(1, 2).unflatten(0, (batch, blocks.count)), length).transpose(1, 2)


def _row_by_row(query, key, value, reach: int, key_mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of each row by itself. The neighbourhoods of one row are views; those of a batch would be copies."""
    masks = [None] * len(query) if key_mask is None else key_mask.split(1)
    rows = zip(query.split(1), key.split(1), value.split(1), masks, strict=True)
    mixed = [_band_attention(q, k, v, reach, mask, None, dropout).transpose(1, 2) for q, k, v, mask in rows]
    return torch.cat(mixed).transpose(1, 2)


def _plain_attention(query, key, value, visible: Tensor, dropout: float) -> Tensor:
    """Attention of tensors of any number of dimensions: ONNX knows PyTorch's own only for four."""
    scale = default_scale(query)
    scores = torch.matmul(query * scale, key.transpose(-2, -1)).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(F.dropout(weights, dropout).to(value.dtype), value)


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


def _bounds(cu_seqlens: Tensor, length: int, device: torch.device) -> Tensor:
    """Return the first token and the end of the sequence of each token of a packed row, (2, length), int32."""
    own = sequence_of_tokens(cu_seqlens, length, device).clamp(0, cu_seqlens.numel() - 2)
    return cu_seqlens.to(device)[torch.stack([own, own + 1])].to(torch.int32)


# ------------------------------------------------------------------------------------------------------------- masks


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
    visible = (band(length, reach, device) & (queries[:, :, None] == keys[:, None, :])).unsqueeze(1)
    own = torch.eye(length, dtype=torch.bool, device=device)
    return _with_own(visible, own) if masked else visible


def _visible_in_blocks(queries: Tensor, keys: Tensor, masked: bool, reach: int, blocks: "_Blocks") -> Tensor:
    """Return the mask of all blocks, (1 or batch, count, size, width), for the owners of queries and keys.

    Tokens beyond the end of a row have owner 0 and read each other.
    """
    token = torch.arange(blocks.size, device=queries.device)[:, None]
    distance = torch.arange(blocks.width, device=queries.device) - blocks.margin - token
    same = blocks.split(queries).unsqueeze(-1) == blocks.around(keys).unsqueeze(-2)
    visible = same & (distance.abs() <= reach)
    return _with_own(visible, distance == 0) if masked else visible


def _with_own(visible: Tensor, own: Tensor) -> Tensor:
    """Let queries that read no key read their own, so that the softmax is finite. Its value is 0, as it is masked."""
    return visible | (own & ~visible.any(-1, keepdim=True))


# ------------------------------------------------------------------------------------------------------------ blocks


class _Blocks(NamedTuple):
    """How a row is divided into `count` blocks of `size` tokens, which read `margin <= size` tokens on both sides."""

    size: int
    margin: int
    count: int
    plain: bool  # whether to use PyTorch's own operators only, in graphs and torch.func
    exported: bool  # whether to index tokens, as torch.export cannot reshape a length that it does not know

    @classmethod
    def of(cls, reach: int, length: int, least: int, plain: bool) -> "_Blocks":
        margin = -(-reach // 8) * 8  # kernels prefer aligned masks
        size, exported = max(least, margin), torch.jit.is_tracing() or is_exporting()
        # An exported graph has at least two blocks, because torch.export makes a constant of a size that is 1.
        return cls(size, margin, -(-length // size) + int(exported), plain or makes_graph(), exported)

    @property
    def width(self) -> int:
        """Number of keys of each block."""
        return self.size + 2 * self.margin

    def split(self, x: Tensor) -> Tensor:
        """Return the blocks (batch, count, size, ...) of x (batch, length, ...)."""
        if self.exported:
            return self._indexed(x, 0, self.size)
        return _padded(x, 0, self.count * self.size - x.shape[1]).unflatten(1, (self.count, self.size))

    def around(self, x: Tensor) -> Tensor:
        """Return the neighbourhoods of the blocks, (batch, count, width, ...), of x (batch, length, ...)."""
        if self.exported:
            return self._indexed(x, -self.margin, self.width)
        if not self.plain:
            return _Neighbourhoods.apply(x, self)
        x = _padded(x, self.size, (self.count + 1) * self.size - x.shape[1])
        x = x.unflatten(1, (self.count + 2, self.size))
        return torch.cat([x[:, :-2, self.size - self.margin :], x[:, 1:-1], x[:, 2:, : self.margin]], 2)

    def join(self, x: Tensor, length: int) -> Tensor:
        """Return the row (batch, length, ...) of blocks x (batch, count, size, ...)."""
        if self.exported:
            token = torch.arange(length, device=x.device)
            return x[:, token // self.size, token % self.size]
        return x.flatten(1, 2)[:, :length]

    def _indexed(self, x: Tensor, start: int, width: int) -> Tensor:
        first = torch.arange(self.count, device=x.device) * self.size + start
        token = first[:, None] + torch.arange(width, device=x.device)
        outside = (token < 0) | (token >= x.shape[1])
        y = x[:, token.clamp(min=0).clamp(max=x.shape[1] - 1)]
        return y.masked_fill(outside[(..., *(None,) * (x.dim() - 2))], 0)


def _padded(x: Tensor, left: int, right: int) -> Tensor:
    """Return x (batch, length, ...) with zeros on both sides of the tokens."""
    zeros = [x.new_zeros(x.shape[0], count, *x.shape[2:]) for count in (left, right)]  # F.pad writes every token twice
    return torch.cat([zeros[0], x, zeros[1]], 1)


class _Neighbourhoods(torch.autograd.Function):
    """The neighbourhoods of blocks as views, with a gradient that adds their three parts without further copies."""

    @staticmethod
    def forward(ctx, x, blocks):
        ctx.blocks, ctx.length = blocks, x.shape[1]
        x = _padded(x, blocks.margin, blocks.margin + blocks.count * blocks.size - x.shape[1])
        return x.unfold(1, blocks.width, blocks.size).movedim(-1, 2)

    @staticmethod
    def backward(ctx, grad):
        size, margin, count, *_ = ctx.blocks
        before, own, after = grad.split((margin, size, margin), 2)
        own = own.clone(memory_format=torch.contiguous_format)
        own[:, : count - 1, size - margin :] += before[:, 1:]
        own[:, 1:, :margin] += after[:, : count - 1]
        return own.flatten(1, 2)[:, : ctx.length], None
