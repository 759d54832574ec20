"""What a mixer does with neighbouring tokens before it mixes them all: short convolutions and token shifts.

Padding counts as zeros, as at the borders of a row. The sequences of a packed row do not read each other, and each
prefix token, such as the class token of an image, is a sequence of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sequences(NamedTuple):
    """Where the sequences of a batch are.

    Args:
        key_mask: (batch, length), bool, True for real tokens; None without padding.
        cu_seqlens: (sequences + 1,), bounds of the sequences of a packed row; None if each row is one sequence.
        prefix_tokens: number of tokens at the beginning of each row that have no neighbours.
    """

    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    prefix_tokens: int = 0

    def spaced(self, x: Tensor, left: int, right: int) -> tuple[Tensor, Tensor | None]:
        """Return x with zeros in place of padding and around every sequence.

        Args:
            x: (batch, length, width).
            left: number of zeros that the first token of a sequence needs on its left.
            right: number of zeros that the last token of a sequence needs on its right.

        Returns:
            (batch, left + length + gaps + right, width), and the indices of the tokens, counted after the first `left`
            zeros: (length,), or None if they are 0, 1, 2, ...
        """
        if self.key_mask is not None:
            x = x.masked_fill(~self.key_mask.unsqueeze(-1), 0)
        if self.cu_seqlens is None and not self.prefix_tokens:
            return F.pad(x, (0, 0, left, right)), None
        token = torch.arange(x.shape[1], device=x.device)
        if self.cu_seqlens is None:
            sequence, gaps = token.clamp(max=self.prefix_tokens), self.prefix_tokens
        else:
            sequence = torch.searchsorted(self.cu_seqlens.to(token.dtype), token, right=True) - 1
            gaps = max(self.cu_seqlens.shape[0] - 2, 0)
        gap = max(left, right)
        places = token + gap * sequence
        zeros = x.new_zeros(x.shape[0], left + x.shape[1] + gap * gaps + right, x.shape[2])
        return zeros.index_copy(1, places + left, x), places


def short_conv(x: Tensor, conv: nn.Module, width: int, direction: str, sequences: Sequences) -> Tensor:
    """Convolve neighbouring tokens, each channel by itself, followed by SiLU.

    Args:
        x: (batch, length, channels).
        conv: a depthwise convolution without padding, from (batch, channels, n + width - 1) to (batch, channels, n).
        width: width of its kernel.
        direction: "both": the kernel is centred; an even width reads one more token on the left than on the right.
            "forward": the last tap is the token itself. "backward": the mirror image of "forward".
        sequences: where the sequences are.

    Returns:
        (batch, length, channels).
    """
    left = {"both": width // 2, "forward": width - 1, "backward": 0}[direction]
    x, places = sequences.spaced(x, left, width - 1 - left)
    x = x.transpose(1, 2)
    y = conv(x.flip(2)).flip(2) if direction == "backward" else conv(x)
    return F.silu(y if places is None else y.index_select(2, places)).transpose(1, 2)


def neighbours(x: Tensor, direction: str, sequences: Sequences) -> Tensor:
    """Return what a token shift mixes into each token of x (batch, length, dim), in the same shape.

    That is the token before it for "forward", the token after it for "backward", and the mean of both for "both". A
    neighbour that is missing or masked counts as 0.
    """
    x, places = sequences.spaced(x, 1, 1)
    before, after = x[:, :-2], x[:, 2:]
    shifted = {"forward": before, "backward": after}[direction] if direction != "both" else (before + after) / 2
    return shifted if places is None else shifted.index_select(1, places)
