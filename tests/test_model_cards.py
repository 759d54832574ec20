"""Model cards are up to date with the generator and valid for the Hub, and their snippets run."""

import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from small_models import text_config, vision_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertTokenizer, ViTImageProcessorPil

import lion_hf
from lion_hf import PRESETS, LionConfig, LionVisionConfig
from lion_hf.models import lion_config_base
from lion_hf.training.recipes import expand, presets_of


FOLDER = Path(__file__).parents[1] / "model_cards"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", "sleeps", "in", "sun", "."]

# Parameter counts of the paper's layout.
PARAMETERS = {
    "lion-lit-base": 109_537_344,
    "lion-s-large": 335_049_920,
    "lion-d-tiny-patch16-224": 5_679_628,
    "lion-s-base-patch16-224-snake": 86_637_832,
}


@pytest.fixture(scope="module")
def scripts():
    """Import the generator of the cards and the counter of operations."""
    sys.path.insert(0, str(FOLDER))
    import flops
    import generate

    yield generate, flops
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def generated(scripts):
    return scripts[0].generate()


def text_of(preset):
    return (FOLDER / f"{preset}.md").read_text(encoding="utf-8")


def test_there_is_a_card_per_preset_and_each_is_up_to_date(generated, scripts):
    assert generated.keys() == {f"{preset}.md" for preset in PRESETS} | {"README.md"} and len(PRESETS) == 21
    assert scripts[0].differing(generated, FOLDER) == []


def test_check_names_what_differs_and_writing_mends_it(tmp_path, generated, scripts, capsys, monkeypatch):
    generate, _ = scripts
    monkeypatch.setattr(generate, "generate", lambda: generated)
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    (tmp_path / "lion-d-base.md").unlink()
    (tmp_path / "README.md").write_text("changed")
    (tmp_path / "lion-x-base.md").write_text("of no preset")
    (tmp_path / "template.md").write_text("not a card")
    capsys.readouterr()
    assert generate.main(["--check"], tmp_path) == 1
    assert re.findall(r"differs: .*/(.*)", capsys.readouterr().out) == [
        "README.md",
        "lion-d-base.md",
        "lion-x-base.md",
    ]
    assert generate.main([], tmp_path) == 0 and generate.main(["--check"], tmp_path) == 0
    assert (tmp_path / "template.md").exists() and not (tmp_path / "lion-x-base.md").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_metadata_is_what_the_hub_expects(preset):
    card = ModelCard.load(FOLDER / f"{preset}.md")
    data = card.data.to_dict()
    is_image = "patch_size" in PRESETS[preset]
    assert (data["license"], data["library_name"]) == ("apache-2.0", "transformers")
    assert data["pipeline_tag"] == ("image-classification" if is_image else "fill-mask")
    assert data["datasets"] == ["ILSVRC/imagenet-1k" if is_image else "allenai/c4"]
    assert {"lion", "linear-attention"} <= set(data["tags"])
    assert "model-index" not in data  # reserved for numbers measured on the model itself
    assert f"\n# {preset}\n" in card.text


