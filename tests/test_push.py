"""`push` saves and uploads a model in one call. A dry run lists the files without a network."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects
from small_models import text_config, vision_config
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, BertTokenizer

import lion_hf


CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# A lion\n"


@pytest.fixture
def hub(monkeypatch):
    """Replace the Hub by a dictionary of uploads: repository name -> contents by path."""
    repositories = {}

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            repositories[repo_id] = {"private": private, "token": self.token}
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            files = {
                file.relative_to(folder_path).as_posix(): file for file in folder_path.rglob("*") if file.is_file()
            }
            taken = filter_repo_objects(files, allow_patterns=allow_patterns)
            repositories[repo_id]["files"] = {name: files[name].read_bytes() for name in taken}

    monkeypatch.setattr("lion_hf.hub.HfApi", Hub)
    return repositories


def leftovers(folder):
    """Add other files that a training run leaves in its output folder."""
    for name in ("checkpoint-5/optimizer.pt", ".cache/huggingface/x", ".hidden", "curves [1].png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")


def test_a_dry_run_names_exactly_what_the_upload_takes_and_uploads_nothing(tmp_path, hub):
    model, card = lion_hf.LionForMaskedLM(text_config()), ModelCard(CARD)
    leftovers(tmp_path)
    planned = lion_hf.push(model, tmp_path, "me/lion", card=card, dry_run=True)
    assert not hub
    assert lion_hf.push(model, tmp_path, "me/lion", card=card, private=True, token="secret") == planned
    assert (hub["me/lion"]["private"], hub["me/lion"]["token"]) == (True, "secret")
    assert {name: len(content) for name, content in hub["me/lion"]["files"].items()} == dict(planned)
    names = [file.path for file in planned]
    assert names == sorted(names)
    assert {"README.md", "config.json", "model.safetensors", "modeling_lion.py", "curves [1].png"} <= set(names)
    assert not any("/" in name or name.startswith(".") for name in names)


def test_what_was_uploaded_is_the_model_with_card_and_tokenizer(tmp_path, hub):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lion"]))
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    model = lion_hf.LionForMaskedLM(text_config())
    (tmp_path / "card.md").write_text(CARD, encoding="utf-8")
    lion_hf.push(model, tmp_path / "out", "me/lion", card=tmp_path / "card.md", processor=tokenizer)
    for name, content in hub["me/lion"]["files"].items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "downloaded")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
    assert BertTokenizer.from_pretrained(tmp_path / "downloaded").get_vocab() == tokenizer.get_vocab()
    assert hub["me/lion"]["files"]["README.md"].decode() == CARD


def test_a_trained_folder_is_pushed_from_where_it_lies_with_its_own_card(tmp_path, hub):
    lion_hf.LionForImageClassification(vision_config()).save_pretrained(tmp_path)
    card = str(
        ModelCard.from_template(ModelCardData(license="mit"), template_str="---\n{{ card_data }}\n---\n\nHello\n")
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    before = (tmp_path / "model.safetensors").read_bytes()
    lion_hf.push(lion_hf.LionForImageClassification.from_pretrained(tmp_path), tmp_path, "me/lion")
    files = hub["me/lion"]["files"]
    assert files["model.safetensors"] == before and "modeling_lion_vision.py" in files
    assert files["README.md"].decode() == card


EXAMPLE = """
outputs/x is not code.

```python
from transformers import pipeline
print(pipeline("x", "{name}")("a text"), 'outputs/x', "outputs/y")
```

