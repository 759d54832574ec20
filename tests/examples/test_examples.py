"""The example scripts on tiny data: output files, resuming, and errors for wrong input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import text_config, vision_config
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    ViTImageProcessorPil,
)

import lion_hf


pytestmark = pytest.mark.usefixtures("examples")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = [
    "--hidden_size=16",
    "--num_hidden_layers=1",
    "--num_attention_heads=2",
    "--disable_tqdm=true",
    "--use_cpu=true",
    "--per_device_train_batch_size=8",
]


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(
        "\n".join(f"the {a} cat saw the {b} dog" for a in ("red", "big", "old") for b in ("new", "sad")) + "\n"
    )
    return file


def mlm_flags(text_file, output):
    data = [f"--train_file={text_file}", f"--validation_file={text_file}", "--max_length=16", "--vocab_size=60"]
    return [f"--output_dir={output}", *data, *TINY]


def test_mlm_writes_a_model_that_loads_and_resumes(tmp_path, text_file):
    import run_mlm

    output = tmp_path / "out"
    metrics = run_mlm.main([*mlm_flags(text_file, output), "--num_train_epochs=1"])
    assert {"eval_loss", "eval_masked_accuracy", "eval_perplexity", "eval_unigram_entropy"} <= set(metrics)
    assert json.loads((output / "all_results.json").read_text())["eval_loss"] == pytest.approx(metrics["eval_loss"])
    tokens = len(AutoTokenizer.from_pretrained(output))
    size = AutoModelForMaskedLM.from_pretrained(output).config.vocab_size
    assert tokens <= size < tokens + 8 and size % 8 == 0
    assert (output / "README.md").exists() and list(output.glob("*.png"))
    longer = run_mlm.main([*mlm_flags(text_file, output), "--num_train_epochs=3"])
    state = json.loads((output / "trainer_state.json").read_text())
    # The second run resumed after the first epoch.
    assert longer["epoch"] == 3 and state["log_history"][0]["epoch"] <= 1


def test_arguments_come_from_a_file_and_flags_override_it(tmp_path, text_file):
    import run_mlm

    pairs = (flag.removeprefix("--").split("=") for flag in mlm_flags(text_file, tmp_path / "out"))
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(dict(pairs) | {"max_steps": 5, "save_strategy": "no"}))
    run_mlm.main([str(file), "--max_steps=1"])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


def test_images_train_from_the_built_in_digits(tmp_path):
    import run_image_classification

    flags = [f"--output_dir={tmp_path}", *TINY, "--max_train_samples=16", "--max_eval_samples=8", "--max_steps=1"]
    metrics = run_image_classification.main(flags)
    assert 0 <= metrics["eval_accuracy"] <= 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert len(model.config.id2label) == 10 and AutoImageProcessor.from_pretrained(tmp_path)


NO_HEADER = "(if the first line of the file is data, add a line with the column names)"
STREAM = ["--streaming=true", "--max_steps=1", "--max_eval_samples=1"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_file=absent.txt"], "absent.txt"),
        (["--train_file=empty.txt"], "empty"),
        (
            ["--train_file=table.csv"],
            f"there is no column 'text' (set --text_column); the columns are a, b {NO_HEADER}",
        ),
        (["--train_file=table.csv", *STREAM], f"the columns are a, b {NO_HEADER}"),
        (["--train_file=table.jsonl"], "the columns are a, b"),
        (["flags.yaml"], "flags.yaml sets 'mask_typ', which is not a flag of this script; did you mean 'mask_type'?"),
        (["other.yaml"], "other.yaml sets 'xyz', which is not a flag of this script; is it for another script?"),
        (["--train_file=strange.xyz"], "allowed are .txt"),
        (["--learning_rte=1"], "--learning_rate"),
        (["--mask_type=sideways"], "sideways"),
        (["--format=fast"], "fast"),
        (["--model_name_or_path=."], "has no config.json"),
        (["absent.yaml"], "absent.yaml"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    import run_mlm

    from lion_hf.training.errors import run

    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("table.csv").write_text("a,b\n1,2\n3,4\n")
    Path("table.jsonl").write_text('{"a": 1, "b": 2}\n' * 2)
    Path("flags.yaml").write_text("mask_typ: lit\n")
    Path("other.yaml").write_text("xyz: 1\n")
    Path("strange.xyz").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: run_mlm.main([*flags, "--output_dir=out"]))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error:") and message in last
    assert (NO_HEADER in last) == (NO_HEADER in message)


def test_the_script_itself_ends_so(tmp_path):
    command = [sys.executable, str(EXAMPLES / "run_mlm.py"), "--train_file=absent.txt", "--output_dir=out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: data file 'absent.txt' does not exist" in result.stderr


@pytest.fixture
def trained(tmp_path):
    """Folders of an untrained text model and digits classifier, as the training scripts write them."""
    words = re.findall(r"\S+", "[PAD] [UNK] [CLS] [SEP] [MASK] the a an of to in and is return file string if list")
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    text, digits = tmp_path / "text", tmp_path / "digits"
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(text)
    lion_hf.LionForMaskedLM(text_config(vocab_size=len(words))).save_pretrained(text)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(digits)
    lion_hf.LionForImageClassification(vision_config("decay", image_size=8, patch_size=2)).save_pretrained(digits)
    return text, digits


@pytest.mark.slow
def test_inference_shows_every_use_of_trained_models(tmp_path, trained, capsys):
    import inference

    text, digits = trained
    inference.main([f"--output_dir={tmp_path}", f"--text_model={text}", f"--image_model={digits}"])
    shown = capsys.readouterr().out
    for part in ("correct:", "Each sentence and the most similar one", "The pipeline classifies the image as:\n   "):
        assert part in shown
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("attention.png", "decays.png"))
    assert not (tmp_path / "mlm").exists()  # models that are given are not trained


def test_inference_embeddings_have_length_1_and_do_not_depend_on_company(trained):
    import inference

    together = inference.embed(trained[0], ("return the file", "a list of the string in the file"))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(inference.embed(trained[0], ("return the file",))[0], together[0])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image=absent.png", "cannot read --image 'absent.png'"),
        ("--text_model=absent", "'absent'"),
        ("--text_model={1}", "--text_model '{1}' is not a 'lion' model"),
        ("--image_model={0}", "--image_model '{0}' is not a 'lion_vision' model"),
    ],
    ids=lambda x: x.split("=")[0],
)
def test_inference_refuses_what_does_not_fit_in_one_line(tmp_path, trained, flags, message, capsys, monkeypatch):
    import inference

    from lion_hf.training.errors import run

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(lambda: inference.main([flags.format(*trained), f"--output_dir={tmp_path}"]))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error:") and message.format(*trained) in last
