"""Conversion to the authors' layout and back, in both orders, does not change a bit."""

import argparse
import json

import pytest
import torch
from checkpoints import IMAGE, TEXT, bare_image, bare_text, composer, golden, save
from safetensors.torch import load_file, save_file
from small_models import VARIANTS, text_config, vision_config

import lion_hf
from lion_hf.convert import convert_checkpoint, reverse_checkpoint
from lion_hf.convert.command import main
from lion_hf.convert.source import ConversionError, read_source


def same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def there_and_back(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    reverse_checkpoint(tmp_path / "ours", tmp_path / "theirs.pt")
    convert_checkpoint(tmp_path / "theirs.pt", tmp_path / "back")
    same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back")))
    ours, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "back"))
    for free in ("format", "chunk_size", "initializer_range"):
        ours.pop(free), back.pop(free)
    assert ours == back


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["normal", "s"])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_image_models_survive_the_authors_layout(tmp_path, mask_type, order, dtype):
    config = vision_config(mask_type, order=order, pos_emb=order == "s", cls_tok=dtype == torch.bfloat16)
    there_and_back(lion_hf.LionForImageClassification(config).to(dtype), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [lion_hf.LionForMaskedLM, lion_hf.LionForSequenceClassification])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_text_models_survive_the_authors_layout(tmp_path, mask_type, head, dtype):
    there_and_back(head(text_config(mask_type)).to(dtype), tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"pos_emb": True}, {"layer_norm_after": True}, {"tie_word_embeddings": False}, {"layer_norm_eps": 1e-7}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_text_models_survive_too(tmp_path, options):
    there_and_back(lion_hf.LionForMaskedLM(text_config("decay", **options)), tmp_path)


def test_one_label_and_half_precision_are_no_exception(tmp_path):
    there_and_back(lion_hf.LionForSequenceClassification(text_config("lit", num_labels=1)).half(), tmp_path)


