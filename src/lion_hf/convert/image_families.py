"""Image encoders whose weights LION takes."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..models.modeling_lion_vision import LionForImageClassification, LionVisionModel
from .families import Family, taken


_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "image_size", "num_channels",
    "qkv_bias",
)  # fmt: skip
_SHARED = ("hidden_dropout_prob", "initializer_range", "id2label", "label2id", "problem_type")
_HEADS = {LionForImageClassification: {"classifier.": "classifier."}}

_VIT_NAMES = {
    "embeddings.": "lion_vision.embeddings.",
    "layers.{}.attention.": "lion_vision.layers.{}.mixer.",
    "layers.{}.layernorm_before.": "lion_vision.layers.{}.mixer_norm.",
    "layers.{}.layernorm_after.": "lion_vision.layers.{}.mlp_norm.",
    "layers.{}.mlp.fc1.": "lion_vision.layers.{}.mlp.up_proj.",
    "layers.{}.mlp.fc2.": "lion_vision.layers.{}.mlp.down_proj.",
    "layernorm.": "lion_vision.norm.",
}


def _square(patch_size: int | Sequence[int]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise ValueError(f"the source has patch_size {patch_size}, but LION supports square patches only.")
    return sides.pop()


def _image_options(config: PreTrainedConfig) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"the source has head_dim={head_dim}; it must be hidden_size / num_attention_heads.")
    return taken(config, *_SIZES) | {"patch_size": _square(config.patch_size)}


def _vit_options(config: PreTrainedConfig) -> dict[str, Any]:
    return _image_options(config) | taken(config, "intermediate_size")


def _vit_shared(config: PreTrainedConfig) -> dict[str, Any]:
    return taken(config, *_SHARED, "hidden_act") | {"cls_tok": True}


VIT = Family(
    label="ViT",
    kind="image",
    classes={"ViTModel": LionVisionModel, "ViTForImageClassification": LionForImageClassification},
    options=_vit_options,
    shared=_vit_shared,
    names=_VIT_NAMES,
    heads=_HEADS,
)
VIT_MSN = Family(
    label="ViT-MSN",
    kind="image",
    classes={"ViTMSNModel": LionVisionModel, "ViTMSNForImageClassification": LionForImageClassification},
    options=_vit_options,
    shared=_vit_shared,
    names=_VIT_NAMES,
    heads=_HEADS,
)

# ------------------------------------------------------------------------------------------------------------ DINOv2

_DINOV2_NAMES = {
    "embeddings.mask_token": None,
    "embeddings.": "lion_vision.embeddings.",
    "encoder.layer.{}.attention.attention.query.": "lion_vision.layers.{}.mixer.q_proj.",  # in Transformers 5.10
    "encoder.layer.{}.attention.attention.key.": "lion_vision.layers.{}.mixer.k_proj.",
    "encoder.layer.{}.attention.attention.value.": "lion_vision.layers.{}.mixer.v_proj.",
    "encoder.layer.{}.attention.output.dense.": "lion_vision.layers.{}.mixer.o_proj.",
    "encoder.layer.{}.mlp.weights_in.": tuple(f"lion_vision.layers.{{}}.mlp.{x}_proj." for x in ("up", "gate")),
    "encoder.layer.{}.mlp.weights_out.": "lion_vision.layers.{}.mlp.down_proj.",
    "encoder.layer.{}.attention.": "lion_vision.layers.{}.mixer.",
    "encoder.layer.{}.norm1.": "lion_vision.layers.{}.mixer_norm.",
    "encoder.layer.{}.norm2.": "lion_vision.layers.{}.mlp_norm.",
    "encoder.layer.{}.mlp.fc1.": "lion_vision.layers.{}.mlp.up_proj.",
    "encoder.layer.{}.mlp.fc2.": "lion_vision.layers.{}.mlp.down_proj.",
    "encoder.layer.{}.mlp.gate_proj.": "lion_vision.layers.{}.mlp.up_proj.",  # activated, as up_proj is here
    "encoder.layer.{}.mlp.up_proj.": "lion_vision.layers.{}.mlp.gate_proj.",
    "encoder.layer.{}.mlp.down_proj.": "lion_vision.layers.{}.mlp.down_proj.",
    "layernorm.": "lion_vision.norm.",
}


def _dinov2_options(config: PreTrainedConfig) -> dict[str, Any]:
    width = int(config.hidden_size * config.mlp_ratio)
    gated = {}
    if config.use_swiglu_ffn:
        width = -(-int(width * 2 / 3) // 8) * 8  # two thirds, up to a multiple of 8
        gated = {"mlp_type": "glu", "hidden_act": "silu"}
    # The classifier reads the class token and the mean of the patches.
    return _image_options(config) | {"intermediate_size": width, "cls_tok": True, "append_patch_mean": True} | gated


def _dinov2_shared(config: PreTrainedConfig) -> dict[str, Any]:
    rest = () if config.use_swiglu_ffn else ("hidden_act",)
    return taken(config, *_SHARED, *rest)


DINOV2 = Family(
    label="DINOv2",
    kind="image",
    classes={"Dinov2Model": LionVisionModel, "Dinov2ForImageClassification": LionForImageClassification},
    options=_dinov2_options,
    shared=_dinov2_shared,
    names=_DINOV2_NAMES,
    heads=_HEADS,
    scales={
        "encoder.layer.{}.layer_scale1.lambda1": "lion_vision.layers.{}.mixer.o_proj.",
        "encoder.layer.{}.layer_scale2.lambda1": "lion_vision.layers.{}.mlp.down_proj.",
    },
)

# By model_type.
IMAGE_FAMILIES = {"vit": VIT, "vit_msn": VIT_MSN, "dinov2": DINOV2}
