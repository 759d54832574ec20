"""The authors' checkpoints to folders of this package, and back: verified, then written as a whole or not at all.

A checkpoint is read without running anything in it (source.py), its configuration is inferred (config.py), its tensors
get our names (names.py), and all is verified (plan.py) before anything is written.
"""

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..hub import holds_lion, save_with_code
from .companions import image_processor, load_tokenizer, model_card
from .plan import Plan, plan_conversion
from .reverse import authors_checkpoint, lost_names, read_folder, require_same_meaning
from .source import ConversionError, interpret, read_source


# What a converted folder can hold.
_WRITTEN = ("config.json", "README.md", "*.safetensors", "*.safetensors.index.json", "*.py", "preprocessor_config.json")
_WRITTEN += ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json")


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to. It becomes `out` when the block ends, in one step, and only then is what was at
    `out` removed; it is gone if the block fails."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        new, old = Path(work, "new"), Path(work, "old")
        yield new
        try:
            if out.exists():
                out.rename(old)
            new.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise


def _require_writable(out: Path, source: Path, force: bool, folder: bool) -> None:
    """Raises ConversionError unless `out` can be made, or holds a checkpoint that `force` may replace."""
    if not out.parent.is_dir():
        raise ConversionError(f"{out.parent} is not a folder; make it first.")
    if not out.exists():
        return
    if out.is_dir() != folder:
        raise ConversionError(f"{out} is a {'file' if folder else 'folder'}; give a {'folder' if folder else 'file'}.")
    if not force:
        raise ConversionError(f"{out} exists; give another place, or --force to replace it.")
    if out == source or out in source.parents or source in out.parents:
        raise ConversionError(f"{out} is where the source is; give another place.")
    if folder and any(out.iterdir()) and not holds_lion(out):
        raise ConversionError(f"{out} holds something other than a LION checkpoint; empty it, or give another place.")
    foreign = next((x.name for x in sorted(out.iterdir()) if x.is_dir() or not _is_ours(x)), None) if folder else None
    if foreign:
        raise ConversionError(f"{out} also holds {foreign}, which would be lost; move it, or give another place.")
    if not folder and not zipfile.is_zipfile(out):
        raise ConversionError(f"{out} is something other than a checkpoint; remove it, or give another place.")


def _is_ours(file: Path) -> bool:
    """Whether a file has a name that a conversion writes."""
    return any(file.match(pattern) for pattern in _WRITTEN)


def write_folder(plan: Plan, out: Path, tokenizer: PreTrainedTokenizerBase | None, with_code: bool) -> None:
    """Writes model, configuration, tokenizer or image processor and model card; see [`save_with_code`] for the code."""
    if with_code:
        save_with_code(plan.model, out)
    else:
        plan.model.save_pretrained(out)
    ratio = plan.source.stated.get("eval_crop_ratio")
    processor = image_processor(plan.model.config, ratio) if plan.source.kind == "image" else None
    for companion in (tokenizer, processor):
        if companion is not None:
            companion.save_pretrained(out)
    model_card(plan.model, plan.source, plan.dropped, with_code).save(out / "README.md")


def convert_checkpoint(
    path: str | Path,
    out: str | Path | None,
    *,
    ema: bool = False,
    tokenizer: str | None = None,
    with_code: bool = False,
    force: bool = False,
    **flags: Any,
) -> Plan:
    """Converts a checkpoint of the authors to a folder that `AutoModelForX.from_pretrained` loads.

    Args:
        path: the checkpoint; see [`read_source`] for the kinds.
        out: the folder to write; it appears complete or not at all. None writes nothing.
        ema: take the averaged weights (model_ema, state_dict_ema).
        tokenizer: name or folder of the tokenizer of a text model; by default the one inside the checkpoint, if any.
        with_code: add the modelling code, see [`save_with_code`].
        force: replace `out` if it holds a LION checkpoint.
        flags: options of the configuration that the file does not tell: mask_type, num_attention_heads, cls_tok, order,
            pos_emb, image_size.

    Returns:
        What was converted, and how.

    Raises:
        ConversionError: for a source, an option or a place that does not fit; nothing is written then.
    """
    if out is not None:
        out = Path(out).resolve()
        _require_writable(out, Path(path).resolve(), force, folder=True)
    plan = plan_conversion(read_source(path, ema=ema), flags)
    loaded = load_tokenizer(tokenizer, plan.source, getattr(plan.model.config, "vocab_size", 0))
    if out is not None:
        with _published(out) as new:
            write_folder(plan, new, loaded, with_code)
    return plan


def reverse_checkpoint(folder: str | Path, out: str | Path | None, *, force: bool = False) -> Plan:
    """Writes the model of a save_pretrained folder as a checkpoint that the authors' code can load: DeiT's layout
    (model, args) for images, Composer's (state.model and the configuration) for text.

    Args:
        folder: the folder.
        out: the file to write; it appears complete or not at all. None writes nothing.
        force: replace `out` if it is a file.

    Returns:
        The conversion of what was written, which gives the weights of the folder bit by bit. Its notes name what the
        authors' layout has no place for.

    Raises:
        ConversionError: for another kind of folder, and for a model that the authors' layout cannot express.
    """
    folder = Path(folder)
    if out is not None:
        out = Path(out).resolve()
        _require_writable(out, folder.resolve(), force, folder=False)
    config, state = read_folder(folder)
    content = authors_checkpoint(config, state)
    plan = plan_conversion(interpret(content, folder))
    require_same_meaning(config, plan.model.config)
    plan.notes += lost_names(config, plan.model.config)
    back = plan.model.state_dict()
    if not all(tensor.dtype == back[name].dtype and tensor.equal(back[name]) for name, tensor in state.items()):
        raise ConversionError(f"{folder}: the weights do not survive the way to the authors' layout and back.")
    if out is not None:
        with _published(out) as new:
            torch.save(content, new)
    return plan
