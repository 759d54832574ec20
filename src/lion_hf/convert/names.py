"""Conversion of tensor names between the authors' checkpoints and this package.

All maps are linear in the tensors, so they apply to gradients as well as to weights. Keys may be missing. Tables that
the configuration does not use are dropped.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.configuration_lion import LionConfig, LionVisionConfig


# Our names by the authors'. {} is the number of a layer; a name that ends in a dot is a prefix.
_VISION_NAMES = {
    "cls_token": "lion_vision.embeddings.cls_token",
    "pos_embed": "lion_vision.embeddings.position_embeddings",
    "patch_embed.proj.": "lion_vision.embeddings.patch_embeddings.projection.",
    "norm.": "lion_vision.norm.",
    "head.": "classifier.",
    "blocks.{}.norm1.": "lion_vision.layers.{}.mixer_norm.",
    "blocks.{}.norm2.": "lion_vision.layers.{}.mlp_norm.",
    "blocks.{}.attn.proj.": "lion_vision.layers.{}.mixer.o_proj.",
    "blocks.{}.attn.a_i": "lion_vision.layers.{}.mixer.decay_logit",
    "blocks.{}.attn.a2_i": "lion_vision.layers.{}.mixer.decay_logit_2",
    "blocks.{}.attn.a_i.": "lion_vision.layers.{}.mixer.decay_proj.",
    "blocks.{}.attn.a2_i.": "lion_vision.layers.{}.mixer.decay_proj_2.",
    "blocks.{}.mlp.fc1.": "lion_vision.layers.{}.mlp.up_proj.",
    "blocks.{}.mlp.fc2.": "lion_vision.layers.{}.mlp.down_proj.",
}
_VISION_STACKED = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_VISION_SPLIT = re.compile(r"lion_vision\.layers\.(\d+)\.mixer\.([qkv])_proj\.(weight|bias)")

TEXT_NAMES = {
    "bert.embeddings.LayerNorm.": "lion.embeddings.norm.",
    "bert.embeddings.word_embeddings.": "lion.embeddings.word_embeddings.",
    "bert.embeddings.position_embeddings.": "lion.embeddings.position_embeddings.",
    "bert.embeddings.token_type_embeddings.": "lion.embeddings.token_type_embeddings.",
    "bert.encoder.layer.{}.attention.self.query.": "lion.layers.{}.mixer.q_proj.",
    "bert.encoder.layer.{}.attention.self.key.": "lion.layers.{}.mixer.k_proj.",
    "bert.encoder.layer.{}.attention.self.value.": "lion.layers.{}.mixer.v_proj.",
    "bert.encoder.layer.{}.attention.self.ai": "lion.layers.{}.mixer.decay_logit",
    "bert.encoder.layer.{}.attention.self.Wa_i.": "lion.layers.{}.mixer.decay_proj.",
    "bert.encoder.layer.{}.attention.self.layer_norm.": "lion.layers.{}.mixer.norm.",
    "bert.encoder.layer.{}.attention.output.dense.": "lion.layers.{}.mixer.o_proj.",
    "bert.encoder.layer.{}.attention.output.LayerNorm.": "lion.layers.{}.mixer_norm.",
    "bert.encoder.layer.{}.intermediate.dense.": "lion.layers.{}.mlp.up_proj.",
    "bert.encoder.layer.{}.output.dense.": "lion.layers.{}.mlp.down_proj.",
    "bert.encoder.layer.{}.output.LayerNorm.": "lion.layers.{}.mlp_norm.",
    "bert.pooler.": "lion.pooler.",
    "cls.predictions.transform.dense.": "head.dense.",
    "cls.predictions.transform.LayerNorm.": "head.norm.",
    "cls.predictions.bias": "head.decoder.bias",
    "cls.predictions.decoder.": "head.decoder.",
    "classifier.": "classifier.",
}
# Buffers and tables of relative distances, which no LION model uses.
_TEXT_UNUSED = re.compile(r"(^|\.)(position_ids|distance_embedding\.weight)$")

# Parts that wrappers add to the names of weights: DistributedDataParallel and AveragedModel, torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_UNKNOWN = "is not a name in the authors' {} models; remove the tensor, or the prefix if all names have one."
_NO_COUNTERPART = (
    "has no counterpart in the authors' models, which have an image classifier, a text classifier and a masked "
    "language modelling head."
)

_Rules = list[tuple[re.Pattern, str]]


def name_pattern(name: str) -> re.Pattern:
    """Return a pattern for a name in which {} is the number of a layer; a name that ends in a dot is a prefix."""
    return re.compile("^" + re.escape(name).replace(r"\{\}", r"(\d+)") + ("" if name.endswith(".") else "$"))


def _rules(names: dict[str, str]) -> _Rules:
    return [(name_pattern(old), new.replace("{}", r"\1")) for old, new in names.items()]


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


_FROM_VISION, _TO_VISION = _rules(_VISION_NAMES), _rules(_reversed(_VISION_NAMES))
_FROM_TEXT, _TO_TEXT = _rules(TEXT_NAMES), _rules(_reversed(TEXT_NAMES))


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers around the model or its modules add to the names of a state dict.

    AveragedModel's counter `n_averaged` is dropped, since it is not a weight.

    Raises:
        ValueError: if two weights get the same name, and for flattened parameters of FSDP, which have lost their names.
    """
    bare, origin = {}, {}
    for name, tensor in weights.items():
        parts = [part for part in str(name).split(".") if part not in _WRAPPERS]
        if parts[-1:] == ["n_averaged"]:
            continue
        if parts and parts[-1].lstrip("_") == "flat_param":
            raise ValueError(
                f"{name!r} is a parameter flattened by FSDP; save the full state dict "
                "(StateDictType.FULL_STATE_DICT, or get_model_state_dict with full_state_dict=True)."
            )
        short = ".".join(parts) if isinstance(name, str) else name
        if short in bare:
            raise ValueError(f"{origin[short]!r} and {name!r} both become {short!r} without wrappers; remove one.")
        bare[short], origin[short] = tensor, name
    return bare


