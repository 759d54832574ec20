"""Converted folders give the logits of the authors' checkpoints; errors are one line and write no file."""

import configparser
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    IMAGE,
    IMAGE_EXPECTED,
    TEXT,
    TEXT_EXPECTED,
    bare_image,
    bare_text,
    composer,
    deit,
    golden,
    relative,
    save,
)
from safetensors.torch import load_file, save_file
from small_models import vision_config
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

import lion_hf
from lion_hf.convert import checkpoint, command, convert_checkpoint


AUTO = {
    "LionForImageClassification": AutoModelForImageClassification,
    "LionForMaskedLM": AutoModelForMaskedLM,
    "LionForSequenceClassification": AutoModelForSequenceClassification,
}


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


@pytest.fixture
def out(tmp_path):
    """A path in an empty folder."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def listing(folder):
    """Return every file below a folder with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def logits(folder, tensors):
    """Return the float64 logits of a folder's model, loaded by its Auto class, for the inputs of a golden file."""
    head = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = AUTO[head].from_pretrained(folder, dtype=torch.float64).eval()
    inputs = {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


# ----------------------------------------------------------------------------------------------- the authors' outputs


@pytest.mark.parametrize("source, expected", [(IMAGE, IMAGE_EXPECTED), (TEXT, TEXT_EXPECTED)], ids=["image", "text"])
def test_golden_checkpoints_give_the_authors_logits(source, expected, out, capsys):
    assert run(source, out) == 0
    tensors = load_file(expected)
    assert relative(logits(out, tensors), tensors["output.attention.logits_float64"]) < 1e-9
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {out}: LionFor") and told.count("\n") == 1 + 4 * (source == TEXT)
    assert os.listdir(out.parent) == ["out"]


def test_averaged_weights_give_the_authors_averaged_logits(out):
    assert run(IMAGE, out, "--ema") == 0
    tensors = load_file(IMAGE_EXPECTED)
    actual = logits(out, tensors)
    assert relative(actual, tensors["output.attention_ema.logits"].double()) < 1e-6  # stored in float32 only
    assert relative(actual, tensors["output.attention.logits_float64"]) > 1e-3


IMAGES = ["vision_lit_normal_cls", "vision_decay_normal_pos_cls", "vision_selective_s"]
TEXTS = ["text_lit_yaml", "text_d_yaml", "text_s_ln_holes", "text_cls_d"]


@pytest.mark.parametrize("name", IMAGES + TEXTS)
def test_checkpoints_of_every_variant_and_head_give_the_authors_logits(name, tmp_path, out):
    weights, tensors, config = golden(name)
    content = (deit if name in IMAGES else composer)(weights, config)
    flags = ["--num-heads", config["num_heads"]] if name == "vision_lit_normal_cls" else []
    assert run(save(content, tmp_path / "source.pt"), out, *flags) == 0
    assert relative(logits(out, tensors), tensors["output.attention.logits"]) < 1e-9


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_bare_weights_give_the_authors_logits_once_the_questions_are_answered(suffix, tmp_path, out):
    weights, tensors, config = golden("vision_lit_normal_cls")
    source = tmp_path / f"source.{suffix}"
    save_file(weights, source) if suffix == "safetensors" else torch.save(weights, source)
    answers = ["--mask-type", "LIT", "--num-heads", config["num_heads"], "--cls-tok", "True", "--order", "Normal"]
    assert run(source, out, *answers, "--image-size", config["img_size"]) == 0
    assert relative(logits(out, tensors), tensors["output.attention.logits"]) < 1e-9


@pytest.mark.parametrize("spelling", ["LION-S", "Selective", "lion-s"])
def test_every_spelling_of_a_variant_is_accepted(spelling, tmp_path, out, capfd):
    source = save(bare_text("selective")[0], tmp_path / "source.pt")
    assert run(source, out, "--mask-type", spelling) == 0
    assert_refused(
        capfd, out, source, "--dry-run", "--mask-type", "LION-D", match="mask_type is 'decay' .* 'selective'"
    )


def test_heads_of_lit_by_the_name_of_the_model_and_no_head_at_all(tmp_path, out):
    weights, model = bare_image("lit", num_attention_heads=6, num_labels=0)
    description = {"mask_type": "Lit", "order": "Normal", "pos_emb": False, "cls_tok": False, "img_size": 16}
    content = deit(weights, description | {"num_classes": 0})
    content["args"].model = "lion_small_patch16_224"
    assert run(save(content, tmp_path / "source.pth"), out) == 0
    pixels = torch.randn(2, 3, 16, 16)
    loaded = AutoModelForImageClassification.from_pretrained(out).eval()
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path, out):
    weights, _ = bare_text("selective")
    weights = {name: x.to(dtype) if x.is_floating_point() else x for name, x in weights.items()}
    assert run(save(weights, tmp_path / "source.pt"), out) == 0
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_an_untied_decoder_stays_untied(tmp_path, out):
    weights, model = bare_text("decay", tie_word_embeddings=False)
    assert run(save(weights, tmp_path / "source.pt"), out) == 0
    ids = torch.arange(8)[None]
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(out)(ids).logits, model(ids).logits)


