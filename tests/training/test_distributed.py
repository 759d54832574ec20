"""Two processes, or a run that was killed and started again, train exactly as one undisturbed process does."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import Script, run_script
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = [
    "--hidden_size=16",
    "--num_hidden_layers=2",
    "--num_attention_heads=2",
    "--hidden_dropout_prob=0",
    "--use_cpu=true",
    "--disable_tqdm=true",
    "--logging_steps=1",
    "--learning_rate=5e-3",
]


def mlm_command(folder: Path, *flags: str) -> list[str]:
    text = folder.parent / "text.txt"
    if not text.exists():
        random = np.random.default_rng(0)
        words = ["red", "cat", "old", "dog", "saw", "the", "a", "big", "new", "sad"]
        text.write_text("\n".join(" ".join(random.choice(words, 9)) for _ in range(75)) + "\n")
    data = [f"--train_file={text}", f"--validation_file={text}", "--max_length=12", "--vocab_size=60"]
    return [str(EXAMPLES / "run_mlm.py"), f"--output_dir={folder}", *data, "--line_by_line=true", *TINY, *flags]


def image_command(folder: Path, *flags: str) -> list[str]:
    rows = ["--max_train_samples=75", "--max_eval_samples=20", "--augment=shift"]
    return [str(EXAMPLES / "run_image_classification.py"), f"--output_dir={folder}", *rows, *TINY, *flags]


def bert_command(folder: Path, *flags: str) -> list[str]:
    return mlm_command(folder, "--model_type=bert", *flags)


def warm_command(folder: Path, *flags: str) -> list[str]:
    """Starts from a BERT and stays near its hidden states."""
    source = folder.parent / "bert"
    if not source.exists():
        mlm_command(folder)  # writes the text
        words = sorted(set((folder.parent / "text.txt").read_text().split()))
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
        tokenizer.save_pretrained(source)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **shape)).save_pretrained(
            source
        )
    sizes = ("--hidden_size", "--num_hidden_layers", "--num_attention_heads", "--vocab_size")
    command = [flag for flag in mlm_command(folder, *flags) if not flag.startswith(sizes)]
    return [*command, f"--warm_start={source}", "--warm_start_distillation=1"]


COMMANDS = {"text": mlm_command, "image": image_command}


def run(command: list[str], processes: int = 1) -> str:
    folder = next(flag for flag in command if flag.startswith("--output_dir=")).partition("=")[2]
    return run_script(command, Path(f"{folder}.txt"), processes)


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    expected, found = losses(one), losses(other)
    assert len(expected) > 5 and expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=tolerance)
    weights, again = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name in weights:
        torch.testing.assert_close(again[name], weights[name], rtol=tolerance, atol=tolerance)
    results = [json.loads((folder / "all_results.json").read_text())["eval_loss"] for folder in (one, other)]
    assert results[0] == pytest.approx(results[1], rel=tolerance)


@pytest.mark.parametrize(
    "command, accumulations",
    [
        (mlm_command, (1, 2)),
        *(
            pytest.param(command, counts, marks=pytest.mark.slow)
            for command, counts in ((image_command, (1, 2)), (bert_command, (2,)), (warm_command, (2,)))
        ),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_two_processes_train_as_one(tmp_path, command, accumulations):
    """75 rows in global batches of 16: the last batch has 11, or with accumulation 8 + 3, in no process the same."""
    flags = ["--num_train_epochs=2", "--save_strategy=no", "--eval_strategy=no"]
    one = tmp_path / "one"
    run(command(one, *flags, "--per_device_train_batch_size=16"))
    for steps in accumulations:
        two = tmp_path / f"two-{steps}"
        size = [f"--per_device_train_batch_size={8 // steps}", f"--gradient_accumulation_steps={steps}"]
        run(command(two, *flags, *size), processes=2)
        assert_same_run(one, two, 1e-5)


@pytest.mark.parametrize("command", [mlm_command, bert_command], ids=lambda command: command.__name__)
def test_a_process_without_a_row_does_not_count(tmp_path, command):
    """65 rows in global batches of 8: the last one has a single row, so one process has none."""
    flags = ["--num_train_epochs=1", "--max_train_samples=65", "--save_strategy=no", "--eval_strategy=no"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(command(one, *flags, "--per_device_train_batch_size=8"))
    run(command(two, *flags, "--per_device_train_batch_size=4"), processes=2)
    assert_same_run(one, two, 1e-5)


@pytest.mark.parametrize("kind", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, kind):
    """kill -9 between two checkpoints; a newer checkpoint that was cut off while being written is skipped."""
    flags = ["--max_steps=60", "--per_device_train_batch_size=8", "--save_strategy=steps", "--save_steps=7"]
    flags += ["--hidden_dropout_prob=0.1", "--eval_strategy=no"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(COMMANDS[kind](undisturbed, *flags))
    script = Script(COMMANDS[kind](killed, *flags), tmp_path / "killed.txt")
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-14" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    script.process.kill()  # the signal 9
    script.process.join()
    assert not (killed / "all_results.json").exists(), "the run was over before it was killed"
    damaged = killed / "checkpoint-59"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes(b"cut off")
    told = run(COMMANDS[kind](killed, *flags))
    assert "checkpoint-59, which is incomplete" in told
    assert_same_run(undisturbed, killed, 1e-6)
    before = (killed / "model.safetensors").read_bytes()
    run(COMMANDS[kind](killed, *flags))  # it is finished, so nothing changes
    assert (killed / "model.safetensors").read_bytes() == before
    assert_same_run(undisturbed, killed, 1e-6)


def test_fully_sharded_parameters_train_as_whole_ones(tmp_path):
    """PyTorch's fully_shard on two processes: every variant in every form ends with the weights of one process."""
    worker = Path(__file__).parent / "fully_shard_worker.py"
    assert run_script([str(worker), "float32"], tmp_path / "log.txt", processes=2).count("equal") == 9


@pytest.mark.slow
def test_fully_sharded_parameters_train_in_bfloat16(tmp_path):
    """Every variant ends near the weights of float32 where bfloat16 computes, and where a model is loaded in it."""
    worker = Path(__file__).parent / "fully_shard_worker.py"
    told = run_script([str(worker), "bfloat16"], tmp_path / "log.txt", processes=2)
    assert told.count("loaded in bfloat16: near") == told.count("computed in bfloat16: near") == 3


@pytest.mark.parametrize("file", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_option_of_the_configurations(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))
    options = {action.dest for action in launch_command_parser()._actions}
    settings = {**config.fsdp_config, **config.deepspeed_config}
    assert config.num_processes == 8 and settings and set(settings) <= options


def test_a_finished_script_ends_the_threads_of_its_process_group(examples):
    """Threads of gloo that meet the interpreter's own end abort the process now and then."""
    from lion_hf.training.errors import run

    def threads() -> set[str]:
        return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}

    run(lambda: dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1))
    assert not dist.is_initialized()
    assert not any("gloo" in name for name in threads())