![curves](curves.png) ![no file](absent.png) ![other](../other.png) <img src="more/a%20b.png"> ![web](https://a.b/c.png)
"""


@pytest.mark.parametrize("name", ["outputs/x", "./outputs/x/", "absolute"])
@pytest.mark.parametrize("in_place", [False, True], ids=["new folder", "in place"])
def test_a_card_of_a_run_is_pushed_with_its_pictures_and_names_the_repository(
    tmp_path, monkeypatch, hub, name, in_place
):
    monkeypatch.chdir(tmp_path)
    trained, folder = Path("outputs/x"), Path("outputs/x" if in_place else "new")
    text = CARD + EXAMPLE.format(name=trained.absolute() if name == "absolute" else name)
    for file in ("curves.png", "more/a b.png", "more/unused.png", "../other.png"):
        (trained / file).parent.mkdir(parents=True, exist_ok=True)
        (trained / file).write_text(file)
    (trained / "README.md").write_text(text)
    given = ModelCard(text)
    lion_hf.push(lion_hf.LionModel(text_config()), folder, "me/lion", card=None if in_place else trained / "README.md")
    files = hub["me/lion"]["files"]
    assert {path for path in files if path.endswith("png")} == {"curves.png", "more/a b.png"}
    assert files["more/a b.png"] == b"more/a b.png"
    card = files["README.md"].decode()
    assert """pipeline("x", "me/lion")("a text"), 'me/lion', "outputs/y")""" in card
    assert "outputs/x is not code" in card
    if not in_place:
        assert (trained / "README.md").read_text() == text
        lion_hf.push(lion_hf.LionModel(text_config()), "another", "me/lion", card=given)
        assert str(given) == text == hub["me/lion"]["files"]["README.md"].decode()


NO_CARDS = {
    "no README": (None, r"There is no card at '.*README.md'\. Set card to a ModelCard"),
    "no file": ("absent.md", r"There is no card at 'absent.md'"),
    "text": (CARD * 99, "card is the text .* card=huggingface_hub.ModelCard"),
    "number": (3, "card is 3; it must be a ModelCard, or the path of a Markdown file"),
    "no metadata": (ModelCard("# No metadata"), "The card has no metadata"),
    "bad YAML": (b"---\nlicense: [mit\ntags: : x\n---\n", "The card '.*bad.md' is malformed; .* line 1"),
    "a list": (b"---\n- license\n---\n", "is malformed; .*should be a dict"),
    "a wrong type": (b"---\nlicense: mit\ntags: 5\n---\n", "is malformed; .*'int' object"),
    "not UTF-8": (b"---\nlicense: \xff\n---\n", "is malformed; .* in UTF-8: .*0xff"),
}


@pytest.mark.parametrize("kind", NO_CARDS)
def test_without_a_proper_card_nothing_is_written(tmp_path, hub, kind):
    card, message = NO_CARDS[kind]
    if isinstance(card, bytes):
        (tmp_path / "bad.md").write_bytes(card)
        card = tmp_path / "bad.md"
    with pytest.raises(ValueError, match=message) as error:
        lion_hf.push(lion_hf.LionModel(text_config()), tmp_path / "out", "me/lion", card=card)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not hub


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("repo_id", ["me/my/lion", "me/my lion", "me/", "", "a..b", None])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_written(tmp_path, hub, repo_id, dry_run):
    model, card = lion_hf.LionModel(text_config()), ModelCard(CARD)
    with pytest.raises(ValueError, match=f"repo_id is {repo_id!r}; it must be 'user/name'"):
        lion_hf.push(model, tmp_path / "out", repo_id, card=card, dry_run=dry_run)
    assert not (tmp_path / "out").exists() and not hub


@pytest.mark.parametrize("card", [None, ModelCard(CARD)], ids=["no card", "card"])
@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_is_no_place_for_a_model(tmp_path, hub, place, card):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="folder cannot be '.*file.*: '.*file' is a file. Give another path"):
        lion_hf.push(lion_hf.LionModel(text_config()), tmp_path / place, "me/lion", card=card)
    assert (tmp_path / "file").read_text() == "mine" and not hub


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', '{"model_type": ["lion"]}', "[]", "{"])
def test_another_model_in_the_folder_is_not_overwritten(tmp_path, hub, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="another kind of model, which would be overwritten"):
        lion_hf.push(lion_hf.LionModel(text_config()), tmp_path, "me/lion", card=ModelCard(CARD))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config.json", config)] and not hub


@pytest.mark.parametrize("kind", ["BERT", "folder"])
def test_what_is_no_lion_model_is_not_uploaded(tmp_path, hub, kind):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    given = BertModel(BertConfig(**shape)) if kind == "BERT" else str(tmp_path)
    with pytest.raises(ValueError, match="is not a LION model"):
        lion_hf.push(given, tmp_path / "out", "me/bert", card=ModelCard(CARD))
    assert not (tmp_path / "out").exists() and not hub


@pytest.mark.parametrize("processor", ["my-text", BertTokenizer])
def test_what_is_no_processor_is_refused_before_anything_is_written(tmp_path, hub, processor):
    model, card = lion_hf.LionModel(text_config()), ModelCard(CARD)
    with pytest.raises(ValueError, match="processor is .*; it must be a tokenizer or image processor.*from_pretrained"):
        lion_hf.push(model, tmp_path / "out", "me/lion", card=card, processor=processor)
    assert not (tmp_path / "out").exists() and not hub
