"""Softmax attention with the interface of a `Mixer`, for hybrid encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.packing import map_sequences
from .mixer import Path, TokenMixer
from .names import require_rate
from .variants import at_least_float32


class SoftmaxMixer(TokenMixer):
    """Softmax attention by PyTorch's SDPA. It knows no order: tokens come as a set. Arguments as in `TokenMixer`."""

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
        """As `Mixer.forward`. `paths`, `format` and `chunk_size` change nothing, and the matrix is there in every
        format. Rows whose keys are all masked read 0."""
        require_rate("dropout", dropout)
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
    """Keys that count 0, and keys that the softmax runs over, (batch, 1, 1, length) each.

    Where every key is masked all are let in, so that the softmax is finite."""
    if key_mask is None:
        return None, None
    masked = ~key_mask[:, None, None, :]
    return masked, ~masked | masked.all(-1, keepdim=True)
