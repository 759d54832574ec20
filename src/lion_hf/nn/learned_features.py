"""Feature maps with parameters, from (batch, heads, length, width) to a wider last dimension."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .registry import Variant, at_least_float32


class Hedgehog(nn.Module):
    """Positive features that a linear map in each head learns: softmax of `[z, -z]` for `z = (x + W x) / width**(1/4)`.

    Products of such features can imitate the spikes of softmax attention (Hedgehog, arXiv 2402.04347), which fixed
    maps such as elu(x) + 1 cannot. At the start W is 0, and the products of z of query and key are the logits of
    softmax attention. `lion-linearize` trains W against the layers of a softmax encoder.

    Args:
        heads: number of heads of query and key.
        width: width of a head of query and key.
    """

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, width))

    def init_weights(self, init: ModuleType) -> None:
        """Set W to 0.

        Args:
            init: a module with the functions of `torch.nn.init`.
        """
        init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (batch, heads, length, 2 * width), in the dtype of x; softmax is computed in float32.

        Args:
            x: (batch, heads, length, width).
        """
        z = at_least_float32(x + torch.matmul(x, self.weight.transpose(1, 2))) * x.shape[-1] ** -0.25
        return torch.cat([z, -z], -1).softmax(-1).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"heads={self.weight.shape[0]}, width={self.weight.shape[1]}"


# Modules of feature maps by name. Those without parameters are in features.py.
MODULES: dict[str, type[nn.Module]] = {"hedgehog": Hedgehog}


def require_positive_scores(name: str, variant: type[Variant]) -> None:
    """Raise ValueError if a variant does not support learned features: its scores have signs, or its decays have one
    entry for each channel of the key, which these features double."""
    if variant.signed or (variant.decay or "").endswith("channel"):
        raise ValueError(
            f"feature_map is {name!r}, whose features are positive and twice as wide as the key, but {variant.label} "
            f"has {'scores of either sign' if variant.signed else 'a decay per channel of the key'}. Choose 'lit', "
            "'decay' or 'selective' as variant, or another feature_map."
        )
