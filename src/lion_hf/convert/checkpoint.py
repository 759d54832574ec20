"""Conversion of the authors' checkpoints to folders of this package, and back.

A checkpoint is read without running code in it (source.py). Its configuration is inferred (config.py), its tensors are
renamed (names.py) and the result is verified (plan.py) before anything is written. Output is written completely
or not at all.
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
from .sentences import SENTENCE_FILES, modules_of, sentence_folder
from .source import ConversionError, interpret, read_source


# Names of files that a conversion can write.
_WRITTEN = ("config.json", "README.md", "*.safetensors", "*.safetensors.index.json", "*.py", "preprocessor_config.json")
_WRITTEN += ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json")
_WRITTEN += SENTENCE_FILES


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """Yield a temporary path beside `out`. When the block ends, the path is renamed to `out`, and only then is an old
    `out` removed. If the block fails, the path is removed and `out` is unchanged."""
    out.parent.mkdir(parents=True, exist_ok=True)
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


def require_writable(out: Path, source: Path | None, force: bool, folder: bool) -> None:
    """Raise ConversionError unless `out` can be created, is empty, or is a checkpoint that `force` allows replacing.
    The source is None if it is on the Hub."""
    if source is not None and not source.exists():  # before anything about `out`, which is not at fault
        raise ConversionError(f"{source} does not exist.")
    source = None if source is None else source.resolve()
    above = next(path for path in out.parents if path.exists())
    if not above.is_dir():
        raise ConversionError(f"{above} is not a folder; give another path.")
    if not out.exists():
        return
    if out.is_dir() != folder:
        raise ConversionError(f"{out} is a {'file' if folder else 'folder'}; give a {'folder' if folder else 'file'}.")
    if folder and not any(out.iterdir()):
        return
    if not force:
        raise ConversionError(f"{out} exists; give another path, or --force to replace it.")
    if source is not None and (out == source or out in source.parents or source in out.parents):
        raise ConversionError(f"{out} would overwrite the source; give another path.")
    if folder and not holds_lion(out):
        raise ConversionError(f"{out} holds something other than a LION checkpoint; empty it, or give another path.")
    foreign = _foreign(out) if folder else None
    if foreign:
        raise ConversionError(f"{out} also holds {foreign}, which would be lost; move it, or give another path.")
    if not folder and not zipfile.is_zipfile(out):
        raise ConversionError(f"{out} is not a checkpoint and is not replaced; remove it, or give another path.")


def _foreign(out: Path) -> str | None:
    """Return the name of something in a folder that no conversion writes there."""
    try:
        modules = {module["path"] for module in modules_of(out)} if sentence_folder(out) else set()
    except ValueError:
        return "a malformed modules.json"
    ours = {x for x in out.iterdir() if x.is_file() and any(x.match(pattern) for pattern in _WRITTEN)}
    ours |= {x for x in out.iterdir() if x.is_dir() and x.name in modules}
    return next((x.name for x in sorted(out.iterdir()) if x not in ours), None)


def write_folder(plan: Plan, out: Path, tokenizer: PreTrainedTokenizerBase | None, with_code: bool) -> None:
    """Write model, configuration, tokenizer or image processor, model card and, on request, the modelling code."""
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
    """Convert a checkpoint of the authors to a folder for `AutoModelForX.from_pretrained`.

    No code in the checkpoint is run. The folder is written completely or not at all.

    Args:
        path: the checkpoint: a DeiT image checkpoint, a Composer text checkpoint, or a state dict (.pth, .pt,
            .safetensors).
        out: the folder to write. None verifies the conversion and writes nothing.
        ema: convert the averaged weights (`model_ema`, `state_dict_ema`).
        tokenizer: name or folder of the tokenizer for a text model. Default: the one inside the checkpoint, if any.
        with_code: add the modelling code, as `lion_hf.save_with_code` does.
        force: replace `out` if it holds a LION checkpoint.
        flags: options of the configuration that the file does not contain: `mask_type`, `num_attention_heads`,
            `cls_tok`, `order`, `pos_emb`, `image_size`.

    Returns:
        A plan with the source, the model, the origin of each option, renamed and dropped tensors, and notes.

    Raises:
        ConversionError: if the source, an option or the output path is invalid. Nothing is written then. It is a
            ValueError.
    """
    if out is not None:
        out = Path(out).resolve()
        require_writable(out, Path(path), force, folder=True)
    plan = plan_conversion(read_source(path, ema=ema), flags)
    loaded = load_tokenizer(tokenizer, plan.source, getattr(plan.model.config, "vocab_size", 0))
    if out is not None:
        with published(out) as new:
            write_folder(plan, new, loaded, with_code)
    return plan


def reverse_checkpoint(folder: str | Path, out: str | Path | None, *, force: bool = False) -> Plan:
    """Write the model of a `save_pretrained` folder as a checkpoint for the authors' code.

    The layout is DeiT's (`model`, `args`) for images and Composer's (`state.model` and the configuration) for text.

    Args:
        folder: the folder.
        out: the file to write, completely or not at all. None verifies the conversion and writes nothing.
        force: replace `out` if it is a checkpoint file.

    Returns:
        The plan that converts the written checkpoint back; it gives the same weights, bit for bit. Its notes list
        what the authors' layout cannot store.

    Raises:
        ConversionError: if the folder holds no LION model, or a model that the authors' layout cannot express. It is a
            ValueError.
    """
    folder = Path(folder)
    if out is not None:
        out = Path(out).resolve()
        require_writable(out, folder, force, folder=False)
    config, state = read_folder(folder)
    content = authors_checkpoint(config, state)
    plan = plan_conversion(interpret(content, folder))
    require_same_meaning(config, plan.model.config)
    plan.notes += lost_names(config, plan.model.config)
    back = plan.model.state_dict()
    if not all(tensor.dtype == back[name].dtype and tensor.equal(back[name]) for name, tensor in state.items()):
        raise ConversionError(f"{folder}: the weights change on the way to the authors' layout and back.")
    if out is not None:
        with published(out) as new:
            torch.save(content, new)
    return plan
