"""The authors' checkpoints to folders of this package, and back; also the command `lion-convert`.

    lion-convert vision_checkpoint.pth lion-s-tiny
    lion-convert latest-rank0.pt lion-d-base --dry-run
    lion-convert --reverse lion-s-tiny back.pth

`python -m lion_hf.convert_lion_checkpoint` is the same. A checkpoint is read without running anything in it
(convert_source), its configuration is inferred (convert_config), its tensors get our names (convert_names), and all is
verified (convert_plan) before anything is written.
"""

import argparse
import signal
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.configuration_lion import spellings
from ..save_with_code import holds_lion, save_with_code
from .companions import image_processor, load_tokenizer, model_card
from .names import convert_text_state_dict, convert_vision_state_dict
from .plan import Plan, plan_conversion
from .reverse import authors_checkpoint, lost_names, read_folder, require_same_meaning
from .source import ConversionError, first_line, interpret, read_source


# ------------------------------------------------------------------------------------------------------------ writing


# What a converted folder can hold.
_WRITTEN = ("config.json", "README.md", "*.safetensors", "*.safetensors.index.json", "*.py", "preprocessor_config.json")
_WRITTEN += ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json")


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to. It becomes `out` when the block ends, in one step, and is gone if the block fails;
    only then is what was at `out` removed."""
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
        ema: take the averaged weights (model_ema).
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


# ------------------------------------------------------------------------------------------------------- command line


def _table(*rows: tuple[Any, ...]) -> str:
    cells = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def describe(plan: Plan) -> str:
    """The plan as tables: what the source is, the configuration, the names of the weights, what is dropped; and its notes."""
    model = plan.model
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.state_dict().values()})
    summary = [
        ("source", f"{plan.source.path}: {plan.source.layout}"),
        ("model", type(model).__name__),
        ("parameters", f"{model.num_parameters():,}"),
        ("dtype", ", ".join(dtypes)),
    ]
    options = [(name, getattr(model.config, name), origin) for name, origin in plan.origins.items()]
    names = [
        (old, tuple(plan.source.weights[old].shape), new, tuple(tensor.shape))
        for old, parts in plan.renamed.items()
        for new, tensor in parts.items()
    ]
    tables = [
        _table(*summary),
        _table(("option", "value", "known from"), *options),
        _table(("the authors' name", "shape", "name here", "shape"), *names),
    ]
    if plan.dropped:
        tables.append(_table(("dropped", "why"), *plan.dropped.items()))
    if plan.notes:
        tables.append("\n".join(plan.notes) + "\n")
    return "\n".join(tables)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lion-convert", description="Converts checkpoints of the LION authors' code to Transformers, and back."
    )
    add, choice = parser.add_argument, {"type": str.lower}
    add("source", help="the authors' checkpoint (.pth, .pt, .safetensors); with --reverse a folder of save_pretrained")
    add("out", nargs="?", help="folder to write (with --reverse: file); not needed with --dry-run")
    add("--reverse", action="store_true", help="write a folder's model as a checkpoint for the authors' code")
    add("--dry-run", action="store_true", help="verify, show the plan as a table, write nothing")
    add("--force", action="store_true", help="replace OUT")
    add("--ema", action="store_true", default=None, help="take the averaged weights (model_ema) of an image checkpoint")
    add("--with-code", action="store_true", default=None, help="add the modelling code, for users without lion_hf")
    add("--tokenizer", metavar="NAME_OR_PATH", help="tokenizer to save beside a text model")
    unknown = parser.add_argument_group("what a bare state dict does not tell")
    add = unknown.add_argument
    add("--mask-type", **choice, choices=spellings("mask_type"), help="the variant; shown by the decays if any")
    add("--num-heads", type=int, dest="num_attention_heads", metavar="N", help="heads of a LION-LIT model")
    add("--cls-tok", **choice, choices=("true", "false"), help="images: classify from the class token")
    add("--order", **choice, choices=("normal", "s"), help="images: the scan of a LION-LIT model")
    add("--pos-emb", **choice, choices=("true", "false"), help="whether the position table is in use")
    add("--image-size", type=int, metavar="N", help="images: side in pixels of a model without position table")
    return parser


def _run(source: str, out: str | None, reverse: bool, dry_run: bool, force: bool, **options: Any) -> str:
    """Does what the command line says; returns what to tell the user."""
    options = {name: value for name, value in options.items() if value is not None}
    if out is None and not dry_run:
        raise ConversionError("OUT is missing: say where to write, or --dry-run.")
    if reverse and options:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ConversionError(f"--reverse reads all it needs from the folder; leave out {given}.")
    for name in ("cls_tok", "pos_emb"):
        if name in options:
            options[name] = options[name] == "true"
    work = reverse_checkpoint if reverse else convert_checkpoint
    plan = work(source, None if dry_run else out, force=force, **options)
    if dry_run:
        return describe(plan)
    lines = [f"wrote {out}: {type(plan.model).__name__} with {plan.model.num_parameters():,} parameters"]
    if not reverse:
        lines += [f"dropped {name}: {reason}" for name, reason in plan.dropped.items()]
        lines += _missing_companions(Path(out), plan.source.kind)
    lines += plan.notes
    return "\n".join(lines)


def _missing_companions(out: Path, kind: str) -> list[str]:
    if kind == "text" and not (out / "tokenizer_config.json").exists():
        return ["no tokenizer was written: the checkpoint holds none; give one with --tokenizer"]
    if kind == "image" and not (out / "preprocessor_config.json").exists():
        return ["no image processor was written: install Pillow"]
    return []


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 after an error that the user can mend (one line), or 130 after an interruption."""
    options = vars(_parser().parse_args(arguments))
    # A terminated process removes what is half-written, as an interrupted one does.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logging.disable_progress_bar()
    try:
        sys.stdout.write(f"{_run(**options)}\n")
    except (ConversionError, OSError, SafetensorError) as error:
        sys.stderr.write(f"lion-convert: error: {first_line(error)}.\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("lion-convert: interrupted, nothing was written\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


__all__ = [
    "convert_checkpoint",
    "convert_text_state_dict",
    "convert_vision_state_dict",
    "main",
    "reverse_checkpoint",
]

if __name__ == "__main__":
    sys.exit(main())
