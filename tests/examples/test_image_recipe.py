"""The DeiT recipe of the image script: numbers, augmentation, losses, average, teachers, other sizes, bad images."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

import lion_hf
from lion_hf.training.recipes import expand, presets_of


pytestmark = pytest.mark.usefixtures("examples")

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "recipes" / "imagenet"
RECIPES = [(file, preset) for file in sorted(FOLDER.glob("*.yaml")) for preset in presets_of(file)]
MODEL = ["--hidden_size=16", "--num_hidden_layers=2", "--num_attention_heads=2"]
TINY = [
    "--disable_tqdm=true",
    "--use_cpu=true",
    "--augmentation_backend=kornia",
    "--per_device_train_batch_size=8",
    "--save_strategy=no",
    "--eval_strategy=no",
]
DIGITS = ["--max_train_samples=24", "--max_eval_samples=12"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(autouse=True)
def without_curves(request, monkeypatch):
    """Drawing takes longer than these trainings; the first recipe is drawn."""

    from lion_hf.training import reports

    if RECIPES[0][1] not in request.node.name:
        monkeypatch.setattr(reports, "plot_curves", lambda *args: None)


def train(folder, *flags):
    """Metrics of a run in this process."""
    import run_image_classification

    model = [] if any(flag.startswith("--model_name_or_path") for flag in flags) else MODEL
    return run_image_classification.main([f"--output_dir={folder}", *TINY, *model, *flags])


def picture(seed=0, size=(48, 40)):
    """A smooth random RGB image of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, three classes of eight images, not square."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("ash", "elm", "oak")):
        (root / name).mkdir()
        for i in range(8):
            picture(8 * number + i).save(root / name / f"{i}.png")
    return root


def collator(bad_images="error", classes=10, size=16, crop=False, length=100, **options):
    from datasets import Dataset
    from transformers import ViTImageProcessorPil

    from lion_hf.training.augmentation import AugmentationArguments
    from lion_hf.training.data import Key
    from lion_hf.training.images import ImageCollator

    sizes = {"size": {"height": size, "width": size}}
    if crop:
        sizes = {"size": {"shortest_edge": round(size / 0.875)}, "do_center_crop": True}
        sizes["crop_size"] = {"height": size, "width": size}
    processor = ViTImageProcessorPil(**sizes, **IMAGENET, resample=Image.Resampling.BICUBIC, do_convert_rgb=True)
    part = Dataset.from_dict({"source_row": list(range(length))})
    options = AugmentationArguments(augmentation_backend="kornia", **options)
    made = ImageCollator(processor, options, classes, 17, bad_images, training=part, validation=part)
    rows = [{"image": encoded(i), "label": i % classes, "source_row": i, "key": Key(2, i)} for i in range(8)]
    return made, rows


def encoded(seed):
    import io

    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


# --------------------------------------------------------------------------------------------------------- recipes


