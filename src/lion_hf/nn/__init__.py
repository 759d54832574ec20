"""LION as PyTorch layers without a configuration, for your own models (arXiv 2502.16249)."""

from .block import Block
from .encoder import Encoder, run_blocks
from .gates import GateLinear
from .local_attention import LocalMixer
from .mixer import Mixer, TokenMixer
from .mlp import MLP
from .softmax import SoftmaxMixer
from .variants import Recurrence, Variant, register_variant, variant_class, without_prefix


__all__ = [
    "MLP",
    "Block",
    "Encoder",
    "GateLinear",
    "LocalMixer",
    "Mixer",
    "Recurrence",
    "SoftmaxMixer",
    "TokenMixer",
    "Variant",
    "register_variant",
    "run_blocks",
    "variant_class",
    "without_prefix",
]
