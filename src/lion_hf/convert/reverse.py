"""From a folder of this package to a checkpoint that the authors' code can load."""

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
# Options that do not change what a trained model computes, or that say how it is computed: they need no counterpart.
_FREE = {"_out_features", "_out_indices", "apply_layernorm", "reshape_hidden_states"}  # a backbone's
_FREE |= {"format", "chunk_size", "initializer_range", "attention_probs_dropout_prob", "bos_token_id", "eos_token_id"}


def read_folder(folder: Path) -> tuple[LionConfig | LionVisionConfig, dict[str, Tensor]]:
    """Configuration and weights of a save_pretrained folder, in the dtype of the file.

    Raises:
        ConversionError: for a folder without either, or of a model that the authors' code does not have.
    """
    try:
        options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classes = {"lion": LionConfig, "lion_vision": LionVisionConfig}
        config = classes[options["model_type"]].from_pretrained(folder)
        state = without_wrappers(_weights(folder))
    except ConversionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConversionError(f"{folder} is not a LION folder of save_pretrained: {first_line(error)}.") from error
    stored = (config.architectures or ["no head"])[0]
    head = stored if stored in lion_classes(config.model_type) else _head_of(state)
    if head not in _HEADS:
        raise ConversionError(
            f"{folder} holds {stored}, which the authors do not have; theirs are {', '.join(_HEADS)}."
        )
    config.architectures = [head]
    return config, state


def _head_of(state: dict[str, Tensor]) -> str | None:
    """The class of weights that were saved from a subclass with a name of its own; None where the authors have none."""
    if "lion.pooler.dense.weight" in state and "classifier.weight" in state:
        return "LionForSequenceClassification"
    if "lion_vision.embeddings.cls_token" in state and "classifier.weight" in state:
        return "LionForImageClassification"
    return "LionForMaskedLM" if "head.dense.weight" in state else None


def _weights(folder: Path) -> dict[str, Tensor]:
    """What `from_pretrained` would load, and no other file beside it."""
    files = weight_files(folder)
    missing = next((file.name for file in files if not file.is_file()), None)
    if not files or missing:
        raise ConversionError(f"{folder} holds no {missing or SAFE_WEIGHTS_NAME}; save the model with save_pretrained.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def authors_checkpoint(config: LionConfig | LionVisionConfig, state: dict[str, Tensor]) -> dict[str, Any]:
    """The content of a checkpoint in the authors' layout: DeiT's {"model", "args"} for images, Composer's for text.

    Optimizer and random states are not there: it serves for evaluation and fine-tuning, not to resume a run.

    Raises:
        ConversionError: for a tensor that has no counterpart.
    """
    if config.softmax_layers:
        raise ConversionError(
            f"softmax_layers is {config.softmax_layers}, but the authors' models have no softmax layers: only a model "
            "without any has a place in their layout."
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
    """Raises ConversionError where the authors' layout lost an option that decides what the model computes."""
    for name in type(ours).__annotations__:
        if name not in _FREE and getattr(ours, name) != getattr(read_back, name):
            raise ConversionError(
                f"{name} is {getattr(ours, name)!r}, which the authors' layout cannot say: it would be read as "
                f"{getattr(read_back, name)!r}."
            )


def lost_names(ours: LionConfig | LionVisionConfig, read_back: LionConfig | LionVisionConfig) -> list[str]:
    """A line that names of classes have no place in the authors' layout, where they were chosen and are lost."""
    if ours.id2label == read_back.id2label:
        return []
    first = next(iter(ours.id2label.values()))
    return [
        f"dropped id2label: {ours.num_labels} names of classes ({first!r}, ...), for which the authors' layout of "
        "image models has no place; keep the folder's config.json"
    ]


def _args(config: LionVisionConfig) -> argparse.Namespace:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    if height != width:
        raise ValueError(f"image_size is {height} x {width}, but the authors' images are square")
    size = _SIZES.get(config.num_attention_heads, "custom")
    return argparse.Namespace(
        model=f"lion_{size}_patch{config.patch_size}_{height}",
        num_heads=config.num_attention_heads,  # the name of the model tells only three sizes apart
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
