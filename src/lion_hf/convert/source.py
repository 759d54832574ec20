"""Safe reading of the authors' checkpoints."""

import argparse
import datetime
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .names import without_wrappers


class ConversionError(ValueError):
    """A checkpoint or an option that cannot be converted. The message is one line and states how to fix the problem."""


@dataclass
class Source:
    """Content of a checkpoint of the authors.

    Args:
        path: the file.
        layout: description of the layout, for messages.
        kind: "image" or "text".
        weights: state dict under the authors' names, without prefixes.
        stated: options stored in the file, under the authors' names; empty for a bare state dict.
        tokenizer: vocabulary and options of the tokenizer inside the file, if there is one.
    """

    path: Path
    layout: str
    kind: str
    weights: dict[str, Tensor]
    stated: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None


# Layout by the key that holds the weights.
_WRAPPERS = {"model": "DeiT image checkpoint", "state_dict": "wrapped state dict"}
_SHARDS = (
    "it holds the shards of one process; save the full state dict (get_model_state_dict with full_state_dict=True)"
)
# Keys of averaged weights in checkpoints of DeiT and timm.
_AVERAGED = ("model_ema", "state_dict_ema")
# A weight that every model of the kind has.
_KINDS = {"image": "patch_embed.proj.weight", "text": "bert.embeddings.word_embeddings.weight"}


class _Unread:
    """Replaces NumPy objects, which form the random state in a Composer checkpoint. The state is not needed, and
    NumPy's own constructors would follow pointers in a forged file."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# The constructor of arrays has different paths in NumPy 1 and 2.
_ALLOWED = [
    argparse.Namespace,
    datetime.timedelta,
    (_Unread, "numpy.ndarray"),
    (_Unread, "numpy.dtype"),
    (_Unread, "numpy.core.multiarray._reconstruct"),
    (_Unread, "numpy._core.multiarray._reconstruct"),
]


def read_source(path: str | Path, *, ema: bool = False) -> Source:
    """Read a checkpoint of the authors without running code in it.

    Args:
        path: a file of torch.save, or .safetensors.
        ema: read the averaged weights, which DeiT and timm store beside the others.

    Raises:
        ConversionError: as `interpret`, and if the file is missing, truncated or of another type, or contains objects
            other than tensors, plain Python types, argparse.Namespace, datetime.timedelta and NumPy arrays (which are
            skipped).
    """
    return interpret(_load(Path(path)), Path(path), ema=ema)


def interpret(content: Mapping, path: Path, *, ema: bool = False) -> Source:
    """Find weights and options in the content of a checkpoint and remove the prefixes of wrappers.

    Layouts: DeiT's image checkpoint (model, model_ema, args), Composer's text checkpoint (state.model and the
    configuration), and a state dict, bare or under "state_dict" (with optional args and state_dict_ema beside it).

    Raises:
        ConversionError: if the architecture is unknown, a weight is not a dense tensor, or averaged weights are
            requested and missing.
    """
    stated, tokenizer = {}, None
    if _nested(content, "state", "model"):
        layout, weights = "Composer text checkpoint", content["state"]["model"]
        hugging_face = _nested(content, "state", "integrations", "huggingface")
        stated = _nested(hugging_face, "model", "config", "content")
        tokenizer = _tokenizer(_nested(hugging_face, "tokenizer"))
    elif wrapper := next((name for name in _WRAPPERS if _nested(content, name)), None):
        layout, weights = _WRAPPERS[wrapper], content[wrapper]
        args = content.get("args")
        stated = vars(args) if isinstance(args, argparse.Namespace) else _nested(content, "args")
    else:
        layout, weights = "bare state dict", content
    averaged = next((name for name in _AVERAGED if _nested(content, name)), None)
    if ema:
        if averaged is None:
            raise ConversionError(f"{path} contains no averaged weights ({', '.join(_AVERAGED)}); remove --ema.")
        layout, weights = f"{layout}, averaged weights ({averaged})", content[averaged]
    elif averaged and weights is content:
        raise ConversionError(f"{path} contains averaged weights only ({averaged}); convert them with --ema.")
    try:
        weights = _without_prefix(without_wrappers(weights))
    except ValueError as error:
        raise ConversionError(f"{path}: {first_line(error)}.") from error
    stated = {name: value for name, value in stated.items() if isinstance(value, (str, int, float, Mapping))}
    return Source(path, layout, _kind(weights, path), weights, stated, tokenizer)


def _load(path: Path) -> Mapping:
    if path.is_dir():
        raise ConversionError(
            f"{path} is a folder; give the checkpoint file in it, or --reverse for a folder written by save_pretrained."
        )
    if not path.exists():
        raise ConversionError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{path} is not a complete safetensors file: {first_line(error)}.") from error
    try:
        # With mmap, only tensors in use are read. The optimizer state, twice as large as the weights, is not.
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems raise an error below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {first_line(error)}.") from error
    except Exception as error:  # broken pickles raise errors of many types
        raise ConversionError(_refusal(path, error)) from error
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{path} contains {type(content).__name__}, not a checkpoint or a state dict; save model.state_dict()."
        )
    return content


def _refusal(path: Path, error: Exception) -> str:
    if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
        if name[1].startswith("torch.distributed."):
            return f"{path} is rejected: {_SHARDS}. Nothing in it was run."
        return (
            f"{path} is rejected: it refers to {name[1]}, which the authors' checkpoints do not need and which could "
            "run code. Nothing in it was run."
        )
    return (
        f"{path} is not a complete PyTorch checkpoint: it is truncated, of another file type, or a pickle that the "
        "safe reader rejects. Nothing in it was run."
    )


def _nested(content: Any, *names: str) -> Mapping:
    """Return the mapping at a path of keys, or an empty one if there is none."""
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _tokenizer(saved: Mapping) -> dict[str, Any] | None:
    words = _nested(saved, "vocab").get("content")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    options = _nested(saved, "tokenizer_config", "content")
    kept = {name: options[name] for name in ("do_lower_case", "model_max_length") if name in options}
    return {"vocab": {word: i for i, word in enumerate(words)}, **kept}


def _without_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    """Remove the prefix "model." that Composer and Lightning add to all names."""
    while weights and all(str(name).startswith("model.") for name in weights):
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    return weights


def _kind(weights: dict[str, Any], path: Path) -> str:
    """Return "image" or "text"; raise ConversionError if the weights belong to neither."""
    kind = next((kind for kind, name in _KINDS.items() if name in weights), None)
    if kind is None:
        names = ", ".join(map(repr, list(weights)[:3])) or "nothing"
        raise ConversionError(
            f"{path} is not one of the authors' models: it contains {names}{', ...' * (len(weights) > 3)}, but neither "
            f"{_KINDS['image']!r} (images) nor {_KINDS['text']!r} (text)."
        )
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ConversionError(f"{path} contains a tensor under {name!r}, but names of weights must be strings.")
        if hasattr(value, "full_tensor"):
            raise ConversionError(f"{path} cannot be converted: {_SHARDS}.")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ConversionError(f"{path} contains something other than a dense tensor under {name!r}.")
    return kind


def first_line(error: Exception) -> str:
    """Return the first line of an error message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