def test_dead_tables_are_dropped_with_a_note_and_may_be_missing(tmp_path, out, capsys):
    weights, _, config = golden("text_d_yaml")
    assert run(save(composer(weights, config), tmp_path / "source.pt"), out) == 0
    assert re.search(r"dropped \S+position_embeddings.weight: a position table that", capsys.readouterr().out)
    first = load_file(out / "model.safetensors")
    assert not any("position" in name for name in first)
    del weights["bert.embeddings.position_embeddings.weight"]
    assert run(save(composer(weights, config), tmp_path / "source.pt"), out, "--force") == 0
    assert "position_embeddings" not in capsys.readouterr().out
    assert all(torch.equal(x, first[name]) for name, x in load_file(out / "model.safetensors").items())


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("source", [IMAGE, TEXT], ids=["image", "text"])
def test_dry_run_shows_every_name_and_writes_nothing(source, out, capsys):
    before = listing(out.parent)
    assert run(source, out, "--dry-run") == 0
    table = capsys.readouterr().out
    assert run(source, "--dry-run") == 0
    assert capsys.readouterr().out == table
    assert listing(out.parent) == before
    plan = convert_checkpoint(source, None)
    for name in (*plan.source.weights, *plan.model.state_dict(), *plan.origins):
        assert name in table or name == "head.decoder.weight"
    assert plan.renamed.keys() | plan.dropped.keys() == plan.source.weights.keys()
    assert f"{plan.model.num_parameters():,}" in table and plan.source.layout in table
    for name, reason in plan.dropped.items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(reason)}$", table, re.M)


def test_dry_run_of_the_way_back_shows_the_same_names(tmp_path, capsys):
    assert run(TEXT, tmp_path / "ours") == 0
    capsys.readouterr()
    assert run("--reverse", tmp_path / "ours", "--dry-run") == 0
    assert "bert.encoder.layer.1.attention.self.ai" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["ours"]


# ------------------------------------------------------------------------------------------------------------- errors


