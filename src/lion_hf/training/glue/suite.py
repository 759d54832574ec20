"""Many runs of run_glue.py: which (task, seed) there are, which are finished, and several at a time.

Each run has a folder of its own, output_dir/task/seed, and a file arguments.json in it:
`python examples/run_glue.py outputs/glue/rte/17/arguments.json` is that run alone.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from shutil import rmtree
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import TextModelArguments
from ..errors import UserError, make_output_dir, say
from .summary import RESULT, read_results, run_score, to_markdown, write_summary
from .tasks import AFTER_MNLI


# What may differ between two calls that go on with the same runs.
TECHNICAL = {"parallel", "num_seeds", "disable_tqdm", "logging_steps", "report_to", "save_total_limit"}
TECHNICAL |= {"dataloader_num_workers", "per_device_eval_batch_size", "output_dir"}
# Set for a process that `launch` starts, which ends with the one that started it.
SUPERVISED = "LION_GLUE_SUPERVISED"


class Run(NamedTuple):
    """One fine-tuning; `first` is the folder of the run on MNLI that it starts from, if any."""

    task: str
    seed: int
    folder: Path
    first: Path | None = None

    @property
    def arguments_file(self) -> Path:
        return self.folder / "arguments.json"

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}"


def plan_runs(tasks: Sequence, num_seeds: int | None, seed: int, folder: str, from_mnli: bool) -> list[Run]:
    """All runs: of several tasks the paper's number of seeds each, unless given; of one task one."""
    if num_seeds is not None and num_seeds < 1:
        raise UserError(f"--num_seeds is {num_seeds}; it must be at least 1")
    counts = {task.name: num_seeds or (task.seeds if len(tasks) > 1 else 1) for task in tasks}
    if from_mnli and ("mnli" not in counts or len(counts) == 1):
        raise UserError(
            "--from_mnli needs mnli and other tasks in --task; else give its folder by --model_name_or_path"
        )
    runs = []
    for name, count in counts.items():
        for number in range(seed, seed + count):
            first = None
            if from_mnli and name in AFTER_MNLI:
                first = Path(folder) / "mnli" / str(number if number < seed + counts["mnli"] else seed)
            runs.append(Run(name, number, Path(folder) / name / str(number), first))
    return runs


def run_arguments(run: Run, given: dict[str, Any]) -> dict[str, Any]:
    """What a run is called with: everything that was given, with the one task, seed and folder."""
    if run.first is not None:  # that model says what it is
        model = {field.name for field in dataclasses.fields(TextModelArguments)} - {"format"}
        model |= {"tokenizer_name", "train_tokenizer", "vocab_size"}
        given = {name: value for name, value in given.items() if name not in model}
        given["model_name_or_path"] = str(run.first)
    own = {"task": [run.task], "seed": run.seed, "num_seeds": 1, "from_mnli": False, "output_dir": str(run.folder)}
    # Through JSON, so that it compares equal to what is read again.
    return json.loads(json.dumps(given | own, default=str))


