"""Which options of the modern block help: each alone, all together, and without each, against BERT and ModernBERT.

    python examples/ablation_evidence.py --data DATA                  # everything that is not done yet
    python examples/ablation_evidence.py --data DATA --only BERT      # some models, by name
    python examples/ablation_evidence.py --draw                       # tables and plot again, from the stored results
    python examples/ablation_evidence.py --list                       # the models and their options
    python examples/ablation_evidence.py --data DATA --length 512     # some models on rows of 512 tokens, text only

`python examples/run_evidence.py modern --data DATA` is the same as the first line. DATA is a folder with
wiki/{train,validation}.txt and reviews/{train,validation}.csv.

Every model is trained to predict masked tokens with the recipe of `run_evidence.py text`, at each of four learning
rates with the first seed on 90 % of the training file. The rate with the lowest loss on the other 10 % is used for all
seeds on the whole training file, and the validation file is evaluated. These models are then fine-tuned on the review
sentences in the same way, once with a classifier that reads the first token and once with the mean of the tokens. No
choice depends on a validation file, nor does that of the options to leave out of the modern block.

Finished runs are stored one by one and not repeated; `--text_only` leaves the review sentences for later. On a GPU
several models are trained side by side, see `ablation_training.py`; the results then differ from those of a CPU by
rounding.
"""

import argparse
import json
import math
import os
import platform
import queue
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import run_evidence
from ablation_results import draw, write_table


EXAMPLES = Path(__file__).parent
SEEDS = run_evidence.SEEDS
TEXT_RATES = run_evidence.RATES
SENTIMENT_RATES = (1e-4, 2e-4, 4e-4, 8e-4)
POOLINGS = ("first", "mean")
HELD_OUT = "--validation_share 0.1"
# Published LION-S, changed by one option. A gated MLP has two thirds of the width, and so as many parameters.
# A row has 64 tokens: the windows of the decays and of local attention are scaled to it.
LOCAL = {"local_layers": [0, 1], "local_window": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "pre-norm": {"norm_position": "pre"},
    "RMSNorm": {"norm_type": "rms"},
    "gated MLP": {"mlp_type": "glu", "intermediate_size": 512},
    "no biases": {"use_bias": False},
    "feature map silu": {"feature_map": "silu"},
    "output norm": {"output_norm": "rms"},
    "output gate": {"output_gate": "silu"},
    "convolution": {"short_conv": 3},
    "windows": {"decay_init": "windows", "decay_windows": [4, 64]},
    "local layers": LOCAL | {"rope_theta": 10000.0},
}
LION_S, LION_D, LION_LIT = ({"mask_type": name} for name in ("selective", "decay", "lit"))
PUBLISHED, MODERN = "LION-S, published", "LION-S, modern"
BERT = "BERT"
MODERNBERT = {"model_type": "modernbert", "intermediate_size": 512, "local_attention": 32}
# The block of the presets lion-s-modern-* with local layers between layers of LION, and what was tried with it.
PRESET_BLOCK = {
    **LION_S,
    **OPTIONS["pre-norm"],
    **OPTIONS["gated MLP"],
    **OPTIONS["no biases"],
    **OPTIONS["feature map silu"],
    "first_norm": False,
    "output_norm": "head_rms",
    "local_layers": [1, 2],
    "local_window": LOCAL["local_window"],
}
ROTATED = "RoPE in linear layers"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LOCAL_ROPE = {"rope_theta": 10000.0}
LINEAR_ROPE = {"rope_parameters": {"linear_attention": ROPE}}
BOTH_ROPES = {"rope_parameters": {"sliding_attention": ROPE, "linear_attention": ROPE}}
ALL_LINEAR = {k: v for k, v in PRESET_BLOCK.items() if k not in LOCAL} | LINEAR_ROPE
WINDOWS, CONVOLUTION = OPTIONS["windows"], OPTIONS["convolution"]
PRESET_BLOCKS = {
    "": PRESET_BLOCK | LOCAL_ROPE,
    ", windows": PRESET_BLOCK | LOCAL_ROPE | WINDOWS,
    f", {ROTATED}": PRESET_BLOCK | BOTH_ROPES,
    f", {ROTATED}, windows": PRESET_BLOCK | BOTH_ROPES | WINDOWS,
    ", RoPE for local layers": ALL_LINEAR,
    ", RoPE and convolution for local layers, windows": ALL_LINEAR | CONVOLUTION | WINDOWS,
}


