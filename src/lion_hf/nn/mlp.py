"""The MLP of a block, which computes each token separately."""

from collections.abc import Callable

from torch import Tensor, nn

from .names import require_rate


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class MLP(nn.Module):
    """Two linear layers with an activation between them, optionally gated (GLU).

    It computes `down(activation(up(x)))`, or `down(activation(up(x)) * gate(x))` if gated.

    Args:
        dim: width of the tokens.
        hidden: width between the layers.
        activation: "gelu" (default), "relu", "silu", or a module or function of a tensor.
        gated: whether to multiply by a third linear layer.
        dropout: dropout rate before the last linear layer, in [0, 1).
        bias: whether the linear layers have a bias; True by default.

    Raises:
        ValueError: if the name of the activation is unknown, or the dropout rate is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(
                    f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}, "
                    "or a module or function."
                )
            activation = ACTIVATIONS[activation]()
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.act_fn = activation
        self.gate_proj = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.down_proj = nn.Linear(hidden, dim, bias=bias)
        require_rate("dropout", dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., dim) for x (..., dim)."""
        hidden = self.act_fn(self.up_proj(x))
        if self.gate_proj is not None:
            hidden = hidden * self.gate_proj(x)
        return self.down_proj(self.dropout(hidden))
