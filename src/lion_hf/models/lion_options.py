"""Checks of option names and values that both configurations use."""

import difflib
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from operator import attrgetter, methodcaller
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import BertConfig, GenerationConfig, ViTConfig

from ..nn.names import COSINE_MAPS, MIXER_OPTIONS, require_mixer_option, require_rate, require_size
from ..nn.variants import variant_class


def _of_variant(value_of: Callable[[type], Any]) -> Callable[[type, str | None], Any]:
    return lambda variant, feature_map: value_of(variant)


def _image_norm(variant: type, feature_map: str | None) -> str:
    norm = variant.image_norm()
    return "rms" if feature_map in COSINE_MAPS and norm == "none" else norm


# Options that follow the variant and the feature map until they are set, with the function of both that gives their
# value. Scores of cosines may be negative, so outputs are not divided by their sums; images normalise them instead.
_OF_MIXERS = {name: _of_variant(methodcaller("option", name)) for name in MIXER_OPTIONS}
TEXT_DERIVED = MappingProxyType(
    {
        "pos_emb": _of_variant(attrgetter("pos_emb")),
        "layer_norm_after": _of_variant(attrgetter("norm")),
        "normalize": lambda variant, feature_map: variant.text_normalize and feature_map not in COSINE_MAPS,
        **_OF_MIXERS,
    }
)
IMAGE_DERIVED = MappingProxyType(
    {
        **_OF_MIXERS,
        "normalize": lambda variant, feature_map: variant.normalizes() and feature_map not in COSINE_MAPS,
        "output_norm": _image_norm,
    }
)

# Names that Transformers stores or stored in configurations, besides the fields of BERT and ViT.
_FOREIGN_NAMES = re.compile(
    r"_\w+|do_\w+|pooler_\w+|(\w+_)?token_ids?|position_embedding_type|classifier_activation|gradient_checkpointing|"
    r"(attn|experts)_implementation|(quantization|fusion|distributed)_config|auto_map|transformers_weights|torchscript|"
    r"tie_(encoder_decoder|last_hidden_states)|use_(return_dict|bfloat16)|pruned_heads|finetuning_task|prefix|"
    r"tokenizer_class|task_specific_params|cross_attention_hidden_size|output_past|tf_legacy_loss|per_layer_config"
)


@functools.lru_cache
def is_known(owner: type, name: str) -> bool:
    """Return whether a configuration class has an option of this name, or Transformers uses it elsewhere."""
    if name in dir(owner) or name in owner.__dataclass_fields__ or _FOREIGN_NAMES.fullmatch(name):
        return True
    twins = (BertConfig.__dataclass_fields__, ViTConfig.__dataclass_fields__, vars(GenerationConfig()))
    return any(name in names for names in twins)


@functools.lru_cache
def misspelt_option(owner: type, name: str) -> str | None:
    """Return the option of a configuration class whose name is close to an unknown name, or None."""
    near = [] if is_known(owner, name) else difflib.get_close_matches(name, owner.__dataclass_fields__, 1, 0.75)
    return near[0] if near else None