class Model(NamedTuple):
    """A model of the study.

    Attributes:
        options: its configuration, besides the sizes of the recipe.
        poolings: what its classifier reads: "first", "mean", both, or neither, which leaves the review sentences out.
        reported: whether it is reported, with all seeds. If not, it only decides what to leave out.
        rates: learning rates of the masked tokens.
    """

    options: dict[str, Any]
    poolings: tuple[str, ...] = POOLINGS
    reported: bool = True
    rates: tuple[float, ...] = TEXT_RATES

    def tasks(self) -> dict[str, tuple[float, ...]]:
        """Return the learning rates of each task, in the order of the runs."""
        return {"text": self.rates} | {f"sentiment, {pooling}": SENTIMENT_RATES for pooling in self.poolings}


def without(*names: str) -> dict[str, Any]:
    """Return the options of the modern block without some, by their names in OPTIONS."""
    return LION_S | {k: v for name, options in OPTIONS.items() if name not in names for k, v in options.items()}


def fixed_models() -> dict[str, Model]:
    """Return the models that depend on no result, the most informative first."""
    leave_one_out = {f"{MODERN} without {name}": Model(without(name), (), False) for name in OPTIONS}
    return {
        PUBLISHED: Model(LION_S),
        MODERN: Model(without()),
        BERT: Model({"model_type": "bert"}, ("first",)),
        # At the best of four rates two of its seeds do not train. This is the rate of text.md.
        f"{BERT} at 0.001": Model({"model_type": "bert"}, ("first",), rates=(1e-3,)),
        "ModernBERT": Model(MODERNBERT),
        "LION-D, modern": Model(without() | LION_D),
        **leave_one_out,
        **{f"LION-S, {name}": Model(LION_S | options, ("first",)) for name, options in OPTIONS.items()},
        "LION-S, local layers without RoPE": Model(LION_S | LOCAL, ("first",)),
        f"LION-S, {ROTATED}": Model(LION_S | LINEAR_ROPE, ("first",)),
        **{f"LION-S, preset block{name}": Model(options) for name, options in PRESET_BLOCKS.items()},
        "LION-D, published": Model(LION_D),
        f"LION-D, {ROTATED}": Model(LION_D | LINEAR_ROPE, ()),
        "LION-LIT, published": Model(LION_LIT, ()),
        f"LION-LIT, {ROTATED}": Model(LION_LIT | LINEAR_ROPE, ()),
    }


def chosen_model(runs: dict[str, dict]) -> str | None:
    """Return the modern block with the lowest masked loss on held-out rows: whole, or without one option.

    None until the losses of all are known.
    """
    losses = {name: held_out_loss(runs, name) for name in (MODERN, *(f"{MODERN} without {name}" for name in OPTIONS))}
    return None if None in losses.values() else min(losses, key=losses.get)


def all_models(runs: dict[str, dict]) -> dict[str, Model]:
    """Return all models. That without the option that hurts most, if any hurts, is reported too."""
    models, chosen = fixed_models(), chosen_model(runs)
    return models if chosen is None else models | {chosen: models[chosen]._replace(poolings=POOLINGS, reported=True)}