def test_recipes_are_the_authors():
    """Every preset of every file against the numbers of the paper's recipe; the models against their layout."""
    layout = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
    variants = {"lion-lit": "lit", "lion-d": "decay", "lion-s": "selective"}
    orders = ("", "-snake")
    names = {f"{v}-{s}-patch16-224{o}" for v in variants for s in layout for o in orders if v != "lion-lit" or not o}
    names |= {f"vit-{size}" for size in layout}
    assert {preset for _, preset in RECIPES} == names and len(RECIPES) == 18
    for file, preset in RECIPES:
        values = expand(file, preset)
        batch, epochs, peak = values["total_batch_size"], values["num_train_epochs"], values["learning_rate"]
        assert epochs == 300 and batch == 1024 and values["dataset_name"] == "imagenet-1k"
        assert peak == 5e-4 * batch / 512 and values["lr_scheduler_type"] == "cosine"
        assert values["optim"] == "adamw_torch" and values["adam_epsilon"] == 1e-8 and values["weight_decay"] == 0.05
        assert not {"adam_beta1", "adam_beta2"} & set(values)
        assert values["lr_floor"] * peak == pytest.approx(1e-5)
        assert values["lr_warmup_start"] * peak == pytest.approx(1e-6)
        assert values["warmup_steps"] * epochs == pytest.approx(5)
        assert values["mixup"] == 0.8 and values["cutmix"] == 1.0
        assert values["mixup_prob"] == 1.0 and values["mixup_switch_prob"] == 0.5
        assert values["label_smoothing_factor"] == 0.1
        assert values["augment"] == "deit" and values["rand_augment"] == "rand-m9-mstd0.5-inc1"
        assert values["color_jitter"] == 0.3 and values["random_erasing"] == 0.25
        assert values["repeated_augmentation"] == 3 and values["ema_decay"] == 0.99996
        assert values["interpolation"] == "bicubic" and values["normalization"] == "imagenet"
        size = next(name for name in layout if name in preset.split("-"))
        if preset.startswith("vit"):
            model = values
            assert values["model_type"] == "vit" and "drop_path_rate" not in values
        else:
            assert values["preset"] == preset
            model = lion_hf.PRESETS[preset]
            variant = preset.partition(f"-{size}")[0]
            assert model["mask_type"] == variants[variant] and values["drop_path_rate"] == 0.1
            assert model["order"] == ("s" if preset.endswith("-snake") else "normal")
        shape = (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"])
        assert shape == layout[size] and model["intermediate_size"] == 4 * shape[0]
        assert model["image_size"] == 224 and model["patch_size"] == 16
        assert round(model["image_size"] / values["eval_crop_ratio"]) == 256
        assert values["output_dir"] == f"outputs/imagenet/{preset}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[1])
def test_every_recipe_runs_with_smoke(recipe, tmp_path):
    import run_image_classification

    flags = [f"--output_dir={tmp_path}", "--augmentation_backend=kornia", "--disable_tqdm=true"]
    metrics = run_image_classification.main([str(recipe[0]), f"--preset={recipe[1]}", "--smoke", *flags])
    assert math.isfinite(metrics["train_loss"]) and math.isfinite(metrics["eval_ema_loss"])
    assert 0 <= metrics["eval_accuracy"] <= metrics["eval_top5_accuracy"] <= 1
    assert metrics["train_samples_per_second"] > 0
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "ema").config
    assert config.num_labels == 10 and getattr(config, "drop_path_rate", 0.1) == 0.1


def test_the_total_batch_size_sets_the_accumulation(tmp_path):
    from run_image_classification import ImageTrainingArguments

    options = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8}
    assert ImageTrainingArguments(total_batch_size=40, **options).gradient_accumulation_steps == 5
    with pytest.raises(ValueError, match="multiple of 8"):
        ImageTrainingArguments(total_batch_size=20, **options)


# ---------------------------------------------------------------------------------------------------- augmentation


def test_operations_are_those_of_pillow():
    """At a magnitude within the recipe's range, each operation of RandAugment does what Pillow's does."""
    from lion_hf.training.kornia_augmentation import OPERATIONS

    image, m, corner = picture(size=(64, 64)), 0.9, (slice(None), slice(16, 48), slice(16, 48))
    fill, color = torch.tensor([0.485, 0.456, 0.406]), (124, 116, 104)
    strong = 1 + 0.9 * m

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=color)

    expected = {
        "auto_contrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "invert": ImageOps.invert(image),
        "rotate": image.rotate(30 * m, Image.Resampling.BICUBIC, fillcolor=color),
        "posterize": ImageOps.posterize(image, 1),
        "solarize": ImageOps.solarize(image, 26),
        "solarize_add": image.point(lambda v: min(255, v + 99) if v < 128 else v),
        "color": ImageEnhance.Color(image).enhance(strong),
        "contrast": ImageEnhance.Contrast(image).enhance(strong),
        "brightness": ImageEnhance.Brightness(image).enhance(strong),
        "sharpness": ImageEnhance.Sharpness(image).enhance(strong),
        "shear_x": affine(1, -0.3 * m, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, -0.3 * m, 1, 0),
        "translate_x": affine(1, 0, -0.45 * m * 64, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, -0.45 * m * 64),
    }
    assert expected.keys() == OPERATIONS.keys() and len(expected) == 15
    pixels = tensor(image)
    for name, reference in expected.items():
        found = OPERATIONS[name](pixels[None], m, 1.0, fill)[0]
        moved = name.startswith(("rotate", "shear", "translate"))  # kornia's cubic differs from Pillow's at edges
        where = corner if moved else (slice(None),) * 3
        error = (found - tensor(reference))[where].abs()
        assert error.mean() < 2 / 255 and (error > 4 / 255).float().mean() < 0.05, name
        assert found.min() >= 0 and found.max() <= 1


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("augment", ["shift+flip", "deit"])
def test_an_image_depends_on_its_key_alone(augment):
    """Not on its batch, nor on what else was drawn; and drawing for it leaves the global generators as they were."""
    collate, rows = collator(augment=augment)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    together = collate(rows)["pixel_values"]
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert np.array_equal(before[1], np.random.get_state()[1])
    torch.rand(5)
    alone = torch.cat([collate([row])["pixel_values"] for row in reversed(rows)]).flip(0)
    assert torch.equal(together, alone)
    for change in ({"epoch": 3}, {"repeat": 1}):
        other = collate([row | {"key": row["key"]._replace(**change)} for row in rows])["pixel_values"]
        assert not torch.equal(together, other)


