"""Run the comparisons in examples/results: LION's variants and a softmax encoder of the same size and recipe.

    python examples/run_evidence.py text --data DATA            # masked tokens of encyclopedia text
    python examples/run_evidence.py images --data DATA          # Fashion-MNIST
    python examples/run_evidence.py sentiment --data DATA       # sentiment of reviews, from the models of text
    python examples/run_evidence.py pooling --data DATA         # sentiment from scratch, by what the classifier pools
    python examples/run_evidence.py warm_start --data DATA      # sentiment from the weights of a BERT and from scratch
    python examples/run_evidence.py warm_start_mlm --data DATA  # masked tokens from a BERT's weights and from scratch
    python examples/run_evidence.py diagonal --data DATA        # how often a token counts its score with itself
    python examples/run_evidence.py modern --data DATA          # the options of the modern block, see ablation_evidence
    python examples/run_evidence.py text --draw                 # the table and plot again, from the stored results

DATA is a folder with wiki/{train,validation}.txt, fashion-mnist/{train,test}-00000-of-00001.parquet,
reviews/{train,validation}.csv and minilm, the folder of a BERT encoder and its tokenizer. Each comparison needs only
some of them. Every run is a command of the training scripts on one CPU thread. All but images and warm_start_mlm
compare learning rates with the first seed, then train the other seeds at the best rate. Finished runs are not repeated.
The results go to examples/results: a JSON file, a Markdown table and a plot.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import matplotlib
import pandas


matplotlib.use("Agg")
from diagonal_results import comparison, draw_differences, learned_factors
from matplotlib import pyplot as plt


EXAMPLES = Path(__file__).parent
SEEDS = (17, 18, 19)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SENTIMENT_RATES = (1e-4, 3e-4, 1e-3)
TEXT_MODELS = {  # as published, without rotary positions
    "LION-LIT": "--mask_type lit --linear_rope_theta 0",
    "LION-D": "--mask_type decay --linear_rope_theta 0",
    "LION-S": "--mask_type selective --linear_rope_theta 0",
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
    "--hidden_size 64 --num_hidden_layers 4 --num_attention_heads 4 --image_size 28 --patch_size 4 "
    "--augment shift+flip --initializer_range 0.1 --learning_rate 2e-3 --max_train_samples 50000 --num_train_epochs 2 "
    "--eval_strategy no --per_device_train_batch_size 64 "
    "--save_strategy no --disable_tqdm true --use_cpu true"
)
SENTIMENT_RECIPE = (
    "--task custom --sentence1_column sentence --max_length 64 --num_train_epochs 1 --per_device_train_batch_size 16 "
    "--eval_strategy no --save_strategy no --disable_tqdm true --use_cpu true"
)
# A small model from scratch, two epochs on 2,000 sentences: what a first trial on your own data may look like.
POOLING_RATES = (3e-4, 1e-3)
POOLING_RECIPE = (
    "--task custom --sentence1_column sentence --max_length 48 --vocab_size 4096 --hidden_size 128 "
    "--num_hidden_layers 2 --num_attention_heads 2 --max_train_samples 2000 --num_train_epochs 2 "
    "--per_device_train_batch_size 16 --eval_strategy no --save_strategy no --disable_tqdm true --use_cpu true"
)
POOLING_MODELS = {
    f"{name}, {pooling}": f"{TEXT_MODELS[name]} --classifier_pooling {pooling}"
    for name in ("LION-LIT", "LION-D", "LION-S")
    for pooling in ("first", "mean")
} | {"BERT, first": TEXT_MODELS["BERT"]}
# The sentiment recipe for an encoder of 22 M parameters, each model at the better of two learning rates.
WARM_RATES = (1e-4, 3e-4)
SCRATCH = "--pos_emb true --layer_norm_after true --linear_rope_theta 0"
WARM_RECIPE = (
    "--task custom --sentence1_column sentence --max_length 48 --max_train_samples 4800 --num_train_epochs 1 "
    "--per_device_train_batch_size 16 --eval_strategy no --save_strategy no --disable_tqdm true --use_cpu true"
)
ADAPTATION_RECIPE = (
    "--max_length 64 --per_device_train_batch_size 8 --max_steps 300 --learning_rate 5e-4 --max_eval_samples 60 "
    "--eval_strategy steps --eval_steps 25 --logging_steps 25 --save_strategy no --disable_tqdm true --use_cpu true"
)
# LION-S with its diagonal counted 0 times, once as in LION, twice, or as often as each head of each layer learns.
# Learning rates are compared on rows of the training file, of the share that stands first.
DIAGONALS = {
    "0": "selective-diagonal-0",
    "1": "selective",
    "2": "selective-diagonal-2",
    "free": "selective-diagonal-free",
}
DIAGONAL_MODULE = "examples.diagonal_variants"
DIAGONAL_TASKS = {
    "text": (
        "run_mlm.py",
        "0.1",
        (1e-3, 1.4e-3, 2e-3),
        "--linear_rope_theta 0 --max_length 64 --vocab_size 2048 --hidden_size 128 --num_hidden_layers 4 "
        "--num_attention_heads 2 --hidden_dropout_prob 0 --per_device_train_batch_size 16 --max_steps 600 "
        "--lr_floor 0.02 --max_eval_samples 2000 --logging_steps 50 --eval_strategy no --save_strategy no "
        "--disable_tqdm true --use_cpu true",
    ),
    "images": (
        "run_image_classification.py",
        "0.15",
        (2e-3, 4e-3),
        "--order normal --pos_emb true --hidden_size 64 --num_hidden_layers 4 --num_attention_heads 4 "
        "--image_size 28 --patch_size 4 --augment shift+flip --initializer_range 0.1 --max_train_samples 20000 "
        "--num_train_epochs 1 --eval_strategy no --per_device_train_batch_size 32 --save_strategy no "
        "--disable_tqdm true --use_cpu true",
    ),
}


def warm_models(encoder: Path) -> dict[str, str]:
    """Return the flags of each model: the source, LION from its weights, and LION of the same shape from scratch."""
    start = f"--warm_start {shlex.quote(str(encoder))}"
    config = json.loads((encoder / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shape = " ".join(f"--{name} {config[name]}" for name in names)
    half = " ".join(map(str, range(1, config["num_hidden_layers"], 2)))
    scratch = f"--tokenizer_name {shlex.quote(str(encoder))} {shape} {SCRATCH}"
    variants = {"LION-LIT": "lit", "LION-D": "decay", "LION-S": "selective"}
    return {
        "BERT, the source": f"--model_name_or_path {shlex.quote(str(encoder))}",
        **{f"{name}, warm": f"{start} --mask_type {kind}" for name, kind in variants.items()},
        "LION-S, warm, distilled": f"{start} --mask_type selective --warm_start_distillation 1",
        "LION-S, warm, every second layer softmax": f"{start} --mask_type selective --softmax_layers {half}",
        **{f"{name}, from scratch": f"{scratch} --mask_type {kind}" for name, kind in variants.items()},
    }


def program(script: str, module: str | None) -> str:
    """Return the beginning of a command: the script, with the variants of a module if one is given."""
    return f"python -m lion_hf --import {module} examples/{script}" if module else f"python examples/{script}"


def run(script: str, flags: str, folder: Path, module: str | None = None) -> dict[str, float]:
    """Run a training script and return its metrics; the metrics of a finished run are read from its folder.

    The metrics contain the seconds of CPU time of the whole command, `cpu_seconds`, if they were stored.
    """
    command = [*shlex.split(program(script, module)), "--output_dir", str(folder), *shlex.split(flags)]
    record, seconds = folder / "command.txt", folder / "cpu_seconds.json"
    if not (record.is_file() and record.read_text() == shlex.join(command)):
        print(shlex.join(command), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        before = cpu_time_of_children()
        with open(folder / "log.txt", "w") as log:
            subprocess.run(
                [sys.executable, *command[1:]], cwd=EXAMPLES.parent, check=True, stdout=log, stderr=subprocess.STDOUT
            )
        seconds.write_text(json.dumps({"cpu_seconds": cpu_time_of_children() - before}))
        record.write_text(shlex.join(command))
    known = json.loads(seconds.read_text()) if seconds.is_file() else {}
    return json.loads((folder / "all_results.json").read_text()) | known


def cpu_time_of_children() -> float:
    """Return the seconds of CPU time of all commands that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def summary(values: list[float], factor: float = 1, digits: int = 2) -> str:
    """Return mean and standard deviation as a cell of a table."""
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


