"""Checks of what a mixer is given: its options, its variant, the windows of its heads and calls for its matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.checks import values_can_be_read
from .names import COSINE_MAPS, FEATURE_MAPS, require_name
from .registry import DECAY_SHAPES, Recurrence, Variant
from .rotary import require_theta


# Number of dimensions of the log-decay, by the attribute `decay` of the variant.
_LOG_DECAY_DIMS = {None: None, "head": 1, "channel": 2, "token": 3, "token_channel": 4}

NO_MATRIX_OF_PACKED_ROWS = (
    "This row holds several packed sequences, for which no attention matrix is built, but output_attentions=True or "
    "attention dropout in training needs one. Give each sequence its own row, or set output_attentions to False and "
    "dropout or attention_probs_dropout_prob to 0."
)


def head_windows(windows: Sequence[float], heads: int) -> Tensor:
    """Return the window of each head, in tokens.

    Args:
        windows: one number per head, or (smallest, largest), which are spread geometrically over the heads.
        heads: number of heads.

    Returns:
        The windows, of shape (heads,) in float64.

    Raises:
        ValueError: if there are neither two windows nor one per head, or if one is not a finite number above 1.
    """
    try:
        given = torch.tensor(list(windows), dtype=torch.float64, device="cpu")  # also while models are built on "meta"
    except (TypeError, ValueError, OverflowError):  # not a sequence of numbers
        given = torch.empty(0, device="cpu")
    if given.shape not in ((2,), (heads,)) or not bool(((given > 1) & given.isfinite()).all()):
        raise ValueError(
            f"windows is {windows!r}; it must be (smallest, largest) or {heads} numbers, one per head, each a finite "
            "number of tokens above 1."
        )
    if len(given) == heads:
        return given
    steps = torch.logspace(0, 1, heads, base=float(given[1] / given[0]), dtype=torch.float64, device="cpu")
    return steps * given[0]


def require_added(view: Variant) -> None:
    """Raise an error if `build` set a weight as an attribute, or the class names one that `build` did not add."""
    kind = type(view)
    for name, value in vars(view).items():
        if name != "mixer" and isinstance(value, (Tensor, nn.Module)):
            raise ValueError(
                f"{kind.__name__}.build sets self.{name}; write self.add({name!r}, ...), so that the weight belongs to "
                "the mixer."
            )
    for name in kind.float32_weights:
        if not hasattr(view.mixer, name):
            raise ValueError(f"{kind.__name__}.float32_weights names {name!r}, but build adds no weight of this name.")


def require_stated(variant: type[Variant], recurrence: Recurrence) -> None:
    """Raise an error if `prepare` returned something else than its class declares."""
    if not isinstance(recurrence, Recurrence):
        raise TypeError(
            f"{variant.__name__}.prepare returned {type(recurrence).__name__}; it must return a Recurrence."
        )
    decay = recurrence.log_decay
    if (None if decay is None else decay.dim()) != _LOG_DECAY_DIMS[variant.decay]:
        found = "no log_decay" if decay is None else f"a log_decay of shape {tuple(decay.shape)}"
        raise ValueError(
            f"{variant.__name__} sets decay = {variant.decay!r}, but prepare returned {found}. "
            f"{', '.join(f'{kind!r} means {shape}' for kind, shape in DECAY_SHAPES.items())}, and None means no "
            "log_decay."
        )
    if decay is not None and values_can_be_read(decay) and bool((decay > 0).any()):
        raise ValueError(
            f"{variant.__name__}.prepare returned a positive log_decay (largest: {decay.max().item()}); it is the "
            "logarithm of a decay in [0, 1], so every entry must be <= 0. Use logsigmoid, or clamp(max=0)."
        )


def chosen_normalize(variant: type[Variant], normalize: bool | None, feature_map: str | None = None) -> bool:
    """Return whether a mixer divides outputs by their row sums, by default what the variant and feature map allow.

    Raises:
        ValueError: if it should, although the scores may be negative, or `normalize` is no bool.
    """
    if normalize not in (None, True, False):
        raise ValueError(f"normalize is {normalize!r}; it must be True, False, or None for what the variant says.")
    if normalize and variant.signed:
        raise ValueError(
            f"normalize is {normalize!r}, but scores of {variant.label} may be negative, so outputs cannot be divided "
            "by their sums. Set normalize=False, and output_norm to 'rms' for outputs of one size."
        )
    if normalize and feature_map in COSINE_MAPS:
        raise ValueError(
            f"normalize is {normalize!r} with feature_map={feature_map!r}, whose scores may be negative, so outputs "
            "cannot be divided by their sums. Set normalize=False, and output_norm to 'rms' for outputs of one size, "
            "or feature_map to 'elu' or 'unit_silu'."
        )
    return variant.normalizes() and feature_map not in COSINE_MAPS if normalize is None else normalize


def chosen_feature_map(variant: type[Variant], name: str | None, normalize: bool) -> str:
    """Return the feature map of a mixer, `name` or by default that of the variant.

    Raises:
        ValueError: if the name is unknown, or is "identity" although outputs are divided by their row sums and the
            variant does not use it by default.
    """
    if name is None:
        return variant.feature_map if normalize else "identity"
    require_name("feature_map", name, FEATURE_MAPS)
    if normalize and name == "identity" and variant.feature_map != "identity":
        raise ValueError(
            "feature_map is 'identity' with normalize=True, which divides by sums of scores of either sign. Set it to "
            "'elu' or 'unit_silu', or set normalize=False."
        )
    return name


def require_rope(variant: type[Variant], rope_theta: float | None, key_dim: int) -> None:
    """Raise ValueError if queries and keys cannot be rotated, see `require_theta`, or the variant does not allow it."""
    require_theta(rope_theta, key_dim)
    if rope_theta is not None and not variant.rope:
        raise ValueError(
            f"rope_theta is {rope_theta!r}, but keys of {variant.label} are gates, which cannot be rotated. Leave "
            "rope_theta out, or choose another variant."
        )


def require_matrix(format: str, output_attentions: bool, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError for packed rows, and for a form that never builds the attention matrix."""
    if cu_seqlens is not None:
        raise ValueError(NO_MATRIX_OF_PACKED_ROWS)
    if format.lower() not in ("attention", "auto"):
        cause = (
            "output_attentions=True" if output_attentions else "dropout or attention_probs_dropout_prob > 0 in training"
        )
        raise ValueError(
            f"{cause} needs the attention matrix, which format={format!r} never builds. Set format or "
            "model.config.format to 'attention' or 'auto'"
            + ("." if output_attentions else ", or set dropout or attention_probs_dropout_prob to 0.")
        )
