"""Names of the authors' checkpoints to names of this package, and back.

All maps are linear in the tensors: they serve for gradients as well as for weights, and keys may be missing. Tables
that the configuration does not use are dropped.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.configuration_lion import LionConfig, LionVisionConfig


# The authors' name: ours. {} is the number of a layer; a name that ends in a dot stands for all below it.
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

_TEXT_NAMES = {
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
# Never used by a LION model: buffers, and tables of relative distances.
_TEXT_UNUSED = re.compile(r"(^|\.)(position_ids|distance_embedding\.weight)$")

# What wrappers add to the names of all weights inside: DistributedDataParallel and AveragedModel, torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_UNKNOWN = (
    "is not a name of the authors' {} models; remove the tensor, or, where all names begin with a prefix of your own, "
    "the prefix."
)
_NO_COUNTERPART = (
    "has no counterpart in the authors' models; only their image classifier and text heads can be written."
)

_Rules = list[tuple[re.Pattern, str]]


def _rules(names: dict[str, str]) -> _Rules:
    return [
        (
            re.compile("^" + re.escape(old).replace(r"\{\}", r"(\d+)") + ("" if old.endswith(".") else "$")),
            new.replace("{}", r"\1"),
        )
        for old, new in names.items()
    ]


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


_FROM_VISION, _TO_VISION = _rules(_VISION_NAMES), _rules(_reversed(_VISION_NAMES))
_FROM_TEXT, _TO_TEXT = _rules(_TEXT_NAMES), _rules(_reversed(_TEXT_NAMES))


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names that it has without wrappers around the model or any module in it. The number of
    averaged models that AveragedModel counts, no weight, is left out.

    Raises:
        ValueError: for two weights of one name, and for FSDP's flattened parameters, which have lost their names.
    """
    bare, origin = {}, {}
    for name, tensor in weights.items():
        parts = [part for part in str(name).split(".") if part not in _WRAPPERS]
        if parts[-1:] == ["n_averaged"]:
            continue
        if parts and parts[-1].lstrip("_") == "flat_param":
            raise ValueError(
                f"{name!r} is a parameter that FSDP flattened; save the whole state dict "
                "(StateDictType.FULL_STATE_DICT, or get_model_state_dict with full_state_dict=True)."
            )
        short = ".".join(parts) if isinstance(name, str) else name
        if short in bare:
            raise ValueError(f"{origin[short]!r} and {name!r} are both {short!r} without wrappers; remove one of them.")
        bare[short], origin[short] = tensor, name
    return bare


def convert_vision_state_dict(official: dict[str, Tensor], config: LionVisionConfig) -> dict[str, Tensor]:
    """The authors' image state dict (DeiT names) with the keys of [`LionForImageClassification`].

    The stacked query-key-value projection becomes three; a position table is dropped when `config.pos_emb` is False.

    Raises:
        ValueError: for a name that no LION image model has.
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
    """The authors' text state dict (BERT names) with the keys of [`LionForMaskedLM`], or of
    [`LionForSequenceClassification`] when it holds a classifier.

    The position table is dropped when `config.pos_emb` is False (the authors keep it unused in LION-D and LION-S).
    A tied decoder keeps both names, as in the state dict of the model.

    Raises:
        ValueError: for a name that no LION text model has.
    """
    converted = {}
    for name, tensor in official.items():
        if _TEXT_UNUSED.search(name) or ("position_embeddings" in name and not config.pos_emb):
            continue
        converted[_renamed(name, _FROM_TEXT, _UNKNOWN.format("text"))] = tensor
    return converted


def revert_vision_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of [`convert_vision_state_dict`]: the weights of a [`LionForImageClassification`] with DeiT names.

    Raises:
        ValueError: for a name that the authors' image models do not have.
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
    """The inverse of [`convert_text_state_dict`]: the weights of a LION text model with BERT names.

    What the authors' models hold besides is added: the decoder under every name it has there, the buffer of position
    numbers, and a position table of zeros for models that do not read it.

    Raises:
        ValueError: for a name that the authors' text models do not have.
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
    """The authors' name of the tensor that one of ours comes from; the three projections of an image come from one.

    Args:
        name: in the state dict of our model.
        kind: "image" or "text".

    Raises:
        ValueError: for a name that has no counterpart.
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
