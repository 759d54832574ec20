"""The command `lion-convert`: the authors' checkpoints to folders of this package, and back.

    lion-convert vision_checkpoint.pth lion-s-tiny
    lion-convert latest-rank0.pt lion-d-base --dry-run
    lion-convert --reverse lion-s-tiny back.pth

`python -m lion_hf.convert` is the same.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from ..models.configuration_lion import LionConfig, LionVisionConfig, spellings
from .checkpoint import convert_checkpoint, reverse_checkpoint
from .plan import Plan
from .source import ConversionError, first_line


def _table(*rows: tuple[Any, ...]) -> str:
    cells = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def describe(plan: Plan) -> str:
    """The plan as tables: the source, the configuration, the names of the weights, what is dropped; and its notes."""
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
    add("--ema", action="store_true", default=None, help="take the averaged weights (model_ema, state_dict_ema)")
    add("--with-code", action="store_true", default=None, help="add the modelling code, for users without lion_hf")
    add("--tokenizer", metavar="NAME_OR_PATH", help="tokenizer to save beside a text model")
    unknown = parser.add_argument_group("what a bare state dict does not tell")
    add = unknown.add_argument
    add("--mask-type", **choice, choices=spellings("mask_type"), help="the variant; shown by the decays if any")
    add("--num-heads", type=int, dest="num_attention_heads", metavar="N", help="heads of a LION-LIT model")
    add("--cls-tok", **choice, choices=("true", "false"), help="images: classify from the class token")
    add("--order", **choice, choices=spellings("order"), help="images: the scan of a LION-LIT model")
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
        lines += _about_companions(Path(out), plan.model.config)
    lines += plan.notes
    return "\n".join(lines)


def _about_companions(out: Path, config: LionConfig | LionVisionConfig) -> list[str]:
    """What is missing beside the weights, or was made up."""
    if isinstance(config, LionConfig):
        if (out / "tokenizer_config.json").exists():
            return []
        return ["no tokenizer was written: the checkpoint holds none; give one with --tokenizer"]
    channels = config.num_channels
    if channels not in (1, 3):
        return [
            f"no image processor was written: the checkpoint tells no mean and deviation of its {channels} channels"
        ]
    if not (out / "preprocessor_config.json").exists():
        return ["no image processor was written: install Pillow"]
    if channels == 1:
        return [
            "the image processor is for one channel: give it image.convert('L'); its mean and deviation are those of "
            "ImageNet's three channels averaged, since the checkpoint tells none"
        ]
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


if __name__ == "__main__":
    sys.exit(main())
