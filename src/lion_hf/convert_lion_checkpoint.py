"""Names of the authors' checkpoints to names of this package.

Both converters are linear maps of names and slices: they serve for gradients as well as for weights, and keys may be
missing. Tables that the configuration does not use are dropped.
"""

import re

from torch import Tensor

from .configuration_lion import LionConfig, LionVisionConfig


_VISION_NAMES = [
    (r"^cls_token$", "lion_vision.embeddings.cls_token"),
    (r"^pos_embed$", "lion_vision.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "lion_vision.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "lion_vision.norm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.(\d+)\.norm1\.", r"lion_vision.layers.\1.mixer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"lion_vision.layers.\1.mlp_norm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"lion_vision.layers.\1.mixer.o_proj."),
    (r"^blocks\.(\d+)\.attn\.a_i$", r"lion_vision.layers.\1.mixer.decay_logit"),
    (r"^blocks\.(\d+)\.attn\.a2_i$", r"lion_vision.layers.\1.mixer.decay_logit_2"),
    (r"^blocks\.(\d+)\.attn\.a_i\.", r"lion_vision.layers.\1.mixer.decay_proj."),
    (r"^blocks\.(\d+)\.attn\.a2_i\.", r"lion_vision.layers.\1.mixer.decay_proj_2."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"lion_vision.layers.\1.mlp.up_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"lion_vision.layers.\1.mlp.down_proj."),
]
_VISION_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")

_TEXT_LAYER = r"^bert\.encoder\.layer\.(\d+)\."
_TEXT_NAMES = [
    (r"^bert\.embeddings\.LayerNorm\.", "lion.embeddings.norm."),
    (r"^bert\.embeddings\.(word|position|token_type)_embeddings\.", r"lion.embeddings.\1_embeddings."),
    (_TEXT_LAYER + r"attention\.self\.query\.", r"lion.layers.\1.mixer.q_proj."),
    (_TEXT_LAYER + r"attention\.self\.key\.", r"lion.layers.\1.mixer.k_proj."),
    (_TEXT_LAYER + r"attention\.self\.value\.", r"lion.layers.\1.mixer.v_proj."),
    (_TEXT_LAYER + r"attention\.self\.ai$", r"lion.layers.\1.mixer.decay_logit"),
    (_TEXT_LAYER + r"attention\.self\.Wa_i\.", r"lion.layers.\1.mixer.decay_proj."),
    (_TEXT_LAYER + r"attention\.self\.layer_norm\.", r"lion.layers.\1.mixer.norm."),
    (_TEXT_LAYER + r"attention\.output\.dense\.", r"lion.layers.\1.mixer.o_proj."),
    (_TEXT_LAYER + r"attention\.output\.LayerNorm\.", r"lion.layers.\1.mixer_norm."),
    (_TEXT_LAYER + r"intermediate\.dense\.", r"lion.layers.\1.mlp.up_proj."),
    (_TEXT_LAYER + r"output\.dense\.", r"lion.layers.\1.mlp.down_proj."),
    (_TEXT_LAYER + r"output\.LayerNorm\.", r"lion.layers.\1.mlp_norm."),
    (r"^bert\.pooler\.", "lion.pooler."),
    (r"^cls\.predictions\.transform\.dense\.", "head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "head.norm."),
    (r"^cls\.predictions\.decoder\.", "head.decoder."),
    (r"^cls\.predictions\.bias$", "head.decoder.bias"),
    (r"^classifier\.", "classifier."),
]
# Never used by a LION model: buffers, relative distance tables, and the head of a task this package does not have.
_TEXT_UNUSED = re.compile(r"(^|\.)(position_ids|distance_embedding\.weight)$")


def convert_vision_state_dict(official: dict[str, Tensor], config: LionVisionConfig) -> dict[str, Tensor]:
    """The authors' image state dict (DeiT names) with the keys of [`LionForImageClassification`].

    The stacked query-key-value projection becomes three; a position table is dropped when `config.pos_emb` is False.

    Raises:
        ValueError: for a name that no LION image model has.
    """
    converted = {}
    for name, tensor in official.items():
        if qkv := _VISION_QKV.match(name):
            layer, kind = qkv.groups()
            for short, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"lion_vision.layers.{layer}.mixer.{short}_proj.{kind}"] = part.clone()
        elif name != "pos_embed" or config.pos_emb:
            converted[_renamed(name, _VISION_NAMES, "image")] = tensor
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
        converted[_renamed(name, _TEXT_NAMES, "text")] = tensor
    return converted


def _renamed(name: str, table: list[tuple[str, str]], kind: str) -> str:
    for pattern, replacement in table:
        new, hits = re.subn(pattern, replacement, name)
        if hits:
            return new
    raise ValueError(
        f"{name!r} is not a name of the authors' {kind} models. Pass their bare state dict, without prefixes such as "
        "'model.' or 'module.'."
    )
