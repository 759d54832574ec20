"""Softmax attention with the interface of a `Mixer`, for hybrid encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.band import zero_masked
from ..ops.checks import check_cu_seqlens
from ..ops.packing import map_sequences
from .mixer import NO_MATRIX_OF_PACKED_ROWS, Path, TokenMixer
from .names import require_rate, tells_misspelt
from .registry import at_least_float32
from .rotary import apply_rotary, require_theta


class SoftmaxLayer(TokenMixer):
    """Base class of the mixers that use softmax attention. Subclasses say which tokens a token reads."""

    @tells_misspelt
    def __init__(
        self, dim: int, heads: int, *, qkv_bias: bool = True, out_bias: bool = True, rope_theta: float | None = None
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, out_bias=out_bias)
        require_theta(rope_theta, self.head_dim)
        self.rope_theta = rope_theta

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
            key_mask: (batch, length), bool, True for real tokens. The attention of a token that reads no key is 0.
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
                [0, 1); if `cu_seqlens` does not divide the row into sequences; if `output_attentions` is set for a
                packed row.
        """
        require_rate("dropout", dropout)
        if output_attentions and cu_seqlens is not None:
            raise ValueError(NO_MATRIX_OF_PACKED_ROWS)
        key_mask = self.checked_mask(x, key_mask)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *x.shape[:2])
        query, key, value = self.project(x)
        if self.rope_theta is not None:
            query, key = apply_rotary(query, key, self.rope_theta, cu_seqlens)
        dropout = dropout if self.training else 0.0
        weights = None
        if output_attentions:
            key, value = zero_masked(key_mask, key, value)
            weights = F.dropout(self._matrix(query, key, key_mask), dropout).to(value.dtype)
            mixed = torch.matmul(weights, value)
        else:
            mixed = self._attend(query, key, value, key_mask, cu_seqlens, dropout)
        mixed = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return (mixed, weights) if output_attentions else mixed

    def _attend(self, query, key, value, key_mask, cu_seqlens, dropout: float) -> Tensor:
        """Return the attention of a row or of packed sequences, (batch, heads, length, head_dim)."""
        raise NotImplementedError

    def _readable(self, length: int, device: torch.device) -> Tensor | None:
        """Return the mask (length, length) of the tokens that each token reads; None if it reads all."""
        return None

    def _matrix(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
        scores = torch.matmul(query * self.head_dim**-0.5, key.transpose(2, 3))
        masks = [self._readable(query.shape[2], query.device), None if key_mask is None else key_mask[:, None, None, :]]
        masks = [mask for mask in masks if mask is not None]
        if not masks:
            return at_least_float32(scores).softmax(-1)
        read = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        # The softmax of a token that reads no key includes all keys, so that it is finite.
        scores = scores.masked_fill(~(read | ~read.any(-1, keepdim=True)), -torch.inf)
        return at_least_float32(scores).softmax(-1).masked_fill(~read, 0)

    def extra_repr(self) -> str:
        """Return the options that `repr` shows."""
        return "" if self.rope_theta is None else f"rope_theta={self.rope_theta}"


class SoftmaxMixer(SoftmaxLayer):
    """Softmax attention by PyTorch's `scaled_dot_product_attention`, in place of a `Mixer`.

    Without `rope_theta` it does not depend on the order of the tokens, so the model must encode positions in another
    way.

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads, each `dim // heads` wide.
        qkv_bias: whether the projections of query, key and value have a bias; True by default.
        out_bias: whether the output projection has a bias; True by default.
        rope_theta: base of the angles of rotary position embeddings, see `lion_hf.nn.rotary.apply_rotary`; None
            (default) for none. Positions are indices in the row, and start from 0 in each packed sequence.

    Raises:
        ValueError: if `dim` is not a multiple of `heads`; if `rope_theta` is not positive, or heads have an odd width
            with it.
    """

    def _attend(self, query, key, value, key_mask, cu_seqlens, dropout: float) -> Tensor:
        key, value = zero_masked(key_mask, key, value)

        def attend(query, key, value, key_mask):
            visible = None
            if key_mask is not None:  # if every key is masked, the softmax includes all, so that it is finite
                visible = key_mask[:, None, None, :]
                visible = visible | ~visible.any(-1, keepdim=True)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)

        if cu_seqlens is None:
            return attend(query, key, value, key_mask)
        return map_sequences(attend, cu_seqlens, key_mask, query, key, value)
