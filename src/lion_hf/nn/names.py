"""Allowed values of options, names and numbers. They are separate because configurations check them without torch."""

import math
from numbers import Real


# Feature maps, see features.py.
FEATURE_MAPS = ("identity", "elu", "unit_silu")
# Options of a block, see block.py. Encoders and configurations read this table.
BLOCK_OPTIONS = {"norm_position": ("post", "pre")}
# Types of the MLP, see mlp.py: "glu" is gated.
MLP_TYPES = ("mlp", "glu")


def require_name(option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value of an option is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def require_rate(option: str, value: object) -> None:
    """Raise ValueError unless the value of an option, a dropout rate, is a probability below 1."""
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f"{option} is {value!r}; it must be a probability in [0, 1).")


def require_size(option: str, value: object) -> None:
    """Raise ValueError unless the value of an option is a finite number that is not negative."""
    if not (isinstance(value, Real) and 0 <= value < math.inf):
        raise ValueError(f"{option} is {value!r}; it must be a finite number that is not negative.")
