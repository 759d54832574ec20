"""A block of an encoder: a mixer and an MLP, each with a norm and a residual connection."""

import functools

from torch import Tensor, nn

from .names import BLOCK_OPTIONS, require_name, require_rate, require_size


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of a whole row of the batch with probability `rate`."""

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
    """A mixer and an MLP with residual connections.

        norm_position="post"  (BERT)    x = norm(x + mixer(x)),  x = norm(x + mlp(x))
        norm_position="pre"   (ViT)     x = x + mixer(norm(x)),  x = x + mlp(norm(x))

    Args:
        dim: width of the tokens.
        mixer: a [`Mixer`], a [`SoftmaxMixer`], or a module that takes (batch, length, dim) and what it is called with.
        mlp: a module from and to (batch, length, dim), such as [`MLP`].
        norm_position: "post" or "pre".
        norm_eps: eps of both LayerNorms.
        dropout: rate on what is added to the residual stream.
        drop_path: rate of stochastic depth.

    Raises:
        ValueError: for another norm_position.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        norm_position: str = "post",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        require_name("norm_position", norm_position, BLOCK_OPTIONS["norm_position"])
        self.norm_position = norm_position
        self._norm = norm = functools.partial(nn.LayerNorm, dim, eps=norm_eps)
        # In the order in which tokens meet them: states of optimizers number the parameters.
        if norm_position == "pre":
            self.mixer_norm, self.mixer, self.mlp_norm, self.mlp = norm(), mixer, norm(), mlp
        else:
            self.mixer, self.mixer_norm, self.mlp, self.mlp_norm = mixer, norm(), mlp, norm()
        require_rate("dropout", dropout)
        require_size("norm_eps", norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: Tensor, key_mask: Tensor | None = None, **mixing) -> Tensor:
        """`key_mask` and further keyword arguments go to the mixer. (batch, length, dim) to the same shape."""
        if self.norm_position == "pre":
            hidden_states = hidden_states + self._mix(self.mixer_norm(hidden_states), key_mask, mixing)
            return hidden_states + self._branch(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.mixer_norm(hidden_states + self._mix(hidden_states, key_mask, mixing))
        return self.mlp_norm(hidden_states + self._branch(self.mlp(hidden_states)))

    def final_norm(self) -> nn.Module | None:
        """A new norm for the end of a stack of such blocks; None where they are post-norm and need none."""
        return self._norm() if self.norm_position == "pre" else None

    def _mix(self, x: Tensor, key_mask: Tensor | None, mixing: dict) -> Tensor:
        mixed = self.mixer(x, key_mask, **mixing)
        return self._branch(mixed[0] if isinstance(mixed, tuple) else mixed)  # a tuple holds the attention matrix too

    def _branch(self, branch: Tensor) -> Tensor:
        return self.drop_path(self.dropout(branch))