def test_shifts_show_the_image_and_nothing_else():
    from lion_hf.training.augmentation import shift_and_flip

    pixels, padding = torch.rand(200, 3, 8, 16), torch.full((1, 3, 1, 1), -1.0)
    draws = np.random.default_rng(0).random((200, 3))
    changed = shift_and_flip(pixels, "shift+flip", padding, draws)
    mirrored = draws[:, 0] < 0.5
    assert 60 < mirrored.sum() < 140
    seen = set()
    for image, before, flip in zip(changed, pixels, mirrored, strict=True):
        before = before.flip(-1) if flip else before
        for down in (-1, 0, 1):
            for right in (-2, -1, 0, 1, 2):
                moved = torch.full_like(before, -1.0)
                rows, columns = (slice(max(0, n), side + min(0, n)) for n, side in ((down, 8), (right, 16)))
                source = tuple(slice(max(0, -n), side - max(0, n)) for n, side in ((down, 8), (right, 16)))
                moved[:, rows, columns] = before[:, source[0], source[1]]
                if torch.equal(moved, image):
                    seen.add((down, right))
    assert len(seen) == 15


def test_the_crop_covers_the_wanted_share():
    from lion_hf.training.kornia_augmentation import KorniaAugmentation

    options = {
        "rand_augment": "none",
        "color_jitter": 0.0,
        "random_erasing": 0.0,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
    }
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64)[None, :] * 4, np.arange(64)[:, None] * 4
    for smallest in (0.08, 0.6):
        augment = KorniaAugmentation((32, 32), smallest, resample=Image.Resampling.BICUBIC, **options)
        shares = []
        for _ in range(60):
            found = augment(Image.fromarray(ramp)) * 255 / 4
            width, height = (float(found[c].max() - found[c].min()) + 1 for c in (0, 1))
            shares.append(width * height / 64**2)
        assert smallest - 0.05 < min(shares) < smallest + 0.15 and max(shares) > 0.85


