"""The options of named models: those of the paper, and modern ones."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .lion_options import LINEAR, ROPE_KINDS


def _presets() -> Mapping[str, Mapping[str, Any]]:
    variants = {"lit": "lit", "d": "decay", "s": "selective"}
    text = {"base": (768, 12, 12), "large": (1024, 24, 16)}
    image = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
    presets = {}
    for short, mask_type in variants.items():
        for size, (width, layers, heads) in text.items():
            presets[f"lion-{short}-{size}"] = {"vocab_size": 30528} | _sizes(mask_type, width, layers, heads)
        for size, (width, layers, heads) in image.items():
            for order in ("normal", "s") if short != "lit" else ("normal",):
                name = f"lion-{short}-{size}-patch16-224" + ("-snake" if order == "s" else "")
                fixed = {"patch_size": 16, "image_size": 224, "order": order, "num_labels": 1000}
                presets[name] = fixed | _sizes(mask_type, width, layers, heads)
    return MappingProxyType({name: MappingProxyType(options) for name, options in presets.items()})


def _sizes(mask_type: str, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "mask_type": mask_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


# Every model of the paper by name: 6 text encoders and 15 image encoders.
PAPER_PRESETS: Mapping[str, Mapping[str, Any]] = _presets()


_ROPE = MappingProxyType({"rope_type": "default", "rope_theta": 10000.0})


def _modern(width: int, layers: int, heads: int, hidden: int) -> Mapping[str, Any]:
    """Return the block of ModernBERT (arXiv 2412.13663), with LION-S where that has global attention."""
    return MappingProxyType(
        {
            "vocab_size": 50368,
            "pad_token_id": 50283,
            "max_position_embeddings": 8192,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": hidden,
            "layer_norm_eps": 1e-5,
            "hidden_dropout_prob": 0.0,
            "classifier_pooling": "mean",
            "norm_position": "pre",
            "first_norm": False,
            "use_bias": False,
            "mlp_type": "glu",
            "mask_type": "selective",
            "local_layers": tuple(i for i in range(layers) if i % 3),
            "local_window": 128,
            "rope_parameters": MappingProxyType(dict.fromkeys(ROPE_KINDS, _ROPE)),
            "decay_init": "windows",
            "feature_map": "silu",
            "output_norm": "head_rms",
        }
    )


# Text encoders with the block of 2024: base and large have the shape of ModernBERT, small and tiny that of Ettin's
# models of 32 and 17 million parameters (arXiv 2507.11412).
MODERN_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lion-s-modern-tiny": _modern(256, 7, 4, 384),
        "lion-s-modern-small": _modern(384, 10, 6, 576),
        "lion-s-modern-base": _modern(768, 22, 12, 1152),
        "lion-s-modern-large": _modern(1024, 28, 16, 2624),
    }
)


def preset_options(preset: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a preset with what overrides them; `rope_theta` leaves RoPE in LION's layers as it is."""
    options = {**preset, **overrides}
    if "rope_theta" in overrides and "rope_parameters" in preset and "rope_parameters" not in overrides:
        linear = options.pop("rope_parameters")[LINEAR]["rope_theta"]
        options.setdefault("linear_rope_theta", linear)
    return options