def at_best_rate(
    script: str,
    flags: str,
    rates: Sequence[float],
    folder: str,
    starts: dict[int, str] | None = None,
    sweep_flags: str | None = None,
    module: str | None = None,
) -> tuple[dict, list[dict], list[str]]:
    """Train with each learning rate and the first seed, then at the best rate with all seeds.

    Args:
        script: name of the training script.
        flags: flags of every run.
        rates: learning rates to compare; the best one has the lowest evaluation loss.
        folder: beginning of the names of the output folders.
        starts: further flags for each seed, if any.
        sweep_flags: flags of the runs that compare learning rates, if not `flags`: to compare them on other rows than
            those that are reported.
        module: a module with variants that the script needs, if any.

    Returns:
        Part of a row of the table, the metrics of each seed, and the folder of each seed.
    """

    def place(rate: float, seed: int) -> str:
        return f"{folder}-{rate:g}-{seed}"

    def train(rate: float, seed: int) -> dict[str, float]:
        start = f"{starts[seed]} " if starts else ""
        return run(script, f"{start}{flags} --learning_rate {rate:g} --seed {seed}", Path(place(rate, seed)), module)

    if sweep_flags is None:
        sweep = {rate: train(rate, SEEDS[0]) for rate in rates}
    else:
        sweep = {
            rate: run(
                script, f"{sweep_flags} --learning_rate {rate:g} --seed {SEEDS[0]}", Path(f"{folder}-{rate:g}"), module
            )
            for rate in rates
        }
    best = min(rates, key=lambda rate: sweep[rate]["eval_loss"])
    runs = [train(best, seed) for seed in SEEDS]
    row = {
        "command": f"{program(script, module)} {flags} --learning_rate {best:g}",
        "learning_rate": best,
        "sweep": {f"{rate:g}": metrics["eval_loss"] for rate, metrics in sweep.items()},
        "swept_on": "rows that are reported" if sweep_flags is None else "held-out rows of the training file",
        "seeds": list(SEEDS),
        "loss": [r["eval_loss"] for r in runs],
        "train_runtime": [r["train_runtime"] for r in runs],
    }
    return row, runs, [place(best, seed) for seed in SEEDS]