def convert_vision_state_dict(official: dict[str, Tensor], config: LionVisionConfig) -> dict[str, Tensor]:
    """Rename the authors' image state dict (DeiT names) to the keys of `LionForImageClassification`.

    The stacked query-key-value projection is split into three. The position table is dropped if `config.pos_emb` is
    False. Keys may be missing, and values may be gradients.

    Args:
        official: the authors' state dict.
        config: configuration of the model.

    Returns:
        A state dict for `LionForImageClassification`. Tensors that are not split are shared with `official`.

    Raises:
        ValueError: if a name does not belong to a LION image model.
    """
    converted = {}
    for name, tensor in official.items():
        if stacked := _VISION_STACKED.fullmatch(name):
            layer, kind = stacked.groups()
            for short, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"lion_vision.layers.{layer}.mixer.{short}_proj.{kind}"] = part.clone()
        elif name != "pos_embed" or config.pos_emb:
            converted[_renamed(name, _FROM_VISION, _UNKNOWN.format("image"))] = tensor
    return converted


def convert_text_state_dict(official: dict[str, Tensor], config: LionConfig) -> dict[str, Tensor]:
    """Rename the authors' text state dict (BERT names) to the keys of a LION text model.

    The keys are those of `LionForSequenceClassification` if the state dict contains a classifier, else those of
    `LionForMaskedLM`. The position table is dropped if `config.pos_emb` is False; the authors keep an unused one in
    LION-D and LION-S. A tied decoder keeps both names, as in the state dict of the model. Keys may be missing, and
    values may be gradients.

    Args:
        official: the authors' state dict.
        config: configuration of the model.

    Returns:
        A state dict for the LION model. Tensors are shared with `official`.

    Raises:
        ValueError: if a name does not belong to a LION text model.
    """
    converted = {}
    for name, tensor in official.items():
        if _TEXT_UNUSED.search(name) or ("position_embeddings" in name and not config.pos_emb):
            continue
        converted[_renamed(name, _FROM_TEXT, _UNKNOWN.format("text"))] = tensor
    return converted


def revert_vision_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `convert_vision_state_dict`: rename the weights of a `LionForImageClassification` to DeiT names.

    Raises:
        ValueError: if a name has no counterpart in the authors' image models.
    """
    official = {}
    for name, tensor in state.items():
        if split := _VISION_SPLIT.fullmatch(name):
            layer, short, kind = split.groups()
            if short != "q":
                continue
            tensor = torch.cat([state[f"lion_vision.layers.{layer}.mixer.{x}_proj.{kind}"] for x in "qkv"])
        official[authors_name(name, "image")] = tensor
    return official


def revert_text_state_dict(state: dict[str, Tensor], config: LionConfig) -> dict[str, Tensor]:
    """Invert `convert_text_state_dict`: rename the weights of a LION text model to BERT names.

    Adds what the authors' models contain besides: the decoder under all of its names there, the buffer of position
    numbers, and a position table of zeros for models that do not use one.

    Raises:
        ValueError: if a name has no counterpart in the authors' text models.
    """
    official = {authors_name(name, "text"): tensor for name, tensor in state.items()}
    words = official.get("bert.embeddings.word_embeddings.weight")
    if words is not None:
        positions = config.max_position_embeddings
        official["bert.embeddings.position_ids"] = torch.arange(positions)[None]
        official.setdefault(
            "bert.embeddings.position_embeddings.weight", words.new_zeros(positions, config.hidden_size)
        )
    if "cls.predictions.bias" in official:
        official["cls.predictions.decoder.bias"] = official["cls.predictions.bias"]
        official.setdefault("cls.predictions.decoder.weight", words)
    return official


def authors_name(name: str, kind: str) -> str:
    """Return the authors' name of a tensor. In image models the projections q, k and v share one name.

    Args:
        name: name in the state dict of our model.
        kind: "image" or "text".

    Raises:
        ValueError: if the name has no counterpart.
    """
    if kind == "text":
        return _renamed(name, _TO_TEXT, _NO_COUNTERPART)
    if split := _VISION_SPLIT.fullmatch(name):
        return f"blocks.{split[1]}.attn.qkv.{split[3]}"
    return _renamed(name, _TO_VISION, _NO_COUNTERPART)


def _renamed(name: str, rules: _Rules, complaint: str) -> str:
    for pattern, replacement in rules:
        new, hits = pattern.subn(replacement, name)
        if hits:
            return new
    raise ValueError(f"{name!r} {complaint}")