def long_models() -> dict[str, Model]:
    """Return the models of rows of `LONG` tokens, with windows for that length. Their review sentences are left out."""
    windows = {"local_window": 128, "local_attention": 128, "decay_windows": [4, LONG]}
    found = {}
    for name, model in fixed_models().items():
        if name in (PUBLISHED, "ModernBERT", "LION-S, windows", f"LION-S, {ROTATED}") or "preset block" in name:
            options = model.options | {k: v for k, v in windows.items() if k in model.options}
            found[name] = Model(options, ())
    return found


class Part(NamedTuple):
    """A part of the study: rows of one length.

    Attributes:
        name: name of the files of its results.
        models: gives its models for finished runs.
        recipe: flags of masked language modelling.
    """

    name: str
    models: Callable[[dict[str, dict]], dict[str, Model]]
    recipe: str


LONG = 512
LONG_RECIPE = run_evidence.TEXT_RECIPE.replace("--max_length 64 ", f"--max_length {LONG} ").replace(
    "--per_device_train_batch_size 16 ", "--per_device_train_batch_size 2 "
)
PARTS = {
    64: Part("modern", all_models, run_evidence.TEXT_RECIPE),
    LONG: Part(f"modern_{LONG}", lambda runs: long_models(), LONG_RECIPE),
}


# ------------------------------------------------------------------------------------------------------------ runs


class Run(NamedTuple):
    """One training run; `stage` is "rate" (held-out rows of the training file) or "final" (validation file)."""

    model: str
    task: str
    stage: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.model} | {self.task} | {self.stage} | {self.rate:g} | {self.seed}"


def best_rate(runs: dict[str, dict], model: str, task: str, rates: Sequence[float]) -> float | None:
    """Return the rate with the lowest loss on held-out rows; None unless all rates were tried. NaN counts as worst."""
    losses = [held_out(runs, Run(model, task, "rate", rate, SEEDS[0])) for rate in rates]
    if None in losses:
        return None
    return rates[min(range(len(rates)), key=lambda i: math.inf if math.isnan(losses[i]) else losses[i])]


def held_out(runs: dict[str, dict], run: Run) -> float | None:
    return runs[run.key]["loss"] if run.key in runs else None


def held_out_loss(runs: dict[str, dict], model: str) -> float | None:
    """Return the masked loss of a model on held-out rows at its best rate, or None if it is not known yet."""
    rate = best_rate(runs, model, "text", TEXT_RATES)
    return None if rate is None else held_out(runs, Run(model, "text", "rate", rate, SEEDS[0]))


def missing(runs: dict[str, dict], name: str, model: Model) -> list[Run]:
    """Return the runs of a model that can start now: rates to compare, and all seeds at a best rate that is known.

    Fine-tuning starts when all seeds are pretrained.
    """
    due = []
    for task, rates in model.tasks().items():
        rate = best_rate(runs, name, task, rates)
        wanted = [Run(name, task, "rate", rate, SEEDS[0]) for rate in rates]
        if rate is not None and model.reported:
            wanted += [Run(name, task, "final", rate, seed) for seed in SEEDS]
        found = [run for run in wanted if run.key not in runs]
        due += found
        if task == "text" and (found or rate is None or not model.reported):
            break
    return due


