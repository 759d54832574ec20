"""The linear layer of gates, whose few outputs need more bits than the rest of a model."""

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device. Some types, such as "meta", have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class GateLinear(NonDynamicallyQuantizableLinear):
    """`torch.nn.Linear` for gates, which computes in the dtype of its weights whatever the dtype of its input.

    A decay close to 1 needs more than 8 bits. PyTorch's dynamic quantisation, torchao and bitsandbytes select linear
    layers by their type, and do not quantise this one. LoRA treats it like any linear layer.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias; True by default.
        device: as in `torch.nn.Linear`.
        dtype: as in `torch.nn.Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x (..., in_features), in the dtype of the weights, or of autocast."""
        device = x.device.type
        if self.weight.dtype == torch.float32 and autocasts(device) and x.dtype == torch.get_autocast_dtype(device):
            return super().forward(x)  # autocast would cast the input back
        return super().forward(x.to(self.weight.dtype))


class LowRankGate(nn.Module):
    """Two `GateLinear` without an activation between them, `down` (without bias) and `up`, for gates of low rank.

    Args:
        in_features: width of the input.
        rank: width between the layers.
        out_features: width of the output.
    """

    def __init__(self, in_features: int, rank: int, out_features: int):
        super().__init__()
        self.down = GateLinear(in_features, rank, bias=False)
        self.up = GateLinear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x (..., in_features), in the dtype of the weights."""
        return self.up(self.down(x))
