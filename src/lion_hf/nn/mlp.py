"""The layer that works on each token alone."""

from collections.abc import Callable

from torch import Tensor, nn

from .names import require_rate


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class MLP(nn.Module):
    """Two linear layers with an activation between them; gated, its values are multiplied by a third one's (GLU).

    Args:
        dim: width of the tokens.
        hidden: width between the layers.
        activation: "gelu", "relu", "silu", or a module or function of a tensor.
        gated: down(activation(up x) * gate x) in place of down(activation(up x)).
        dropout: rate after the activation.

    Raises:
        ValueError: for an activation of another name, and a rate that is no probability below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(
                    f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}, "
                    "or a module or function."
                )
            activation = ACTIVATIONS[activation]()
        self.up_proj = nn.Linear(dim, hidden)
        self.act_fn = activation
        self.gate_proj = nn.Linear(dim, hidden) if gated else None
        self.down_proj = nn.Linear(hidden, dim)
        require_rate("dropout", dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.up_proj(x))
        if self.gate_proj is not None:
            hidden = hidden * self.gate_proj(x)
        return self.down_proj(self.dropout(hidden))