class Study:
    """Trains what is missing of some models.

    Args:
        data: folder with the data.
        work: folder for rows and models.
        runs: finished runs, by key.
        report: is called with the key and the record of each finished run.
        deadline: time after which no run starts.
        steps: trains this many steps only, to try the script.
        cpu: do not use a GPU.
        length: tokens of a row.
    """

    def __init__(
        self,
        data: Path,
        work: Path,
        runs: dict[str, dict],
        report: Callable[[str, dict], None],
        deadline: float = math.inf,
        steps: int | None = None,
        cpu: bool = False,
        length: int = 64,
    ):
        self.data, self.work, self.runs, self.report = data, work, runs, report
        self.deadline, self.steps, self.cpu = deadline, steps, cpu
        few = f" --max_steps {steps}" if steps else ""
        device = f" --use_cpu {str(cpu).lower()}"
        self.flags = {"text": PARTS[length].recipe, "sentiment": run_evidence.SENTIMENT_RECIPE}
        self.chosen = [] if length == 64 else ["--length", str(length)]
        self.tasks = ("text", "sentiment") if length == 64 else ("text",)
        self.flags = {name: flags.replace(" --use_cpu true", device) + few for name, flags in self.flags.items()}

    def train(self, models: dict[str, Model]) -> None:
        """Train all missing runs of some models, those of a task side by side, until the deadline."""
        for task in ("text", *(f"sentiment, {pooling}" for pooling in POOLINGS)):
            for stage in ("rate", "final"):
                due = (run for name, model in models.items() for run in missing(self.runs, name, model))
                due = [run for run in due if (run.task, run.stage) == (task, stage)]
                # Nothing is gained side by side on a CPU, and each run is stored when it is done.
                for part in [[run] for run in due] if self.cpu else [due] if due else []:
                    if time.time() < self.deadline:
                        self.train_runs(models, part)

    def train_runs(self, models: dict[str, Model], runs: Sequence[Run]) -> None:
        """Train runs of a task side by side, and report each."""
        from ablation_training import train_together

        trainings = [self.training(models, run) for run in runs]
        seconds = train_together(trainings, lambda problem: print(f"{runs[0].key}: {problem}", flush=True))
        for run, training in zip(runs, trainings, strict=True):
            record = run._asdict() | training.evaluate() | training.rows.known
            record |= {"steps": training.steps, "seconds": round(seconds, 2), "options": models[run.model].options}
            record |= {"parameters": training.model.num_parameters(), "device": device_name(training.device)}
            command = ["python", "examples/ablation_evidence.py", "--data", "DATA", *self.chosen, "--only", run.model]
            self.runs[run.key] = record | {"command": shlex.join(command)}
            if run.task == "text" and run.stage == "final":
                training.model.save_pretrained(self.encoder(run))
            self.report(run.key, self.runs[run.key])

    def training(self, models: dict[str, Model], run: Run):
        from ablation_training import sentiment_training, text_training

        task = run.task.split(",")[0]
        rows, folder, flags = (
            self.rows(task, run.stage, run.seed),
            self.tokenizer_folder(task, run.stage),
            self.flags[task],
        )
        if task == "text":
            return text_training(models[run.model].options, flags, run.rate, run.seed, rows, folder)
        start, pooling = self.pretrained(models, run), run.task.split(", ")[1]
        return sentiment_training(start, pooling, flags, run.rate, run.seed, rows, folder)

    def rows(self, task: str, stage: str, seed: int):
        """Return the rows of a run, which are stored in `work`."""
        from ablation_training import sentiment_rows, stored_rows, text_rows

        make = {"text": text_rows, "sentiment": sentiment_rows}[task]
        train, validation = (shlex.quote(str(self.data / name)) for name in run_evidence.NEEDED[task])
        other = HELD_OUT if stage == "rate" else f"--validation_file {validation}"
        flags = f"--train_file {train} {other} {self.flags[task]}"
        folder, steps = self.tokenizer_folder(task, stage), f"-{self.steps}" if self.steps else ""
        return stored_rows(lambda: make(flags, seed, folder), self.work / f"{task}-{stage}-{seed}{steps}.pt")

    def tokenizer_folder(self, task: str, stage: str) -> Path:
        """Return the folder of the tokenizer; fine-tuning uses that of the encoders it starts from."""
        return self.work / ("tokenizer-rate" if (task, stage) == ("text", "rate") else "tokenizer")

    def prepare(self) -> None:
        """Make all rows, before several processes need them."""
        for task in self.tasks:
            self.rows(task, "rate", SEEDS[0])
            for seed in SEEDS:
                self.rows(task, "final", seed)

    def pretrained(self, models: dict[str, Model], run: Run) -> Path:
        """Return the folder of the encoder that a fine-tuning starts from. If it is gone, all seeds are trained again,
        to the same results on the same device."""
        rate = best_rate(self.runs, run.model, "text", models[run.model].rates)
        source = Run(run.model, "text", "final", rate, run.seed)
        if not (self.encoder(source) / "config.json").is_file():
            self.train_runs(models, [source._replace(seed=seed) for seed in SEEDS])
        return self.encoder(source)

    def encoder(self, run: Run) -> Path:
        return self.work / "models" / run.key.replace(" | ", "_").replace(" ", "-").replace(",", "")


