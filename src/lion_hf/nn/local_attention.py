"""Softmax attention in a window around each token, with the interface of a `Mixer`, for hybrid encoders."""

import torch
from torch import Tensor

from ..ops.band import band, band_attention
from .names import tells_misspelt
from .softmax import SoftmaxLayer


class LocalMixer(SoftmaxLayer):
    """Softmax attention to the tokens near each token, in place of a `Mixer`.

    Token i reads the tokens j with `|i - j| <= window // 2`. Time and memory are linear in the length, on every device.
    On a GPU fused kernels compute it, see `lion_hf.ops.band.band_attention`.

    Example::

        >>> mixer = lion_hf.nn.LocalMixer(dim=256, heads=4, window=128, rope_theta=10000.0)
        >>> mixer(torch.randn(2, 1000, 256)).shape
        torch.Size([2, 1000, 256])

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads, each `dim // heads` wide.
        window: total width of the window in tokens, 128 by default, as ModernBERT's `local_attention`.
        qkv_bias: whether the projections of query, key and value have a bias; True by default.
        out_bias: whether the output projection has a bias; True by default.
        rope_theta: base of the angles of rotary position embeddings, as in `SoftmaxMixer`; None (default) for none.

    Packed sequences do not read each other. Masked tokens inside a window are counted as tokens of the window, but are
    not read. The attention matrix (batch, heads, length, length) is built only if `output_attentions` asks for it.

    Raises:
        ValueError: if `dim` is not a multiple of `heads`; if `window` is not a whole number of at least 1; if
            `rope_theta` is not positive, or heads have an odd width with it.
    """

    @tells_misspelt
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 128,
        qkv_bias: bool = True,
        out_bias: bool = True,
        rope_theta: float | None = None,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, out_bias=out_bias, rope_theta=rope_theta)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(
                f"window is {window!r}; it must be a whole number of tokens, at least 1, for instance 128."
            )
        self.window = window

    def _attend(self, query, key, value, key_mask, cu_seqlens, dropout: float) -> Tensor:
        reach = self.window // 2
        return band_attention(query, key, value, reach, key_mask=key_mask, cu_seqlens=cu_seqlens, dropout=dropout)

    def _readable(self, length: int, device: torch.device) -> Tensor:
        return band(length, self.window // 2, device)

    def extra_repr(self) -> str:
        """Return the options that `repr` shows."""
        return ", ".join(filter(None, [f"window={self.window}", super().extra_repr()]))
