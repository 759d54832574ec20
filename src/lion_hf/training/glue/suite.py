"""Several runs of run_glue.py: plan them, skip finished ones, and run them one after the other or in parallel.

Each run has its own folder, output_dir/task/seed, with a file arguments.json:
`python examples/run_glue.py outputs/glue/rte/17/arguments.json` repeats that run alone.
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


# Arguments that may differ between two calls that resume the same runs.
TECHNICAL = {"parallel", "num_seeds", "disable_tqdm", "logging_steps", "report_to", "save_total_limit"}
TECHNICAL |= {"dataloader_num_workers", "per_device_eval_batch_size", "output_dir"}
# Environment variable of processes that `launch` starts; they exit when the process that started them does.
SUPERVISED = "LION_GLUE_SUPERVISED"


class Run(NamedTuple):
    """One fine-tuning run; `first` is the folder of the MNLI run that it starts from, if any."""

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
    """Return all runs: `num_seeds` per task, by default the paper's number for several tasks and 1 for one task."""
    if num_seeds is not None and num_seeds < 1:
        raise UserError(f"--num_seeds is {num_seeds}; it must be at least 1")
    counts = {task.name: num_seeds or (task.seeds if len(tasks) > 1 else 1) for task in tasks}
    if from_mnli and ("mnli" not in counts or len(counts) == 1):
        raise UserError(
            "--from_mnli requires mnli and other tasks in --task; for a finished MNLI run give its folder as "
            "--model_name_or_path"
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
    """Return the arguments of a run: all that were given, with the task, seed and folder of the run."""
    if run.first is not None:  # options of a new model do not apply to the MNLI model
        model = {field.name for field in dataclasses.fields(TextModelArguments)} - {"format"}
        model |= {"tokenizer_name", "train_tokenizer", "vocab_size"}
        given = {name: value for name, value in given.items() if name not in model}
        given["model_name_or_path"] = str(run.first)
    own = {"task": [run.task], "seed": run.seed, "num_seeds": 1, "from_mnli": False, "output_dir": str(run.folder)}
    # Through JSON, so that the values equal those read from the file later.
    return json.loads(json.dumps(given | own, default=str))


def prepare(run: Run, given: dict[str, Any]) -> None:
    """Write the argument file of the run, or check that an existing one has the same arguments."""
    make_output_dir(run.folder)
    arguments = run_arguments(run, given)
    if run.arguments_file.is_file():
        before = json.loads(run.arguments_file.read_text(encoding="utf-8"))
        for name in sorted((before.keys() | arguments.keys()) - TECHNICAL):
            if before.get(name) != arguments.get(name):
                raise UserError(
                    f"{str(run.folder)!r} belongs to a run with other arguments: {name} was {_shown(before, name)} "
                    f"and is {_shown(arguments, name)} now. Use another --output_dir, or delete that folder"
                )
    write_json(run.arguments_file, arguments)


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not given"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file atomically: it is either complete or does not exist."""
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
    """Perform the unfinished runs, one by one here or in parallel processes, and return the summary of all runs.

    Args:
        runs: all runs.
        given: the arguments that were given, see `given_values`.
        training: arguments with the devices and the rank of this process.
        parallel: number of runs at a time.
        train: `run_glue.main`, called with the argument file of a run.
        script: path of run_glue.py, for parallel processes.
    """
    if parallel is not None and parallel < 1:
        raise UserError(f"--parallel is {parallel}; it must be at least 1")
    devices = visible_devices(training)
    workers = parallel or max(1, len(devices))
    if training.world_size > 1 and workers > 1 and parallel:
        raise UserError("--parallel starts its own processes and cannot be combined with torchrun")
    with training.main_process_first(desc="plan of the runs"):
        if training.process_index == 0:
            for planned in runs:
                prepare(planned, given)
    todo = [planned for planned in runs if not planned.is_finished]
    if training.process_index == 0 and len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are already finished")
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
    """Delete the checkpoints of a finished run, which would fill the disk; its final model stays."""
    if training is None or training.process_index == 0:
        for folder in run.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            rmtree(folder)


# ------------------------------------------------------------------------------------------- processes of their own


def visible_devices(training: TrainingArguments) -> list[str]:
    """Return the GPUs of this process, with the names of CUDA_VISIBLE_DEVICES."""
    if training.device.type != "cuda":
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(i) for i in range(torch.cuda.device_count())]


def run_processes(runs: list[Run], workers: int, devices: list[str], script: Path) -> None:
    """Perform each run in its own process with one device, `workers` at a time; a failure stops further starts.

    Raises:
        UserError: for a failed run, with its name and log.
    """
    slots, failed = SimpleQueue(), threading.Event()
    for i in range(workers):
        slots.put(devices[i % len(devices)] if devices else None)
    futures: dict[Path, Future] = {}

    def do(planned: Run) -> None:
        if planned.first in futures:  # it was started before this one, so it finishes
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
    """Perform one run in its own process, which writes to log.txt."""
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
        raise UserError(f"{run} ended with exit code {code}: {lines[-1] if lines else 'no output'} (full log: {log})")
    remove_checkpoints(run)


def stop_with_parent() -> None:
    """Make a process that `launch` started exit when its parent does, which closes the pipe between them.

    It has no effect in other processes.
    """
    if os.environ.pop(SUPERVISED, None) is None:
        return

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