def device_name(device) -> str:
    """Return the name of the processor or GPU, with PyTorch's version."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------- many processes


def work_on(groups, maker: "StudyMaker", outcomes) -> None:
    """Train groups of models that come from a queue, until it gives None; put what happened into another queue."""
    study = maker(lambda key, record: outcomes.put((key, record)))
    while (models := groups.get()) is not None:
        try:
            study.train(models)
            outcomes.put((list(models), None))
        except Exception:
            outcomes.put((list(models), traceback.format_exc()))


class StudyMaker(NamedTuple):
    """Makes a `Study` in another process."""

    arguments: dict[str, Any]

    def __call__(self, report: Callable[[str, dict], None]) -> Study:
        return Study(**self.arguments, report=report)


class Processes:
    """Processes that train groups of models.

    Args:
        workers: how many.
        maker: makes their study.
    """

    def __init__(self, workers: int, maker: StudyMaker):
        from torch import multiprocessing

        context = multiprocessing.get_context("spawn")
        self.groups, self.outcomes, self.busy = context.Queue(), context.Queue(), 0
        arguments = self.groups, maker, self.outcomes
        self.all = [context.Process(target=work_on, args=arguments, daemon=True) for _ in range(workers)]
        for process in self.all:
            process.start()

    def train(self, next_group: Callable[[], dict[str, Model]], keep: Callable[[str, dict], None]) -> list[str]:
        """Train the groups that a function gives, until it gives none while no process is busy. Return what failed.

        `keep` is called with the key and the record of each finished run. If the first three groups fail, the rest is
        not tried.
        """
        failed, bad, ended = [], 0, 0
        while True:
            while self.busy < len(self.all) and (group := next_group()):
                self.groups.put(group)
                self.busy += 1
            if not self.busy:
                return failed
            names, found = self.next_outcome()
            if isinstance(found, dict):
                keep(names, found)
                continue
            self.busy, ended = self.busy - 1, ended + 1
            bad += found is not None
            failed += [] if found is None else names
            print(f"{time.strftime('%H:%M:%S')} {', '.join(names)}: {'done' if found is None else found}", flush=True)
            if bad == ended == 3:
                return failed

    def next_outcome(self) -> tuple:
        while True:
            try:
                return self.outcomes.get(timeout=10)
            except queue.Empty:
                if not all(process.is_alive() for process in self.all):
                    sys.exit("error: a process ended before its models were trained")

    def end(self) -> None:
        """End the processes: at once where one is still busy."""
        for process in self.all:
            if self.busy:
                process.terminate()
            else:
                self.groups.put(None)
        for process in self.all:
            process.join()


# ------------------------------------------------------------------------------------------------------ command


def read_runs(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text())["runs"] if file.is_file() else {}


def store(file: Path, runs: dict[str, dict]) -> None:
    """Write all runs; an interruption leaves the former file whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"runs": dict(sorted(runs.items()))}, indent=1) + "\n")
    unfinished.replace(file)


