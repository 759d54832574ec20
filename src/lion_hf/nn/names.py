"""Allowed values of options, names and numbers. They are separate because configurations check them without torch."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real


# Feature maps, see features.py and, for those with parameters, learned_features.py.
FEATURE_MAPS = ("identity", "elu", "unit_silu", "silu", "hedgehog")
# Feature maps of either sign with length 1: scores are cosines, which are not divided by their sums, and have scale 1.
COSINE_MAPS = ("silu",)
# Options of a block, see block.py, with the values that are allowed, the default first. Encoders and configurations
# read this table.
BLOCK_OPTIONS = {
    "norm_position": ("post", "pre"),
    "norm_type": ("layer", "rms"),
    "use_bias": (True, False),
}
# Initial decays of a mixer: those of the variant, or windows that are spread over the heads.
DECAY_INITS = ("normal", "windows")
# Types of the MLP, see mlp.py: "glu" is gated.
MLP_TYPES = ("mlp", "glu")
# What tokens read: both sides, or only the tokens before or after them.
DIRECTIONS = ("both", "forward", "backward")
# Activations of the output gate of a mixer.
OUTPUT_GATES = ("none", "silu", "sigmoid")
# Norms of the output of a mixer, see norms.py.
OUTPUT_NORMS = ("none", "rms", "head_rms", "head_layer", "group_rms")
# Options of a mixer that a variant can turn on, with the values that turn them off. None is the value of the heads.
# Mixers, encoders and configurations read this table; None there means what the variant says.
MIXER_OPTIONS = {
    "short_conv": 0,
    "token_shift": False,
    "output_gate": "none",
    "output_norm": "none",
    "key_heads": None,
    "key_dim": None,
}


def require_name(option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value of an option is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """Return a sentence, after a space, with the allowed name nearest to a wrong one; empty if none is near."""
    near = difflib.get_close_matches(value.lower(), allowed, 1, 0.75) if isinstance(value, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def tells_misspelt(init: Callable) -> Callable:
    """Decorate the `__init__` of a module: a keyword that it does not have raises TypeError with the nearest name."""
    parameters = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(self, *args, **options):
        require_options(type(self), options, parameters)
        init(self, *args, **options)

    return checked


def require_options(owner: type, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError if a name is not that of an option of a class."""
    known = [name for name in known if name != "self"]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        hint = did_you_mean(unknown, known) or f" Its options are {', '.join(known)}."
        raise TypeError(f"{owner.__name__} has no option {unknown!r}.{hint}")


def require_rate(option: str, value: object) -> None:
    """Raise ValueError unless the value of an option, a dropout rate, is a probability below 1."""
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f"{option} is {value!r}; it must be a probability in [0, 1).")


def require_size(option: str, value: object) -> None:
    """Raise ValueError unless the value of an option is a finite number that is not negative."""
    if not (isinstance(value, Real) and 0 <= value < math.inf):
        raise ValueError(f"{option} is {value!r}; it must be a finite number that is not negative.")


def require_mixer_option(option: str, value: object, heads: int | None = None) -> None:
    """Raise ValueError unless an option in `MIXER_OPTIONS` has a value that is allowed.

    Args:
        option: name of the option.
        value: its value.
        heads: number of heads, to check `key_heads`; None if it is not known yet.
    """
    if option == "output_gate":
        require_name(option, value, OUTPUT_GATES)
    elif option == "output_norm":
        require_name(option, value, OUTPUT_NORMS)
    elif option == "token_shift":
        require_name(option, value, (False, True))
    else:
        least = 0 if option == "short_conv" else 1
        if value is None and least == 1:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{option} is {value!r}; it must be a whole number, at least {least}.")
        if option == "key_heads" and heads is not None and heads % value:
            raise ValueError(f"key_heads is {value}; it must divide the number of heads, {heads}.")
