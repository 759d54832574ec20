"""run_glue.py: several tasks and seeds, and the GLUE score."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path

import psutil
import pytest
import torch
from glue_script import ONE_STEP, TINY, labelled_rows, write
from transformers import AutoModelForSequenceClassification

import lion_hf
from lion_hf.training.recipes import presets_of


pytestmark = pytest.mark.usefixtures("examples")

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [(file, preset) for file in sorted((EXAMPLES / "recipes/glue").glob("*.yaml")) for preset in presets_of(file)]


# ----------------------------------------------------------------------------------------------------------- score


def result_of(task, seed=17, **metrics):
    from lion_hf.training.glue.tasks import TASKS

    metrics = metrics or dict.fromkeys(TASKS[task].evaluated, 0.5)
    return {
        "task": task,
        "seed": seed,
        "score_metrics": list(TASKS[task].evaluated),
        "metrics": metrics,
        "arguments": {},
    }


def all_results(**replaced):
    from lion_hf.training.glue.tasks import TASKS

    return [result for task in TASKS for result in replaced.get(task, [result_of(task)])]


def test_the_score_is_the_mean_over_tasks_of_the_mean_over_seeds_and_metrics():
    from lion_hf.training.glue.summary import summarise

    summary = summarise(
        all_results(
            mnli=[result_of("mnli", matched_accuracy=0.8, mismatched_accuracy=0.7, loss=9.0)],  # 0.75
            qqp=[result_of("qqp", accuracy=0.9, f1=0.8)],  # 0.85
            mrpc=[result_of("mrpc", 17, accuracy=0.1, f1=0.8), result_of("mrpc", 18, accuracy=0.3, f1=0.6)],  # 0.7
            stsb=[result_of("stsb", pearson=0.1, spearmanr=0.9)],
            wnli=[result_of("wnli", accuracy=1.0)],  # not in the score
        )
    )
    assert summary["glue_score"] == pytest.approx((0.75 + 0.85 + 0.7 + 0.9 + 4 * 0.5) / 8)
    mrpc = summary["tasks"]["mrpc"]
    assert mrpc["score"] == pytest.approx({"mean": 0.7, "std": math.sqrt(0.02)})
    assert mrpc["metrics"]["accuracy"]["mean"] == pytest.approx(0.2)
    assert summary["tasks"]["qqp"]["score"]["std"] is None  # one seed


@pytest.mark.parametrize("case", ["missing", "toy", "no number", "no mismatched"])
def test_there_is_no_glue_score_without_all_of_glue(case, tmp_path):
    from lion_hf.training.glue.summary import write_summary

    results = all_results()
    if case == "missing":
        results = [result for result in results if result["task"] not in ("cola", "wnli")]
    elif case == "toy":
        results[3]["arguments"] = {"builtin_data": True}
    elif case == "no number":
        results = all_results(stsb=[result_of("stsb", 17, spearmanr=None), result_of("stsb", 18, spearmanr=0.5)])
    else:
        results = all_results(mnli=[result_of("mnli", matched_accuracy=0.8)])
    reason = {"missing": "CoLA", "toy": "toy data", "no number": "STS-B", "no mismatched": "mismatched_accuracy"}[case]
    write_summary(tmp_path, results)
    summary = json.loads((tmp_path / "glue.json").read_text())
    assert summary["glue_score"] is None and reason in summary["no_glue_score"][0]
    text = (tmp_path / "glue.md").read_text()
    assert "No GLUE score" in text and reason in text and "GLUE score:" not in text.replace("No GLUE score:", "")
    assert (tmp_path / "glue.png").stat().st_size > 1000


# ----------------------------------------------------------------------------------------------------------- suite


def test_runs_count_seeds_and_wait_for_mnli():
    from lion_hf.training.errors import UserError
    from lion_hf.training.glue.suite import plan_runs, run_arguments
    from lion_hf.training.glue.tasks import TASKS

    runs = plan_runs(list(TASKS.values()), None, 17, "out", True)
    counts = {name: [run.seed for run in runs if run.task == name] for name in TASKS}
    assert counts["mrpc"] == [17, 18, 19, 20, 21] and counts["mnli"] == [17] and len(runs) == 30
    first = {run.first for run in runs if run.task in ("rte", "mrpc", "stsb")}
    assert first == {Path("out/mnli/17")} and all(run.first is None for run in runs if run.task == "cola")
    assert len(plan_runs([TASKS["rte"]], None, 1, "out", False)) == 1
    given = {"preset": "lion-s-base", "hidden_size": 8, "format": "chunk", "learning_rate": 1e-3, "task": ["all"]}
    arguments = run_arguments(runs[-6], given | {"tokenizer_name": "x", "vocab_size": 99})
    assert arguments["task"] == ["rte"] and arguments["model_name_or_path"] == "out/mnli/17"
    assert arguments["format"] == "chunk" and not {"preset", "hidden_size", "tokenizer_name", "vocab_size"} & set(
        arguments
    )
    with pytest.raises(UserError, match="num_seeds"):
        plan_runs([TASKS["rte"]], -1, 17, "out", False)


def test_a_suite_skips_what_is_finished_and_goes_on_with_the_rest(run_glue):
    from lion_hf.training.errors import UserError

    write("train.csv", "text,label\n" + labelled_rows(24))
    flags = ["--output_dir=out", *TINY, "--train_file=train.csv", "--num_seeds=2", "--num_train_epochs=2"]
    flags += ["--validation_share=0.34", "--eval_strategy=no", "--logging_steps=1"]
    summary = run_glue(flags)
    assert set(summary["tasks"]["custom"]["seeds"]) == {"17", "18"} and summary["glue_score"] is None
    results = {seed: Path(f"out/custom/{seed}/glue_result.json") for seed in (17, 18)}
    assert not list(Path("out").glob("*/*/checkpoint-*"))

    # A run that was stopped after its first epoch: a checkpoint of half the steps, and no result.
    (before,) = [summary["tasks"]["custom"]["seeds"]["18"]]
    losses = json.loads(Path("out/custom/18/trainer_state.json").read_text())["log_history"]
    results[18].unlink()
    run_glue([str(results[18].with_name("arguments.json"))])
    results[18].unlink()
    last, first = sorted(Path("out/custom/18").glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    (last / "trainer_state.json").unlink()
    state = json.loads((first / "trainer_state.json").read_text())
    state["log_history"].insert(0, {"step": 0, "from": "the checkpoint"})
    (first / "trainer_state.json").write_text(json.dumps(state))
    written = results[17].stat().st_mtime_ns
    out = io.StringIO()
    with redirect_stdout(out):
        again = run_glue(flags)
    assert "1 of 2 runs are already finished" in out.getvalue()
    assert results[17].stat().st_mtime_ns == written and results[18].is_file() and first != last
    history = json.loads(Path("out/custom/18/trainer_state.json").read_text())["log_history"]
    assert {"step": 0, "from": "the checkpoint"} in history
    assert [x["loss"] for x in history if "loss" in x] == pytest.approx([x["loss"] for x in losses if "loss" in x])
    assert again["tasks"]["custom"]["seeds"]["18"] == pytest.approx(before)

    with pytest.raises(UserError, match=r"learning_rate was not given and is 0\.1 now"):
        run_glue([*flags, "--learning_rate=0.1"])
    assert run_glue([*flags, "--logging_steps=5"])["tasks"] == again["tasks"]  # does not change the results


def test_sts_b_is_trained_in_float32_between_tasks_in_bf16(run_glue, monkeypatch):
    """Training in bf16 in one process, with the autocast of the CPU in place of an accelerator's."""
    import transformers.training_args

    from lion_hf.training import arguments

    for module in (arguments, transformers.training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)
    forward, seen = lion_hf.LionForSequenceClassification.forward, []

    @wraps(forward)
    def record(self, *args, **kwargs):
        seen.append((self.config.problem_type, torch.is_autocast_enabled("cpu")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(lion_hf.LionForSequenceClassification, "forward", record)
    flags = [flag for flag in ONE_STEP if not flag.startswith("--use_cpu")]
    flags += ["--bf16=true", "--builtin_data=true", "--max_train_samples=8", "--num_seeds=1", "--parallel=1"]
    run_glue(["--output_dir=out", *flags, "--task", "cola", "stsb", "rte"])
    assert set(seen) == {("single_label_classification", True), ("regression", False)}


def test_a_failed_run_is_named(run_glue):
    from lion_hf.training.errors import UserError

    Path("data/rte").mkdir(parents=True)
    Path("data/wnli").mkdir(parents=True)
    write("data/rte/train.csv", "sentence1,sentence2,label\na b,c,5\n")
    write("data/wnli/train.csv", "sentence1,sentence2,label\na b,c,0\n")
    with pytest.raises(UserError, match=r"rte, seed 17: row 1 .* label 5"):
        run_glue(["--output_dir=out", *ONE_STEP, "--data_dir=data", "--task", "wnli", "rte", "--num_seeds=1"])


COMMAND = [sys.executable, str(EXAMPLES / "run_glue.py"), "--output_dir=out", *ONE_STEP, "--builtin_data=true"]


@pytest.mark.slow
def test_all_tasks_with_smoke(run_glue):
    summary = run_glue(
        [str(EXAMPLES / "recipes/glue/lion.yaml"), "--preset=lion-s-base", "--smoke", "--from_mnli=true"]
    )
    from lion_hf.training.glue.tasks import TASKS

    assert set(summary["tasks"]) == set(TASKS) and summary["glue_score"] is None
    folder = Path("outputs/recipes/glue/lion-s-base-smoke")
    files = {"CoLA", "MNLI-m", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"}
    assert {file.stem for file in (folder / "submission").glob("*.tsv")} == files
    assert AutoModelForSequenceClassification.from_pretrained(folder / "stsb" / "17").config.num_labels == 1


@pytest.mark.slow
def test_processes_end_with_their_parent_and_the_next_call_finishes_the_runs(tmp_path):
    """After kill -9 of the command no child process keeps writing, and the same command finishes the runs."""
    flags = ["--task", "mnli", "rte", "--num_seeds=1", "--from_mnli=true", "--parallel=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*COMMAND, *flags], cwd=tmp_path, env=environment)
    while not (tmp_path / "out/mnli/17/log.txt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(600):
        alive = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            break
        time.sleep(0.1)
    assert children and not alive and not list(tmp_path.glob("out/*/*/glue_result.json"))
    result = subprocess.run([*COMMAND, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mnli, seed 17: score" in result.stdout and "rte, seed 17: score" in result.stdout
    assert json.loads((tmp_path / "out/rte/17/arguments.json").read_text())["model_name_or_path"] == "out/mnli/17"


@pytest.mark.slow
def test_a_failed_process_is_named_with_its_log(tmp_path):
    flags = ["--task=rte", "--num_seeds=2", "--parallel=2", "--format=fast"]
    result = subprocess.run([*COMMAND, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "fast" in last and "out/rte/17/log.txt" in last
