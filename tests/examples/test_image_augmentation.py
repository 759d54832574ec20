"""Augmentation, mixup and cutmix of the image script, and losses of soft targets."""

import random
import sys

import numpy as np
import pytest
import torch
from image_script import DIGITS, IMAGENET, collator, picture, tensor, train
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F
from transformers import ViTImageProcessorPil

import lion_hf


pytestmark = pytest.mark.usefixtures("examples", "without_curves")


# ---------------------------------------------------------------------------------------------------- augmentation


def test_operations_are_those_of_pillow():
    """At magnitudes of the recipe, each operation of RandAugment equals Pillow's."""
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
        moved = name.startswith(
            ("rotate", "shear", "translate")
        )  # kornia's bicubic filter differs from Pillow's at edges
        where = corner if moved else (slice(None),) * 3
        error = (found - tensor(reference))[where].abs()
        assert error.mean() < 2 / 255 and (error > 4 / 255).float().mean() < 0.05, name
        assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("augment", ["shift+flip", "deit"])
def test_an_image_depends_on_its_key_alone(augment):
    """The batch and other random draws have no influence, and the global generators keep their states."""
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
    with pytest.raises(UserError, match="requires timm, which cannot be imported"):
        choose_backend("timm")


def test_with_timm_its_images_depend_on_their_key_alone():
    try:
        import timm.data  # noqa: F401
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")

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
            assert torch.equal(mask, pasted[0])  # the same box for all images
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
    """Smoothed soft targets equal the formula; micro-batches add up to the whole batch; filler images count nothing."""
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