def test_erasing_fills_a_rectangle_with_noise():
    from lion_hf.training.kornia_augmentation import KorniaAugmentation

    options = {"rand_augment": "none", "color_jitter": 0.0, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resample": 3}
    gray = Image.new("RGB", (40, 40), (128, 128, 128))
    augment = KorniaAugmentation((32, 32), 0.08, random_erasing=0.25, **options)
    erased = [(augment(gray) - 1 / 255).abs() > 1e-3 for _ in range(200)]
    hit = [mask for mask in erased if mask.any()]
    assert 30 < len(hit) < 75
    for mask in hit:
        rows, columns = mask.any(0).any(1).nonzero(), mask.any(0).any(0).nonzero()
        box = mask[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.float().mean() > 0.9 and 0.01 < box[0].numel() / 32**2 < 0.4


def test_jitter_acts_where_rand_augment_does_not():
    from lion_hf.training.kornia_augmentation import KorniaAugmentation

    options = {"random_erasing": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3, "resample": 3}
    gray = Image.new("RGB", (40, 40), (100, 100, 100))

    def brightness(**given):
        augment = KorniaAugmentation((16, 16), 0.5, **given, **options)
        return torch.stack([augment(gray).mean() for _ in range(40)]) * 255 / 100

    jittered = brightness(rand_augment="none", color_jitter=0.3)
    assert 0.69 < jittered.min() < 0.85 and 1.15 < jittered.max() < 1.31
    assert torch.allclose(brightness(rand_augment="none", color_jitter=0.0), torch.ones(40), atol=1e-4)
    torch.manual_seed(1)
    with_it = brightness(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3)
    torch.manual_seed(1)
    assert torch.equal(with_it, brightness(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.0))


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5", "rand-x3-inc1", "augmix", "rand"])
def test_an_unknown_rand_augment_is_an_error(name):
    from lion_hf.training.errors import UserError
    from lion_hf.training.kornia_augmentation import rand_augment_options

    with pytest.raises(UserError, match="--rand_augment"):
        rand_augment_options(name)


def test_rand_augment_options_are_read_from_the_name():
    from lion_hf.training.kornia_augmentation import rand_augment_options

    assert rand_augment_options("rand-m9-mstd0.5-inc1") == (9, 0.5, 2)
    assert rand_augment_options("rand-n3-m7-inc1") == (7, 0, 3)


def test_without_timm_kornia_is_chosen_with_a_warning(monkeypatch, caplog):
    from lion_hf.training.augmentation import choose_backend, logger
    from lion_hf.training.errors import UserError

    for module in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, module, None)  # the import fails
    monkeypatch.setattr(logger, "warning_once", lambda text: caplog.records.append(text))
    assert choose_backend("kornia") == "kornia" and not caplog.records
    assert choose_backend("auto") == "kornia" and "rounds to 8 bits" in caplog.records[0]
    caplog.records.clear()
    with pytest.raises(UserError, match="timm cannot be imported"):
        choose_backend("timm")


def test_with_timm_its_images_depend_on_their_key_alone():
    try:
        import timm.data  # noqa: F401
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    from transformers import ViTImageProcessorPil

    from lion_hf.training.augmentation import AugmentationArguments, deit_augmentation, seeded

    processor = ViTImageProcessorPil(**IMAGENET, resample=Image.Resampling.BICUBIC)
    options = AugmentationArguments(augment="deit", augmentation_backend="timm")
    augment = deit_augmentation(options, processor, (32, 32))
    images = []
    for seed in (1, 2, 1):
        with seeded(seed):
            images.append(augment(picture()))
    assert images[0].shape == (3, 32, 32) and torch.equal(images[0], images[2]) and not torch.equal(*images[:2])


# ------------------------------------------------------------------------------------------------ mixup and losses


def mixed(count=300, **options):
    from lion_hf.training.augmentation import AugmentationArguments, mix

    arguments = AugmentationArguments(**options)
    pixels, targets = torch.rand(6, 3, 12, 20), F.one_hot(torch.tensor([0, 1, 2, 3, 1, 0]), 5).float()
    results = [mix(pixels, targets, arguments, np.random.default_rng(i)) for i in range(count)]
    return pixels, targets, results


def test_mixup_blends_each_image_with_its_mirror_in_the_batch():
    pixels, targets, results = mixed(mixup=0.8)
    shares = []
    for blended, soft in results:
        share = float(((blended - pixels.flip(0)) / (pixels - pixels.flip(0)))[0].median())
        torch.testing.assert_close(blended, share * pixels + (1 - share) * pixels.flip(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(soft, share * targets + (1 - share) * targets.flip(0), atol=1e-4, rtol=0)
        shares.append(share)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * 2.6)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06) and np.var(shares) == pytest.approx(1 / 10.4, abs=0.015)


def test_cutmix_pastes_one_box_and_counts_its_area():
    pixels, targets, results = mixed(cutmix=1.0)
    shares = []
    for cut, soft in results:
        pasted = (cut != pixels).any(1)
        assert torch.equal(torch.where(pasted[:, None], pixels.flip(0), pixels), cut)
        for mask in pasted[1:]:
            assert torch.equal(mask, pasted[0])  # one box for all
        rows, columns = pasted[0].any(1).nonzero(), pasted[0].any(0).nonzero()
        if len(rows):
            assert pasted[0][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        share = 1 - float(pasted[0].float().mean())
        torch.testing.assert_close(soft, share * targets + (1 - share) * targets.flip(0))
        shares.append(share)
    assert 0.5 < np.mean(shares) < 0.8 and min(shares) < 0.35 and max(shares) == 1


def test_switch_and_probability_of_mixing():
    pixels, targets, results = mixed(mixup=0.8, cutmix=1.0, mixup_prob=0.5, mixup_switch_prob=0.25)
    plain = sum(torch.equal(image, pixels) and torch.equal(soft, targets) for image, soft in results)
    cut = sum(bool(((image == pixels) | (image == pixels.flip(0))).all()) for image, _ in results) - plain
    assert 120 < plain < 185 and 20 < cut < 60


def image_trainer(tmp_path, model, teacher=None, **options):
    from run_image_classification import ImageTrainingArguments

    from lion_hf.training.image_trainer import ImageTrainer

    folder = {"output_dir": str(tmp_path), "use_cpu": True, "eval_strategy": "no"}
    return ImageTrainer(model=model, args=ImageTrainingArguments(**folder, **options), teacher=teacher)


def test_the_loss_is_the_sum_over_the_batch_per_image_of_the_step(tmp_path):
    """Smoothed soft targets against plain math; micro-batches add up to the step; a filler counts nothing."""
    from small_models import vision_config

    model = lion_hf.LionForImageClassification(vision_config()).train()
    trainer = image_trainer(tmp_path, model, label_smoothing_factor=0.1)
    pixels, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    soft = F.one_hot(labels, 5).float().lerp(F.one_hot(labels.flip(0), 5).float(), 0.3)

    def loss(rows, items, **changes):
        batch = {"pixel_values": pixels[rows], "labels": labels[rows], "soft_labels": soft[rows]} | changes
        return trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(items))

    smooth = 0.9 * soft + 0.1 / 5
    expected = -(smooth * model(pixels).logits.log_softmax(-1)).sum() / 6
    torch.testing.assert_close(loss(slice(None), 6), expected)
    torch.testing.assert_close(loss(slice(0, 4), 6) + loss(slice(4, 6), 6), expected)
    filler = loss(slice(0, 2), 6, labels=torch.full((2,), -100))
    assert filler == 0 and filler.requires_grad
    hard = trainer.compute_loss(model, {"pixel_values": pixels, "labels": labels}, num_items_in_batch=6)
    torch.testing.assert_close(hard, F.cross_entropy(model(pixels).logits, labels, label_smoothing=0.1))
    plain, outputs = trainer.compute_loss(model.eval(), {"pixel_values": pixels, "labels": labels}, return_outputs=True)
    torch.testing.assert_close(plain, F.cross_entropy(outputs.logits, labels))  # evaluation is not smoothed


def test_top_one_top_five_and_loss():
    from run_image_classification import image_metrics, scores
    from transformers.trainer_utils import EvalPrediction

    logits, labels = torch.randn(50, 12), torch.arange(50) % 12
    labels[7] = -100
    predictions = tuple(x.numpy() for x in scores(logits, labels))
    found = image_metrics(EvalPrediction(predictions, labels.numpy()), 12)
    kept = labels != -100
    ranks = (logits > logits.gather(1, labels.clamp(min=0)[:, None])).sum(1)[kept]
    assert found["accuracy"] == pytest.approx((ranks == 0).float().mean().item())
    assert found["top5_accuracy"] == pytest.approx((ranks < 5).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[kept], labels[kept]).item(), rel=1e-5)
    assert "top5_accuracy" not in image_metrics(EvalPrediction(predictions, labels.numpy()), 5)


