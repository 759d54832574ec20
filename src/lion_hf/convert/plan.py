"""Conversion of the authors' weights in memory, with verification before anything is written."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.configuration_lion import LionConfig, LionVisionConfig
from ..models.modeling_lion import LionForMaskedLM
from .config import infer_config
from .names import authors_name, convert_text_state_dict, convert_vision_state_dict
from .source import ConversionError, Source, first_line


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Plan:
    """A verified conversion.

    Args:
        source: the authors' checkpoint.
        model: the converted model, in the dtype of the file.
        origins: origin of each option of the configuration.
        renamed: our names and tensors, by the authors' names.
        dropped: reasons by the authors' names of tensors that are not converted.
        notes: further information for the user, one line each.
    """

    source: Source
    model: PreTrainedModel
    origins: dict[str, str]
    renamed: dict[str, dict[str, Tensor]]
    dropped: dict[str, str]
    notes: list[str] = field(default_factory=list)


def plan_conversion(source: Source, flags: dict[str, Any] | None = None) -> Plan:
    """Convert a checkpoint in memory and verify the result.

    The checks: every tensor is used or listed as dropped; none is missing or has a wrong shape; the number of
    parameters is unchanged; all parameters are finite, and so are the outputs of a forward pass.

    Args:
        source: from `read_source`.
        flags: options that the file does not contain; see `QUESTIONS` in config.py.

    Raises:
        ConversionError: if an option of the configuration remains open or a check fails.
    """
    config, origins, head = infer_config(source, flags or {})
    convert = convert_vision_state_dict if source.kind == "image" else convert_text_state_dict
    renamed, dropped = {}, {}
    for name, tensor in source.weights.items():
        if reason := _reason_to_drop(name, source, config, head):
            dropped[name] = reason
            continue
        if tensor.dtype not in _DTYPES:
            raise ConversionError(
                f"{source.path}: {name} has dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64."
            )
        try:
            finite = bool(tensor.isfinite().all())
        except RuntimeError as error:  # a small file can declare a huge tensor
            raise ConversionError(f"{source.path}: {name} cannot be read: {first_line(error)}.") from error
        if not finite:
            raise ConversionError(f"{source.path}: {name} contains values that are not finite.")
        try:
            renamed[name] = convert({name: tensor}, config)
        except ValueError as error:
            raise ConversionError(f"{source.path}: {first_line(error)}.") from error
    state = {name: tensor for parts in renamed.values() for name, tensor in parts.items()}
    model = _loaded(head, config, state, source)
    kept = sum(source.weights[name].numel() for name in renamed)
    if kept != model.num_parameters():
        raise ConversionError(
            f"{source.path} contains {kept:,} parameters, but the model has {model.num_parameters():,}: some are "
            "stored twice."
        )
    _check_forward(model, source)
    return Plan(source, model, origins, renamed, dropped)


def _reason_to_drop(name: str, source: Source, config: LionConfig | LionVisionConfig, head: type) -> str | None:
    if name.endswith("position_ids"):
        return "position numbers, not weights"
    if name.endswith("distance_embedding.weight"):
        return "a table of relative positions, which LION does not use"
    if ("position_embeddings" in name or name == "pos_embed") and not config.pos_emb:
        return "a position table that this model does not use"
    if name.startswith("bert.pooler.") and head is LionForMaskedLM:
        return "a pooler, which a masked language model does not use"
    if name == "cls.predictions.decoder.weight" and config.tie_word_embeddings:
        return "the same tensor as the word embeddings"
    twin = source.weights.get("cls.predictions.decoder.bias")
    if name == "cls.predictions.bias" and twin is not None:
        if not twin.equal(source.weights[name]):
            raise ConversionError(f"{source.path}: cls.predictions.bias and cls.predictions.decoder.bias differ.")
        return "the same tensor as cls.predictions.decoder.bias"
    return None


def _loaded(
    head: type[PreTrainedModel], config: LionConfig | LionVisionConfig, state: dict[str, Tensor], source: Source
) -> PreTrainedModel:
    """Build the model with exactly these weights, in their dtypes."""
    with torch.device("meta"):
        model = head(config)
    expected = model.state_dict()
    if source.kind == "text" and config.tie_word_embeddings:
        for tied in model._tied_weights_keys or ():
            expected.pop(tied)
    for problem, names in (
        (f"lacks {{}} tensor(s) of {head.__name__}", expected.keys() - state.keys()),
        (f"contains {{}} tensor(s) that {head.__name__} does not have", state.keys() - expected.keys()),
    ):
        if names:
            names = sorted({authors_name(name, source.kind) for name in names})
            raise ConversionError(
                f"{source.path} {problem.format(len(names))}: {', '.join(names[:3])}"
                + (", ..." if len(names) > 3 else ".")
            )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{source.path}: {name}, from {authors_name(name, source.kind)}, has the shape {tuple(tensor.shape)}, "
                f"but the configuration requires {tuple(expected[name].shape)}."
            )
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(owned, strict=False, assign=True)  # all but the tied decoder is there, as checked above
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _check_forward(model: PreTrainedModel, source: Source) -> None:
    config = model.config
    try:
        if source.kind == "image":
            side = config.image_size
            inputs = {"pixel_values": torch.zeros(1, config.num_channels, side, side, dtype=model.dtype)}
        else:
            inputs = {"input_ids": torch.arange(min(16, config.vocab_size, config.max_position_embeddings))[None]}
        logits = model(**inputs).logits
    except (RuntimeError, ValueError) as error:
        raise ConversionError(f"{source.path}: the converted model does not run: {first_line(error)}.") from error
    if not logits.isfinite().all():
        raise ConversionError(f"{source.path}: the outputs of the converted model are not finite.")