def plain(value: Any) -> Any:
    """Convert numpy numbers and arrays, also in containers, to Python's own. Other values stay as they are."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {plain(k): plain(v) for k, v in value.items()}
    return value


def sorted_layers(name: str, value: Any) -> list[int]:
    """Return the layer numbers of an option in ascending order. Raises ValueError for anything else."""
    value = [] if value is None else value
    if not isinstance(value, (list, tuple, range)) or any(type(layer) is not int or layer < 0 for layer in value):
        raise ValueError(
            f"{name} is {value!r}; it must be a list of layer numbers, whole and counted from 0 ([0, 1] are the first "
            "two layers; negative numbers are not allowed)."
        )
    if len(set(value)) < len(value):
        raise ValueError(f"{name} is {value!r}; it must contain each layer once.")
    return sorted(value)


# Layers with rotary positions by their names in Transformers: those of `softmax_layers` and those of `local_layers`.
# LION's own layers have a third name, and rotate only where it is stated.
LINEAR = "linear_attention"
ROPE_KINDS = ("full_attention", "sliding_attention", LINEAR)


def plain_rope(value: Any) -> dict[str, Any] | None:
    """Return `rope_parameters` for all layers, or by kind of layer; None without any.

    Raises:
        ValueError: for anything but the default type of RoPE with its theta.
    """
    if not value:
        return None
    if isinstance(value, Mapping) and any(kind in value for kind in ROPE_KINDS):
        if unknown := [kind for kind in value if kind not in ROPE_KINDS]:
            raise ValueError(
                f"rope_parameters names the layers {unknown[0]!r}; allowed are {', '.join(map(repr, ROPE_KINDS))}."
            )
        kinds = {kind: _one_rope(value.get(kind), kind) for kind in ROPE_KINDS}
        if kinds[LINEAR] is None:
            del kinds[LINEAR]
        return kinds if any(kinds.values()) else None
    return _one_rope(value)


def _one_rope(value: Any, layers: str | None = None) -> dict[str, Any] | None:
    if not value:
        return None
    stated = dict(value) if isinstance(value, Mapping) else {"rope_type": value}
    kind, theta = stated.pop("rope_type", stated.pop("type", "default")), stated.pop("rope_theta", 10000.0)
    stated.pop("type", None)
    if kind != "default" or stated:
        raise ValueError(
            f"rope_parameters is {value!r}; LION has the default type of RoPE only, "
            "{'rope_type': 'default', 'rope_theta': 10000.0}, for all layers or by kind of layer "
            f"({', '.join(map(repr, ROPE_KINDS))}). Leave other entries out."
        )
    if layers == LINEAR and isinstance(theta, (list, tuple)):
        thetas = [None if x is None else _theta(x) for x in theta]
        return {"rope_type": "default", "rope_theta": thetas} if any(thetas) else None
    return {"rope_type": "default", "rope_theta": _theta(theta)}


def _theta(value: Any) -> float:
    require_size("rope_theta", value)
    if isinstance(value, bool) or value <= 1:
        raise ValueError(f"rope_theta is {value!r}; it must be a number above 1, such as 10000.")
    return float(value)


def rope_thetas(rope: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """Return theta of the softmax layers and of the local layers, None without RoPE."""
    kinds = [None if rope is None else rope.get(kind) if kind in rope else rope for kind in ROPE_KINDS[:2]]
    return tuple(None if kind is None else kind.get("rope_theta") for kind in kinds)


def linear_rope_thetas(rope: Mapping[str, Any] | None, count: int) -> list[float | None]:
    """Return theta of each of `count` layers if LION is its attention, None without RoPE."""
    thetas = ((rope or {}).get(LINEAR) or {}).get("rope_theta")
    return thetas if isinstance(thetas, list) else [thetas] * count


def with_linear_theta(rope: Mapping[str, Any] | None, theta: Any) -> dict[str, Any] | None:
    """Return `rope_parameters` with RoPE of this theta in LION's own layers: a number or a list, None for no RoPE."""
    by_kind = any(kind in (rope or {}) for kind in ROPE_KINDS)
    kinds = rope if by_kind else dict.fromkeys(ROPE_KINDS[:2], rope)
    found = plain_rope({**kinds, LINEAR: None if theta is None else {"rope_theta": theta}})
    softmax, local = (found or {}).get(ROPE_KINDS[0]), (found or {}).get(ROPE_KINDS[1])
    return softmax if found and LINEAR not in found and softmax == local else found  # the short form, as without theta


def with_linear_rope(rope: Mapping[str, Any], local_layers: Collection[int], count: int) -> dict[str, Any]:
    """Return `rope_parameters` with which LION rotates in each layer as softmax or local attention does in `rope`.

    Args:
        rope: `rope_parameters`, for all layers or by kind.
        local_layers: layers that use the theta of local layers.
        count: number of layers.
    """
    softmax, local = rope_thetas(rope)
    return with_linear_theta(rope, [local if layer in local_layers else softmax for layer in range(count)])


_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "chunk_size",
    "local_window",
    "vocab_size",
    "max_position_embeddings",
    "patch_size",
    "num_channels",
)


def check_shape(config: Any) -> None:
    """Raise ValueError if an option of a configuration is out of range, or if options contradict each other."""
    for name in _COUNTS:
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    for name in ("layer_norm_eps", "initializer_range", "gate_eps"):
        require_size(name, getattr(config, name))
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not divisible by num_attention_heads {config.num_attention_heads}; "
            "each head needs the same whole number of features."
        )
    _check_layers(config)
    if not config.first_norm and config.norm_position != "pre":
        raise ValueError(
            f"first_norm is False with norm_position={config.norm_position!r}; only pre-norm layers can do without the "
            "norm before the first mixer. Set norm_position='pre' or first_norm=True."
        )
    activations = _activations()
    for name in ("hidden_act", "pooler_act"):
        value = getattr(config, name, "gelu")
        if activations is not None and value not in activations:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(sorted(activations))}.")
    _check_source_options(config)
    _check_mixer(config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "classifier_dropout"):
        if getattr(config, name, None) is not None:
            require_rate(name, getattr(config, name))


def _check_source_options(config: Any) -> None:
    """Check the options that other encoders need to be converted."""
    if getattr(config, "append_patch_mean", False) and not config.cls_tok:
        raise ValueError("append_patch_mean is True, but cls_tok is False; set cls_tok=True, or leave it out.")
    if getattr(config, "type_vocab_size", 0) < 0:
        raise ValueError(f"type_vocab_size is {config.type_vocab_size}; it must be at least 0 (no token types).")
    if not getattr(config, "roberta_positions", False):
        return
    pad, most = config.pad_token_id, config.max_position_embeddings - 2
    if pad is None or not 0 <= pad <= most:
        raise ValueError(
            f"pad_token_id is {pad} with roberta_positions=True, which counts positions from pad_token_id + 1; it must "
            f"be from 0 to {most} (max_position_embeddings - 2)."
        )


