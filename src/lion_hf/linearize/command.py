"""The command `lion-linearize`: softmax encoders become linear, by imitation of their own layers, without labels.

    lion-linearize sentence-transformers/all-MiniLM-L6-v2 minilm-lion --text texts.txt
    lion-linearize answerdotai/ModernBERT-base modern-lion --text texts.txt --minutes 120
    lion-linearize google/vit-base-patch16-224 vit-lion --images photos

`python -m lion_hf.linearize` is equivalent.
"""

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, ImageProcessingMixin, PreTrainedTokenizerBase
from transformers.utils import logging

from ..convert.encoder import FAMILIES
from ..convert.sentences import transformer_folder
from ..convert.source import first_line
from ..convert.warm_start import source_config
from ..models.configuration_lion import spellings
from .card import pooling_of, write_folder
from .losses import measure
from .models import ROPES, Pair, kind_of, load_pair, positions
from .run import MIXED_PRECISIONS, STATE, Data, Linearizer, Recipe
from .text import Pieces, read_lines


def linearize(
    source: str,
    out: str | Path,
    text: str | Path | Sequence[str | Path] = (),
    *,
    images: str | Path | Sequence[str | Path] = (),
    layers: str = "default",
    mask_type: str = "selective",
    windows: Sequence[float] | None = None,
    context: int | None = None,
    target: str = "auto",
    rope: str = "auto",
    force: bool = False,
    device: str | None = None,
    recipe: Recipe | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """Convert an encoder to linear attention and write it to a folder, with a card that says what was measured.

    Args:
        source: folder or Hub name of an encoder of text (also of sentence-transformers) or of images.
        out: folder to write. It also keeps the state of an interrupted run, from which the same call goes on.
        text: names of text files, one text a line, without labels.
        images: for a source that reads images, instead of `text`: names of folders, which are searched with their
            subfolders, of image files, and of parquet files with a column of images. The source's image processor makes
            pixels of them.
        layers: which layers become LION: "default" (every second one; with local attention the global ones), "all", or
            numbers separated by commas, counted from 0.
        mask_type: the variant of these layers, as in `LionConfig`.
        windows: numbers of tokens that heads read at the start: (smallest, largest), or one per head. Default: (16,
            512), for images (4, number of patches).
        context: maximum number of tokens of the result, by default that of the source. The source's position table is
            repeated. Only for text.
        target: what the second stage trains for: "hidden" states, "embeddings" as well, or "auto": embeddings for a
            folder of sentence-transformers.
        rope: whether linear layers rotate queries and keys as the source's layers did: "yes", "no", or "auto": if these
            did.
        force: whether to replace what a finished or interrupted run left in `out`.
        device: such as "cuda"; by default a GPU if there is one.
        recipe: options of the training.
        say: receives lines of progress.

    Returns:
        The measurements on held-out text or images, "before" and "after"; see `lion_hf.linearize.losses.measure`.

    Raises:
        ValueError: if an argument is invalid, the source cannot be converted, there are not enough texts or images, or
            `out` exists and does not hold the state of this run.
        OSError: if a file cannot be read or written.
        ImportError: if a package that reads the images is not installed.
    """
    recipe, out, text, images = recipe or Recipe(), Path(out), _names(text), _names(images)
    if bool(text) == bool(images):
        raise ValueError("give either --text or --images, what the source reads")
    _require_free(out, source, force)
    options = {"layers": layers, "mask_type": mask_type, "windows": windows, "context": context, "rope": rope}
    if images:
        task = _image_task(source, images, recipe, target, options, say)
    else:
        task = _text_task(source, text, recipe, target, options)
    pair = task.pair
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for model in (pair.teacher, pair.student):
        model.to(device)
    identity = task.identity | {"source": source, "layers": pair.layers, "mask_type": mask_type}
    run = Linearizer(pair, task.data, recipe, pooling=task.pooling, folder=out, identity=identity, say=say)
    batches = [{name: x.to(device) for name, x in batch.items()} for batch in task.data.measuring()]
    if run.resume():
        say(f"resumed at step {run.progress.step}")
    else:
        say(f"layers {', '.join(map(str, pair.layers))} of {pair.teacher.config.num_hidden_layers} become linear")
        run.progress.before = measure(pair, batches, task.pooling)
    run.train()
    after = measure(pair, batches, task.pooling)
    pair.student.to("cpu")
    names = ", ".join(Path(name).name for name in (*text, *images))
    write_folder(out, run, task.companion, source, after, names, context)
    (out / STATE).unlink(missing_ok=True)
    return {"before": run.progress.before, "after": after}


@dataclass
class _Task:
    """What differs between text and images.

    Args:
        pair: source and student.
        data: what they learn from.
        companion: tokenizer or image processor of the source.
        pooling: how a sentence encoder pools; None if the source is none.
        identity: what the state of an interrupted run must agree with.
    """

    pair: Pair
    data: Data
    companion: PreTrainedTokenizerBase | ImageProcessingMixin
    pooling: str | None
    identity: dict[str, object]


def _text_task(source: str, text: Sequence[str], recipe: Recipe, target: str, options: dict) -> _Task:
    pooling = pooling_of(source) if target in ("auto", "embeddings") else None
    if target == "embeddings" and pooling is None:
        raise ValueError(f"--target is 'embeddings', but {source!r} is no folder of sentence-transformers")
    lines = read_lines(text)
    if kind_of(source) == "image":
        raise ValueError(f"{source!r} is an image model; give --images, what it reads, instead of --text")
    pair = load_pair(source, **options)
    limit = positions(pair.teacher.config)
    if recipe.max_length > limit:
        raise ValueError(f"--max_length is {recipe.max_length}, but the source reads at most {limit} tokens")
    tokenizer = AutoTokenizer.from_pretrained(transformer_folder(source))
    pieces = Pieces(lines, tokenizer, recipe.max_length, recipe.batch_size, recipe.seed, recipe.mask_share)
    identity = {"text": text, "pooling": pooling} | {name: options[name] for name in ("windows", "context", "rope")}
    return _Task(pair, pieces, tokenizer, pooling, identity)


def _image_task(
    source: str, images: Sequence[str], recipe: Recipe, target: str, options: dict, say: Callable[[str], None]
) -> _Task:
    from .images import Images, Rows, image_size, load_processor  # only here: text needs no Pillow

    if kind_of(source) == "text":
        raise ValueError(f"{source!r} is a text encoder; give --text, what it reads, instead of --images")
    if target == "embeddings":
        raise ValueError("--target is 'embeddings', which is for sentence encoders; image models learn hidden states")
    if recipe.mask_share:
        raise ValueError(f"--mask_share is {recipe.mask_share}, but {source!r} is an image model; leave it out")
    rows, processor, config = Rows(images), load_processor(source), source_config(source, FAMILIES)
    size, known = image_size(processor, config), config.image_size
    known = (known, known) if isinstance(known, int) else tuple(known)
    pair = load_pair(source, **options, image_size=None if size == known else size)
    if size != known:
        say(f"images have {size[0]} x {size[1]} pixels; the position table for {known[0]} x {known[1]} is resized")
    data = Images(rows, processor, config.num_channels, recipe.batch_size, recipe.seed, say)
    identity = {"images": images, "number": len(rows), "size": size, "windows": options["windows"]}
    return _Task(pair, data, processor, None, identity)


def _names(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(given)] if isinstance(given, str | Path) else [str(name) for name in given]


def _require_free(out: Path, source: str, force: bool) -> None:
    """Raise ValueError unless `out` can be written; with `force`, remove what an earlier run left there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; give a folder that does not exist yet")
    if Path(source).is_dir() and out.exists() and out.samefile(source):
        raise ValueError("OUT is SOURCE; give another folder")
    if not out.exists() or not any(out.iterdir()) or ((out / STATE).is_file() and not force):
        return
    card = out / "README.md"
    ours = (out / STATE).is_file() or (card.is_file() and "lion-linearize" in _text(card))
    if not force:
        raise ValueError(f"{str(out)!r} exists and is not empty; give another folder" + ", or --force" * ours)
    if not ours:
        raise ValueError(f"{str(out)!r} was not written by lion-linearize, so --force does not replace it")
    shutil.rmtree(out)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lion-linearize",
        description="Convert a softmax encoder to linear attention: its layers learn to imitate those of the source on "
        "text or images without labels. The same command resumes an interrupted run.",
    )
    add, recipe = parser.add_argument, {field.name: field.default for field in fields(Recipe)}
    add("source", metavar="SOURCE", help="folder or Hub name of an encoder of text or images")
    add("out", metavar="OUT", help="folder to write")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", nargs="+", default=(), metavar="FILE", help="text files, one text a line")
    data.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="PATH",
        help="folders of images, searched with their subfolders, image files, or parquet files with a column of images",
    )
    add(
        "--layers",
        default="default",
        help="layers that become linear: all, or numbers from 0, such as 0,2,4 (default: every second one; with local "
        "attention the global ones)",
    )
    add("--mask_type", type=str.lower, choices=spellings("mask_type"), default="selective", help="variant of LION")
    add("--steps", type=int, help="steps at most")
    add("--minutes", type=float, help="minutes at most, 0 for no limit")
    add("--learning_rate", type=float, help="of the second stage, end to end")
    add("--layer_learning_rate", type=float, help="of the first stage, layer by layer")
    add("--map_learning_rate", type=float, help="of feature maps and decays in the first stage")
    add("--first_share", type=float, help="share of the first stage, from 0 to 1")
    add("--max_length", type=int, help="tokens of a piece of text at most; longer texts are cut")
    add("--batch_size", type=int, help="pieces of text, or images, in a step")
    add("--mask_share", type=float, help="share of the tokens that are masked in training, from 0 to 1")
    add("--seed", type=int, help="seed of the order of the text or images")
    add("--mixed_precision", choices=MIXED_PRECISIONS, help="of the training; auto: bf16 where the device has it")
    add("--context", type=int, metavar="N", help="tokens that the result can read (default: as the source)")
    add(
        "--windows",
        type=float,
        nargs=2,
        metavar=("SMALL", "LARGE"),
        help="tokens that heads read at the start (default: 16 512; for images 4 and the number of patches)",
    )
    add("--target", choices=("auto", "hidden", "embeddings"), default="auto", help="what the second stage trains for")
    add(
        "--rope",
        choices=ROPES,
        default="auto",
        help="whether linear layers rotate queries and keys as the source's did (default: auto, if these did)",
    )
    add("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    add("--force", action="store_true", help="replace what an earlier run left in OUT")
    for action in parser._actions:
        if action.dest in recipe:
            action.default = recipe[action.dest]
            action.help += f" (default: {action.default if isinstance(action.default, str) else f'{action.default:g}'})"
    return parser


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 0, 2 after an error (one line on stderr), or 130 after an interruption."""
    options = vars(_parser().parse_args(arguments))
    # SIGTERM saves the state as Ctrl-C does, also in the background of a script, where shells ignore Ctrl-C.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.disable_progress_bar()
    try:
        recipe = Recipe(**{field.name: options.pop(field.name) for field in fields(Recipe)})
        found = linearize(recipe=recipe, say=_say, **options)
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        sys.stderr.write(f"lion-linearize: error: {first_line(error).rstrip('.')}.\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("lion-linearize: interrupted; the same command goes on from the last saved state\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    before, after = found["before"], found["after"]
    errors = [sum(x["layers"].values()) / len(x["layers"]) for x in (before, after)]
    _say(f"layers, mean relative squared error: {errors[0]:.3f} before, {errors[1]:.3f} after")
    for name in ("hidden", "cosine", "embedding_cosine", "spearman", "agreement"):
        if after.get(name) is not None:
            _say(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")
    _say(f"wrote {options['out']}")
    return 0
