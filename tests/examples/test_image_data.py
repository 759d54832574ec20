"""Images of other sizes, from files and folders, and images that cannot be decoded."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from image_script import DIGITS, FOLDER, IMAGENET, collator, encoded, picture, tensor, train
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from lion_hf.training.recipes import expand


pytestmark = pytest.mark.usefixtures("examples", "without_curves")


# -------------------------------------------------------------------------------------- evaluation and other sizes


def test_evaluation_resizes_and_crops_the_centre():
    """Evaluation images equal those that Pillow makes step by step, for an image that is not square."""
    collate, _ = collator(crop=True, size=14)
    row = {"image": encoded(3), "label": 0, "source_row": 0}
    found = collate([row])["pixel_values"][0]
    image = picture(3)  # 48 x 40; its shorter side becomes 16
    resized = image.resize((int(48 * 16 / 40), 16), Image.Resampling.BICUBIC)
    left = (resized.width - 14) // 2
    expected = tensor(resized.crop((left, 1, left + 14, 15)))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET.values())
    torch.testing.assert_close(found, (expected - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("side", [14, 15])
def test_evaluation_is_what_the_processor_does(crop, side):
    """This holds whether or not the images already have the size of the model."""
    import io

    collate, _ = collator(crop=crop, size=14)
    files = []
    for seed in range(3):
        files.append(io.BytesIO())
        picture(seed, (side, side)).save(files[-1], "PNG")
    rows = [{"image": {"bytes": f.getvalue(), "path": None}, "label": 0, "source_row": 0} for f in files]
    expected = collate.processor([picture(seed, (side, side)) for seed in range(3)], return_tensors="pt")
    assert torch.equal(collate(rows)["pixel_values"], expected["pixel_values"])


def test_the_saved_processor_does_what_evaluation_does(tmp_path, folder):
    """A pipeline on the saved folder gives the logits of the evaluation."""
    flags = ["--eval_crop_ratio=0.875", "--interpolation=bicubic", "--normalization=imagenet", "--image_size=16"]
    metrics = train(tmp_path, f"--train_dir={folder}", f"--validation_dir={folder}", *flags, "--max_steps=3")
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 18} and saved["crop_size"] == {"height": 16, "width": 16}
    assert saved["resample"] == 3 and saved["image_mean"] == IMAGENET["image_mean"]
    classify = pipeline("image-classification", model=str(tmp_path), top_k=3)
    files = sorted(folder.glob("*/*.png"))
    losses, hits = [], []
    for file in files:
        answers = {answer["label"]: answer["score"] for answer in classify(str(file))}
        losses.append(-math.log(answers[file.parent.name]))
        hits.append(max(answers, key=answers.get) == file.parent.name)
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(hits))


def test_by_default_images_are_resized_to_the_square(tmp_path):
    train(tmp_path, *DIGITS, "--max_steps=1")
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 8, "width": 8} and not saved["do_center_crop"]
    assert saved["image_mean"] == [0.5] * 3 and saved["resample"] == 2


@pytest.mark.parametrize("kind", ["lion", "lion, positions", "vit", "deit"])
def test_fine_tuning_at_another_resolution(kind, tmp_path):
    model = {"lion": ["--pos_emb=false"], "lion, positions": ["--pos_emb=true"]}.get(kind, [f"--model_type={kind}"])
    size = ["--image_size=16", "--patch_size=4", "--eval_crop_ratio=0.8"]
    train(tmp_path / "small", *DIGITS, *model, *size, "--max_steps=1")
    before = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    train(
        tmp_path / "large",
        *DIGITS,
        f"--model_name_or_path={tmp_path / 'small'}",
        "--image_size=24",
        "--max_steps=1",
        "--learning_rate=0",
    )
    after = AutoModelForImageClassification.from_pretrained(tmp_path / "large")
    assert after.config.image_size == 24
    saved = json.loads((tmp_path / "large" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 30} and saved["crop_size"]["height"] == 24
    changed = []
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        if old.shape == new.shape:
            assert torch.equal(old, new), name
        else:
            changed.append((name, tuple(new.shape)))
    if kind == "lion":
        assert not changed
    else:
        tokens = 6 * 6 + (2 if kind == "deit" else 1)
        assert len(changed) == 1 and changed[0][0].endswith("position_embeddings") and changed[0][1] == (1, tokens, 16)
        # The positions that the model itself interpolates for the larger image.
        pixels = torch.randn(2, 3, 24, 24)
        with torch.no_grad():
            logits = before.eval()(pixels, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(after.eval()(pixels).logits, logits, rtol=1e-4, atol=1e-5)


def test_resizing_a_position_table():
    from lion_hf.training.image_models import resize_positions

    table = torch.randn(1, 2 + 12, 5)
    assert torch.equal(resize_positions(table, (3, 4), (3, 4)), table)
    larger = resize_positions(table, (3, 4), (7, 9))
    assert larger.shape == (1, 2 + 63, 5) and torch.equal(larger[:, :2], table[:, :2])
    flat = resize_positions(torch.full((1, 17, 5), 0.3), (4, 4), (7, 7))
    torch.testing.assert_close(flat, torch.full((1, 50, 5), 0.3))


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_baselines_have_the_size_of_the_recipe(kind):
    """The numbers differ only by position tables, class tokens and distillation tokens."""
    from lion_hf.training.image_models import ImageModelArguments, get_model

    values = expand(FOLDER / "vit.yaml", "vit-tiny")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    arguments = ImageModelArguments(model_type=kind, **{name: values[name] for name in names})
    model = get_model(arguments, {"num_labels": 1000})
    assert model.config.model_type == kind
    tokens = 196 + (2 if kind == "deit" else 1)
    own = tokens * 192 + (192 if kind == "deit" else 0)
    assert model.num_parameters() == 5_679_592 + own  # LION-LIT, tiny: the paper's number without a position table


# -------------------------------------------------------------------------------------------------------- the data


def bad_folder(tmp_path, folder):
    """The folder with one file that is not an image and one that is truncated."""

    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    (copy / "elm" / "2.png").write_text("no image")
    whole = (copy / "oak" / "5.png").read_bytes()
    (copy / "oak" / "5.png").write_bytes(whole[: len(whole) // 2])
    return copy


def test_images_that_do_not_decode_are_skipped_and_counted(tmp_path, folder, monkeypatch):
    from lion_hf.training import images

    said = []
    monkeypatch.setattr(images.logger, "warning", said.append)
    bad = bad_folder(tmp_path, folder)
    data = [f"--train_dir={bad}", f"--validation_dir={bad}", "--image_size=16", "--num_train_epochs=2"]
    metrics = train(tmp_path / "out", *data, "--bad_images=skip", "--per_device_train_batch_size=1")
    assert metrics["skipped_training_images"] == metrics["skipped_validation_images"] == 2
    assert len(said) == 1 and "does not decode" in said[0]
    assert math.isfinite(metrics["train_loss"])
    good = tmp_path / "good"
    for file in sorted(bad.glob("*/*.png")):
        if (file.parent.name, file.name) not in {("elm", "2.png"), ("oak", "5.png")}:
            (good / file.parent.name).mkdir(parents=True, exist_ok=True)
            (good / file.parent.name / file.name).write_bytes(file.read_bytes())
    flags = [f"--model_name_or_path={tmp_path / 'out'}", "--do_train=false", f"--train_dir={good}"]
    again = train(tmp_path / "again", *flags, f"--validation_dir={good}")
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert again["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_an_error_of_one_line(tmp_path, folder, workers):
    """Row 10 is elm/2.png: eight ash trees come first."""
    from lion_hf.training.errors import UserError

    bad = bad_folder(tmp_path, folder)
    (bad / "oak" / "5.png").unlink()
    flags = [f"--train_dir={bad}", f"--validation_dir={folder}", f"--dataloader_num_workers={workers}"]
    with pytest.raises(UserError) as error:
        train(tmp_path / "out", *flags, "--image_size=16", "--num_train_epochs=1")
    message = str(error.value)
    assert message.startswith("the training image in row 10 (") and "elm/2.png) does not decode: " in message
    assert "\n" not in message and message.endswith("(use --bad_images skip to leave such images out)")


def test_a_row_keeps_its_number_where_a_part_is_held_out(tmp_path, folder):
    from lion_hf.training.errors import UserError

    bad = bad_folder(tmp_path, folder)
    (bad / "oak" / "5.png").unlink()
    with pytest.raises(UserError, match=r"image in row 10 \(.*elm/2.png\)"):
        train(
            tmp_path / "out", f"--train_dir={bad}", "--validation_share=0.3", "--image_size=16", "--num_train_epochs=1"
        )


@pytest.mark.parametrize(
    "name, path, image, label",
    [
        ("fashion_mnist", "zalando-datasets/fashion_mnist", "image", "label"),
        ("cifar10", "uoft-cs/cifar10", "img", "label"),
        ("cifar100", "uoft-cs/cifar100", "img", "fine_label"),
        ("imagenet-1k", "ILSVRC/imagenet-1k", "image", "label"),
    ],
)
def test_known_data_sets_by_their_short_names(name, path, image, label, tmp_path, monkeypatch):
    """A function that returns data for these names takes the place of the Hub."""
    import datasets

    def load(asked, config=None, **kwargs):
        assert asked == path and config is None
        features = datasets.Features(
            {image: datasets.Image(), label: datasets.ClassLabel(names=["a", "b"]), "x": datasets.Value("int8")}
        )
        rows = {image: [encoded(i) for i in range(8)], label: [i % 2 for i in range(8)], "x": [0] * 8}
        part = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict(train=part, test=part)

    monkeypatch.setattr(datasets, "load_dataset", load)
    metrics = train(tmp_path, f"--dataset_name={name}", "--image_size=8", "--max_steps=1")
    assert 0 <= metrics["eval_accuracy"] <= 1 and "eval_top5_accuracy" not in metrics
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == {0: "a", 1: "b"}


def test_a_gated_data_set_says_how_to_get_in(tmp_path, monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    from lion_hf.training.errors import UserError

    def load(name, *args, **kwargs):
        raise DatasetNotFoundError(
            f"Dataset '{name}' is a gated dataset on the Hub. You must be authenticated to access it."
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"'ILSVRC/imagenet-1k' is gated: accept its terms.*hf auth login"):
        train(tmp_path, "--dataset_name=imagenet-1k", "--max_steps=1")


def test_parquet_and_a_recipe_on_a_folder(tmp_path, folder):
    """--dataset_name= and a folder replace the data set of a recipe; a parquet file gives the same images."""
    import datasets
    import run_image_classification

    recipe = [str(FOLDER / "vit.yaml"), "--preset=vit-tiny"]
    flags = ["--dataset_name=", "--augmentation_backend=kornia", "--disable_tqdm=true", "--dataloader_num_workers=0"]
    tiny = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--intermediate_size=16"]
    tiny += ["--image_size=16", "--patch_size=8", "--per_device_train_batch_size=8", "--total_batch_size=8"]
    tiny += ["--max_steps=2", "--use_cpu=true", "--save_strategy=no", "--eval_strategy=no"]
    file = tmp_path / "images.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(folder), split="train").to_parquet(file)
    sources = (
        [f"--train_dir={folder}", f"--validation_dir={folder}"],
        [f"--train_file={file}", f"--validation_file={file}"],
    )
    found = []
    for i, source in enumerate(sources):
        metrics = run_image_classification.main([*recipe, f"--output_dir={tmp_path / str(i)}", *flags, *tiny, *source])
        found.append((metrics["train_loss"], metrics["eval_loss"], metrics["eval_ema_loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--augment=turn"], "invalid choice: 'turn'"),
        (["--bad_images=hide"], "invalid choice: 'hide'"),
        (["--eval_crop_ratio=1.5"], "--eval_crop_ratio is 1.5; it must be greater than 0"),
        (["--mixup=-1"], "--mixup and --cutmix must be finite and at least 0"),
        (["--cutmix=nan"], "--mixup and --cutmix must be finite and at least 0"),
        (["--teacher=unread", "--distillation=soft", "--distillation_tau=nan"], "--distillation_tau is nan"),
        (["--drop_path_rate=nan"], "drop_path_rate is nan; it must be a probability"),
        (["--random_erasing=2"], "--random_erasing is 2.0; it must be from 0 to 1"),
        (["--crop_scale=0"], "--crop_scale is 0.0"),
        (["--repeated_augmentation=0"], "--repeated_augmentation is 0"),
        (["--ema_decay=1"], "--ema_decay is 1.0"),
        (["--total_batch_size=9"], "multiple of 8"),
        (["--augment=deit", "--rand_augment=rand-m9"], "only the increasing form"),
        (
            ["--model_type=vit", "--drop_path_rate=0.1"],
            "--drop_path_rate is an option of LION; a 'vit' model does not have it",
        ),
        (["--teacher=absent/model/here"], "--teacher: there is no folder 'absent/model/here'"),
        (["--distillation_alpha=2"], "--distillation_alpha is 2.0"),
        (["--distillation_tau=0"], "--distillation_tau is 0.0"),
        (["--train_dir=absent"], "image folder 'absent' does not exist"),
        (["--train_file=table.csv"], "column 'image' holds no images"),
        (["--image_size=10", "--patch_size=4"], "not divisible by patch_size 4"),
        (["--patch_size=0"], "--patch_size is 0; it must be at least 1"),
        (["--distillation=soft"], "--distillation requires --teacher"),
        (["--validation_dir=images"], "--validation_dir requires --train_dir"),
        (["--train_dir=images", "--validation_file=table.csv"], "cannot be combined; give one of them"),
        (
            ["--train_dir=images"],
            "'images' has no classes: it must hold one folder of images per class, two or more, such as "
            "images/CLASS/1.jpg",
        ),
        (["--train_dir=empty"], "cannot read 'empty': it holds no images; the form is empty/CLASS/1.jpg"),
        (["--train_dir=notes"], "cannot read 'notes': it holds no images; the form is notes/CLASS/1.jpg"),
        (
            ["--train_dir=split"],
            "'split' holds folders that look like parts of the data, not like classes: test, train. Use --train_dir "
            "split/train --validation_dir split/test",
        ),
        (["--train_dir=table.csv"], "'table.csv' is a file"),
        (["--train_file=same.csv"], "the same value 1 in every row"),
        (["--train_file=gap.csv"], "has rows without a label"),
        (
            ["--train_file=table.csv", "--label_column=class"],
            "no column 'class' (set --label_column); the columns are image, label (if the first line of the file is",
        ),
        (["--preset=lion-s-base"], "allowed are lion-lit-tiny-patch16-224"),
        (["--lr_scheduler_type=cosin"], "argument --lr_scheduler_type"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_a_message_of_one_line(flags, message, tmp_path, monkeypatch):
    from lion_hf.training.errors import UserError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("image,label\nred,1\nblue,2\ngreen,1\n")
    (tmp_path / "same.csv").write_text("image,label\nred,1\nblue,1\ngreen,1\n")
    (tmp_path / "gap.csv").write_text("image,label\nred,1\nblue,\ngreen,2\n" * 9)
    for name in ("images", "empty/cat", "notes/cat", "split/train/cat", "split/test/cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes" / "cat" / "notes.txt").write_text("no image")
    for name in ("images", "split/train/cat", "split/test/cat"):
        picture().save(tmp_path / name / "one.png")
    with pytest.raises(UserError) as error:
        train(tmp_path / "out", *DIGITS, "--max_steps=1", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_image_size_must_fit_the_patches(tmp_path):
    from lion_hf.training.errors import UserError

    train(tmp_path / "small", *DIGITS, "--image_size=16", "--patch_size=4", "--max_steps=1")
    with pytest.raises(UserError, match="wrong --image_size 18"):
        train(
            tmp_path / "out", *DIGITS, f"--model_name_or_path={tmp_path / 'small'}", "--image_size=18", "--max_steps=1"
        )
