"""Conversion of a folder of this package to a checkpoint for the authors' code."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from ..hub import lion_classes, weight_files
from ..models.configuration_lion import LionConfig, LionVisionConfig
from .names import revert_text_state_dict, revert_vision_state_dict, without_wrappers
from .source import ConversionError, first_line


_VISION_TYPES = {"lit": "Lit", "decay": "Decay", "selective": "Selective"}
_TEXT_TYPES = {"lit": "lion-lit", "decay": "lion-d", "selective": "lion-s"}
_SIZES = {3: "tiny", 6: "small", 12: "base"}
_HEADS = {
    "LionForImageClassification": None,
    "LionForMaskedLM": "BertForMaskedLM",
    "LionForSequenceClassification": "BertForSequenceClassification",
}
# Options that need no counterpart: they do not change what a trained model computes, or only how it is computed.
_FREE = {"_out_features", "_out_indices", "apply_layernorm", "reshape_hidden_states"}  # a backbone's
_FREE |= {"format", "chunk_size", "initializer_range", "attention_probs_dropout_prob", "bos_token_id", "eos_token_id"}


def read_folder(folder: Path) -> tuple[LionConfig | LionVisionConfig, dict[str, Tensor]]:
    """Read configuration and weights of a save_pretrained folder, in the dtype of the file.

    Raises:
        ConversionError: if one of them is missing or invalid, or if the authors' code has no such model.
    """
    try:
        options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classes = {"lion": LionConfig, "lion_vision": LionVisionConfig}
        config = classes[options["model_type"]].from_pretrained(folder)
        state = without_wrappers(_weights(folder))
    except ConversionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConversionError(
            f"{folder} is not a LION folder written by save_pretrained: {first_line(error)}."
        ) from error
    stored = (config.architectures or ["no head"])[0]
    head = stored if stored in lion_classes(config.model_type) else _head_of(state)
    if head not in _HEADS:
        raise ConversionError(
            f"{folder} holds {stored}, which the authors' code does not have; allowed are {', '.join(_HEADS)}."
        )
    config.architectures = [head]
    return config, state


def _head_of(state: dict[str, Tensor]) -> str | None:
    """Return the class of weights that were saved from a custom subclass; None if the authors' code has none."""
    if "lion.pooler.dense.weight" in state and "classifier.weight" in state:
        return "LionForSequenceClassification"
    if "lion_vision.embeddings.cls_token" in state and "classifier.weight" in state:
        return "LionForImageClassification"
    return "LionForMaskedLM" if "head.dense.weight" in state else None


def _weights(folder: Path) -> dict[str, Tensor]:
    """Load the files that `from_pretrained` would load, and no others in the folder."""
    files = weight_files(folder)
    missing = next((file.name for file in files if not file.is_file()), None)
    if not files or missing:
        raise ConversionError(
            f"{folder} contains no {missing or SAFE_WEIGHTS_NAME}; save the model with save_pretrained."
        )
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def authors_checkpoint(config: LionConfig | LionVisionConfig, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the content of a checkpoint in the authors' layout: DeiT's for images, Composer's for text.

    It contains no optimizer and no random states, so it can be evaluated and fine-tuned, but a run cannot be resumed
    from it.

    Raises:
        ConversionError: if the model has softmax layers, or a tensor or option without counterpart.
    """
    if config.softmax_layers:
        raise ConversionError(
            f"softmax_layers is {config.softmax_layers}, but the authors' models have no softmax layers; only models "
            "without them can be converted."
        )
    try:
        if isinstance(config, LionVisionConfig):
            return {"model": revert_vision_state_dict(state), "args": _args(config)}
        weights = {f"model.{name}": x for name, x in revert_text_state_dict(state, config).items()}
    except (ValueError, KeyError) as error:
        raise ConversionError(f"The folder cannot be written in the authors' layout: {first_line(error)}.") from error
    description = {"file_extension": ".json", "content": _content(config), "class": _HEADS[config.architectures[0]]}
    return {
        "state": {"model": weights, "integrations": {"huggingface": {"model": {"config": description}}}},
        "rng": [],
    }


def require_same_meaning(ours: LionConfig | LionVisionConfig, read_back: LionConfig | LionVisionConfig) -> None:
    """Raise ConversionError if the authors' layout loses an option that changes what the model computes."""
    for name in type(ours).__annotations__:
        if name not in _FREE and getattr(ours, name) != getattr(read_back, name):
            raise ConversionError(
                f"{name} is {getattr(ours, name)!r}, which the authors' layout cannot store: it would be read as "
                f"{getattr(read_back, name)!r}."
            )


def lost_names(ours: LionConfig | LionVisionConfig, read_back: LionConfig | LionVisionConfig) -> list[str]:
    """Return a note if custom names of classes are lost in the authors' layout."""
    if ours.id2label == read_back.id2label:
        return []
    first = next(iter(ours.id2label.values()))
    return [
        f"dropped id2label: {ours.num_labels} names of classes ({first!r}, ...), which the authors' layout of image "
        "models cannot store; keep the folder's config.json"
    ]


def _args(config: LionVisionConfig) -> argparse.Namespace:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    if height != width:
        raise ValueError(f"image_size is {height} x {width}, but the authors' code supports square images only")
    size = _SIZES.get(config.num_attention_heads, "custom")
    return argparse.Namespace(
        model=f"lion_{size}_patch{config.patch_size}_{height}",
        num_heads=config.num_attention_heads,  # the name of the model determines only three sizes
        mask_type=_VISION_TYPES[config.mask_type],
        order="S" if config.order == "s" else "Normal",
        pos_emb=config.pos_emb,
        cls_tok=config.cls_tok,
        input_size=height,
        nb_classes=config.num_labels,
        drop=config.hidden_dropout_prob,
        drop_path=config.drop_path_rate,
    )


def _content(config: LionConfig) -> dict[str, Any]:
    same = (
        name for name in type(config).__annotations__ if name not in ("mask_type", "pos_emb", "format", "chunk_size")
    )
    return {name: getattr(config, name) for name in same} | {
        "arch_type": _TEXT_TYPES[config.mask_type],
        "position_embedding_type": "absolute" if config.pos_emb else "relative_key_query",
        "architectures": [_HEADS[config.architectures[0]]],
        "model_type": "bert",
        "problem_type": config.problem_type,
        "id2label": dict(config.id2label),
        "label2id": dict(config.label2id),
    }