def _check_layers(config: Any) -> None:
    """Raise ValueError if `softmax_layers`, `local_layers` or RoPE do not fit the layers of a configuration."""
    for name in ("softmax_layers", "local_layers"):
        layers = getattr(config, name)
        if layers and layers[-1] >= config.num_hidden_layers:
            raise ValueError(
                f"{name} is {layers}; with num_hidden_layers {config.num_hidden_layers} its numbers must be from 0 to "
                f"{config.num_hidden_layers - 1}."
            )
    if both := sorted({*config.softmax_layers} & {*config.local_layers}):
        raise ValueError(
            f"softmax_layers and local_layers both contain {both}; attention in a layer is either over all tokens or "
            "in a window. Remove the layers from one of the lists."
        )
    head_dim = config.hidden_size // config.num_attention_heads
    if any(rope_thetas(config.rope_parameters)) and head_dim % 2:
        raise ValueError(
            f"rope_parameters is set, but heads are {head_dim} wide (hidden_size / num_attention_heads); RoPE rotates "
            "pairs of features. Choose an even width, or rope_parameters=None."
        )
    _check_linear_rope(config, head_dim)
    windows = config.decay_windows
    if windows is not None and len(windows) not in (2, config.num_attention_heads):
        raise ValueError(
            f"decay_windows is {windows!r}; it must be (smallest, largest) or one number per head, "
            f"{config.num_attention_heads} here."
        )


def _check_linear_rope(config: Any, head_dim: int) -> None:
    """Raise ValueError if RoPE in LION's own layers does not fit their number, their variant or the width of keys."""
    count = config.num_hidden_layers
    thetas = linear_rope_thetas(config.rope_parameters, count)
    if len(thetas) != count:
        raise ValueError(
            f"rope_parameters has {len(thetas)} thetas for {LINEAR!r}; it must be a number, or a list with one number "
            f"or None for each of the {count} layers."
        )
    variant = variant_class(config.mask_type)
    if not any(thetas):
        return
    if not variant.rope:
        raise ValueError(
            f"mask_type is {config.mask_type!r} with rope_parameters for {LINEAR!r}, but keys of {variant.label} are "
            "gates, which cannot be rotated. Leave it out, or set linear_rope_theta=None beside a preset."
        )
    width = config.key_dim or head_dim
    if width % 2:
        raise ValueError(
            f"key_dim is {width} with rope_parameters for {LINEAR!r}; RoPE rotates pairs of features. Choose an even "
            "width."
        )


def plain_windows(value: Any) -> list[float] | None:
    """Return `decay_windows` as a list of numbers of tokens. Raises ValueError if one is not finite and above 1."""
    if value is None:
        return None
    numbers = isinstance(value, (list, tuple)) and all(
        isinstance(x, Real) and not isinstance(x, bool) and 1 < x < math.inf for x in value
    )
    if not numbers:
        raise ValueError(
            f"decay_windows is {value!r}; it must be (smallest, largest) or one number per head, each a finite number "
            "of tokens above 1, or None."
        )
    return list(value)


def _check_mixer(config: Any) -> None:
    variant = variant_class(config.mask_type)
    for name in MIXER_OPTIONS:
        require_mixer_option(name, getattr(config, name), config.num_attention_heads)
    if config.normalize and variant.signed:
        raise ValueError(
            f"mask_type is {config.mask_type!r} with normalize=True, but scores of {variant.label} may be negative, so "
            "outputs cannot be divided by their sums. Set normalize=False, and output_norm='rms' for outputs of one "
            "size."
        )
    if config.normalize and config.feature_map in COSINE_MAPS:
        raise ValueError(
            f"feature_map is {config.feature_map!r} with normalize=True, but its scores may be negative, so outputs "
            "cannot be divided by their sums. Set normalize=False, and output_norm='rms' for outputs of one size, or "
            "choose feature_map='elu' or 'unit_silu'."
        )
    if config.normalize and config.structure()["feature_map"] == "identity" != variant.feature_map:
        raise ValueError(
            "feature_map is 'identity' with normalize=True, which divides by sums of scores of either sign. Choose "
            "feature_map='elu' or 'unit_silu', or normalize=False."
        )
    if getattr(config, "layer_norm_after", False) and config.output_norm != "none":
        raise ValueError(
            f"layer_norm_after=True with output_norm={config.output_norm!r} would normalise the outputs twice. Set "
            "layer_norm_after=False or output_norm='none'."
        )


def _activations() -> Mapping | None:
    """Transformers' activations by name, or None without torch, which configurations do not need."""
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        return None
    return ACT2FN
