"""A block of an encoder: a mixer and an MLP, each with a norm and a residual connection."""

import functools

from torch import Tensor, nn

from .names import BLOCK_OPTIONS, require_name, require_rate
from .norms import token_norm


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the residual branch of each row of the batch with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        require_rate("drop_path", rate)
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return branch * keep.div_(1 - self.rate)


class Block(nn.Module):
    """A mixer and an MLP, each with a norm and a residual connection.

    `norm_position` selects the order::

        "post"  (BERT)    x = norm(x + mixer(x)),  x = norm(x + mlp(x))
        "pre"   (ViT)     x = x + mixer(norm(x)),  x = x + mlp(norm(x))

    Args:
        dim: width of the tokens.
        mixer: a `Mixer`, a `SoftmaxMixer`, or a module that is called as `mixer(x, key_mask, **mixing)` with the
            arguments of `forward`. It returns (batch, length, dim), or a tuple that begins with it.
        mlp: a module from (batch, length, dim) to the same shape, such as `MLP`.
        norm_position: "post" (default) or "pre".
        norm_type: "layer" (LayerNorm, default) or "rms" (RMSNorm), also of `final_norm`.
        norm_eps: eps of both norms.
        use_bias: whether LayerNorms have a bias; True by default. RMSNorm has none.
        first_norm: whether the mixer of a pre-norm block reads normalised tokens; True by default. The first block of
            an encoder with normalised embeddings can do without, as in ModernBERT.
        dropout: dropout rate of what is added to the residual stream, in [0, 1).
        drop_path: rate of stochastic depth, in [0, 1).

    Raises:
        ValueError: if `norm_position` or `norm_type` is unknown, a rate is not in [0, 1), `norm_eps` is negative or not
            finite, or `first_norm` is False in a post-norm block.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        norm_position: str = "post",
        norm_type: str = "layer",
        norm_eps: float = 1e-5,
        use_bias: bool = True,
        first_norm: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        require_name("norm_position", norm_position, BLOCK_OPTIONS["norm_position"])
        self.norm_position = norm_position
        if not first_norm and norm_position != "pre":
            raise ValueError(
                f"first_norm is {first_norm!r} with norm_position={norm_position!r}; only pre-norm blocks can do "
                "without the norm before the first mixer. Set norm_position='pre' or first_norm=True."
            )
        self._norm = norm = functools.partial(token_norm, norm_type, dim, norm_eps, use_bias)
        # In the order of computation. Optimizer states number the parameters, so this order must not change.
        if norm_position == "pre":
            self.mixer_norm = norm() if first_norm else None
            self.mixer, self.mlp_norm, self.mlp = mixer, norm(), mlp
        else:
            self.mixer, self.mixer_norm, self.mlp, self.mlp_norm = mixer, norm(), mlp, norm()
        require_rate("dropout", dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: Tensor, key_mask: Tensor | None = None, **mixing) -> Tensor:
        """Compute the block.

        Args:
            hidden_states: (batch, length, dim).
            key_mask: (batch, length), True for real tokens, passed to the mixer.
            mixing: further keyword arguments of the mixer, see `Mixer.forward`.

        Returns:
            (batch, length, dim).
        """
        if self.norm_position == "pre":
            normed = hidden_states if self.mixer_norm is None else self.mixer_norm(hidden_states)
            hidden_states = hidden_states + self._mix(normed, key_mask, mixing)
            return hidden_states + self._branch(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.mixer_norm(hidden_states + self._mix(hidden_states, key_mask, mixing))
        return self.mlp_norm(hidden_states + self._branch(self.mlp(hidden_states)))

    def final_norm(self) -> nn.Module | None:
        """Return a new norm for the end of a stack of pre-norm blocks; None for post-norm blocks."""
        return self.new_norm() if self.norm_position == "pre" else None

    def new_norm(self) -> nn.Module:
        """Return a new norm like those of the block."""
        return self._norm()

    def _mix(self, x: Tensor, key_mask: Tensor | None, mixing: dict) -> Tensor:
        mixed = self.mixer(x, key_mask, **mixing)
        return self._branch(mixed[0] if isinstance(mixed, tuple) else mixed)  # a tuple also holds the attention matrix

    def _branch(self, branch: Tensor) -> Tensor:
        return self.drop_path(self.dropout(branch))
