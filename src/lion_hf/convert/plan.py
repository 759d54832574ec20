"""Converting the authors' weights in memory, and verifying the result before anything is written."""

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
    """A conversion that is verified and not yet written.

    Args:
        source: the authors' checkpoint.
        model: our model with its weights, in the dtype of the file.
        origins: where each option of the configuration comes from.
        renamed: our names and tensors, by the authors' names.
        dropped: why a tensor of the authors is not carried over, by its name.
        notes: what else the user should know, one line each.
    """

    source: Source
    model: PreTrainedModel
    origins: dict[str, str]
    renamed: dict[str, dict[str, Tensor]]
    dropped: dict[str, str]
    notes: list[str] = field(default_factory=list)


def plan_conversion(source: Source, flags: dict[str, Any] | None = None) -> Plan:
    """Converts a checkpoint in memory and verifies the result: every tensor is used or listed as dropped, none is
    missing or of another shape, parameters are as many as before, all are finite, and so is a forward.

    Args:
        source: from [`read_source`].
        flags: options that the file does not tell; see `QUESTIONS` in config.py.

    Raises:
        ConversionError: where the configuration stays open or the verification fails.
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
                f"{source.path}: {name} is of {tensor.dtype}; weights must be of float16, bfloat16, float32 or float64."
            )
        try:
            finite = bool(tensor.isfinite().all())
        except RuntimeError as error:  # a small file can claim a tensor that no memory holds
            raise ConversionError(f"{source.path}: {name} cannot be read: {first_line(error)}.") from error
        if not finite:
            raise ConversionError(f"{source.path}: {name} holds something other than finite real numbers.")
        try:
            renamed[name] = convert({name: tensor}, config)
        except ValueError as error:
            raise ConversionError(f"{source.path}: {first_line(error)}.") from error
    state = {name: tensor for parts in renamed.values() for name, tensor in parts.items()}
    model = _loaded(head, config, state, source)
    kept = sum(source.weights[name].numel() for name in renamed)
    if kept != model.num_parameters():
        raise ConversionError(
            f"{source.path} holds {kept:,} parameters, but the model has {model.num_parameters():,}: some are there "
            "twice."
        )
    _check_forward(model, source)
    return Plan(source, model, origins, renamed, dropped)


def _reason_to_drop(name: str, source: Source, config: LionConfig | LionVisionConfig, head: type) -> str | None:
    if name.endswith("position_ids"):
        return "numbers of positions, no weights"
    if name.endswith("distance_embedding.weight"):
        return "a table of relative positions, which no LION model reads"
    if ("position_embeddings" in name or name == "pos_embed") and not config.pos_emb:
        return "a position table that this model does not read"
    if name.startswith("bert.pooler.") and head is LionForMaskedLM:
        return "a pooler, which a masked language model does not have"
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
    """The model with exactly these weights, in their dtypes."""
    with torch.device("meta"):
        model = head(config)
    expected = model.state_dict()
    if source.kind == "text" and config.tie_word_embeddings:
        for tied in model._tied_weights_keys or ():
            expected.pop(tied)
    for problem, names in (
        ("lacks", expected.keys() - state.keys()),
        ("has no use for", state.keys() - expected.keys()),
    ):
        if names:
            names = sorted({authors_name(name, source.kind) for name in names})
            raise ConversionError(
                f"{source.path} {problem} {len(names)} tensor(s) of {head.__name__}: {', '.join(names[:3])}"
                + (", ..." if len(names) > 3 else ".")
            )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{source.path}: {name}, from {authors_name(name, source.kind)}, has the shape {tuple(tensor.shape)}, "
                f"but the configuration gives {tuple(expected[name].shape)}."
            )
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(owned, strict=False, assign=True)  # strict but for the tied decoder, which follows
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
