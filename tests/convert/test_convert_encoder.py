"""The command line on folders of other encoders."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from lion_hf.convert import command, from_encoder


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", "sleeps"]
SHAPE = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
IDS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


@pytest.fixture
def modern(tmp_path):
    """Return the folder of a ModernBERT with layers of global, local, local and global attention."""
    source = ModernBertForMaskedLM(ModernBertConfig(**SHAPE, **IDS, num_hidden_layers=4, vocab_size=len(WORDS)))
    source.save_pretrained(tmp_path / "modern")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "modern")
    return tmp_path / "modern"


def test_a_text_encoder_is_written_with_its_tokenizer_and_a_card(modern, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(modern, out, "--layers", "0", "--mask-type", "lion-d") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {out}: LionForMaskedLM with ")
    assert "layers 0: LION-D\nlayers 3: softmax attention\nlayers 1, 2: softmax attention in windows of 128\n" in told
    expected = from_encoder(modern, "decay", layers=[0])
    loaded = AutoModel.from_pretrained(out)
    assert all(
        torch.equal(x, expected.lion.state_dict()[name])
        for name, x in loaded.state_dict().items()
        if "pool" not in name
    )
    assert AutoTokenizer.from_pretrained(out)("the lion")["input_ids"] == [2, 5, 6, 3]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# LION-D from modern" in card and "- softmax attention: 3" in card and "licence of `modern` covers" in card
    assert str(tmp_path) not in card, "a card does not name folders of this machine"


@pytest.mark.parametrize("layers, softmax", [("none", [0, 3]), ("all", []), (None, [])])
def test_layers_are_chosen_by_a_flag(modern, tmp_path, layers, softmax):
    assert run(modern, tmp_path / "out", *(["--layers", layers] if layers else [])) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["softmax_layers"] == softmax


def test_an_image_encoder_is_written_with_its_processor(tmp_path):
    ViTModel(ViTConfig(**SHAPE, num_hidden_layers=2, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    assert run(tmp_path / "vit", tmp_path / "out", "--image-size", 12, "--order", "s", "--with-code") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["image_size"], config["order"], config["softmax_layers"]) == (12, "s", [1])
    assert (tmp_path / "out/preprocessor_config.json").exists() and (tmp_path / "out/modeling_lion_vision.py").exists()


def test_a_dry_run_writes_nothing(modern, tmp_path, capsys):
    assert run(modern, "--dry-run") == 0
    assert "becomes LionForMaskedLM" in capsys.readouterr().out
    assert sorted(x.name for x in tmp_path.iterdir()) == ["modern", "vocab.txt"]


def test_a_folder_is_replaced_only_by_force_and_never_that_of_the_source(modern, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(modern, out) == 0
    before = {x.name: x.read_bytes() for x in out.iterdir()}
    assert run(modern, out) == 2 and "--force to replace it" in capsys.readouterr().err
    assert run(modern, modern, "--force") == 2 and "would overwrite the source" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert run(modern, out, "--force") == 2 and "also holds notes.txt" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    assert before == {x.name: x.read_bytes() for x in out.iterdir()}
    assert run(modern, out, "--force", "--layers", "none") == 0
    assert json.loads((out / "config.json").read_text())["softmax_layers"] == [0, 3]


def test_a_source_without_tokenizer_is_converted_with_a_note(modern, tmp_path, capsys):
    for file in modern.glob("*token*"):
        file.unlink()
    assert run(modern, tmp_path / "out") == 0
    assert "no tokenizer was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ema"], "is an encoder with its own configuration; remove --ema"),
        (["--num-heads", "3"], "remove --num-heads"),
        (["--layers", "0,9"], "layers is [0, 9]; it must be 'all'"),
        (["--image-size", "8"], "the source is a text model"),
        (["--tokenizer", "nowhere/at/all"], "the tokenizer 'nowhere/at/all' does not load"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_nothing_is_written(modern, tmp_path, capsys, flags, message):
    assert run(modern, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["modern", "vocab.txt"]


def test_layers_are_only_for_other_encoders(tmp_path, capsys):
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "out", "--layers", "all") == 2
    assert "--layers is for other encoders" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "x.pt", tmp_path / "out", "--layers", "0;1")
    assert "'0;1' is neither 'all' nor 'none'" in capsys.readouterr().err
