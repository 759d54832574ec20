"""lion-convert on folders of sentence-transformers: what they hold beside the encoder goes with it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from lion_hf.convert import command
from lion_hf.convert.sentences import sentence_folder, transformer_folder
from lion_hf.hub import files_to_upload
from lion_hf.linearize.card import pooling_of


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", "sleeps", "in", "grass"]
TEXTS = ["the lion sleeps in the grass", "grass", "lion in grass the the the sleeps"]
KIND = "sentence_transformers.models."


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def sentence_model(folder, inner=""):
    """Write a BERT with pooling, a dense layer and normalisation; the encoder is in the subfolder `inner`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / inner)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder / inner)
    (folder / "vocab.txt").unlink()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 24, **modes})
    activation = "torch.nn.modules.activation.Tanh"
    dense = {"in_features": 24, "out_features": 6, "bias": True, "activation_function": activation}
    write(folder / "2_Dense/config.json", dense)
    weights = {"linear.weight": torch.randn(6, 24), "linear.bias": torch.randn(6)}
    torch.save(weights, folder / "2_Dense/pytorch_model.bin")
    write(folder / inner / "sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": False})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "the "}})
    paths = {"Transformer": inner, "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": KIND + name} for i, (name, path) in enumerate(paths.items())
    ]
    write(folder / "modules.json", modules)
    return folder


def convert(*arguments):
    return command.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_sentence_encoder_stays_one(tmp_path, inner):
    source, out = sentence_model(tmp_path / "source", inner), tmp_path / "out"
    assert convert(source, out, "--layers", "none") == 0
    modules = json.loads((out / "modules.json").read_text())
    assert [(x["type"].removeprefix(KIND), x["path"]) for x in modules] == [
        ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize"),
    ]  # fmt: skip
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 7
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
    assert pooling_of(str(out)) == pooling_of(str(source)) == "mean"
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1/model.safetensors").write_text("")
    uploaded = {file.path for file in files_to_upload(out)}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/pytorch_model.bin", "model.safetensors"} <= uploaded
    assert not any(name.startswith("checkpoint") for name in uploaded)


@pytest.mark.parametrize("layers", ["none", "all"])
def test_sentence_transformers_loads_the_result(tmp_path, layers):
    """With every layer kept, embeddings are those of the source: length limit, pooling, dense layer and norm."""
    load = pytest.importorskip("sentence_transformers").SentenceTransformer
    source, out = sentence_model(tmp_path / "source"), tmp_path / "out"
    assert convert(source, out, "--layers", layers) == 0
    theirs, ours = (load(str(x), device="cpu").encode(TEXTS, convert_to_tensor=True) for x in (source, out))
    assert ours.shape == (3, 6)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(3))
    assert torch.allclose(ours, theirs, atol=1e-5) is (layers == "none")


def test_a_sentence_encoder_is_replaced_only_if_nothing_else_is_lost(tmp_path, capsys):
    source, out = sentence_model(tmp_path / "source"), tmp_path / "out"
    assert convert(source, out) == 0
    (out / "runs").mkdir()
    assert convert(source, out, "--force") == 2 and "also holds runs" in capsys.readouterr().err
    (out / "runs").rmdir()
    assert convert(source, out, "--force", "--layers", "none") == 0
    assert json.loads((out / "config.json").read_text())["softmax_layers"] == [0, 1]


@pytest.mark.parametrize(
    "modules, message",
    [
        ([{"idx": 0, "path": "../elsewhere"}], "lists a module outside its folder; repair it"),
        ({"idx": 0}, "is not a list of modules of sentence-transformers; repair it"),
    ],
)
def test_a_malformed_list_of_modules_is_said_in_one_line(tmp_path, capsys, modules, message):
    source = sentence_model(tmp_path / "source")
    write(source / "modules.json", modules)
    assert convert(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_models_are_no_sentence_encoders(tmp_path):
    (tmp_path / "model").mkdir()
    for name in (tmp_path / "model", tmp_path / "absent", "outputs/of/nobody", "owner/absent-from-the-hub"):
        assert sentence_folder(name) is None and transformer_folder(name) == str(name)


@pytest.mark.slow
def test_a_sentence_encoder_on_the_hub_is_converted_with_its_files(tmp_path):
    repo = tmp_path / "hub" / "models--user--sentences"
    sentence_model(repo / "snapshots" / "1")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1")
    code = "from lion_hf.convert.command import main; raise SystemExit(main())"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, "user/sentences", tmp_path / "out"], check=True, env=environment)
    assert (tmp_path / "out/2_Dense/pytorch_model.bin").exists() and pooling_of(str(tmp_path / "out")) == "mean"
