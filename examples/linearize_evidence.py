"""Measure what `lion-linearize` loses: a BERT sentence encoder with half of its layers linear, and with all of them.

    python examples/linearize_evidence.py --data DATA
    python examples/linearize_evidence.py --data DATA --parts convert embeddings      # without sentiment and length
    python examples/linearize_evidence.py --draw                                      # the tables again

DATA is a folder with minilm (all-MiniLM-L6-v2), wiki/{train,validation}.txt, reviews/{train,validation}.csv (columns
sentence and label) and brown/{train,validation}.csv (column text), long documents. The parts:

- convert: the conversions, from wiki/train.txt and the sentences of reviews/train.csv, without labels, 30 minutes each.
- embeddings: rank correlation of the cosines of source and conversion, on texts that were not trained on: on random
  pairs, and on pairs of each text with its nearest neighbours by the source.
- sentiment: source and conversions fine-tuned on labels, with the same settings. Each has its learning rate chosen on
  held-out rows of the training file; the validation file is read once for each seed.
- masked: masked language models that are trained for it, converted, and compared on the same masked tokens, see
  `linearize_masked.py`. It needs wiki alone.
- length: embeddings of long texts that are read whole, against the mean of the source's embeddings of 256 tokens each.

Finished steps are not repeated. Results go to examples/results/linearize.{json,md}.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from linearize_masked import masked, masked_table
from run_evidence import run
from transformers import AutoModel, AutoTokenizer

from lion_hf.linearize.losses import embeddings, pair_cosines, spearman


PARTS = ("convert", "embeddings", "sentiment", "length", "masked")
SEEDS = (17, 18, 19, 20, 21)
RATES = (5e-5, 1e-4, 2e-4)
MODELS = {"every second layer linear": "default", "all layers linear": "all"}
SOURCE = "the source"
NEIGHBOURS = 10
WINDOW = 256  # maximum length of the source as a sentence encoder
LENGTHS = (512, 1024, 2048, 4096, 8192)
TEXTS = 32  # at most, of each length
RECIPE = (
    "--task custom --sentence1_column sentence --max_length 48 --num_train_epochs 1 "
    "--per_device_train_batch_size 16 --eval_strategy no --save_strategy no --disable_tqdm true"
)
NEEDED = (
    "minilm/config.json", "wiki/train.txt", "wiki/validation.txt", "reviews/train.csv", "reviews/validation.csv",
    "brown/train.csv", "brown/validation.csv",
)  # fmt: skip


def column(file: Path, name: str) -> list[str]:
    """Return a column of a csv file, each text on one line."""
    csv.field_size_limit(10**9)
    with open(file, encoding="utf-8", newline="") as rows:
        return [" ".join(row[name].split()) for row in csv.DictReader(rows)]


def training_text(data: Path, work: Path) -> list[str]:
    """Return the files to learn from; sentences of reviews are written without their labels."""
    work.mkdir(parents=True, exist_ok=True)
    sentences = work / "sentences.txt"
    sentences.write_text("\n".join(column(data / "reviews/train.csv", "sentence")) + "\n", encoding="utf-8")
    return [str(data / "wiki/train.txt"), str(sentences)]


def convert(data: Path, work: Path, options: argparse.Namespace) -> dict:
    """Run `lion-linearize` for each model, and return what its card says."""
    texts = training_text(data, work)

    def one(name: str, layers: str) -> tuple[str, dict]:
        out, record = work / layers, work / f"{layers}.json"
        command = ["lion-linearize", str(data / "minilm"), str(out), "--text", *texts, "--layers", layers]
        command += ["--context", str(max(LENGTHS)), *shlex.split(options.flags)]
        if not (record.is_file() and (out / "config.json").is_file()):
            print(shlex.join(command), flush=True)
            threads = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            begun = time.monotonic()
            with open(work / f"{layers}.log", "a") as log:
                program = [sys.executable, "-m", "lion_hf.linearize", *command[1:]]
                subprocess.run(program, check=True, stdout=log, stderr=subprocess.STDOUT, env=threads)
            command = shlex.join(command).replace(str(data), "DATA").replace(str(work), "WORK")
            minutes = (time.monotonic() - begun) / 60
            record.write_text(json.dumps({"minutes": minutes, "threads": options.threads, "command": command}))
        card = (out / "README.md").read_text(encoding="utf-8")
        table = [line for line in card.splitlines() if line.startswith("| ") and not line.startswith("| |")]
        return name, {**json.loads(record.read_text()), "card": table}

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = dict(pool.map(lambda item: one(*item), MODELS.items()))
    return {"models": rows}


@torch.no_grad()
def encode(model, tokenizer, texts: list[str], length: int, device: str) -> torch.Tensor:
    """Return the mean of the tokens of each text, cut to `length` tokens, as a vector of length 1."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = [None] * len(texts)
    size = max(1, 8192 // length)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=length, verbose=False)
        ids, mask = (torch.tensor(batch[name], device=device) for name in ("input_ids", "attention_mask"))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for i, vector in zip(chosen, embeddings(hidden, mask, "mean").double().cpu(), strict=True):
            vectors[i] = vector
    return torch.stack(vectors)


def encoders(data: Path, work: Path, device: str) -> dict:
    """Return source and conversions by name."""
    import lion_hf  # noqa: F401  registers LION with the Auto classes

    folders = {SOURCE: data / "minilm"} | {name: work / layers for name, layers in MODELS.items()}
    return {name: AutoModel.from_pretrained(folder).float().eval().to(device) for name, folder in folders.items()}


def compared(source: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Return the rank correlations on all pairs and on pairs of neighbours, and the mean cosine to the source."""
    near = (source @ source.T).fill_diagonal_(-2).topk(min(NEIGHBOURS, len(source) - 1)).indices
    first = torch.arange(len(source))[:, None].expand_as(near)
    pairs = torch.stack([first, near], -1).flatten(0, 1).sort(-1).values.unique(dim=0).T
    cosines = [(x[pairs[0]] * x[pairs[1]]).sum(-1) for x in (source, other)]
    return {
        "random": spearman(pair_cosines(source), pair_cosines(other)),
        "neighbours": spearman(*cosines),
        "cosine": (source * other).sum(-1).mean().item(),
    }


def measure_embeddings(data: Path, work: Path, options: argparse.Namespace) -> dict:
    """Compare the embeddings of texts that no conversion was trained on."""
    lines = (data / "wiki/validation.txt").read_text(encoding="utf-8").splitlines()
    texts = {
        "encyclopedia": [line for line in lines if line.strip()],
        "reviews": column(data / "reviews/validation.csv", "sentence"),
    }
    if options.smoke:
        texts = {kind: rows[:20] for kind, rows in texts.items()}
    texts["both"] = texts["encyclopedia"] + texts["reviews"]
    models, tokenizer = encoders(data, work, options.device), AutoTokenizer.from_pretrained(data / "minilm")
    vectors = {
        name: {kind: encode(model, tokenizer, rows, WINDOW, options.device) for kind, rows in texts.items()}
        for name, model in models.items()
    }
    rows = {name: {kind: compared(vectors[SOURCE][kind], vectors[name][kind]) for kind in texts} for name in MODELS}
    return {"models": rows, "texts": {kind: len(rows) for kind, rows in texts.items()}}


def sentiment(data: Path, work: Path, options: argparse.Namespace) -> dict:
    """Fine-tune each model at the rate that is best on held-out rows of the training file."""
    train, test = data / "reviews/train.csv", data / "reviews/validation.csv"
    recipe = f"{RECIPE} --max_train_samples {options.rows}" + ("" if options.device == "cuda" else " --use_cpu true")
    folders = {SOURCE: data / "minilm"} | {name: work / layers for name, layers in MODELS.items()}

    def one(job: tuple[str, float, int | None]) -> dict:
        name, rate, seed = job
        held_out = f"--validation_file {test}" if seed else "--validation_share 0.2"
        flags = f"--model_name_or_path {folders[name]} --train_file {train} {held_out} {recipe}"
        flags += f" --learning_rate {rate:g} --seed {seed or SEEDS[0]}"
        place = (work / "sentiment" / f"{folders[name].name}-{rate:g}-{seed or 'held-out'}").resolve()
        return run("run_glue.py", flags, place)

    with ThreadPoolExecutor(options.jobs) as pool:
        sweep = [(name, rate, None) for name in folders for rate in options.rates]
        losses = dict(zip(sweep, pool.map(one, sweep), strict=True))
        best = {name: min(options.rates, key=lambda rate: losses[name, rate, None]["eval_loss"]) for name in folders}
        jobs = [(name, best[name], seed) for name in folders for seed in options.seeds]
        found = dict(zip(jobs, pool.map(one, jobs), strict=True))
    return {
        name: {
            "learning_rate": best[name],
            "sweep": {f"{rate:g}": losses[name, rate, None]["eval_loss"] for rate in options.rates},
            "accuracy": [found[name, best[name], seed]["eval_accuracy"] for seed in options.seeds],
            "loss": [found[name, best[name], seed]["eval_loss"] for seed in options.seeds],
        }
        for name in folders
    }


def long_texts(data: Path, length: int, tokenizer, count: int) -> list[list[int]]:
    """Return at most `count` texts of this many tokens, less two for the special ones: documents of one genre after the
    other."""
    files = [data / f"brown/{part}.csv" for part in ("validation", "train")]
    genres: dict[str, list[str]] = {}
    for file in files:
        for label, text in zip(column(file, "label"), column(file, "text"), strict=True):
            genres.setdefault(label, []).append(text)
    texts = []
    for documents in genres.values():
        ids: list[int] = []
        for document in documents:
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > length * count:
                break
        texts.append([ids[i : i + length - 2] for i in range(0, len(ids) - length + 3, length - 2)])
    turns = [row[i] for i in range(max(map(len, texts))) for row in texts if i < len(row)]  # genres by turns
    return turns[:count]


@torch.no_grad()
def encode_ids(model, tokenizer, ids: list[int], window: int, device: str) -> torch.Tensor:
    """Return the mean over windows of tokens of the model's embeddings, as a vector of length 1."""
    room = window - 2
    pieces = [ids[i : i + room] for i in range(0, len(ids), room)]
    pieces = [[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces]
    total = 0
    for piece in pieces:
        row = torch.tensor([piece], device=device)
        total = total + embeddings(model(input_ids=row).last_hidden_state, torch.ones_like(row), "mean") * len(piece)
    return torch.nn.functional.normalize(total, dim=-1)[0].double().cpu()


def length(data: Path, work: Path, options: argparse.Namespace) -> dict:
    """Compare embeddings of whole long texts with the mean of the source's windows."""
    models, tokenizer = encoders(data, work, options.device), AutoTokenizer.from_pretrained(data / "minilm")
    rows: dict[str, dict] = {}
    for tokens in options.lengths:
        texts = long_texts(data, tokens, tokenizer, options.texts)
        windows = torch.stack([encode_ids(models[SOURCE], tokenizer, ids, WINDOW, options.device) for ids in texts])
        readers = {name: (models[name], tokens) for name in MODELS}
        readers["the source, windows of 512 tokens"] = (models[SOURCE], 512)
        readers["the source, the first 512 tokens"] = (models[SOURCE], 512)
        for name, (model, window) in readers.items():
            cut = [ids[:510] for ids in texts] if "first" in name else texts
            whole = torch.stack([encode_ids(model, tokenizer, ids, window, options.device) for ids in cut])
            rows.setdefault(name, {})[str(tokens)] = {
                "texts": len(texts),
                "random": spearman(pair_cosines(windows), pair_cosines(whole)),
                "cosine": (windows * whole).sum(-1).mean().item(),
            }
    return rows


def write(rows: dict, folder: Path) -> None:
    """Write the results as JSON and as tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "linearize.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = []
    for part, table in (
        ("convert", conversion_table),
        ("embeddings", embedding_table),
        ("sentiment", sentiment_table),
        ("length", length_table),
        ("masked", masked_table),
    ):
        if part in rows:
            lines += [*table(rows[part]), ""]
    (folder / "linearize.md").write_text("\n".join(lines).rstrip() + "\n")


def conversion_table(rows: dict) -> list[str]:
    """Return the lines on the conversions: time, command, and the card's table."""
    lines = []
    for name, row in rows["models"].items():
        lines += [f"**{name}**: {row['minutes']:.1f} minutes, threads: {row['threads']}. `{row['command']}`", ""]
        lines += ["| | before | after |", "|---|---|---|", *(line for line in row["card"] if line.count("|") == 4), ""]
        lines += ["| | |", "|---|---|", *(line for line in row["card"] if line.count("|") == 3), ""]
    return lines


def embedding_table(rows: dict) -> list[str]:
    """Return the lines on embeddings."""
    lines = [
        "Rank correlation (Spearman) between the cosines of source and conversion, on texts that were not trained on: "
        f"all pairs, and each text with its {NEIGHBOURS} nearest neighbours by the source. Cosine: the mean between "
        "the two embeddings of a text.",
        "",
        "| model | texts | all pairs | nearest neighbours | cosine |",
        "|---|---|---|---|---|",
    ]
    for name, kinds in rows["models"].items():
        for kind, x in kinds.items():
            values = f"{x['random']:.3f} | {x['neighbours']:.3f} | {x['cosine']:.3f}"
            lines.append(f"| {name} | {kind} ({rows['texts'][kind]:,}) | {values} |")
    return lines


def sentiment_table(rows: dict) -> list[str]:
    """Return the lines on sentiment."""
    source, seeds = 100 * mean(rows[SOURCE]["accuracy"]), len(rows[SOURCE]["accuracy"])
    lines = [
        f"Accuracy on reviews/validation.csv after fine-tuning, mean and range over {seeds} seeds; the learning rate "
        "has the lowest loss on held-out rows of the training file.",
        "",
        "| model | accuracy (%) | range | less than the source | loss | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        values = [100 * x for x in row["accuracy"]]
        lines.append(
            f"| {name} | {mean(values):.2f} | {min(values):.2f} to {max(values):.2f} | {source - mean(values):.2f} | "
            f"{mean(row['loss']):.3f} | {row['learning_rate']:g} |"
        )
    rates = list(rows[SOURCE]["sweep"])
    lines += ["", "| loss on held-out rows by learning rate | " + " | ".join(rates) + " |"]
    lines += ["|---" * (len(rates) + 1) + "|"]
    return lines + [
        f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in row["sweep"].values()) + " |"
        for name, row in rows.items()
    ]


def length_table(rows: dict) -> list[str]:
    """Return the lines on long texts."""
    lengths = list(next(iter(rows.values())))
    lines = [
        "Texts longer than the source ever read, each read whole by the conversions. Reference: the mean of the "
        f"source's embeddings of windows of {WINDOW} tokens. Rank correlation of the cosines of all pairs / mean "
        "cosine to the reference.",
        "",
        "| model | " + " | ".join(f"{int(tokens):,} tokens" for tokens in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    return lines + [
        f"| {name} | " + " | ".join(f"{x['random']:.3f} / {x['cosine']:.3f}" for x in row.values()) + " |"
        for name, row in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=lambda path: Path(path).resolve(), help="folder with the data, see above")
    add("--work", type=Path, default=Path("outputs/linearize"), help="folder for the runs (default: %(default)s)")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the tables")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run (default: everything)")
    add("--flags", default="", help="further flags of lion-linearize, such as '--minutes 10'")
    add("--threads", type=int, default=2, help="CPU threads of a conversion (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device of all models (default: %(default)s)")
    add("--smoke", action="store_true", help="a few steps, texts and one seed, to see that everything runs")
    add("--draw", action="store_true", help="write the tables again from the stored results")
    options = parser.parse_args()
    options.seeds, options.rates, options.texts, options.lengths = SEEDS, RATES, TEXTS, LENGTHS
    options.rows, options.source_steps = "4800", None
    if options.smoke:
        options.flags = "--steps 4 --minutes 0 --max_length 16 --batch_size 4"
        options.seeds, options.rates, options.texts, options.lengths = SEEDS[:1], RATES[:1], 3, (512,)
        options.rows, options.source_steps = "32 --max_eval_samples 40", 2
    stored = options.results / "linearize.json"
    rows = json.loads(stored.read_text()) if stored.is_file() else {}
    if not options.draw:
        needed = [name for name in NEEDED if name.startswith("wiki") or set(options.parts) != {"masked"}]
        missing = [name for name in needed if options.data is None or not (options.data / name).is_file()]
        if missing:
            sys.exit(f"error: --data {str(options.data)!r} lacks {', '.join(missing)}")
        options.flags += f" --device {options.device}"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        functions = {"convert": convert, "embeddings": measure_embeddings, "sentiment": sentiment, "length": length}
        functions["masked"] = masked
        for part in options.parts:
            rows[part] = functions[part](options.data, options.work.resolve(), options)
            write(rows, options.results)
    write(rows, options.results)
    print((options.results / "linearize.md").read_text())


if __name__ == "__main__":
    main()
