"""The part "masked" of `linearize_evidence.py`: what a conversion loses at predicting masked tokens.

A ModernBERT of 2.6 M parameters is trained on wiki/train.txt with the recipe of `run_evidence.py text`,
`lion-linearize` converts it on the same text, and all predict the same masked tokens of wiki/validation.txt. Its rows
are two halves: options are compared on the first, the second is reported. BERT learns too little in as many steps to
be a source.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ablation_evidence import MODERNBERT
from run_evidence import TEXT_RECIPE
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer


SEED = 17
LAYERS = {"half": "default", "all": "all"}
MASKED = 0.15  # share of the tokens that are masked in training, besides none
STEPS = 300
BATCH = 100  # rows


class Source(NamedTuple):
    """A masked language model to convert.

    Attributes:
        options: its configuration, besides the sizes of the recipe.
        rate: its learning rate, the best of modern.md.
        steps: number of training steps.
        ropes: values of `--rope` to compare.
    """

    options: dict[str, Any]
    rate: float
    steps: int
    ropes: tuple[str, ...]


SOURCES = {"ModernBERT": Source(MODERNBERT, 2e-3, 1200, ("no", "yes"))}


class Conversion(NamedTuple):
    """A call of `lion-linearize`: source, key in LAYERS, value of `--rope`, and value of `--mask_share`."""

    source: str
    layers: str
    rope: str
    mask_share: float

    @property
    def folder(self) -> str:
        return f"{self.source.lower()}-{self.layers}-rope-{self.rope}-masked-{self.mask_share:g}"


def conversions(smoke: bool = False) -> list[Conversion]:
    """Return all that are compared, or one of each source."""
    if smoke:
        return [Conversion(name, "half", source.ropes[-1], MASKED) for name, source in SOURCES.items()]
    return [
        Conversion(name, layers, rope, share)
        for name, source in SOURCES.items()
        for layers in LAYERS
        for rope in source.ropes
        for share in (0.0, MASKED)
    ]


def source_rows(data: Path, work: Path, steps: int):
    """Return the rows of a training of this many steps; the tokenizer is saved in `work`/tokenizer."""
    from ablation_training import stored_rows, text_rows

    train, validation = (shlex.quote(str(data / "wiki" / name)) for name in ("train.txt", "validation.txt"))
    flags = f"--train_file {train} --validation_file {validation} {TEXT_RECIPE} --max_steps {steps}"
    return stored_rows(lambda: text_rows(flags, SEED, work / "tokenizer"), work / f"rows-{steps}.pt")


def train_source(name: str, data: Path, work: Path, steps: int) -> Path:
    """Train a source, unless its folder is there, and return the folder."""
    from ablation_training import text_training

    folder, source = work / name.lower(), SOURCES[name]
    if (folder / "config.json").is_file():
        return folder
    rows = source_rows(data, work, steps)
    print(f"training {name}, {steps} steps", flush=True)
    training = text_training(source.options, TEXT_RECIPE, source.rate, SEED, rows, work / "tokenizer")
    for _ in range(training.steps):
        training.run()
    training.model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(folder)
    return folder


@torch.no_grad()
def predictions(folder: Path, rows: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Return loss and accuracy at the masked tokens of both halves of the rows."""
    import lion_hf  # noqa: F401  registers LION with the Auto classes

    model = AutoModelForMaskedLM.from_pretrained(folder).float().eval().to(device)
    count, found = len(rows["labels"]), {}
    for half, part in (("compared", slice(0, count // 2)), ("reported", slice(count // 2, count))):
        ids, labels = rows["input_ids"][part].long(), rows["labels"][part].long()
        loss, hits = 0.0, 0
        for x, y in zip(ids.split(BATCH), labels.split(BATCH), strict=True):
            asked = y != -100
            logits = model(input_ids=x.to(device)).logits[asked.to(device)].float().cpu()
            loss += F.cross_entropy(logits, y[asked], reduction="sum").item()
            hits += int((logits.argmax(-1) == y[asked]).sum())
        asked = int((labels != -100).sum())
        found |= {f"{half} loss": loss / asked, f"{half} accuracy": hits / asked, f"{half} tokens": asked}
    return found


def converted(conversion: Conversion, source: Path, data: Path, work: Path, options) -> dict:
    """Run `lion-linearize`, unless its folder is there; return its command and its minutes."""
    out = work / conversion.folder
    command = ["lion-linearize", str(source), str(out), "--text", str(data / "wiki/train.txt")]
    command += ["--layers", LAYERS[conversion.layers], "--mask_share", f"{conversion.mask_share:g}"]
    command += ["--rope", conversion.rope]
    command += ["--steps", str(STEPS), "--minutes", "0", "--max_length", "64", *shlex.split(options.flags)]
    record = work / f"{conversion.folder}.json"
    if not (record.is_file() and (out / "config.json").is_file()):
        print(shlex.join(command), flush=True)
        begun = time.monotonic()
        with open(work / f"{conversion.folder}.log", "a") as log:
            program = [sys.executable, "-m", "lion_hf.linearize", *command[1:]]
            threads = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            subprocess.run(program, check=True, stdout=log, stderr=subprocess.STDOUT, env=threads)
        record.write_text(json.dumps({"minutes": (time.monotonic() - begun) / 60}))
    shown = shlex.join(command).replace(str(data), "DATA").replace(str(work), "WORK")
    return {"command": shown, **json.loads(record.read_text())}


def masked(data: Path, work: Path, options) -> dict:
    """Train the sources, convert them, and return what each model predicts."""
    work = work / "masked"
    work.mkdir(parents=True, exist_ok=True)
    steps = {name: options.source_steps or source.steps for name, source in SOURCES.items()}
    rows = source_rows(data, work, min(steps.values()))
    folders = {name: train_source(name, data, work, steps[name]) for name in SOURCES}

    def one(conversion: Conversion) -> dict:
        made = converted(conversion, folders[conversion.source], data, work, options)
        return conversion._asdict() | made | predictions(work / conversion.folder, rows.evaluation, options.device)

    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(one, conversions(options.smoke)))
    sources = {
        name: predictions(folder, rows.evaluation, options.device) | {"steps": steps[name]}
        for name, folder in folders.items()
    }
    return {"unigram entropy": rows.known["unigram_entropy"], "sources": sources, "conversions": found}


def masked_table(rows: dict) -> list[str]:
    """Return the lines on masked tokens."""
    sources = rows["sources"]
    tokens = next(iter(sources.values()))["reported tokens"]
    entropy = rows["unigram entropy"]
    lines = [
        f"Masked tokens of the second half of wiki/validation.txt ({tokens:,}), the same for all models. Options are "
        f"compared on those of the first half. Token frequencies alone have a loss of {entropy:.3f} nats.",
        "",
        "| source | linear layers | RoPE in them | masked in training | loss on the first half | loss | more than the "
        "source | accuracy (%) | less than the source | minutes |",
        "|---" * 10 + "|",
    ]
    for name, source in sources.items():
        loss, accuracy = source["reported loss"], 100 * source["reported accuracy"]
        lines.append(f"| {name} | none | | | {source['compared loss']:.3f} | {loss:.3f} | | {accuracy:.2f} | | |")
        for row in rows["conversions"]:
            if row["source"] == name:
                mine = 100 * row["reported accuracy"]
                lines.append(
                    f"| {name} | {row['layers']} | {row['rope']} | {row['mask_share']:.0%} | "
                    f"{row['compared loss']:.3f} | {row['reported loss']:.3f} | {row['reported loss'] - loss:.3f} | "
                    f"{mine:.2f} | {accuracy - mine:.2f} | {row['minutes']:.1f} |"
                )
    commands = [f"- `{row['command']}`" for row in rows["conversions"]]
    return [*lines, "", "The conversions, from sources of " + _steps(sources) + ":", "", *commands]


def _steps(sources: dict) -> str:
    return " and ".join(f"{row['steps']:,} steps ({name})" for name, row in sources.items())
