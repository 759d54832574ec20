"""The command `lion-convert`: converts other encoders and the authors' checkpoints to folders of this package, and the
latter back.

    lion-convert answerdotai/ModernBERT-base lion-modernbert --layers all
    lion-convert vision_checkpoint.pth lion-s-tiny
    lion-convert latest-rank0.pt lion-d-base --dry-run
    lion-convert --reverse lion-s-tiny back.pth

`python -m lion_hf.convert` is equivalent.
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
from .encoder_folder import convert_encoder, describe_layers, is_encoder
from .plan import Plan
from .source import ConversionError, first_line


def _table(*rows: tuple[Any, ...]) -> str:
    cells = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def describe(plan: Plan) -> str:
    """Format a plan as tables of source, options, renamed and dropped tensors, followed by its notes."""
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
        prog="lion-convert",
        description="Convert other encoders and checkpoints of the LION authors' code to Transformers folders, and the "
        "latter back.",
    )
    add, choice = parser.add_argument, {"type": str.lower}
    add(
        "source",
        help="an encoder, as a folder or a name on the Hub; or the authors' checkpoint (.pth, .pt, .safetensors); with "
        "--reverse: a model folder",
    )
    add("out", nargs="?", help="folder to write (with --reverse: file); optional with --dry-run")
    add("--reverse", action="store_true", help="convert a model folder to a checkpoint for the authors' code")
    add("--dry-run", action="store_true", help="verify the conversion and print it as tables, write nothing")
    add("--force", action="store_true", help="replace OUT if it is a checkpoint")
    add("--ema", action="store_true", default=None, help="convert the averaged weights (model_ema, state_dict_ema)")
    add("--with-code", action="store_true", default=None, help="add the modelling code, for use without lion_hf")
    add("--tokenizer", metavar="NAME_OR_PATH", help="tokenizer of a text model (default: that of the source)")
    add(
        "--layers",
        type=_layers,
        metavar="all|none|0,2,...",
        help="layers of another encoder that become LION (default: those with global attention where there are local "
        "ones too, as in ModernBERT; of other encoders 0, 2, 4 ...)",
    )
    unknown = parser.add_argument_group("options that a bare state dict does not contain")
    add = unknown.add_argument
    add(
        "--mask-type",
        **choice,
        choices=spellings("mask_type"),
        help="variant (default: from the decays in the weights; for another encoder selective)",
    )
    add(
        "--num-heads",
        type=int,
        dest="num_attention_heads",
        metavar="N",
        help="number of attention heads of a LION-LIT model",
    )
    add("--cls-tok", **choice, choices=("true", "false"), help="images: whether to classify from the class token")
    add("--order", **choice, choices=spellings("order"), help="images: scan of a LION-LIT model")
    add("--pos-emb", **choice, choices=("true", "false"), help="whether the model uses its position table")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="images: height and width in pixels, for a model without position table; for another encoder the size "
        "that its position table is resized to",
    )
    return parser


def _run(source: str, out: str | None, reverse: bool, dry_run: bool, force: bool, **options: Any) -> str:
    """Run the command; return the text to print."""
    options = {name: value for name, value in options.items() if value is not None}
    if out is None and not dry_run:
        raise ConversionError("OUT is missing; give the path to write to, or --dry-run.")
    if reverse and options:
        given = ", ".join(_flag(name) for name in options)
        raise ConversionError(f"--reverse reads these options from the folder; remove {given}.")
    for name in ("cls_tok", "pos_emb"):
        if name in options:
            options[name] = options[name] == "true"
    if not reverse and is_encoder(source):
        return _run_encoder(source, None if dry_run else out, force, options)
    if "layers" in options:
        raise ConversionError(f"--layers is for other encoders, but {source} is not the folder of one; remove it.")
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


# Options of `convert_encoder` that are flags.
_ENCODER_OPTIONS = ("mask_type", "layers", "pos_emb", "image_size", "tokenizer", "with_code", "order", "cls_tok")


def _run_encoder(source: str, out: str | None, force: bool, options: dict[str, Any]) -> str:
    """Convert another encoder; return the text to print."""
    foreign = [_flag(name) for name in options if name not in _ENCODER_OPTIONS]
    if foreign:
        raise ConversionError(f"{source} is an encoder with its own configuration; remove {', '.join(foreign)}.")
    model, notes = convert_encoder(source, out, force=force, **options)
    title = f"{type(model).__name__} with {model.num_parameters():,} parameters"
    lines = [f"wrote {out}: {title}" if out is not None else f"{source} becomes {title}"]
    lines += [f"layers {layers}: {kind}" for kind, layers in describe_layers(model)]
    return "\n".join(lines + notes)


def _layers(text: str) -> str | list[int]:
    """Return the value of --layers."""
    if text == "all":
        return text
    try:
        return [] if text == "none" else [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'all' nor 'none', nor a list of layers such as 0,2,4"
        ) from None


def _flag(name: str) -> str:
    """Return the flag of an option."""
    return "--num-heads" if name == "num_attention_heads" else f"--{name.replace('_', '-')}"


def _about_companions(out: Path, config: LionConfig | LionVisionConfig) -> list[str]:
    """Return notes about a tokenizer or image processor that is missing or has assumed values."""
    if isinstance(config, LionConfig):
        if (out / "tokenizer_config.json").exists():
            return []
        return ["no tokenizer was written: the checkpoint contains none; give one with --tokenizer"]
    channels = config.num_channels
    if channels not in (1, 3):
        return [
            f"no image processor was written: the mean and standard deviation of the {channels} channels are unknown"
        ]
    if not (out / "preprocessor_config.json").exists():
        return ["no image processor was written: install Pillow"]
    if channels == 1:
        return [
            "the image processor takes images of one channel: pass image.convert('L'). Its mean and standard deviation "
            "are averages over ImageNet's three channels, because the checkpoint contains none"
        ]
    return []


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 0, 2 after an error (one line on stderr), or 130 after an interruption."""
    options = vars(_parser().parse_args(arguments))
    # On SIGTERM, exit through the context managers, which remove partial output.
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