def prepare(run: Run, given: dict[str, Any]) -> None:
    """Writes the run's file of arguments, or checks that it is called as before."""
    make_output_dir(run.folder)
    arguments = run_arguments(run, given)
    if run.arguments_file.is_file():
        before = json.loads(run.arguments_file.read_text(encoding="utf-8"))
        for name in sorted((before.keys() | arguments.keys()) - TECHNICAL):
            if before.get(name) != arguments.get(name):
                raise UserError(
                    f"{str(run.folder)!r} belongs to a run with other arguments: {name} was {_shown(before, name)} "
                    f"and is {_shown(arguments, name)} now; choose another --output_dir, or delete that folder"
                )
    write_json(run.arguments_file, arguments)


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not given"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a file that is either complete or not there, whatever happens meanwhile."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def run_suite(
    runs: list[Run],
    given: dict[str, Any],
    training: TrainingArguments,
    parallel: int | None,
    train: Callable,
    script: Path,
) -> dict[str, Any]:
    """Does the runs that are not finished, in sequence in this process or several at a time in their own, and returns
    the summary of all of them.

    Args:
        runs: all runs.
        given: the arguments that were given, see `given_values`.
        training: for the devices, and which process this is.
        parallel: how many at a time.
        train: `run_glue.main`, called with a run's file of arguments.
        script: run_glue.py, for the processes of their own.
    """
    if parallel is not None and parallel < 1:
        raise UserError(f"--parallel is {parallel}; it must be at least 1")
    devices = visible_devices(training)
    workers = parallel or max(1, len(devices))
    if training.world_size > 1 and workers > 1 and parallel:
        raise UserError("--parallel starts processes of its own; leave out torchrun, or --parallel")
    with training.main_process_first(desc="plan of the runs"):
        if training.process_index == 0:
            for planned in runs:
                prepare(planned, given)
    todo = [planned for planned in runs if not planned.is_finished]
    if training.process_index == 0 and len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    if training.world_size > 1 or (workers == 1 and len(devices) <= 1):
        for i, planned in enumerate(todo):
            if training.process_index == 0:
                say(f"\n{planned} (run {i + 1} of {len(todo)})")
            try:
                train([str(planned.arguments_file)])
            except UserError as error:
                raise UserError(f"{planned}: {error}") from error
            remove_checkpoints(planned, training)
    else:
        run_processes(todo, min(workers, len(todo)), devices, script)
    if training.process_index != 0:
        return {}
    folder = Path(training.output_dir)
    results = [result for result in read_results(folder) if (result["task"], result["seed"]) in {r[:2] for r in runs}]
    summary = write_summary(folder, results)
    say(f"\n{to_markdown(summary)}\nglue.json, glue.md and glue.png are in {folder}")
    return summary


def remove_checkpoints(run: Run, training: TrainingArguments | None = None) -> None:
    """A finished run keeps its model; what it could have been resumed from would soon fill the disk."""
    if training is None or training.process_index == 0:
        for folder in run.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            rmtree(folder)


# ------------------------------------------------------------------------------------------- processes of their own


def visible_devices(training: TrainingArguments) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if training.device.type != "cuda":
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(i) for i in range(torch.cuda.device_count())]


def run_processes(runs: list[Run], workers: int, devices: list[str], script: Path) -> None:
    """Does runs in processes of their own, `workers` at a time, each with one device; after a failure none is started.

    Raises:
        UserError: names the run that failed and its log.
    """
    slots, failed = SimpleQueue(), threading.Event()
    for i in range(workers):
        slots.put(devices[i % len(devices)] if devices else None)
    futures: dict[Path, Future] = {}

    def do(planned: Run) -> None:
        if planned.first in futures:  # started before this one, so the wait ends
            futures[planned.first].result()
        if failed.is_set():
            return
        device = slots.get()
        try:
            start = time.perf_counter()
            say(f"{planned}: started" + (f" on GPU {device}" if device else ""))
            launch(script, planned, device, workers)
            score = run_score(json.loads((planned.folder / RESULT).read_text(encoding="utf-8")))
            say(f"{planned}: score {100 * score:.2f} in {time.perf_counter() - start:.0f} seconds")
        except BaseException:
            failed.set()
            raise
        finally:
            slots.put(device)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for planned in runs:
            futures[planned.folder] = pool.submit(do, planned)
    for future in futures.values():
        future.result()


def launch(script: Path, run: Run, device: str | None, workers: int) -> None:
    """One run in a process of its own, which writes to log.txt."""
    environment = os.environ | {SUPERVISED: "1"}
    if device is None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    else:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = run.folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(script.resolve()), str(run.arguments_file)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        code = process.wait()
    if code or not run.is_finished:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(f"{run} ended with exit code {code}: {lines[-1] if lines else 'no output'} (all of it: {log})")
    remove_checkpoints(run)


def stop_with_parent() -> None:
    """Ends a process that `launch` started when its parent is gone, by whatever means: the pipe from it closes then.
    Does nothing in other processes."""
    if os.environ.pop(SUPERVISED, None) is None:
        return

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
