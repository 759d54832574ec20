"""Image classifiers and their image processors: new ones, and existing ones at another image size."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from ..models.configuration_lion import LionVisionConfig
from .arguments import ModelArguments
from .errors import user_errors
from .images import ImageArguments, target_size
from .models import ALL_BECOME_LION, build_model, known_config


SMALL_MODEL = {
    "mask_type": "decay",
    "order": "s",
    "pos_emb": True,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
NORMALIZATIONS = {
    "half": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


@dataclass
class ImageModelArguments(ModelArguments):
    """The model of the image script."""

    order: str | None = field(
        default=None,
        metadata={
            "help": "Order of the patches: normal (row by row), or s (average of snake scans along rows and columns)."
        },
    )
    cls_tok: bool | None = field(
        default=None, metadata={"help": "Classify from a class token instead of the mean of the patches."}
    )
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth rate of the last block."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images in pixels; an existing model is adapted to it. Default: the model's or data's."
        },
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a patch in pixels. Default: 2, 4 or 16 by image size."}
    )


def image_options(model: ImageModelArguments, first_side: int) -> None:
    """Set image and patch size if no preset, model or flag sets them."""
    if model.source or model.preset:
        return
    if model.patch_size is None:
        side = model.image_size or first_side
        model.patch_size = 2 if side <= 16 else 4 if side <= 64 else 16
    if model.image_size is None:
        model.image_size = max(1, min(224, first_side) // model.patch_size) * model.patch_size


def check_model(arguments: ImageModelArguments) -> PreTrainedConfig:
    """Check the arguments before images are read; see `known_config`."""
    arguments = dataclasses.replace(arguments, image_size=None if arguments.source else arguments.image_size)
    image_options(arguments, first_side=224)
    return known_config(AutoModelForImageClassification, LionVisionConfig.model_type, arguments, SMALL_MODEL)


def get_model(arguments: ImageModelArguments, labels: dict[str, Any]) -> PreTrainedModel:
    """Return the model to train; an existing one is adapted to `image_size`, if that is given."""
    side = arguments.image_size
    of_other_kind = arguments.warm_start and check_model(arguments).model_type not in ALL_BECOME_LION
    if of_other_kind:  # sets the start of decays for this size too; DINOv2 is larger than what its processor gives
        side = side or processed_size(arguments.warm_start)
    if arguments.source:
        arguments = dataclasses.replace(arguments, image_size=side if of_other_kind else None)
    model = build_model(AutoModelForImageClassification, LionVisionConfig.model_type, arguments, SMALL_MODEL, labels)
    return at_image_size(model, side) if arguments.source and side and not of_other_kind else model


def source_processor(name: str):
    """Return the image processor of an existing model."""
    with user_errors(f"{name!r} has no image processor", OSError, ValueError):
        return AutoImageProcessor.from_pretrained(name, backend="pil")


def processed_size(name: str) -> int | list[int]:
    """Return the side, or height and width, of the images that the processor of an existing model gives."""
    height, width = target_size(source_processor(name))
    return height if height == width else [height, width]


def at_image_size(model: PreTrainedModel, side: int) -> PreTrainedModel:
    """Return the model for square images of another size, with its position table resized (bicubic)."""
    if getattr(model.config, "image_size", None) is None:
        return model
    config = copy.deepcopy(model.config)
    with user_errors(f"wrong --image_size {side}", ValueError, StrictDataclassError):
        config.image_size = side
        config.validate()
        resized = type(model)(config).to(model.dtype)
    weights = model.state_dict()
    for name, table in resized.state_dict().items():
        if name.endswith("position_embeddings") and table.shape != weights[name].shape:
            weights[name] = resize_positions(weights[name], _grid(model.config), _grid(config))
    resized.load_state_dict(weights)
    return resized


def resize_positions(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Resize a position table (1, tokens, width) to another grid of patches; leading class tokens stay as they are."""
    first = table.shape[1] - old[0] * old[1]
    patches = table[:, first:].unflatten(1, old).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :first], patches.to(table.dtype)], 1)


def _sides(config: PreTrainedConfig) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _grid(config: PreTrainedConfig) -> tuple[int, int]:
    height, width = _sides(config)
    return height // config.patch_size, width // config.patch_size


def make_processor(config: PreTrainedConfig, model: ImageModelArguments, data: ImageArguments):
    """Return the processor of the existing model, or a new one, changed by the arguments. Evaluation uses it."""
    options: dict[str, Any] = {}
    if model.source:
        processor = source_processor(model.source)
        height, width = (model.image_size,) * 2 if model.image_size else target_size(processor)
        known = processor.size.shortest_edge or processor.size.height
        ratio = target_size(processor)[0] / known if processor.do_center_crop else 1.0
    else:
        processor, ratio = ViTImageProcessorPil(do_convert_rgb=True), 1.0
        height, width = _sides(config)
        options |= {"resample": Image.Resampling.BILINEAR}
        options["image_mean"], options["image_std"] = NORMALIZATIONS["half"]
    if not model.source or model.image_size or data.eval_crop_ratio:
        options |= _sizes(height, width, data.eval_crop_ratio or ratio)
    if data.interpolation:
        options["resample"] = Image.Resampling[data.interpolation.upper()]
    if data.normalization:
        options["image_mean"], options["image_std"] = NORMALIZATIONS[data.normalization]
    return type(processor).from_dict(processor.to_dict() | options)


def _sizes(height: int, width: int, crop_ratio: float) -> dict[str, Any]:
    if crop_ratio == 1:
        return {"size": {"height": height, "width": width}, "do_center_crop": False}
    resized = {"shortest_edge": round(height / crop_ratio)}
    if height != width:
        resized = {"height": round(height / crop_ratio), "width": round(width / crop_ratio)}
    return {"size": resized, "do_center_crop": True, "crop_size": {"height": height, "width": width}}