def test_the_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path):
    found = [
        train(tmp_path / f"{size}", *DIGITS, "--max_steps=2", f"--per_device_eval_batch_size={size}")["eval_loss"]
        for size in (5, 12)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_repeated_augmentation_shows_an_image_three_times_in_a_batch(tmp_path):
    from lion_hf.training.data import EpochBatchSampler
    from lion_hf.training.image_trainer import ImageTrainer

    seen = []
    original = ImageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append(inputs["labels"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTrainer, "compute_loss", spy)
        train(tmp_path, *DIGITS, "--augment=deit", "--repeated_augmentation=3", "--max_steps=1")
    keys = next(iter(EpochBatchSampler(24, 8, seed=17, repeats=3)))
    assert len({key.index for key in keys}) == 3
    assert seen[0][0] == seen[0][1] == seen[0][2] and len(seen[0]) == 8


# ---------------------------------------------------------------------------------------------------- distillation


def test_distillation_losses_against_plain_math():
    from lion_hf.training.distillation import distillation_losses

    losses, student, teacher = torch.rand(4), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    alpha, tau = 0.3, 2.0
    soft = distillation_losses(losses, student, teacher, "soft", alpha, tau)
    hard = distillation_losses(losses, student, teacher, "hard", alpha, tau)
    for i in range(4):
        q = [math.exp(float(x) / tau) for x in student[i]]
        p = [math.exp(float(x) / tau) for x in teacher[i]]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        divergence = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        assert float(soft[i]) == pytest.approx((1 - alpha) * float(losses[i]) + alpha * tau**2 * divergence, abs=1e-6)
        best = max(range(3), key=lambda k: float(teacher[i, k]))
        surprise = -math.log(math.exp(float(student[i, best])) / sum(math.exp(float(x)) for x in student[i]))
        assert float(hard[i]) == pytest.approx((1 - alpha) * float(losses[i]) + alpha * surprise, abs=1e-6)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A RegNet of ten classes, with ImageNet's mean and deviation."""
    from transformers import RegNetConfig, RegNetForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("teacher")
    names = {i: str(i) for i in range(10)}
    config = RegNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, groups_width=8, id2label=names)
    RegNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, **IMAGENET).save_pretrained(folder)
    return folder