@pytest.mark.parametrize("preset", PRESETS)
def test_cards_say_what_is_not_there(preset):
    card = " ".join(text_of(preset).split())
    assert "no published weights" in card and "Nothing was measured for this model." in card
    assert ("**Reported by [the paper](https://arxiv.org/abs/2502.16249)**" in card) != (
        "None are recorded here" in card
    )


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameters_are_those_of_the_paper(preset):
    assert f"| parameters | {PARAMETERS[preset]:,} |" in text_of(preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_links_lead_somewhere_and_the_recipe_trains_this_model(preset):
    links = re.findall(r"\]\(([^)]+)\)", text_of(preset))
    local = [FOLDER / link.partition("#")[0] for link in links if not link.startswith("https://")]
    assert all(path.exists() for path in local)
    recipes = [path for path in local if path.suffix == ".yaml"]
    assert expand(recipes[0], preset)["preset"] == preset
    assert all(preset in presets_of(path) for path in recipes) and f" --preset {preset} --smoke\n" in text_of(preset)


def test_a_preset_without_a_recipe_is_one_line_and_exit_code_2(tmp_path, scripts, monkeypatch, capsys):
    monkeypatch.setattr(scripts[0], "PRESETS", {**PRESETS, "lion-d-huge": PRESETS["lion-d-base"]})
    monkeypatch.setattr(lion_config_base, "PAPER_PRESETS", scripts[0].PRESETS)
    with pytest.raises(SystemExit) as stopped:
        scripts[0].main([], tmp_path)
    assert stopped.value.code == 2 and not any(tmp_path.iterdir())
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No file in examples/recipes/mlm has the preset 'lion-d-huge'" in said


def test_reported_numbers_are_quoted_as_the_paper_prints_them():
    card = text_of("lion-d-large")
    assert "| **LION-D** | 68.64 | 81.34 | 1.10 |" in card and "| BERT | 69.88 | 82.95 | 1 |" in card
    assert "| **LION-S, snake** | 79.6 | 2.72 |" in text_of("lion-s-small-patch16-224-snake")
    assert "| ViT | 72.2 | – |" in text_of("lion-s-small-patch16-224-snake")


def test_weights_in_bfloat16_are_what_loading_gives(tmp_path, scripts):
    for config, head in (
        (text_config("selective"), lion_hf.LionForMaskedLM),
        (vision_config("decay", order="s"), lion_hf.LionForImageClassification),
    ):
        head(config).save_pretrained(tmp_path)
        sizes = scripts[0].sizes(config)
        for name, dtype in (("float32_mib", torch.float32), ("bfloat16_mib", torch.bfloat16)):
            model = head.from_pretrained(tmp_path, dtype=dtype)
            assert sizes[name] * 2**20 == pytest.approx(sum(x.nbytes for x in model.parameters()))
        assert sizes["parameters"] == model.num_parameters()


# --------------------------------------------------------------------------------------------------- operations


def baddbmm_in_place(out, left, right, **options):
    """Count the operations of out += left @ right from shapes. PyTorch's counter lacks the in-place version."""
    return 2 * left[0] * left[1] * left[2] * right[2]


def counted(config, **inputs):
    head = lion_hf.LionForImageClassification if config.model_type == "lion_vision" else lion_hf.LionForMaskedLM
    model = head(config).eval()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_in_place})
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("form", ["attention", "chunk"])
@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
@pytest.mark.parametrize("length", [3, 4, 13, 40, 300])
def test_operations_of_text_models_are_those_that_pytorch_counts(scripts, form, mask_type, length):
    config = text_config(
        mask_type, format=form, max_position_embeddings=300
    )  # chunks of 4; 64 are linked by one product
    ids = torch.zeros(1, length, dtype=torch.long)
    assert scripts[1].forward_flops(config, form, length) == counted(config, input_ids=ids)


@pytest.mark.parametrize("form", ["attention", "chunk"])
@pytest.mark.parametrize("order", ["normal", "s"])
@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_operations_of_image_models_are_those_that_pytorch_counts(scripts, form, mask_type, order):
    config = vision_config(mask_type, format=form, order=order, image_size=[16, 24])
    assert scripts[1].forward_flops(config, form) == counted(config, pixel_values=torch.zeros(1, 3, 16, 24))


def test_operations_need_a_form_and_a_length(scripts):
    with pytest.raises(ValueError, match="form is 'rnn'"):
        scripts[1].forward_flops(text_config(), "rnn", 128)
    with pytest.raises(ValueError, match="tokens is missing"):
        scripts[1].forward_flops(text_config(), "chunk")


# --------------------------------------------------------------------------------------------------- usage


def save_small(preset, folder):
    """Save the preset as its recipe would, with random weights, one layer and a small vocabulary."""
    if "patch_size" in PRESETS[preset]:
        config = LionVisionConfig.from_preset(preset, num_hidden_layers=1)
        lion_hf.LionForImageClassification(config).save_pretrained(folder)
        ViTImageProcessorPil().save_pretrained(folder)
    else:
        config = LionConfig.from_preset(preset, num_hidden_layers=1, vocab_size=len(WORDS))
        lion_hf.LionForMaskedLM(config).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS))
        BertTokenizer.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_usage_runs(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of(preset), re.DOTALL | re.MULTILINE)
    (folder,) = re.findall(r'"(outputs/[^"]+)"', code)
    save_small(preset, tmp_path / folder)
    Image.new("RGB", (300, 200), "orange").save("lion.jpg")
    capsys.readouterr()
    exec(compile(code, f"{preset}.md", "exec"), {})
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 5 and all("score" in answer for answer in answers)


def test_upload_of_the_readme_runs_dry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    save_small("lion-d-base", tmp_path / "outputs/recipes/mlm/lion-d-base")
    (tmp_path / "outputs/recipes/mlm/lion-d-base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {name: int(size.replace(",", "")) for size, name in shown}
    assert sizes == {file.name: file.stat().st_size for file in (tmp_path / "outputs/to-upload").iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json", "lion_ops_api.py"} <= sizes.keys()
