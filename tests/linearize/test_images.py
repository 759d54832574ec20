"""`lion-linearize --images`: what it reads, that image encoders learn, resume exactly, and load as others do."""

import io
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from lion_hf.linearize import Recipe, linearize, load_pair
from lion_hf.linearize.command import main
from lion_hf.linearize.images import Images, Rows, image_size, load_processor
from lion_hf.linearize.losses import class_loss, end_loss, measure, states, states_and_logits
from lion_hf.linearize.run import STATE, Linearizer


RECIPE = Recipe(steps=40, minutes=0, batch_size=8)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4}


def sharpened(model):
    """Attention that is far from a mean."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
            weight.data.mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A ViT of two layers for images of 16 x 16 pixels and three classes, with its processor."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=16, initializer_range=0.1, num_labels=3)
    sharpened(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def picture(number):
    generator = np.random.default_rng(number)
    blocks = generator.integers(0, 256, (3 + number % 4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((20 + number % 5, 18))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 60 images in two subfolders."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(60):
        file = folder / f"part{number % 2}" / f"{number:02d}.{'png' if number % 3 else 'JPG'}"
        file.parent.mkdir(exist_ok=True)
        picture(number).save(file)
    return str(folder)


def data(source, images, **options):
    return Images(Rows([images]), load_processor(source), **{"channels": 3, "batch_size": 8, "seed": 5} | options)


# ------------------------------------------------------------------------------------------------------------- reading


def test_folders_are_searched_and_hidden_and_other_files_left_out(images, tmp_path):
    (tmp_path / "a/.cache").mkdir(parents=True)
    for name in ("a/.cache/1.png", "a/._2.png", "3.webp", "a/4.bmp"):
        picture(0).save(tmp_path / name)
    (tmp_path / "5.txt").write_text("no image")
    one = Path(images) / "part1/01.png"
    names = [name for name, _ in map(Rows([str(tmp_path), str(one), images]).__getitem__, range(63))]
    assert names[:3] == [str(tmp_path / "3.webp"), str(tmp_path / "a/4.bmp"), str(one)]
    assert names[3:] == sorted(str(x) for x in Path(images).rglob("*.*"))
    with pytest.raises(IndexError):
        Rows([images])[60]


def test_batches_depend_on_the_step_alone_and_an_epoch_has_each_image_once(source, images):
    whole, again = data(source, images), data(source, images)
    for step in (40, 3, 40):
        torch.testing.assert_close(whole.batch(step), again.batch(step), rtol=0, atol=0)
    assert whole.batch(0)["pixel_values"].shape == (8, 3, 16, 16)
    assert sorted(whole.training + whole.held_out) == list(range(60)) and len(whole.held_out) == 3
    order = [whole._chosen(place) for place in range(57 * 3)]
    assert all(sorted(order[i : i + 57]) == whole.training for i in (0, 57, 114)) and order[:57] != order[57:114]
    assert Images(Rows([images]), None, 3, 8, 6).held_out != whole.held_out


def test_pixels_are_those_of_the_processor_and_only_a_batch_is_decoded(source, images, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.append(file), real(file))[1])
    given = data(source, images, batch_size=4)
    assert not opened
    batch = given.batch(2)["pixel_values"]
    assert len(opened) == 4
    processor = AutoImageProcessor.from_pretrained(source)
    expected = processor([real(file).convert("RGB") for file in opened], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)
    assert [len(x["pixel_values"]) for x in data(source, images, batch_size=2).measuring()] == [2, 1]


def test_images_that_do_not_decode_are_left_out_with_one_line(source, tmp_path):
    for number in range(40):
        picture(number).save(tmp_path / f"{number}.png")
    lines = []
    given = data(source, str(tmp_path), batch_size=38, say=lines.append)
    held_out, training = given.held_out, given.training
    for number in (held_out[0], *training[::3]):
        file = given.rows[number][1]
        file.write_bytes(file.read_bytes()[:60])
    assert len(held_out) == 2 and len(training) == 38
    assert len(given.batch(0)["pixel_values"]) == 25  # the whole epoch
    assert len(given.measuring()[0]["pixel_values"]) == 1 and given.held_out == held_out[1:]
    assert len(lines) == 1 and "png does not decode (" in lines[0]
    given.rows[held_out[1]][1].write_bytes(b"")
    with pytest.raises(ValueError, match=r"does not decode \(.*\), and no other of 1 images does"):
        given.measuring()


def test_orientation_and_channels(tmp_path, source):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    for number in (1, 2):
        picture(number).save(tmp_path / f"{number}.png", exif=exif)
    turned = picture(1).transpose(Image.Transpose.ROTATE_270)
    given = data(source, str(tmp_path))
    expected = given.processor(turned, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(given._read(tmp_path / "1.png"), expected, rtol=0, atol=0)
    grey = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    assert Images(Rows([str(tmp_path)]), grey, 1, 2, 0)._read(tmp_path / "1.png").shape == (1, 16, 16)
    assert image_size(grey, ViTConfig(num_channels=1)) == (16, 16)


def test_parquet_files_hold_the_same_images(source, images, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [path for _, path in map(Rows([images]).__getitem__, range(60))]
    column = [{"bytes": file.read_bytes(), "path": None} for file in files]
    rows = {"img": column, "label": [0] * 60}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    ours, theirs = data(source, str(tmp_path / "a.parquet")), data(source, images)
    torch.testing.assert_close(ours.batch(4), theirs.batch(4), rtol=0, atol=0)
    assert ours.rows[7][0] == f"row 7 of {tmp_path / 'a.parquet'}"
    assert isinstance(ours.rows[7][1], io.BytesIO)
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="has 0 columns of images among text; it must have one"):
        Rows([str(tmp_path / "b.parquet")])


# -------------------------------------------------------------------------------------------------- models and losses


@pytest.fixture
def pair(source):
    pair = load_pair(source, "all")
    pair.teacher.double(), pair.student.double()
    return pair


def test_the_teacher_is_the_source_with_its_classes_and_the_student_has_its_weights(source, pair):
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = ViTForImageClassification.from_pretrained(source).double().eval()
    hidden, logits = states_and_logits(pair.teacher, {"pixel_values": pixels})
    torch.testing.assert_close(logits, expected(pixels).logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hidden[-1], expected.vit(pixels).last_hidden_state, rtol=1e-9, atol=1e-9)
    weights = pair.student.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in pair.teacher.state_dict().items())
    config = pair.student.config
    assert config.softmax_layers == [] and config.normalize and not hasattr(config, "layer_norm_after")


def test_heads_start_with_windows_from_four_patches_to_all(source):
    mixer = load_pair(source, "0").student.base_model.layers[0].mixer
    twin = load_pair(source, "0", windows=(4, 16)).student.base_model.layers[0].mixer
    torch.testing.assert_close(mixer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert load_pair(source).layers == [0]


def test_the_second_stage_learns_hidden_states_and_classes(pair):
    batch = {"pixel_values": torch.randn(3, 3, 16, 16, dtype=torch.float64)}
    (hidden, logits), (target, classes) = (states_and_logits(x, batch) for x in (pair.student, pair.teacher))
    distance = [
        ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
        for ours, theirs in zip(hidden[1:], target[1:], strict=True)
    ]
    ours, theirs = logits.softmax(-1), classes.softmax(-1)
    divergence = (theirs * (theirs / ours).log()).sum(-1).mean()
    torch.testing.assert_close(class_loss(logits, classes), divergence, rtol=1e-9, atol=0)
    loss = end_loss(pair, batch, None)
    torch.testing.assert_close(loss, sum(distance) / len(distance) + divergence, rtol=1e-9, atol=0)
    found = measure(pair, [batch], None)
    assert found["agreement"] == (logits.argmax(-1) == classes.argmax(-1)).double().mean()
    alike = torch.nn.functional.cosine_similarity(hidden[-1], target[-1], dim=-1).mean()
    assert found["cosine"] == pytest.approx(alike.item()) and found["hidden"] == pytest.approx(
        (sum(distance) / len(distance)).item()
    )


def test_scores_of_several_classes_per_image_are_not_compared(source, pair):
    batch = {"pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.float64)}
    pair.teacher.config.problem_type = pair.student.config.problem_type = "multi_label_classification"
    assert states_and_logits(pair.teacher, batch)[1] is None
    assert end_loss(pair, batch, None) > 0 and "agreement" not in measure(pair, [batch], None)


def test_dinov2_is_compared_at_the_size_of_its_processor(tmp_path):
    sizes = SIZES | {"mlp_ratio": 2, "image_size": 28}
    del sizes["intermediate_size"]
    original = Dinov2Model(Dinov2Config(**sizes, initializer_range=0.3)).eval()
    original.save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    size = image_size(load_processor(str(tmp_path)), original.config)
    assert size == (16, 16)
    pair = load_pair(str(tmp_path), "all", image_size=size)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    actual = states(pair.teacher.double(), {"pixel_values": pixels})[-1]
    torch.testing.assert_close(actual, original.double()(pixels).last_hidden_state, rtol=1e-6, atol=1e-6)
    assert pair.student.config.grid_size == (4, 4)


# ------------------------------------------------------------------------------------------------------------ training


def test_it_learns_the_source_and_the_folder_holds_what_it_learned(source, images, tmp_path):
    found = linearize(source, tmp_path / "out", images=[images], layers="all", recipe=RECIPE)
    before, after = found["before"], found["after"]
    assert all(after["layers"][i] < 0.5 * before["layers"][i] for i in "01")
    assert after["hidden"] < 0.5 * before["hidden"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "lion_vision" and model.config.softmax_layers == []
    original = AutoModelForImageClassification.from_pretrained(source)
    assert torch.equal(model.classifier.weight, original.classifier.weight)
    inputs = processor([picture(number) for number in range(8)], return_tensors="pt")
    states = [AutoModel.from_pretrained(name)(**inputs).last_hidden_state for name in (source, tmp_path / "out")]
    assert torch.nn.functional.cosine_similarity(*states, dim=-1).mean() > 0.9
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "pipeline_tag: image-classification",
        "| number of images | 57 |",
        "3 images that were not trained on",
    ):
        assert text in card
    assert f" {after['agreement']:.4f} |" in card and f" {after['layers']['1']:.4f} |" in card
    assert "text" not in card.replace("context", "") and "max_length" not in card and "{" not in card


def test_an_encoder_without_classes_and_with_another_image_size(source, images, tmp_path):
    folder = tmp_path / "vit"
    ViTModel.from_pretrained(source, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 12, "width": 24}).save_pretrained(folder)
    lines, recipe = [], Recipe(steps=2, minutes=0, batch_size=2)
    found = linearize(str(folder), tmp_path / "out", images=[images], recipe=recipe, say=lines.append)
    assert "images have 12 x 24 pixels; the position table for 16 x 16 is resized" in lines
    assert "agreement" not in found["after"]
    model, processor = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModel, AutoImageProcessor))
    assert model(**processor(picture(1), return_tensors="pt")).last_hidden_state.shape == (1, 19, 32)
    assert "pipeline_tag: image-feature-extraction" in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupted_run_goes_on_to_the_same_weights(source, images, tmp_path, monkeypatch):
    recipe = Recipe(steps=16, minutes=0, batch_size=6)
    arguments = {"images": [images], "recipe": recipe}
    whole = linearize(source, tmp_path / "whole", **arguments)
    step = Linearizer._step

    def interrupted(self, share):
        if self.progress.step == 11:  # in the second stage and the second epoch
            raise KeyboardInterrupt
        return step(self, share)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Linearizer, "_step", interrupted)
        linearize(source, tmp_path / "out", **arguments)
    fewer = str(Path(images) / "part0")
    with pytest.raises(ValueError, match="holds the state of a run with other options"):
        linearize(source, tmp_path / "out", images=[fewer], recipe=recipe)
    assert linearize(source, tmp_path / "out", **arguments) == whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_sigterm_saves_the_state_where_ctrl_c_is_ignored(source, images, tmp_path, monkeypatch, capsys):
    """As in the background of a script."""
    monkeypatch.setattr(Linearizer, "_step", lambda *_: signal.raise_signal(signal.SIGTERM) or 0.0)
    handlers = [(kind, signal.getsignal(kind)) for kind in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main([source, str(tmp_path / "out"), "--images", images, "--steps", "3"]) == 130
        assert signal.getsignal(signal.SIGTERM) == handlers[1][1]
    finally:
        for kind, handler in handlers:
            signal.signal(kind, handler)
    assert (tmp_path / "out" / STATE).is_file() and "interrupted; the same command" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- errors


MISTAKES = [
    ("{source} {out} --text {tmp}/text.txt", "'{source}' is an image model; give --images"),
    ("{tmp}/bert {out} --images {images}", "'{tmp}/bert' is a text encoder; give --text"),
    ("{source} {out} --images {tmp}/none", "there is no folder or file '{tmp}/none'"),
    ("{source} {out} --images {tmp}/bert", "'{tmp}/bert' holds no images"),
    ("{source} {out} --images {tmp}/some", "give parquet files by name, such as '{tmp}/some/a.parquet'"),
    ("{source} {out} --images {tmp}/text.txt", "'{tmp}/text.txt' is no image file; --images takes folders"),
    ("{source} {out} --images {tmp}/one", "holds 1 image; training and measuring need at least two"),
    ("{source} {out} --images {tmp}/some/a.parquet", "data file '{tmp}/some/a.parquet' is empty"),
    ("{source} {out} --images {tmp}/none.parquet", "data file '{tmp}/none.parquet' does not exist"),
    ("{tmp}/bare {out} --images {images}", "the image processor of '{tmp}/bare' does not load; save"),
    ("{tmp}/free {out} --images {images}", "does not give all images the same size"),
    ("{tmp}/five {out} --images {images}", "reads images of 5 channels; supported are 1 and 3"),
    ("{source} {out} --images {images} --context 99", "--context is 99, but '{source}' is an image model"),
    ("{source} {out} --images {images} --mask_share 0.1", "--mask_share is 0.1, but '{source}' is an image model"),
    ("{source} {out} --images {images} --target embeddings", "--target is 'embeddings', which is for sentence"),
    ("{source} {out} --images {images} --layers 2", "--layers is '2'; the source has 2 layers"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources and images that are refused."""
    folder = tmp_path_factory.mktemp("mistakes")
    BertConfig(num_hidden_layers=1).save_pretrained(folder / "bert")
    (folder / "text.txt").write_text("a\nb\n")
    for name in ("some", "one"):
        (folder / name).mkdir()
    (folder / "some/a.parquet").write_text("")
    picture(0).save(folder / "one/0.png")
    for name, channels in (("bare", 3), ("free", 3), ("five", 5)):
        ViTConfig(**SIZES, image_size=16, num_channels=channels).save_pretrained(folder / name)
        if name != "bare":
            ViTImageProcessorPil(do_resize=name != "free").save_pretrained(folder / name)
    return str(folder)


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(source, images, folders, tmp_path, capsys, arguments, message):
    names = {"source": source, "images": images, "tmp": folders, "out": str(tmp_path / "out")}
    assert main(arguments.format(**names).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("lion-linearize: error: ") and error.count("\n") == 1, error
    assert message.format(**names) in error
    assert not (tmp_path / "out").exists()


def test_exactly_one_of_text_and_images_is_given(source, images, tmp_path, capsys):
    for given in ({}, {"text": ["a"], "images": [images]}):
        with pytest.raises(ValueError, match="give either --text or --images"):
            linearize(source, tmp_path / "out", **given)
    for flags in ([], ["--text", "a", "--images", images]):
        with pytest.raises(SystemExit):
            main([source, str(tmp_path / "out"), *flags])