def make_teacher(folder, **options):
    from transformers import ViTImageProcessorPil

    from lion_hf.training.distillation import DistillationArguments, Teacher

    student = lion_hf.LionVisionConfig(
        image_size=8, patch_size=4, id2label=options.pop("names", {i: str(i) for i in range(10)})
    )
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Teacher(DistillationArguments(teacher=str(folder), **options), student, processor, (8, 8), "cpu"), processor


def test_the_teacher_sees_images_in_its_own_normalisation(teacher_folder):
    teacher, processor = make_teacher(teacher_folder)
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    image = picture()
    theirs = AutoImageProcessor.from_pretrained(teacher_folder, backend="pil")(image, return_tensors="pt")
    with torch.no_grad():
        expected = teacher.model(**theirs).logits
    found = teacher.logits(processor(image, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_training_with_a_teacher(kind, teacher_folder, tmp_path):
    flags = [
        f"--teacher={teacher_folder}",
        f"--distillation={kind}",
        "--mixup=0.8",
        "--max_steps=2",
        "--logging_steps=1",
    ]
    folder, plain = tmp_path / "taught", tmp_path / "plain"
    metrics = train(folder, *DIGITS, *flags)
    alone = train(plain, *DIGITS, *flags[2:])
    assert math.isfinite(metrics["train_loss"]) and metrics["train_loss"] != alone["train_loss"]
    same = train(plain, *DIGITS, *flags, "--distillation_alpha=0", "--resume_from_checkpoint=no")
    assert same["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-6)


def test_a_teacher_of_other_classes_is_an_error(teacher_folder):
    from lion_hf.training.errors import UserError

    with pytest.raises(UserError, match="has 10 classes, the student 4"):
        make_teacher(teacher_folder, names={i: str(i) for i in range(4)})
    with pytest.raises(UserError, match="in another order"):
        make_teacher(teacher_folder, names={i: str(9 - i) for i in range(10)})


# ------------------------------------------------------------------------------------------------------------- EMA


def test_the_average_is_the_recursion_over_the_steps(tmp_path):
    """EMA <- d * EMA + (1 - d) * weights after every optimizer step, beginning at the first weights."""
    from transformers import TrainerCallback

    from lion_hf.training.image_trainer import ImageTrainer

    class Recorder(TrainerCallback):
        def __init__(self):
            self.weights = []

        def on_train_begin(self, args, state, control, model, **kwargs):
            self.weights.append({k: v.clone() for k, v in model.state_dict().items()})

        on_step_end = on_train_begin

    recorder, original = Recorder(), ImageTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(recorder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTrainer, "__init__", init)
        flags = ["--max_steps=4", "--gradient_accumulation_steps=2", "--ema_decay=0.7", "--warmup_steps=0"]
        metrics = train(tmp_path, *DIGITS, *flags)
    assert len(recorder.weights) == 5
    raw, average = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "ema" / "model.safetensors")
    for name, found in average.items():
        expected = recorder.weights[0][name]
        for weights in recorder.weights[1:]:
            expected = 0.7 * expected + 0.3 * weights[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # Evaluating the average left the weights of the model where they were.
        assert torch.equal(raw[name], recorder.weights[-1][name])
    again = train(tmp_path / "again", *DIGITS, f"--model_name_or_path={tmp_path / 'ema'}", "--do_train=false")
    assert again["eval_loss"] == pytest.approx(metrics["eval_ema_loss"], rel=1e-5)
    assert metrics["eval_ema_loss"] != metrics["eval_loss"]


def test_a_short_run_with_a_slow_average_is_warned_of(tmp_path, monkeypatch):
    from lion_hf.training import ema

    said = []
    monkeypatch.setattr(ema.logger, "warning", said.append)
    train(tmp_path, *DIGITS, "--max_steps=1", "--ema_decay=0.99996")
    assert len(said) == 1 and "25,000 steps" in said[0]


# --------------------------------------------------------------------------------------------------------- resuming

FULL = [
    "--augment=deit",
    "--mixup=0.8",
    "--cutmix=1.0",
    "--label_smoothing_factor=0.1",
    "--repeated_augmentation=2",
    "--ema_decay=0.8",
    "--hidden_dropout_prob=0.1",
    "--drop_path_rate=0.2",
    "--logging_steps=1",
    "--save_strategy=steps",
    "--save_steps=3",
]


def history(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def assert_same_run(one, other):
    assert history(one).keys() == history(other).keys()
    np.testing.assert_allclose(list(history(one).values()), list(history(other).values()), rtol=1e-6)
    for file in ("model.safetensors", "ema/model.safetensors"):
        weights, again = load_file(one / file), load_file(other / file)
        for name in weights:
            torch.testing.assert_close(again[name], weights[name], rtol=1e-6, atol=1e-6)
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (one, other)]
    for name in ("eval_loss", "eval_ema_loss"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-6)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    """Stopped between two checkpoints, in the middle of an epoch, with everything random switched on."""
    from lion_hf.training.ema import Ema

    flags = [*DIGITS, *FULL, "--max_steps=8"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, *flags)
    original = Ema.on_optimizer_step

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise InterruptedError
        return original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Ema, "on_optimizer_step", stop)
        train(stopped, *flags)
    assert (stopped / "checkpoint-3" / "ema").is_dir() and not (stopped / "model.safetensors").exists()
    train(stopped, *flags)
    assert_same_run(whole, stopped)


def test_a_run_resumed_at_the_end_of_an_epoch_needs_no_evaluation_made_before(tmp_path):
    """A checkpoint by steps is written before the evaluation of its epoch, which the resumed run does not make."""
    flags = ["--max_train_samples=40", "--max_eval_samples=12", "--num_train_epochs=2", "--logging_steps=1"]
    flags += ["--hidden_dropout_prob=0.1", "--eval_strategy=epoch", "--save_strategy=steps", "--save_steps=5"]
    flags += ["--ema_decay=0.9"]
    one = train(tmp_path / "one", *flags)
    shutil.copytree(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    other = train(tmp_path / "two", *flags)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)


def save_classifier(folder, names):
    """A classifier of images of 16 pixels with classes of these names, and its processor."""
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = lion_hf.LionVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, **classes
    )
    lion_hf.LionForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return f"--model_name_or_path={folder}"


def test_evaluation_counts_classes_as_the_model_does(tmp_path, folder):
    """The same weights under turned class names: what is right turns with them, and foreign classes are refused."""
    from datasets import load_dataset

    from lion_hf.training.errors import UserError

    names = load_dataset("imagefolder", data_dir=str(folder), split="train").features["label"].names
    data = [f"--train_dir={folder}", f"--validation_dir={folder}", "--do_train=false"]
    model = save_classifier(tmp_path / "model", names)
    known = train(tmp_path / "out", model, *data)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    turned = [*names[1:], names[0]]
    for name, values in (("id2label", dict(enumerate(turned))), ("label2id", {n: i for i, n in enumerate(turned)})):
        config[name] = values
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for part in ("weight", "bias"):  # the rows of the head turn with the names
        weights[f"classifier.{part}"] = weights[f"classifier.{part}"].roll(-1, 0)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    same = train(tmp_path / "out", model, *data)
    assert same["eval_loss"] == pytest.approx(known["eval_loss"], rel=1e-5)
    assert same["eval_accuracy"] == known["eval_accuracy"]

    foreign = save_classifier(tmp_path / "foreign", ["rose", "tulip", "lily"])
    with pytest.raises(UserError, match="which the model does not know; it knows rose, tulip, lily"):
        train(tmp_path / "out", foreign, *data)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    """kill -9 while it trains; images are decoded and changed in two worker processes."""
    flags = [*TINY, *MODEL, *FULL, "--max_train_samples=100", "--max_eval_samples=20", "--max_steps=60"]
    flags += ["--dataloader_num_workers=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "run_image_classification.py"), *flags, "--output_dir"]
    subprocess.run([*command, str(whole)], env=ALONE, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed)], env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-12" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "all_results.json").exists(), "the run was over before it was killed"
    subprocess.run([*command, str(killed)], env=ALONE, check=True, capture_output=True)
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_two_processes_end_a_batch_that_is_not_even(tmp_path):
    """25 images in global batches of 8: one process has none of the last. Nothing hangs, all processes agree."""
    flags = [*TINY, *MODEL, *FULL, "--max_train_samples=25", "--max_eval_samples=7", "--num_train_epochs=2"]
    flags += ["--per_device_train_batch_size=4", "--per_device_eval_batch_size=3", "--bad_images=skip"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(EXAMPLES / "run_image_classification.py"), *flags, f"--output_dir={tmp_path}"]
    result = subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "all_results.json").read_text())
    assert len(history(tmp_path)) == 8 and all(math.isfinite(loss) for loss in history(tmp_path).values())
    assert found["skipped_training_images"] == 0 and math.isfinite(found["eval_ema_loss"])
    # One process, evaluating the saved model, finds what two found together.
    flags = [f"--model_name_or_path={tmp_path}", "--do_train=false", "--max_train_samples=25", "--max_eval_samples=7"]
    again = train(tmp_path / "again", *flags)
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert again["eval_accuracy"] == pytest.approx(found["eval_accuracy"])


