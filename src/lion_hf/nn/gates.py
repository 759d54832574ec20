"""The linear layer of gates: few outputs, which need more bits than the rest of a model."""

from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class GateLinear(NonDynamicallyQuantizableLinear):
    """`nn.Linear` for gates. It computes in the dtype of its own weights, whatever that of its input.

    A decay close to 1 needs more than 8 bits. PyTorch's dynamic quantisation, torchao and bitsandbytes replace linear
    layers by their type, and leave this one alone. LoRA treats it as any linear layer.

    Shapes: (..., in_features) to (..., out_features).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
