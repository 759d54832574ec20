"""The options of the models of the paper, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


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
