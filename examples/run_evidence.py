"""The comparisons in examples/results: LION's variants and a softmax encoder of one size, with one recipe.

    python examples/run_evidence.py text   --data DATA   # encyclopedia text: a learning-rate sweep, then more seeds
    python examples/run_evidence.py images --data DATA   # Fashion-MNIST: several seeds
    python examples/run_evidence.py sentiment --data DATA   # review sentiment, from the models of `text`: sweep, seeds

DATA holds wiki/{train,validation}.txt, fashion-mnist/{train,test}-00000-of-00001.parquet and
reviews/{train,validation}.csv. Every run is a command of the training scripts, on one CPU thread; runs that are done are
not repeated. Tables (JSON and Markdown) and plots go to examples/results.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt


EXAMPLES = Path(__file__).parent
SEEDS = (17, 18, 19)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SENTIMENT_RATES = (1e-4, 3e-4, 1e-3)
TEXT_MODELS = {
    "LION-LIT": "--mask_type lit",
    "LION-D": "--mask_type decay",
    "LION-S": "--mask_type selective",
    "BERT": "--model_type bert",
}
TEXT_RECIPE = (
    "--max_length 64 --vocab_size 4096 --hidden_size 192 --num_hidden_layers 4 --num_attention_heads 3 "
    "--hidden_dropout_prob 0 --per_device_train_batch_size 16 --max_steps 1200 --lr_floor 0.02 --max_eval_samples 2000 "
    "--logging_steps 50 --eval_strategy no --save_strategy no --disable_tqdm true --use_cpu true"
)
IMAGE_MODELS = {
    "LION-LIT": "--mask_type lit --order normal --pos_emb true",
    "LION-D": "--mask_type decay --order normal --pos_emb true",
    "LION-D, snake": "--mask_type decay --order s --pos_emb true",
    "LION-S": "--mask_type selective --order normal --pos_emb true",
    "LION-S, snake": "--mask_type selective --order s --pos_emb true",
    "ViT": "--model_type vit",
}
IMAGE_RECIPE = (
    "--hidden_size 64 --num_hidden_layers 4 --num_attention_heads 4 --image_size 28 --patch_size 4 --augment shift+flip "
    "--initializer_range 0.1 --learning_rate 2e-3 --max_train_samples 50000 --num_train_epochs 2 --eval_strategy no "
    "--per_device_train_batch_size 64 "
    "--save_strategy no --disable_tqdm true --use_cpu true"
)
SENTIMENT_RECIPE = (
    "--task custom --sentence1_column sentence --max_length 64 --num_train_epochs 1 --per_device_train_batch_size 16 "
    "--eval_strategy no --save_strategy no --disable_tqdm true --use_cpu true"
)


def run(script: str, flags: str, folder: Path) -> dict[str, float]:
    """Metrics of one run, and its command; a finished run is only read."""
    command = ["python", f"examples/{script}", "--output_dir", str(folder), *shlex.split(flags)]
    record = folder / "command.txt"
    if not (record.is_file() and record.read_text() == shlex.join(command)):
        print(shlex.join(command), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(
                [sys.executable, *command[1:]], cwd=EXAMPLES.parent, check=True, stdout=log, stderr=subprocess.STDOUT
            )
        record.write_text(shlex.join(command))
    return json.loads((folder / "all_results.json").read_text())


def summary(values: list[float], factor: float = 1, digits: int = 2) -> str:
    """Mean and deviation, as a cell of a table."""
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


def swept(train: Callable[[float, int], dict[str, float]], rates: Sequence[float]) -> tuple[dict, list[dict]]:
    """Trains with each learning rate and the first seed, then with the best rate (of the lowest evaluation loss) and the
    other seeds. Returns what the sweep says for the table, and the metrics of every seed."""
    sweep = {rate: train(rate, SEEDS[0]) for rate in rates}
    best = min(rates, key=lambda rate: sweep[rate]["eval_loss"])
    runs = [sweep[best], *(train(best, seed) for seed in SEEDS[1:])]
    losses = {f"{rate:g}": metrics["eval_loss"] for rate, metrics in sweep.items()}
    return {"learning_rate": best, "sweep": losses, "seeds": list(SEEDS)}, runs


def text(data: Path, work: Path, results: Path) -> dict:
    files = f"--train_file {data}/wiki/train.txt --validation_file {data}/wiki/validation.txt"
    rows = {}
    for name, model in TEXT_MODELS.items():
        flags = f"{files} {model} {TEXT_RECIPE}"

        def train(rate: float, seed: int, name=name, flags=flags) -> dict[str, float]:
            folder = work / f"text/{name}-{rate:g}-{seed}"
            return run("run_mlm.py", f"{flags} --learning_rate {rate:g} --seed {seed}", folder)

        found, runs = swept(train, RATES)
        best = found["learning_rate"]
        rows[name] = found | {
            "command": f"python examples/run_mlm.py {flags} --learning_rate {best:g}",
            "loss": [r["eval_loss"] for r in runs],
            "accuracy": [r["eval_masked_accuracy"] for r in runs],
            "unigram_entropy": runs[0]["eval_unigram_entropy"],
            "train_runtime": [r["train_runtime"] for r in runs],
            "folders": [str(work / f"text/{name}-{best:g}-{s}") for s in SEEDS],
        }
    return rows


def images(data: Path, work: Path, results: Path) -> dict:
    files = (
        f"--train_file {data}/fashion-mnist/train-00000-of-00001.parquet "
        f"--validation_file {data}/fashion-mnist/test-00000-of-00001.parquet"
    )
    rows = {}
    for seed in SEEDS:
        for name, model in IMAGE_MODELS.items():
            flags = f"{files} {model} {IMAGE_RECIPE}"
            metrics = run("run_image_classification.py", f"{flags} --seed {seed}", work / f"images/{name}-{seed}")
            row = rows.setdefault(
                name, {"command": f"python examples/run_image_classification.py {flags}", "seeds": [], "accuracy": []}
            )
            row["seeds"].append(seed)
            row["accuracy"].append(metrics["eval_accuracy"])
            row.setdefault("loss", []).append(metrics["eval_loss"])
            row.setdefault("train_runtime", []).append(metrics["train_runtime"])
    return rows


def sentiment(data: Path, work: Path, results: Path) -> dict:
    files = f"--train_file {data}/reviews/train.csv --validation_file {data}/reviews/validation.csv"
    pretrained = json.loads((results / "text.json").read_text())
    rows = {}
    for name, row in pretrained.items():
        flags = f"{files} {SENTIMENT_RECIPE}"
        folders = dict(zip(SEEDS, row["folders"], strict=True))

        def train(rate: float, seed: int, name=name, flags=flags, folders=folders) -> dict[str, float]:
            start = f"--model_name_or_path {shlex.quote(folders[seed])}"
            folder = work / f"sentiment/{name}-{rate:g}-{seed}"
            return run("run_glue.py", f"{start} {flags} --learning_rate {rate:g} --seed {seed}", folder)

        found, runs = swept(train, SENTIMENT_RATES)
        best = found["learning_rate"]
        rows[name] = found | {
            "command": f"python examples/run_glue.py --model_name_or_path FOLDER {flags} --learning_rate {best:g}",
            "accuracy": [r["eval_accuracy"] for r in runs],
            "loss": [r["eval_loss"] for r in runs],
            "train_runtime": [r["train_runtime"] for r in runs],
        }
    return rows


def write(kind: str, rows: dict, data: Path, folder: Path) -> None:
    """The table as JSON and Markdown, and a picture of accuracies with deviations."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows.values():
        row["command"] = row["command"].replace(str(data), "DATA")
    (folder / f"{kind}.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| model | accuracy (%) | loss (nats) | seeds | learning rate | minutes per run |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        minutes = [seconds / 60 for seconds in row["train_runtime"]]
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else "as in the command"
        lines.append(
            f"| {name} | {summary(row['accuracy'], 100)} | {summary(row['loss'], 1, 3)} | "
            f"{len(row['seeds'])} | {rate} | {mean(minutes):.1f} |"
        )
    first = next(iter(rows.values()))
    if "unigram_entropy" in first:
        lines += ["", f"Unigram entropy of the masked tokens: {first['unigram_entropy']:.3f} nats."]
    if "sweep" in first:
        lines += ["", "| evaluation loss by learning rate, one seed | " + " | ".join(first["sweep"]) + " |"]
        lines += ["|---" * (len(first["sweep"]) + 1) + "|"]
        lines += [f"| {n} | " + " | ".join(f"{v:.3f}" for v in row["sweep"].values()) + " |" for n, row in rows.items()]
    lines += ["", "Mean and standard deviation over seeds; one CPU thread per run. Commands:", ""]
    lines += [f"- {name}: `{row['command']}`" for name, row in rows.items()]
    (folder / f"{kind}.md").write_text("\n".join(lines) + "\n")
    figure, axis = plt.subplots(figsize=(6.5, 3.2), constrained_layout=True)
    heights = [100 * mean(row["accuracy"]) for row in rows.values()]
    spread = [100 * stdev(row["accuracy"]) if len(row["accuracy"]) > 1 else 0 for row in rows.values()]
    axis.errorbar(range(len(rows)), heights, yerr=spread, fmt="o", capsize=4)
    axis.set_xticks(range(len(rows)), rows, rotation=20)
    axis.set_ylabel("accuracy (%)")
    axis.grid(alpha=0.3)
    figure.savefig(folder / f"{kind}.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("text", "images", "sentiment"))
    parser.add_argument("--data", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/evidence"), help="the runs, below the repository")
    parser.add_argument("--results", type=Path, default=Path("examples/results"), help="the tables, the same")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kinds = {"text": text, "images": images, "sentiment": sentiment}
    os.chdir(EXAMPLES.parent)
    rows = kinds[arguments.kind](arguments.data, arguments.work, arguments.results)
    write(arguments.kind, rows, arguments.data, arguments.results)
    print((arguments.results / f"{arguments.kind}.md").read_text())


if __name__ == "__main__":
    main()
