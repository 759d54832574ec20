"""LION's operators on tensors (arXiv 2502.16249). They need no layers and no configuration, and import only torch."""

from .api import attention_scores, bidirectional_linear_attention, resolve_format, two_sided_attention
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
    "two_sided_attention",
    "unpad",
]