def text(data: Path, work: Path, results: Path) -> dict:
    files = f"--train_file {data}/wiki/train.txt --validation_file {data}/wiki/validation.txt"
    rows = {}
    for name, model in TEXT_MODELS.items():
        row, runs, folders = at_best_rate("run_mlm.py", f"{files} {model} {TEXT_RECIPE}", RATES, f"{work}/text/{name}")
        rows[name] = row | {
            "accuracy": [r["eval_masked_accuracy"] for r in runs],
            "unigram_entropy": runs[0]["eval_unigram_entropy"],
            "folders": folders,
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
        starts = {
            seed: f"--model_name_or_path {shlex.quote(folder)}"
            for seed, folder in zip(SEEDS, row["folders"], strict=True)
        }
        pooling = "" if name == "BERT" else "--classifier_pooling first "
        flags, place = f"{files} {pooling}{SENTIMENT_RECIPE}", f"{work}/sentiment/{name}"
        found, runs, _ = at_best_rate("run_glue.py", flags, SENTIMENT_RATES, place, starts)
        rows[name] = found | {
            "command": found["command"].replace("run_glue.py", "run_glue.py --model_name_or_path FOLDER"),
            "accuracy": [r["eval_accuracy"] for r in runs],
        }
    return rows


def pooling(data: Path, work: Path, results: Path) -> dict:
    train, rows = f"--train_file {data}/reviews/train.csv", {}
    for name, model in POOLING_MODELS.items():
        flags = f"{train} --validation_file {data}/reviews/validation.csv {model} {POOLING_RECIPE}"
        held_out = f"{train} --validation_share 0.2 {model} {POOLING_RECIPE}"
        place = f"{work}/pooling/{name}"
        row, runs, _ = at_best_rate("run_glue.py", flags, POOLING_RATES, place, sweep_flags=held_out)
        rows[name] = row | {"accuracy": [r["eval_accuracy"] for r in runs]}
    return rows


def warm_start(data: Path, work: Path, results: Path) -> dict:
    files = f"--train_file {data}/reviews/train.csv --validation_file {data}/reviews/validation.csv"
    rows = {}
    for name, model in warm_models(data / "minilm").items():
        pooling = "--classifier_pooling first " if "from scratch" in name else ""
        flags = f"{files} {model} {pooling}{WARM_RECIPE}"
        row, runs, _ = at_best_rate("run_glue.py", flags, WARM_RATES, f"{work}/warm_start/{name}")
        rows[name] = row | {"accuracy": [r["eval_accuracy"] for r in runs]}
    return rows


def warm_start_mlm(data: Path, work: Path, results: Path) -> dict:
    files = f"--train_file {data}/wiki/train.txt --validation_file {data}/wiki/validation.txt"
    rows = {}
    for name, model in warm_models(data / "minilm").items():
        flags, folder = f"{files} {model} {ADAPTATION_RECIPE} --seed {SEEDS[0]}", work / "warm_start_mlm" / name
        metrics = run("run_mlm.py", flags, folder)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rows[name] = {
            "command": f"python examples/run_mlm.py {flags}",
            "seeds": [SEEDS[0]],
            "accuracy": [metrics["eval_masked_accuracy"]],
            "loss": [metrics["eval_loss"]],
            "train_runtime": [metrics["train_runtime"]],
            "curve": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        }
    return rows


def diagonal(data: Path, work: Path, results: Path) -> dict:
    rows = {}
    for task, (script, share, rates, recipe) in DIAGONAL_TASKS.items():
        train, validation = (data / name for name in NEEDED[task])
        for name, variant in DIAGONALS.items():
            model = f"--mask_type {variant} {recipe}"
            flags = f"--train_file {train} --validation_file {validation} {model}"
            held_out = f"--train_file {train} --validation_share {share} {model}"
            place = f"{work}/diagonal/{task}-{name}"
            row, runs, folders = at_best_rate(script, flags, rates, place, sweep_flags=held_out, module=DIAGONAL_MODULE)
            row |= {"cpu_seconds": [r["cpu_seconds"] for r in runs]}
            if task == "text":
                row |= {"unigram_entropy": runs[0]["eval_unigram_entropy"]}
            if name == "free":
                row |= {"learned": [learned_factors(Path(folder)) for folder in folders]}
            measure = "eval_masked_accuracy" if task == "text" else "eval_accuracy"
            rows[f"{task}, diagonal {name}"] = row | {"accuracy": [r[measure] for r in runs]}
    return rows


def modern(data: Path | None, work: Path, results: Path, draw_only: bool = False) -> None:
    """Run the study of the modern block, which stores its results itself, run by run."""
    import ablation_evidence

    flags = ["--work", str(work / "modern"), "--results", str(results)]
    ablation_evidence.main([*flags, *(["--draw"] if draw_only else ["--data", str(data)])])


def write(kind: str, rows: dict, data: Path, folder: Path) -> None:
    """Write the results as JSON, as a Markdown table and as a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows.values():
        row["command"] = row["command"].replace(str(data), "DATA")
    (folder / f"{kind}.json").write_text(json.dumps(rows, indent=1) + "\n")
    write_table(kind, rows, folder)
    draw(kind, rows, folder)


def write_table(kind: str, rows: dict, folder: Path) -> None:
    """Write the results as a Markdown table with the commands."""
    first = next(iter(rows.values()))
    measured, time = ("cpu_seconds", "minutes of CPU time") if "cpu_seconds" in first else ("train_runtime", "minutes")
    lines = [
        f"| model | accuracy (%) | loss (nats) | seeds | learning rate | {time} per run |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        minutes = [seconds / 60 for seconds in row[measured]]
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else "as in the command"
        lines.append(
            f"| {name} | {summary(row['accuracy'], 100)} | {summary(row['loss'], 1, 3)} | "
            f"{len(row['seeds'])} | {rate} | {mean(minutes):.1f} |"
        )
    if "unigram_entropy" in first:
        entropy = f"{first['unigram_entropy']:.3f} nats"
        lines += ["", f"The unigram entropy of the masked tokens, the loss of token frequencies alone, is {entropy}."]
    lines += comparison(rows) if kind == "diagonal" else []
    lines += sweep_tables(rows)
    if len(first["seeds"]) > 1:
        lines += ["", f"Mean and standard deviation over the seeds {', '.join(map(str, first['seeds']))}."]
    commands = "The commands" if "--seed" in first["command"] else "The commands, without `--seed`"
    lines += ["", f"Every run used one CPU thread. {commands}:", ""]
    lines += [f"- {name}: `{row['command']}`" for name, row in rows.items()]
    (folder / f"{kind}.md").write_text("\n".join(lines) + "\n")


def sweep_tables(rows: dict) -> list[str]:
    """Return the lines of the tables of losses by learning rate, one table for each list of learning rates."""
    first, sweeps = next(iter(rows.values())), {name: row["sweep"] for name, row in rows.items() if "sweep" in row}
    where = first.get("swept_on", "rows that are reported")
    loss = "evaluation loss" if where == "rows that are reported" else f"loss on {where}"
    lines = []
    for rates in dict.fromkeys(tuple(sweep) for sweep in sweeps.values()):
        lines += ["", f"| {loss} by learning rate, seed {first['seeds'][0]} | " + " | ".join(rates) + " |"]
        lines += ["|---" * (len(rates) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(f"{value:.3f}" for value in sweep.values()) + " |"
            for name, sweep in sweeps.items()
            if tuple(sweep) == rates
        ]
    return lines


def draw(kind: str, rows: dict, folder: Path) -> None:
    """Draw the plot of a comparison; its axes contain 0.

    It shows losses by step, or losses beside that of token frequencies, or accuracies beside that of the most frequent
    class, or differences.
    """
    if kind == "diagonal":
        draw_differences(rows, folder / f"{kind}.png", TITLES[kind])
        return
    first = next(iter(rows.values()))
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    if "curve" in first:
        draw_curves(axis, rows)
    elif "unigram_entropy" in first:
        draw_means(axis, rows, "loss", 1, "evaluation loss (nats)")
        axis.axhline(
            first["unigram_entropy"], color="0.4", linestyle="--", linewidth=1, label="token frequencies alone"
        )
        axis.legend(loc="lower right", fontsize=8)
    else:
        draw_means(axis, rows, "accuracy", 100, "accuracy (%)")
        axis.set_ylim(0, 100)
        axis.axhline(100 * first["baseline"], color="0.4", linestyle="--", linewidth=1, label="most frequent class")
        axis.legend(loc="lower right", fontsize=8)
    axis.set_ylim(bottom=0)
    seeds = len(first["seeds"])
    axis.set_title(
        f"{TITLES[kind]}, {seeds} seeds: mean and deviation" if seeds > 1 else f"{TITLES[kind]}, one seed", fontsize=9
    )
    axis.grid(alpha=0.3)
    figure.savefig(folder / f"{kind}.png", dpi=120)
    plt.close(figure)


def draw_means(axis, rows: dict, name: str, factor: float, label: str) -> None:
    heights = [factor * mean(row[name]) for row in rows.values()]
    spread = [factor * stdev(row[name]) if len(row[name]) > 1 else 0 for row in rows.values()]
    axis.errorbar(range(len(rows)), heights, yerr=spread, fmt="o", capsize=4, markersize=4)
    for i, (height, deviation) in enumerate(zip(heights, spread, strict=True)):
        axis.annotate(
            f"{height:.1f}" if factor > 1 else f"{height:.2f}",
            (i, height + deviation),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.margins(x=0.08, y=0.15)
    axis.set_xticks(range(len(rows)), rows, rotation=20, ha="right", fontsize=8)
    axis.set_ylabel(label)


def draw_curves(axis, rows: dict) -> None:
    for name, row in rows.items():
        axis.plot(*zip(*row["curve"], strict=True), label=name, linestyle="--" if "scratch" in name else "-")
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("evaluation loss (nats)")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def most_frequent_share(train: Path, validation: Path) -> float:
    """Return the accuracy on `validation` of always predicting the most frequent class of `train`."""
    read = pandas.read_csv if train.suffix == ".csv" else pandas.read_parquet
    train, validation = (
        read(file, **({"columns": ["label"]} if file.suffix == ".parquet" else {})) for file in (train, validation)
    )
    return float((validation["label"] == train["label"].mode()[0]).mean())


KINDS = {
    "text": text,
    "images": images,
    "sentiment": sentiment,
    "pooling": pooling,
    "warm_start": warm_start,
    "warm_start_mlm": warm_start_mlm,
    "diagonal": diagonal,
    "modern": modern,
}
REVIEWS = ("reviews/train.csv", "reviews/validation.csv")
WIKI = ("wiki/train.txt", "wiki/validation.txt")
FASHION = ("fashion-mnist/train-00000-of-00001.parquet", "fashion-mnist/test-00000-of-00001.parquet")
NEEDED = {
    "text": WIKI,
    "images": FASHION,
    "sentiment": REVIEWS,
    "pooling": REVIEWS,
    "warm_start": (*REVIEWS, "minilm/config.json"),
    "warm_start_mlm": (*WIKI, "minilm/config.json"),
    "diagonal": (*WIKI, *FASHION),
    "modern": (*WIKI, *REVIEWS),
}
TITLES = {
    "text": "Masked tokens of encyclopedia text",
    "images": "Fashion-MNIST",
    "sentiment": "Sentiment of review sentences",
    "pooling": "Sentiment of review sentences",
    "warm_start": "Sentiment of review sentences",
    "warm_start_mlm": "Masked tokens of encyclopedia text",
    "diagonal": "LION-S with another diagonal, by seed",
}


def problem_with(kind: str, data: Path | None, results: Path) -> str | None:
    """Return what a comparison lacks, or None if it can run."""
    if data is None:
        return "--data is required: the folder with the data, see --help"
    missing = [name for name in NEEDED[kind] if not (data / name).is_file()]
    if missing:
        return f"--data {str(data)!r} lacks {', '.join(missing)}"
    if kind != "sentiment":
        return None
    if not (results / "text.json").is_file():
        return f"{results / 'text.json'} is missing; run text first, since sentiment starts from its models"
    folders = [folder for row in json.loads((results / "text.json").read_text()).values() for folder in row["folders"]]
    gone = [folder for folder in folders if not Path(folder, "config.json").is_file()]
    return (
        f"{len(gone)} of {len(folders)} models of text are missing, such as {gone[0]!r}; run text first"
        if gone
        else None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="the comparison")
    parser.add_argument("--data", type=lambda path: Path(path).resolve(), help="folder with the data, see above")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("outputs/evidence"),
        help="folder for the runs, relative to the repository (default: outputs/evidence)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("examples/results"),
        help="folder for the tables and plots, relative to the repository (default: examples/results)",
    )
    parser.add_argument(
        "--draw", action="store_true", help="write table and plot again from the stored results, without training"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(EXAMPLES.parent)
    if arguments.draw and arguments.kind == "modern":
        modern(None, arguments.work, arguments.results, draw_only=True)
        return
    if arguments.draw:
        rows = json.loads((arguments.results / f"{arguments.kind}.json").read_text())
        write_table(arguments.kind, rows, arguments.results)
        draw(arguments.kind, rows, arguments.results)
        return
    problem = problem_with(arguments.kind, arguments.data, arguments.results)
    if problem:
        sys.exit(f"error: {problem}")
    rows = KINDS[arguments.kind](arguments.data, arguments.work, arguments.results)
    if rows is None:
        return
    if arguments.kind in ("images", "sentiment", "pooling", "warm_start"):
        baseline = most_frequent_share(*(arguments.data / name for name in NEEDED[arguments.kind][:2]))
        rows = {name: row | {"baseline": baseline} for name, row in rows.items()}
    write(arguments.kind, rows, arguments.data, arguments.results)
    print((arguments.results / f"{arguments.kind}.md").read_text())


if __name__ == "__main__":
    main()
