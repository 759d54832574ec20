"""Files beside converted weights: tokenizer, image processor, code and card."""

import json

import numpy as np
import pytest
import torch
from checkpoints import IMAGE, TEXT, bare_image, composer, golden, save
from huggingface_hub import ModelCard
from PIL import Image
from small_models import vision_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer, BertTokenizer, pipeline

from lion_hf.convert import convert_checkpoint
from lion_hf.convert.command import main
from lion_hf.convert.companions import image_processor, load_tokenizer
from lion_hf.convert.source import ConversionError, read_source


def tokenizer_folder(path, size):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"own{i}" for i in range(size - 5))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path)
    return path


def test_the_tokenizer_inside_the_checkpoint_is_saved_and_fills_masks(tmp_path):
    convert_checkpoint(TEXT, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("TOK1 tok2 unheard").input_ids == [2, 6, 7, 1, 3]
    assert tokenizer.model_max_length == 512
    answers = pipeline("fill-mask", str(tmp_path / "out"))("tok1 [MASK] tok2", top_k=3)
    assert len(answers) == 3


def test_a_given_tokenizer_goes_before_the_one_inside(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", 104)
    convert_checkpoint(TEXT, tmp_path / "out", tokenizer=str(folder))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("own0").input_ids == [2, 5, 3]


def test_a_tokenizer_may_be_smaller_than_the_padded_vocabulary_and_never_larger(tmp_path):
    source = read_source(TEXT)
    assert len(load_tokenizer(str(tokenizer_folder(tmp_path / "small", 97)), source, 104)) == 97
    with pytest.raises(ConversionError, match="has 105 tokens, but the model has only 104"):
        load_tokenizer(str(tokenizer_folder(tmp_path / "large", 105)), source, 104)


def test_a_text_model_without_tokenizer_is_written_with_a_note(tmp_path, capsys):
    weights, _, config = golden("text_d_yaml")
    source = save(composer(weights, config), tmp_path / "source.pt")
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert "give one with --tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_the_image_processor_does_what_the_authors_evaluation_does():
    processor = image_processor(vision_config(image_size=224, patch_size=16))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    actual = processor(picture, return_tensors="pt")["pixel_values"][0]
    resized = picture.resize((341, 256), Image.Resampling.BICUBIC)  # the shorter side to 256
    crop = np.asarray(resized.crop((58, 16, 58 + 224, 16 + 224)), dtype=np.float32) / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert actual.shape == (3, 224, 224)
    torch.testing.assert_close(actual, torch.tensor(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_an_image_folder_classifies_pictures(tmp_path):
    convert_checkpoint(IMAGE, tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size["shortest_edge"] == 73 and processor.crop_size["height"] == 64
    Image.new("RGB", (90, 70), "red").save(tmp_path / "red.png")
    assert len(pipeline("image-classification", str(tmp_path / "out"))(str(tmp_path / "red.png"), top_k=4)) == 4


def test_one_channel_is_processed_as_the_grey_of_three_is(tmp_path, capsys):
    weights, model = bare_image("decay", num_channels=1, pos_emb=True)
    source = save({"model": weights}, tmp_path / "source.pth")
    assert main([str(source), str(tmp_path / "out"), "--cls-tok=false"]) == 0
    assert "image.convert('L')" in capsys.readouterr().out
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor([grey, grey.convert("1")], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 1, 16, 16)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)
    of_three = image_processor(vision_config())(grey, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, 0], of_three[0].mean(0), atol=0.02, rtol=0.02)


def test_no_processor_is_made_up_for_other_numbers_of_channels(tmp_path, capsys):
    source = save({"model": bare_image("decay", num_channels=2, pos_emb=True)[0]}, tmp_path / "source.pth")
    assert main([str(source), str(tmp_path / "out"), "--cls-tok=false"]) == 0
    assert "no image processor was written" in capsys.readouterr().out
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("source, task", [(IMAGE, "image-classification"), (TEXT, "fill-mask")], ids=["image", "text"])
@pytest.mark.parametrize("with_code", [False, True])
def test_the_card_names_origin_licence_and_how_to_load(tmp_path, source, task, with_code):
    convert_checkpoint(source, tmp_path / "out", with_code=with_code)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("other", "transformers", task)
    assert "non-commercial" in card.data.license_name and card.data.license_link in card.text
    assert "**non-commercial licence**" in card.text and "https://arxiv.org/abs/2502.16249" in card.text
    assert f"`{source.name}`" in card.text
    assert ("position table" in card.text) == (source == TEXT)
    code = card.text.split("```python")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    assert ("trust_remote_code" in code) == with_code == ("import lion_hf" not in code)
    found = {}
    exec(code, found)
    assert type(found["model"]).__name__.startswith("LionFor")


def test_with_code_adds_the_modelling_code_beside_all_else(tmp_path):
    convert_checkpoint(TEXT, tmp_path / "out", with_code=True)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"modeling_lion.py", "lion_ops_api.py", "tokenizer.json", "README.md", "model.safetensors"} <= names
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())
