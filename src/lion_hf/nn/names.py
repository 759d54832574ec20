"""Names of options, in a file of their own because configurations check them without torch; and what numbers may be."""

import math
from numbers import Real


# Functions of query and key, see features.py.
FEATURE_MAPS = ("identity", "elu", "unit_silu")
# Options of a block, see block.py. Encoders and configurations take them on by this table.
BLOCK_OPTIONS = {"norm_position": ("post", "pre")}
# What works on each token alone, see mlp.py: two layers, or a gated pair and one.
MLP_TYPES = ("mlp", "glu")


def require_name(option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the value of an option is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def require_rate(option: str, value: object) -> None:
    """Raises ValueError unless the value of an option, a rate of dropout, is a probability below 1."""
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f"{option} is {value!r}; it must be a probability in [0, 1).")


def require_size(option: str, value: object) -> None:
    """Raises ValueError unless the value of an option is a finite number that is not negative."""
    if not (isinstance(value, Real) and 0 <= value < math.inf):
        raise ValueError(f"{option} is {value!r}; it must not be negative, and must be finite.")
