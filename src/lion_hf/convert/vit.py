"""LION image encoders that begin with the weights of a ViT; warm_start.py tells what is copied, and how decays start.

Images normalise their rows over positive weights, as softmax does, and need nothing more than the copy.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_lion import LionVisionConfig
from ..models.modeling_lion_vision import LionForImageClassification, LionVisionModel
from ..nn.mixer import Mixer
from .names import without_wrappers
from .warm_start import (
    SHARED,
    SIZES,
    config_options,
    counterpart,
    filled,
    head_windows,
    load_source,
    new_config,
    set_windows,
)


# The class that each class of a source becomes.
CLASSES = {"ViTModel": LionVisionModel, "ViTForImageClassification": LionForImageClassification}

_SIZES = (*SIZES, "image_size", "patch_size", "num_channels", "qkv_bias")

_NAMES = (
    (".attention.", ".mixer."),
    (".layernorm_before.", ".mixer_norm."),
    (".layernorm_after.", ".mlp_norm."),
    (".fc1.", ".up_proj."),
    (".fc2.", ".down_proj."),
)


def from_vit(
    model_or_path: PreTrainedModel | str | Path,
    mask_type: str = "selective",
    *,
    model_class: type[PreTrainedModel] | None = None,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    windows: Sequence[float] | None = None,
    **config_overrides,
) -> PreTrainedModel:
    """A LION image encoder with the weights of a ViT (a DeiT without distillation token is one).

    Arguments, result and errors are as in [`from_bert`], with these differences: `config_overrides` are options of
    [`LionVisionConfig`], such as `order="s"`, and `cls_tok` is True unless given; windows are (3, number of patches) by
    default and count along the scan, in both scans of a snake; queries and keys get LION's feature map, and need no
    `length`. The image processor stays the source's: `AutoImageProcessor.from_pretrained(source)`.
    """
    source = load_source(model_or_path, "vit", CLASSES, model_class)
    config = config_from_vit(
        source.config, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **config_overrides
    )
    patches = config.grid_size[0] * config.grid_size[1]
    windows = head_windows((3, max(4, patches)) if windows is None else windows, config.num_attention_heads)
    model_class = model_class or counterpart(source, CLASSES)
    model = filled(model_class(config), source, _weights(source, config))
    for layer in model.base_model.layers:
        if isinstance(layer.mixer, Mixer):
            set_windows(layer.mixer, windows)
    return model


def config_from_vit(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    **config_overrides,
) -> LionVisionConfig:
    """As [`config_from_bert`], for [`from_vit`]."""
    options = config_options(source, _SIZES, SHARED, {"cls_tok": True, **config_overrides})
    options["patch_size"] = _square(options["patch_size"])
    return new_config(LionVisionConfig, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **options)


def _square(patch_size: int | Sequence[int]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise ValueError(f"the source has patch_size {patch_size}; LION takes square patches only.")
    return sides.pop()


def _weights(source: PreTrainedModel, config: LionVisionConfig) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in without_wrappers(source.state_dict()).items():
        name = name.removeprefix("vit.")
        for old, new in _NAMES:
            name = name.replace(old, new)
        name = f"norm.{name.removeprefix('layernorm.')}" if name.startswith("layernorm.") else name
        renamed[name if name.startswith("classifier.") else f"lion_vision.{name}"] = tensor
    if not config.pos_emb:
        del renamed["lion_vision.embeddings.position_embeddings"]
    return renamed