# -------------------------------------------------------------------------------------- evaluation and other sizes


def test_evaluation_resizes_and_crops_the_centre():
    """Pillow by hand, of an image that is not square."""
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
    """Whether the images already have the model's size or not."""
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
    """So a pipeline on the saved folder gives the evaluation's logits."""
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
        # What the model itself computes on the fly for the larger image.
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
    """Within the parameters that position tables, class and distillation tokens differ by."""
    from lion_hf.training.image_models import ImageModelArguments, get_model

    values = expand(FOLDER / "vit.yaml", "vit-tiny")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    arguments = ImageModelArguments(model_type=kind, **{name: values[name] for name in names})
    model = get_model(arguments, {"num_labels": 1000})
    assert model.config.model_type == kind
    tokens = 196 + (2 if kind == "deit" else 1)
    own = tokens * 192 + (192 if kind == "deit" else 0)
    assert model.num_parameters() == 5_679_592 + own  # LION-LIT, tiny: the paper's layout without positions


# -------------------------------------------------------------------------------------------------------- the data


def bad_folder(tmp_path, folder):
    """The folder with one file that is no image and one that was cut off."""
    import shutil

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
    assert "\n" not in message and message.endswith("(--bad_images skip leaves out such images)")


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
    """The Hub is replaced by a function that knows these paths."""
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
    """A recipe's data set is replaced by --dataset_name= and a folder; the same images come from a parquet file."""
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
        (["--eval_crop_ratio=1.5"], "--eval_crop_ratio is 1.5; allowed is"),
        (["--mixup=-1"], "--mixup and --cutmix must not be negative"),
        (["--random_erasing=2"], "--random_erasing is 2.0; allowed is 0 to 1"),
        (["--crop_scale=0"], "--crop_scale is 0.0"),
        (["--repeated_augmentation=0"], "--repeated_augmentation is 0"),
        (["--ema_decay=1"], "--ema_decay is 1.0"),
        (["--total_batch_size=9"], "multiple of 8"),
        (["--augment=deit", "--rand_augment=rand-m9"], "only the increasing form"),
        (["--model_type=vit", "--drop_path_rate=0.1"], "--drop_path_rate is an option of LION; a 'vit' model has none"),
        (["--teacher=absent/model/here"], "absent/model/here"),
        (["--distillation_alpha=2"], "--distillation_alpha is 2.0"),
        (["--distillation_tau=0"], "--distillation_tau is 0.0"),
        (["--train_dir=absent"], "image folder 'absent' does not exist"),
        (["--train_file=table.csv"], "column 'image' holds no images"),
        (["--image_size=10", "--patch_size=4"], "not divisible by patch_size 4"),
        (["--patch_size=0"], "--patch_size is 0; it must be at least 1"),
        (["--distillation=soft"], "--distillation needs a --teacher"),
        (["--validation_dir=images"], "--validation_dir needs --train_dir too"),
        (["--train_dir=images", "--validation_file=table.csv"], "three kinds of data; give one"),
        (["--train_dir=images"], "'images' has no classes: it must hold a folder of images for each"),
        (["--train_dir=table.csv"], "'table.csv' is a file"),
        (["--train_file=same.csv"], "the same value 1 in every row"),
        (["--train_file=gap.csv"], "has rows without a label"),
        (["--train_file=table.csv", "--label_column=class"], "the columns are image, label (set --label_column)"),
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
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "one.png")
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
