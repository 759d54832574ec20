"""Encoders whose weights LION takes: how their options and the names of their weights become LION's.

A family is one `Family`. Its `options` are those that the copied weights determine; its `names` are a table from the
source's names to ours. With every layer kept, the LION model computes what its source computes; tests/convert holds
every family to that, on random weights. Encoders with parts that LION lacks are in `REFUSED`, with the reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .names import name_pattern, without_wrappers


Names = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """Encoders of one kind.

    Args:
        label: name for messages, such as "DistilBERT".
        kind: "text" or "image".
        classes: LION's class by the source's class. Where several sources have the same LION class, the first is its
            counterpart.
        options: function from the source's configuration to LION's options that the copied weights determine. It raises
            ValueError for a configuration that does not fit.
        shared: function from the source's configuration to further options, which may be overridden.
        names: our names by the source's, without the prefix of its base model. {} is the number of a layer; a name that
            ends in a dot is a prefix. Several names: the weight is split equally along its first dimension. None: it is
            not needed.
        heads: further names by the LION class that is built. The weights of a head are copied only if the source's head
            is the same.
        scales: prefixes of our projections, by the source's names of the vectors that scale their outputs.
        local_layers: function from the source's configuration to the numbers of its layers with local attention.
        require_head: function of the source's configuration and the LION class, called if a head is copied. It raises
            ValueError for a head that differs.
    """

    label: str
    kind: str
    classes: Mapping[str, type]
    options: Callable[[PreTrainedConfig], dict[str, Any]]
    shared: Callable[[PreTrainedConfig], dict[str, Any]]
    names: Names
    heads: Mapping[type, Names] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    local_layers: Callable[[PreTrainedConfig], list[int]] = lambda config: []
    require_head: Callable[[PreTrainedConfig, type], None] = lambda config, model_class: None


def taken(config: PreTrainedConfig, *names: str, **renamed: str) -> dict[str, Any]:
    """Return options of a configuration by our names: `names` are the same there, `renamed` have another name."""
    return {name: getattr(config, name) for name in names} | {ours: getattr(config, x) for ours, x in renamed.items()}


def weights_of(source: PreTrainedModel, family: Family, model_class: type | None) -> dict[str, Tensor]:
    """Return the source's weights under LION's names. Those without a counterpart keep their names.

    Args:
        source: the source.
        family: its family.
        model_class: the LION class that is the source's counterpart; None to leave the weights of its head out.
    """
    base = f"{source.base_model_prefix}."
    inside = hasattr(source, source.base_model_prefix)
    weights, heads = {}, {}
    for name, tensor in without_wrappers(source.state_dict()).items():
        if inside and not name.startswith(base):
            heads[name] = tensor
        else:
            weights[name.removeprefix(base)] = tensor
    result = _renamed(weights, family.names)
    if model_class is not None:
        result |= _renamed(heads, family.heads.get(model_class, {}))
    return _scaled(result, family)


def _renamed(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    patterns = [(name_pattern(old), new) for old, new in names.items()]
    result = {}
    for name, tensor in weights.items():
        found = next(((pattern, new) for pattern, new in patterns if pattern.match(name)), None)
        if found is None:
            result[name] = tensor
            continue
        pattern, new = found
        parts = () if new is None else (new,) if isinstance(new, str) else new
        for part, share in zip(parts, tensor.chunk(max(len(parts), 1)), strict=False):
            result[pattern.sub(part.replace("{}", r"\1"), name)] = share
    return result


def _scaled(weights: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Multiply the vectors of `family.scales` into the projections whose outputs they scale."""
    for old, new in family.scales.items():
        pattern = name_pattern(old)
        for name in [name for name in weights if pattern.match(name)]:
            scale, target = weights.pop(name), pattern.sub(new.replace("{}", r"\1"), name)
            for part in (f"{target}weight", f"{target}bias"):
                if part in weights:
                    weights[part] = _product(weights[part], scale)
    return weights


def _product(tensor: Tensor, scale: Tensor) -> Tensor:
    """Return the rows of a weight or bias times a vector, rounded once."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    scale = scale.to(dtype)
    return (tensor.to(dtype) * (scale[:, None] if tensor.dim() == 2 else scale)).to(tensor.dtype)


def require_encoder(config: PreTrainedConfig) -> None:
    """Raise ValueError if a configuration is that of a decoder, or of relative positions."""
    for name, allowed in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        value = getattr(config, name, allowed)
        if value != allowed:
            raise ValueError(
                f"the source has {name}={value!r}, but only {name}={allowed!r} can be converted: LION is an encoder "
                "with absolute positions or none."
            )


_OTHER = "Choose a source of a kind that is supported"
_RELATIVE = f"adds a bias by distance to the scores of attention, which LION's softmax layers do not. {_OTHER}"
_SPARSE = f"has another pattern of attention in each layer, which LION's softmax and local layers are not. {_OTHER}"

# Why encoders of these kinds are not taken, by model_type.
REFUSED = {
    "lion": "it is LION already. Load it with from_pretrained",
    "lion_vision": "it is LION already. Load it with from_pretrained",
    "mpnet": f"MPNet {_RELATIVE}, such as a BERT or MiniLM sentence encoder",
    "albert": "ALBERT embeds tokens in a smaller space, normalises them there and projects them, which LION does not. "
    f"{_OTHER}, such as BERT",
    "deberta": f"DeBERTa's attention has terms of content to position and of position to content. {_OTHER}",
    "deberta-v2": f"DeBERTa's attention has terms of content to position and of position to content. {_OTHER}",
    "big_bird": f"BigBird {_SPARSE}",
    "longformer": f"Longformer {_SPARSE}, such as ModernBERT",
    "new": "GTE's encoder is code from the Hub, which is not run here. Choose GTE-ModernBERT or another source that is "
    "supported",
    "roformer": f"RoFormer rotates pairs of neighbouring features, LION those of the two halves of a head. {_OTHER}",
    "esm": f"ESM rescales embeddings by the share of masked tokens. {_OTHER}",
    "deit": "DeiT has a distillation token beside the class token. Save a DeiT without one as a ViT, or choose a ViT",
    "dinov2_with_registers": "this DINOv2 has register tokens beside the class token. Choose DINOv2 without registers",
    "dinov3_vit": "DINOv3 rotates queries and keys by rows and columns and has register tokens. Choose DINOv2",
    "beit": f"BEiT {_RELATIVE}, such as ViT",
    "data2vec-vision": f"Data2Vec for images {_RELATIVE}, such as ViT",
    "siglip": "SigLIP has no class token and pools by attention. Choose ViT or DINOv2",
    "siglip_vision_model": "SigLIP has no class token and pools by attention. Choose ViT or DINOv2",
    "clip": "CLIP normalises the embeddings of patches, and holds a text decoder. Choose ViT or DINOv2",
    "clip_vision_model": "CLIP normalises the embeddings of patches. Choose ViT or DINOv2",
    "vit_mae": "ViTMAE drops patches at random. Load it with ViTModel.from_pretrained and give that model",
    "ijepa": "I-JEPA has no class token. Choose ViT or DINOv2",
    "swin": "Swin attends inside shifted windows of patches and merges them. Choose ViT or DINOv2",
}  # fmt: skip


def refusal(name: str, model_type: str, supported: Mapping[str, Family]) -> str:
    """Return the message for a source of a kind that is not supported."""
    if model_type in REFUSED:
        return f"{name!r} is a {model_type!r} model, which cannot be converted: {REFUSED[model_type]}."
    return f"{name!r} is a {model_type!r} model; supported are {', '.join(supported)}."
