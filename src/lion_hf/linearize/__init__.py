"""Conversion of softmax encoders to linear attention with little loss, from text without labels (`lion-linearize`)."""

from .command import linearize
from .models import Pair, load_pair
from .run import Recipe


__all__ = ["Pair", "Recipe", "linearize", "load_pair"]
