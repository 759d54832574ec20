"""Warm starts of LION image encoders from the weights of a ViT; warm_start.py describes what is copied.

Image layers normalise their rows over positive weights, as softmax does, so plain copies are enough.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_lion import LionVisionConfig
from ..models.modeling_lion_vision import LionForImageClassification, LionVisionModel
from ..nn.mixer import Mixer, head_windows
from .names import without_wrappers
from .warm_start import (
    SHARED,
    SIZES,
    config_options,
    counterpart,
    filled,
    load_source,
    new_config,
)


# LION's class by the source's class.
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
    """Build a LION image encoder from the weights of a ViT, or of a DeiT without distillation token.

    Embeddings, projections, MLPs, norms and a matching head are copied. Queries and keys pass through LION's feature
    map, and decays start from `windows`. The result needs training before use. Load the image processor from the
    source: `AutoImageProcessor.from_pretrained(source)`.

    Args:
        model_or_path: a ViT model of Transformers, its name on the Hub, or its folder.
        mask_type: the variant, as in `LionVisionConfig`.
        model_class: as in `from_bert`.
        softmax_layers: as in `from_bert`.
        pos_emb: keep the source's position table.
        windows: as in `from_bert`, counted in patches along the scan, in both scans of `order="s"`. Default: (3, number
            of patches).
        config_overrides: further options of `LionVisionConfig` that the weights do not determine, such as `order="s"`.
            The default of `cls_tok` is True here.

    Returns:
        As in `from_bert`.

    Raises:
        ValueError: as in `from_bert`, and if the patches are not square.
        OSError: if there is no model at the path.
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
            layer.mixer.set_windows(windows)
    return model


def config_from_vit(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    **config_overrides,
) -> LionVisionConfig:
    """Return the configuration of the model that `from_vit` would build, without loading weights.

    Args:
        source: configuration of the ViT.
        mask_type: as in `from_vit`.
        softmax_layers: as in `from_vit`.
        pos_emb: as in `from_vit`.
        config_overrides: as in `from_vit`.

    Returns:
        The configuration of the LION model.

    Raises:
        ValueError: as in `from_vit`.
    """
    options = config_options(source, _SIZES, SHARED, {"cls_tok": True, **config_overrides})
    options["patch_size"] = _square(options["patch_size"])
    return new_config(LionVisionConfig, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **options)


def _square(patch_size: int | Sequence[int]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise ValueError(f"the source has patch_size {patch_size}, but LION supports square patches only.")
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
