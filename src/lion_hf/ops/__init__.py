"""LION's operators in PyTorch: no layers, no configuration, nothing imported but torch."""

from .api import attention_scores, bidirectional_linear_attention, resolve_format
from .packing import map_sequences, packed_bounds, unpad
from .scans import averaged_scans, snake_orders


__all__ = [
    "attention_scores",
    "averaged_scans",
    "bidirectional_linear_attention",
    "map_sequences",
    "packed_bounds",
    "resolve_format",
    "snake_orders",
    "unpad",
]
