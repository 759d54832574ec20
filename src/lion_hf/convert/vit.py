"""Warm starts of LION image encoders from the weights of a ViT; warm_start.py describes what is copied.

Image layers normalise their rows over positive weights, as softmax does, so plain copies are enough.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_lion import LionVisionConfig
from ..nn.mixer import Mixer, head_windows
from .families import Family, weights_of
from .image_families import VIT
from .warm_start import config_options, counterpart, filled, load_source, new_config


# LION's class by the source's class.
CLASSES = VIT.classes


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
    source, _ = load_source(model_or_path, {"vit": VIT}, model_class)
    config = config_from_vit(
        source.config, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **config_overrides
    )
    return image_model(source, VIT, config, model_class, windows)


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
    decided = VIT.options(source)
    overrides = {"softmax_layers": softmax_layers, "pos_emb": pos_emb, **config_overrides}
    return new_config(VIT, mask_type, decided, **config_options(decided, VIT.shared(source), overrides))


def image_model(
    source: PreTrainedModel,
    family: Family,
    config: LionVisionConfig,
    model_class: type[PreTrainedModel] | None,
    windows: Sequence[float] | None,
) -> PreTrainedModel:
    """Return the model of a configuration with the weights of its source. Arguments are those of `from_vit`."""
    patches = config.grid_size[0] * config.grid_size[1]
    windows = head_windows((3, max(4, patches)) if windows is None else windows, config.num_attention_heads)
    head = counterpart(source, family.classes)
    model_class = model_class or head
    copied = model_class if head is model_class else None
    if copied is not None:
        family.require_head(source.config, copied)
    weights = weights_of(source, family, copied)
    table = weights.pop("lion_vision.embeddings.position_embeddings", None)
    if config.pos_emb and table is not None:
        weights["lion_vision.embeddings.position_embeddings"] = _resized(table, source.config, config)
    model = filled(model_class(config), source, weights)
    for layer in model.base_model.layers:
        if isinstance(layer.mixer, Mixer):
            layer.mixer.set_windows(windows)
    return model


def _resized(table: Tensor, source: PreTrainedConfig, config: LionVisionConfig) -> Tensor:
    """Return a position table (1, 1 + patches, hidden_size) for the grid of patches of another configuration."""
    grid = type(config)(image_size=source.image_size, patch_size=config.patch_size).grid_size
    if grid == config.grid_size:
        return table
    patches = table[:, 1:].to(torch.promote_types(table.dtype, torch.float32))
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=config.grid_size, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], 1)
