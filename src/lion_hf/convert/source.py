"""Reading the authors' checkpoints: safely, and down to bare weights."""

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
    """A checkpoint or an option that cannot be converted; the message is one line and says how to mend it."""


@dataclass
class Source:
    """A checkpoint of the authors, not yet interpreted.

    Args:
        path: the file.
        layout: what the file is, in words.
        kind: "image" or "text".
        weights: the state dict under the authors' names, without prefixes.
        stated: options that the file names itself, under the authors' names; empty for a bare state dict.
        tokenizer: vocabulary and options of the tokenizer inside the file, if there is one.
    """

    path: Path
    layout: str
    kind: str
    weights: dict[str, Tensor]
    stated: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None


# Keys that hold the weights, and what a file with such a key is.
_WRAPPERS = {"model": "DeiT image checkpoint", "state_dict": "wrapped state dict"}
_SHARDS = "it holds one process's shards; save the whole state dict (get_model_state_dict with full_state_dict=True)"
# Keys that hold averaged weights: DeiT's, timm's.
_AVERAGED = ("model_ema", "state_dict_ema")
# A key that every model of the kind has.
_KINDS = {"image": "patch_embed.proj.weight", "text": "bert.embeddings.word_embeddings.weight"}


class _Unread:
    """Stands for NumPy's objects, of which the random state in a Composer checkpoint is made. It is not needed, and
    NumPy's own constructors would follow pointers that a forged file holds."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# The constructor of arrays has moved between NumPy 1 and 2; files of both name it.
_ALLOWED = [
    argparse.Namespace,
    datetime.timedelta,
    (_Unread, "numpy.ndarray"),
    (_Unread, "numpy.dtype"),
    (_Unread, "numpy.core.multiarray._reconstruct"),
    (_Unread, "numpy._core.multiarray._reconstruct"),
]


def read_source(path: str | Path, *, ema: bool = False) -> Source:
    """Reads a checkpoint of the authors without running anything in it.

    Args:
        path: the file: PyTorch's, or .safetensors.
        ema: take the averaged weights, which DeiT and timm store beside the others.

    Raises:
        ConversionError: as [`interpret`], and for a file that is missing, truncated, of another kind, or that holds
            objects other than tensors, plain Python, argparse.Namespace, datetime.timedelta and NumPy arrays, which are
            not read.
    """
    return interpret(_load(Path(path)), Path(path), ema=ema)


def interpret(content: Mapping, path: Path, *, ema: bool = False) -> Source:
    """The weights in the content of a checkpoint, without prefixes of wrappers, and what it says about them.

    The kinds: DeiT's image checkpoint (model, model_ema, args), Composer's text checkpoint (state.model and the
    configuration), and a state dict, bare or under "state_dict" (beside which args and state_dict_ema are read, too).

    Raises:
        ConversionError: for another architecture, something other than tensors, or absent averaged weights.
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
            raise ConversionError(f"{path} has no averaged weights ({', '.join(_AVERAGED)}); leave out --ema.")
        layout, weights = f"{layout}, averaged weights ({averaged})", content[averaged]
    elif averaged and weights is content:
        raise ConversionError(f"{path} holds averaged weights only ({averaged}); take them with --ema.")
    try:
        weights = _without_prefix(without_wrappers(weights))
    except ValueError as error:
        raise ConversionError(f"{path}: {first_line(error)}.") from error
    stated = {name: value for name, value in stated.items() if isinstance(value, (str, int, float, Mapping))}
    return Source(path, layout, _kind(weights, path), weights, stated, tokenizer)


def _load(path: Path) -> Mapping:
    if path.is_dir():
        raise ConversionError(
            f"{path} is a folder; give the checkpoint file in it (or --reverse for a folder of ours)."
        )
    if not path.exists():
        raise ConversionError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{path} is not a whole safetensors file: {first_line(error)}.") from error
    try:
        # A mapped file is read where a tensor is used: the state of the optimizer, twice the weights, never is.
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is an error below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {first_line(error)}.") from error
    except Exception as error:  # broken pickles raise errors of every kind
        raise ConversionError(_refusal(path, error)) from error
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{path} holds {type(content).__name__}, not a checkpoint or a state dict. Save model.state_dict()."
        )
    return content


def _refusal(path: Path, error: Exception) -> str:
    if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
        if name[1].startswith("torch.distributed."):
            return f"{path} is refused: {_SHARDS}. Nothing in it was run."
        return (
            f"{path} is refused: it asks for {name[1]}, which no checkpoint of the authors needs and which could run "
            "code. Nothing in it was run."
        )
    return (
        f"{path} is not a whole PyTorch checkpoint: it is truncated, a file of another kind, or a pickle that the safe "
        "reader refuses. Nothing in it was run."
    )


def _nested(content: Any, *names: str) -> Mapping:
    """The mapping at a path of keys; empty where the path ends early."""
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
    """Without the "model." that Composer and Lightning put before every name."""
    while weights and all(str(name).startswith("model.") for name in weights):
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    return weights


def _kind(weights: dict[str, Any], path: Path) -> str:
    """Whether the weights are of an image or a text model; raises ConversionError where they are of neither."""
    kind = next((kind for kind, name in _KINDS.items() if name in weights), None)
    if kind is None:
        names = ", ".join(map(repr, list(weights)[:3])) or "nothing"
        raise ConversionError(
            f"{path} is not one of the authors' models: it holds {names}{', ...' * (len(weights) > 3)}, but neither "
            f"{_KINDS['image']!r} (images) nor {_KINDS['text']!r} (text)."
        )
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ConversionError(f"{path} holds a tensor under {name!r}, which is no name of a weight.")
        if hasattr(value, "full_tensor"):
            raise ConversionError(f"{path} cannot be converted: {_SHARDS}.")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ConversionError(f"{path} holds something other than a dense tensor under {name!r}.")
    return kind


def first_line(error: Exception) -> str:
    """The message of an error without the lines after the first and without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