def test_sharded_folders_are_read_whole(tmp_path):
    model = lion_hf.LionForMaskedLM(text_config("selective"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    reverse_checkpoint(tmp_path / "sharded", tmp_path / "theirs.pt")
    convert_checkpoint(tmp_path / "theirs.pt", tmp_path / "back")
    same_tensors(
        load_file(tmp_path / "back" / "model.safetensors"),
        {name: x for name, x in model.state_dict().items() if name != "head.decoder.weight"},
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_only_the_weights_that_loading_takes_are_reversed(tmp_path, shards):
    """Averaged weights, older shards and copies in the folder are ignored; the single file, or the index, counts."""
    model = lion_hf.LionForMaskedLM(text_config("decay"))
    model.save_pretrained(tmp_path / "ours", max_shard_size="10KB" if shards > 1 else "1GB")
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shards > 1)
    foreign = {name: torch.full_like(x, 7) for name, x in model.state_dict().items() if "decoder.weight" not in name}
    for name in ("model_ema", "model-old", "model-99999-of-99999", "models"):
        save_file(foreign, tmp_path / "ours" / f"{name}.safetensors")
    reverse_checkpoint(tmp_path / "ours", tmp_path / "theirs.pt")
    weights = read_source(tmp_path / "theirs.pt").weights
    assert torch.equal(weights["bert.embeddings.word_embeddings.weight"], model.get_input_embeddings().weight)
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path / "ours")
    same_tensors(loaded.state_dict(), model.state_dict())


def test_a_missing_shard_and_a_broken_index_are_told(tmp_path):
    lion_hf.LionForMaskedLM(text_config("decay")).save_pretrained(tmp_path / "ours", max_shard_size="10KB")
    shard = sorted((tmp_path / "ours").glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match=f"contains no {shard.name}"):
        reverse_checkpoint(tmp_path / "ours", None)
    (tmp_path / "ours" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConversionError, match="no index of weights"):
        reverse_checkpoint(tmp_path / "ours", None)


def test_names_of_wrappers_in_a_folder_are_taken(tmp_path):
    model = lion_hf.LionForImageClassification(vision_config("selective"))
    model.save_pretrained(tmp_path / "ours")
    state = {name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in model.state_dict().items()}
    save_file(state, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    plan = reverse_checkpoint(tmp_path / "ours", tmp_path / "theirs.pt")
    same_tensors(plan.model.state_dict(), model.state_dict())


def test_the_authors_image_checkpoint_comes_back_bit_by_bit(tmp_path):
    convert_checkpoint(IMAGE, tmp_path / "ours")
    reverse_checkpoint(tmp_path / "ours", tmp_path / "back.pth")
    before, after = read_source(IMAGE), read_source(tmp_path / "back.pth")
    same_tensors(before.weights, after.weights)
    for name in ("mask_type", "order", "pos_emb", "cls_tok", "input_size", "nb_classes", "drop_path", "drop"):
        assert after.stated[name] == before.stated[name], name
    assert after.stated["model"] == "lion_tiny_patch16_64"
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / "back.pth", weights_only=True).keys() == {"model", "args"}


def test_the_authors_text_checkpoint_comes_back_but_for_the_table_it_does_not_read(tmp_path):
    convert_checkpoint(TEXT, tmp_path / "ours")
    reverse_checkpoint(tmp_path / "ours", tmp_path / "back.pt")
    before, after = read_source(TEXT), read_source(tmp_path / "back.pt")
    unread = "bert.embeddings.position_embeddings.weight"
    assert not after.weights[unread].any() and after.weights[unread].shape == before.weights[unread].shape
    before.weights[unread] = after.weights[unread]
    same_tensors(before.weights, after.weights)
    ignored = {"transformers_version", "use_cache", "max_position_embedding"}
    for name, value in before.stated.items():
        assert name in ignored or after.stated[name] == value, name
    state = torch.load(tmp_path / "back.pt", weights_only=True)["state"]
    assert all(name.startswith("model.") for name in state["model"])


@pytest.mark.parametrize("name", ["text_lit_yaml", "text_s_ln_holes", "text_cls_d"])
def test_every_name_of_the_authors_text_models_comes_back(tmp_path, name):
    weights, _, config = golden(name)
    convert_checkpoint(save(composer(weights, config), tmp_path / "source.pt"), tmp_path / "ours")
    reverse_checkpoint(tmp_path / "ours", tmp_path / "back.pt")
    assert read_source(tmp_path / "back.pt").weights.keys() == weights.keys()


@pytest.mark.parametrize("make", [bare_image, bare_text])
def test_weights_without_a_decay_for_every_layer_are_an_error(tmp_path, make):
    _, model = make("decay")
    model.save_pretrained(tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    state = {name: x for name, x in state.items() if "layers.1.mixer.decay" not in name}
    save_file(state, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ConversionError, match="lacks 1 tensor"):
        reverse_checkpoint(tmp_path / "ours", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize("dry_run", [False, True], ids=["written", "dry run"])
@pytest.mark.parametrize("names, said", [(None, False), (["cat", "dog", "owl"], True)], ids=["LABEL_n", "chosen"])
def test_names_of_image_classes_are_not_dropped_without_a_word(tmp_path, capsys, names, said, dry_run):
    labels = {"id2label": dict(enumerate(names)), "label2id": {x: i for i, x in enumerate(names)}} if names else {}
    image(**({"num_labels": 3} | labels)).save_pretrained(tmp_path / "ours")
    arguments = ["--reverse", str(tmp_path / "ours"), str(tmp_path / "back.pth"), *["--dry-run"] * dry_run]
    assert main(arguments) == 0
    assert ("dropped id2label: 3 names of classes ('cat', ...)" in capsys.readouterr().out) == said


def test_names_of_text_classes_come_back_and_nothing_is_said(tmp_path, capsys):
    labels = {"id2label": {0: "calm", 1: "wild"}, "label2id": {"calm": 0, "wild": 1}}
    lion_hf.LionForSequenceClassification(text_config("decay", **labels)).save_pretrained(tmp_path / "ours")
    assert main(["--reverse", str(tmp_path / "ours"), str(tmp_path / "back.pt")]) == 0
    assert "id2label" not in capsys.readouterr().out
    assert read_source(tmp_path / "back.pt").stated["id2label"] == labels["id2label"]


INEXPRESSIBLE = {
    "no head": (lambda: lion_hf.LionModel(text_config()), "LionModel, which the authors' code does not have"),
    "token head": (lambda: lion_hf.LionForTokenClassification(text_config()), "LionForTokenClassification"),
    "not square": (lambda: image(image_size=(16, 8)), "16 x 8, but the authors' code supports square images only"),
    "activation": (lambda: image(hidden_act="relu"), "hidden_act is 'relu', which the authors' layout cannot store"),
    "epsilon": (lambda: image(layer_norm_eps=1e-5), "layer_norm_eps is 1e-05"),
}


def image(**options):
    return lion_hf.LionForImageClassification(vision_config("decay", **options))


@pytest.mark.parametrize("kind", INEXPRESSIBLE)
def test_what_the_authors_layout_cannot_say_is_an_error(tmp_path, kind):
    make, message = INEXPRESSIBLE[kind]
    make().save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=message) as error:
        reverse_checkpoint(tmp_path / "ours", tmp_path / "back.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "bert"}', '{"model_type": "lion"}'])
def test_another_folder_is_an_error(tmp_path, content):
    (tmp_path / "ours").mkdir()
    if content:
        (tmp_path / "ours" / "config.json").write_text(content)
    with pytest.raises(ConversionError, match="is not a LION folder|contains no model.safetensors") as error:
        reverse_checkpoint(tmp_path / "ours", tmp_path / "back.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_hybrids_have_no_place_in_the_authors_layout(tmp_path, kind):
    model = (
        lion_hf.LionForMaskedLM(text_config(softmax_layers=[0]))
        if kind == "text"
        else lion_hf.LionForImageClassification(vision_config(softmax_layers=[0]))
    )
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match="have no softmax layers"):
        reverse_checkpoint(tmp_path / "ours", tmp_path / "theirs.pt")
    assert not (tmp_path / "theirs.pt").exists()