def assert_refused(capfd, out, *arguments, match):
    """Check for exit code 2, one line with the reason, and no change in the folder of `out`."""
    before = listing(out.parent)
    capfd.readouterr()
    assert run(*arguments) == 2
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("lion-convert: error: ") and told.err.count("\n") == 1, told
    assert re.search(match, told.err), told.err
    assert listing(out.parent) == before


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.slow
def test_the_module_runs_as_a_command_and_refuses_a_hostile_pickle_in_one_line(tmp_path, out):
    source = save({"model": Hostile(tmp_path / "marker")}, tmp_path / "source.pth")
    module = [sys.executable, "-m", "lion_hf.convert"]
    done = subprocess.run([*module, source, out], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    *others, last = done.stderr.splitlines()  # other libraries may print warnings when Transformers is imported
    assert re.fullmatch(r"lion-convert: error: .* refers to \w+\.mkdir.*", last), done.stderr
    assert not any("Traceback" in line for line in others), done.stderr
    assert not (tmp_path / "marker").exists() and not os.listdir(out.parent)


def test_the_console_command_is_the_same_function():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    module, _, function = dict(line.split(" = ") for line in lines)["lion-convert"].partition(":")
    assert getattr(importlib.import_module(module), function) is command.main


def changed(change, make=bare_text, mask_type="decay"):
    """Return weights after a change."""
    weights, _ = make(mask_type)
    change(weights)
    return weights


FIRST = "bert.encoder.layer.0."
WRONG = {
    "surplus": (
        lambda w: w.update({"bert.encoder.layer.0.gate.weight": torch.zeros(2)}),
        "gate.weight' is not a name.*; remove",
    ),
    "missing": (
        lambda w: w.pop(FIRST + "output.dense.weight"),
        "lacks 1 tensor.*: bert.encoder.layer.0.output.dense.weight",
    ),
    "lone gate": (
        lambda w: w.pop("bert.encoder.layer.1.attention.self.ai"),
        "lacks 1 tensor.*: bert.encoder.layer.1.attention.self.ai",
    ),
    "layer": (lambda w: [w.pop(n) for n in list(w) if ".layer.0.output" in n], "lacks 4 tensor.*, ..."),
    "shape": (lambda w: w.update({FIRST + "output.dense.bias": torch.zeros(7)}), r"has the shape \(7,\), .*\(24,\)"),
    "nan": (lambda w: w[FIRST + "attention.self.query.weight"].fill_(torch.nan), "query.weight contains .* finite"),
    "integers": (
        lambda w: w.update({FIRST + "output.dense.bias": torch.zeros(24, dtype=int)}),
        "dtype torch.int64; it must be",
    ),
    "endless": (
        lambda w: w.update({FIRST + "output.dense.bias": torch.zeros(1).expand(10**14)}),
        "output.dense.bias cannot be read: .*memory",
    ),
    "overflow": (
        lambda w: w[FIRST + "output.dense.weight"].fill_(3e38),
        "outputs of the converted model are not finite",
    ),
    "two biases": (lambda w: w.update({"cls.predictions.bias": torch.ones(61)}), "decoder.bias differ"),
    "selective too": (
        lambda w: w.update({FIRST + "attention.self.Wa_i.weight": torch.zeros(3, 24)}),
        "contains 1 tensor.* does not have: bert.encoder.layer.0.attention.self.Wa_i.weight",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_do_not_make_a_model_are_refused(kind, tmp_path, out, capfd):
    change, message = WRONG[kind]
    source = save(changed(change), tmp_path / "source.pt")
    assert_refused(capfd, out, source, out, match=message)
    assert_refused(capfd, out, source, "--dry-run", match=message)


WRONG_IMAGES = {
    "surplus": (
        lambda w: w.update({"extra.weight": torch.zeros(2)}),
        "'extra.weight' is not a name.*image models; remove",
    ),
    "missing": (lambda w: w.pop("blocks.1.mlp.fc1.weight"), "lacks 1 tensor.*: blocks.1.mlp.fc1.weight"),
    "stacked": (lambda w: w.pop("blocks.1.attn.qkv.weight"), "lacks 1 tensor.*: blocks.1.attn.qkv.weight"),
    "shape": (
        lambda w: w.update({"blocks.1.attn.qkv.bias": torch.zeros(9)}),
        r"q_proj.bias, from blocks.1.attn.qkv.bias, has the shape \(3,\), .*\(24,\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_image_weights_that_do_not_make_a_model_are_named_as_in_the_file(kind, tmp_path, out, capfd):
    change, message = WRONG_IMAGES[kind]
    source = save(changed(change, bare_image), tmp_path / "source.pth")
    assert_refused(capfd, out, source, out, "--cls-tok", "true", "--image-size", 16, match=message)


def test_an_image_projection_that_does_not_split_is_refused(tmp_path, out, capfd):
    weights, _ = bare_image("decay")
    weights["blocks.1.attn.qkv.weight"] = torch.zeros(2, 24)
    source = save(weights, tmp_path / "source.pth")
    assert_refused(capfd, out, source, out, "--cls-tok", "true", "--image-size", 16, match="source.pth")


def test_a_bert_is_refused(tmp_path, out, capfd):
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "vocab_size": 61,
    }
    source = save(BertForMaskedLM(BertConfig(**sizes)).state_dict(), tmp_path / "bert.pt")
    assert_refused(capfd, out, source, out, match="or to a plain BERT or ViT")


@pytest.mark.parametrize(
    "arguments, match",
    [
        ([IMAGE], "OUT is missing"),
        ([IMAGE, "{out}", "--tokenizer", "x"], "--tokenizer is for text"),
        ([TEXT, "{out}", "--ema"], "no averaged weights"),
        ([TEXT, "{out}", "--tokenizer", "{out}/none"], "does not load"),
        ([TEXT, "{out}", "--num-heads", "5"], "num_attention_heads is 5 according to the flag, but 4"),
        (["--reverse", "{out}", "{out}2", "--num-heads", "3", "--ema"], "remove --ema, --num-heads"),
        (["--reverse", IMAGE, "{out}"], "is not a LION folder"),
        (["none.pth", "{out}"], "does not exist"),
        ([IMAGE, f"{IMAGE}/out"], "is not a folder; give another path"),
        ([IMAGE, f"{IMAGE}/in/between"], "is not a folder; give another path"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match, out, capfd):
    assert_refused(capfd, out, *(str(a).replace("{out}", str(out)) for a in arguments), match=match)


# ------------------------------------------------------------------------------------------------------------ writing


def test_what_exists_is_replaced_only_by_force_and_only_if_it_is_a_checkpoint(out, tmp_path, capfd):
    assert run(TEXT, out) == 0
    assert_refused(capfd, out, IMAGE, out, match="exists; give another path, or --force")
    assert run(IMAGE, out, "--force") == 0
    assert "LionForImageClassification" in (out / "config.json").read_text()
    assert not (out / "tokenizer.json").exists()
    assert os.listdir(out.parent) == ["out"]
    (out / "config.json").write_text('{"model_type": "bert"}')
    assert_refused(capfd, out, IMAGE, out, "--force", match="something other than a LION checkpoint")
    (out / "config.json").unlink()
    assert_refused(capfd, out, IMAGE, out, "--force", match="something other than a LION checkpoint")


def test_missing_folders_are_created_and_empty_ones_are_filled(out, capfd):
    deep = out / "in" / "between"
    assert_refused(capfd, out, IMAGE, deep, "--num-heads", "5", match="num_attention_heads is 5")
    assert run(IMAGE, deep) == 0 and (deep / "config.json").is_file()
    empty = out / "empty"
    empty.mkdir()
    assert run(IMAGE, empty) == 0 and (empty / "config.json").is_file()
    assert run("--reverse", empty, out / "new" / "back.pth") == 0 and (out / "new" / "back.pth").is_file()


def test_a_missing_source_is_reported_before_an_existing_output(out, capfd):
    assert run(IMAGE, out) == 0
    for arguments in (["none.pth", out], ["--reverse", "none", out]):
        assert run(*arguments) == 2
        assert "does not exist" in capfd.readouterr().err


def test_files_and_folders_do_not_replace_each_other_nor_the_source(out, tmp_path, capfd):
    out.touch()
    assert_refused(capfd, out, IMAGE, out, "--force", match="is a file; give a folder")
    out.unlink()
    assert run(IMAGE, out) == 0
    assert_refused(capfd, out, "--reverse", out, out.parent, "--force", match="is a folder; give a file")
    (out / "source.pth").write_bytes(IMAGE.read_bytes())
    assert_refused(capfd, out, out / "source.pth", out, "--force", match="would overwrite the source")
    back = out.parent / "back.pth"
    assert run("--reverse", out, back) == 0
    assert_refused(capfd, out, "--reverse", out, back, match="exists")
    before = back.stat().st_mtime_ns
    assert run("--reverse", out, back, "--force") == 0 and back.stat().st_mtime_ns > before


def test_force_loses_nothing_but_a_conversion(out, tmp_path, capfd):
    assert run(IMAGE, out) == 0
    kept = (out / "model.safetensors").read_bytes()
    (out / "checkpoint-2").mkdir()
    assert_refused(capfd, out, IMAGE, out, "--force", match="also holds checkpoint-2, which would be lost")
    (out / "checkpoint-2").rmdir()
    (out / "notes.txt").write_text("mine")
    assert_refused(capfd, out, IMAGE, out, "--force", match="also holds notes.txt, which would be lost")
    weights = out / "model.safetensors"
    assert_refused(capfd, out, "--reverse", out, weights, "--force", match="would overwrite the source")
    mine = tmp_path / "precious.py"
    mine.write_text("mine")
    assert_refused(capfd, out, "--reverse", out, mine, "--force", match="is not a checkpoint and is not replaced")
    assert weights.read_bytes() == kept and mine.read_text() == "mine"


def test_an_empty_folder_and_a_link_are_filled_by_force(out, tmp_path):
    (tmp_path / "real").mkdir()
    out.symlink_to(tmp_path / "real")
    assert run(IMAGE, out, "--force") == 0
    assert out.is_symlink() and (tmp_path / "real" / "config.json").exists()


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("end, code", [(interrupt, 130), (terminate, 143), (fill_disk, 2)])
@pytest.mark.parametrize("existing", [False, True])
def test_what_ends_early_leaves_the_place_as_it_was(end, code, existing, out, monkeypatch, capfd):
    if existing:
        assert run(TEXT, out) == 0
    before, handler = listing(out.parent), signal.getsignal(signal.SIGTERM)
    complete = checkpoint.write_folder

    def half(plan, new, *arguments):
        complete(plan, new, *arguments)
        assert new.parent.parent == out.parent and listing(new)  # beside `out`, and incomplete
        end()

    monkeypatch.setattr(checkpoint, "write_folder", half)
    if code == 143:
        with pytest.raises(SystemExit, match="143"):
            run(IMAGE, out, "--force")
    else:
        assert run(IMAGE, out, "--force") == code
    assert listing(out.parent) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(out, monkeypatch, capfd):
    assert run(TEXT, out) == 0
    rename = Path.rename

    def refuse(self, target):
        if self.name == "new":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert_refused(capfd, out, IMAGE, out, "--force", match="Permission denied")


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(out, monkeypatch, capfd):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(out))

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryDirectory", refuse)
    assert_refused(capfd, out, IMAGE, out, match="Permission denied")


def test_files_are_as_readable_as_those_of_save_pretrained(out, tmp_path):
    lion_hf.LionForImageClassification(vision_config()).save_pretrained(tmp_path / "usual")
    assert run(IMAGE, out) == 0
    assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode
    for name in ("config.json", "model.safetensors"):
        assert (out / name).stat().st_mode == (tmp_path / "usual" / name).stat().st_mode
