"""Softmax attention with the interface of a `Mixer`, for hybrid encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.packing import map_sequences
from .mixer import NO_MATRIX_OF_PACKED_ROWS, Path, TokenMixer
from .names import require_rate
from .registry import at_least_float32


class SoftmaxMixer(TokenMixer):
    """Softmax attention by PyTorch's `scaled_dot_product_attention`, in place of a `Mixer`.

    It does not depend on the order of the tokens, so the model must encode positions in another way.

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads, each `dim // heads` wide.
        qkv_bias: whether the projections of query, key and value have a bias; True by default.

    Raises:
        ValueError: if `dim` is not a multiple of `heads`.
    """

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        paths: Sequence[Path] | None = None,
        format: str = "auto",
        chunk_size: int = 64,
        dropout: float = 0.0,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens.

        Args:
            x: (batch, length, dim).
            key_mask: (batch, length), bool, True for real tokens. If all keys of a row are masked, its attention is 0.
            cu_seqlens: bounds of packed sequences, as in `Mixer.forward`; not together with `output_attentions`.
            paths: ignored.
            format: ignored.
            chunk_size: ignored.
            dropout: dropout rate of the attention matrix in training, in [0, 1).
            output_attentions: whether to return the attention matrix as well, whatever `format` is.

        Returns:
            (batch, length, dim); with `output_attentions` a pair of it and the attention matrix
            (batch, heads, length, length).

        Raises:
            ValueError: if the shape of `x` or `key_mask` is wrong, or the mask is additive; if `dropout` is not in
                [0, 1); if `output_attentions` is set for a packed row.
        """
        require_rate("dropout", dropout)
        if output_attentions and cu_seqlens is not None:
            raise ValueError(NO_MATRIX_OF_PACKED_ROWS)
        key_mask = self.checked_mask(x, key_mask)
        query, key, value = self.project(x)
        dropout = dropout if self.training else 0.0

        def attend(query, key, value, key_mask):
            return self._attend(query, key, value, key_mask, dropout)

        weights = None
        if output_attentions:
            weights = F.dropout(self._matrix(query, key, key_mask), dropout).to(value.dtype)
            mixed = torch.matmul(weights, value)
        elif cu_seqlens is None:
            mixed = attend(query, key, value, key_mask)
        else:
            mixed = map_sequences(attend, cu_seqlens, key_mask, query, key, value)
        mixed = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return (mixed, weights) if output_attentions else mixed

    def _attend(self, query, key, value, key_mask, dropout: float) -> Tensor:
        masked, visible = _masked_and_visible(key_mask)
        value = value if masked is None else value.masked_fill(masked.transpose(2, 3), 0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)

    def _matrix(self, query, key, key_mask) -> Tensor:
        masked, visible = _masked_and_visible(key_mask)
        scores = torch.matmul(query * self.head_dim**-0.5, key.transpose(2, 3))
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = at_least_float32(scores).softmax(-1)
        return weights if masked is None else weights.masked_fill(masked, 0)


def _masked_and_visible(key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return masks of the keys whose weight is 0, and of the keys in the softmax, (batch, 1, 1, length) each.

    If every key is masked, the softmax includes all of them, so that it is finite.
    """
    if key_mask is None:
        return None, None
    masked = ~key_mask[:, None, None, :]
    return masked, ~masked | masked.all(-1, keepdim=True)