class Groups:
    """Gives the models with missing runs in groups; each once, and again if it is reported by then.

    Args:
        runs: finished runs, which grow.
        only: names of models, or None for all.
        size: models in a group.
        text_only: whether to leave out the review sentences.
        find_models: gives all models for finished runs.
    """

    def __init__(
        self,
        runs: dict[str, dict],
        only: Sequence[str] | None,
        size: int,
        text_only: bool = False,
        find_models: Callable[[dict[str, dict]], dict[str, Model]] = all_models,
    ):
        self.runs, self.only, self.size, self.text_only, self.given = runs, only, size, text_only, set()
        self.find_models = find_models

    def __call__(self) -> dict[str, Model]:
        models = self.find_models(self.runs)
        if self.text_only:
            models = {name: model._replace(poolings=()) for name, model in models.items()}
        due = [name for name in models if self.only is None or name in self.only]
        due = [name for name in due if (name, models[name].reported) not in self.given]
        names = [name for name in due if missing(self.runs, name, models[name])][: self.size]
        self.given |= {(name, models[name].reported) for name in names}
        return {name: models[name] for name in names}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=lambda path: Path(path).resolve(), help="folder with the data, see above")
    found.add_argument("--work", type=Path, default=Path("outputs/evidence/modern"), help="folder for rows and models")
    found.add_argument("--results", type=Path, default=Path("examples/results"), help="folder for the results")
    found.add_argument("--only", nargs="+", metavar="NAME", help="names of the models to train (see --list)")
    found.add_argument("--length", type=int, choices=PARTS, default=64, help="tokens of a row (default: 64)")
    found.add_argument("--text_only", action="store_true", help="leave out the review sentences for now")
    found.add_argument("--workers", type=int, default=1, help="processes that train models at the same time")
    found.add_argument("--together", type=int, default=1, help="models that a process trains side by side on a GPU")
    found.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    found.add_argument("--steps", type=int, help="train this many steps only, to try the script")
    found.add_argument("--cpu", action="store_true", help="do not use a GPU")
    found.add_argument("--draw", action="store_true", help="write tables and plot from the stored results")
    found.add_argument("--list", action="store_true", help="print the models and their options")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.time()
    arguments = parser().parse_args(argv)
    os.chdir(EXAMPLES.parent)
    part = PARTS[arguments.length]
    file = arguments.results / f"{part.name}.json"
    runs = read_runs(file)
    if arguments.list:
        print("\n".join(f"{name}: {model.options}" for name, model in part.models(runs).items()))
        return
    failed = 0 if arguments.draw else train_all(arguments, runs, file, begin + 60 * arguments.minutes)
    if runs:
        write_table(part.models(runs), runs, file.with_suffix(".md"))
        draw(part.models(runs), runs, file.with_suffix(".png"))
    if failed:
        sys.exit(f"error: {failed} models failed, see above")


def train_all(arguments: argparse.Namespace, runs: dict[str, dict], file: Path, deadline: float) -> int:
    """Train what is missing, also models that follow from results; return how many failed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LION_BACKEND", "torch")  # the same forms on every device
    problem, part = run_evidence.problem_with("modern", arguments.data, arguments.results), PARTS[arguments.length]
    unknown = set(arguments.only or ()) - set(part.models(runs))
    if problem or unknown:
        sys.exit(f"error: {problem or f'--only names {sorted(unknown)}; --list prints the models'}")

    def keep(key: str, record: dict) -> None:
        runs[key] = record
        store(file, runs)
        print(f"{time.strftime('%H:%M:%S')} {key}: loss {record['loss']:.3f}, accuracy {record['accuracy']:.4f}")

    work = arguments.work.resolve() / ("" if arguments.length == 64 else str(arguments.length))
    options = {"data": arguments.data, "work": work, "runs": runs, "deadline": deadline, "length": arguments.length}
    import torch

    maker = StudyMaker(options | {"steps": arguments.steps, "cpu": arguments.cpu or not torch.cuda.is_available()})
    maker(keep).prepare()
    groups = Groups(runs, arguments.only, arguments.together, arguments.text_only, part.models)
    processes = Processes(arguments.workers, maker)
    try:
        return len(processes.train(groups, keep))
    finally:
        processes.end()


if __name__ == "__main__":
    main()
