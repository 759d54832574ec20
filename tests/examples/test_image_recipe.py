"""The DeiT recipe of the image script: its values, distillation, the average of the weights, resuming."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from image_script import ALONE, DIGITS, EXAMPLES, FOLDER, IMAGENET, MODEL, TINY, picture, train
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

import lion_hf
from lion_hf.training.recipes import expand, presets_of


pytestmark = pytest.mark.usefixtures("examples", "without_curves")

RECIPES = [(file, preset) for file in sorted(FOLDER.glob("*.yaml")) for preset in presets_of(file)]


# --------------------------------------------------------------------------------------------------------- recipes


def test_recipes_are_the_authors():
    """All presets of all files have the values of the paper's recipe, and their models the right sizes."""
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
        assert values["output_dir"] == f"outputs/recipes/imagenet/{preset}"


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
    """A RegNet with ten classes, and ImageNet's mean and standard deviation."""
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
    """EMA <- d * EMA + (1 - d) * weights after every optimizer step, starting from the initial weights."""
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
        # Evaluating the average does not change the weights of the model.
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
    """The run stops between two checkpoints, in the middle of an epoch, with all random options on."""
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
    """A checkpoint by steps precedes the evaluation of its epoch, which the resumed run does not repeat."""
    flags = ["--max_train_samples=40", "--max_eval_samples=12", "--num_train_epochs=2", "--logging_steps=1"]
    flags += ["--hidden_dropout_prob=0.1", "--eval_strategy=epoch", "--save_strategy=steps", "--save_steps=5"]
    flags += ["--ema_decay=0.9"]
    one = train(tmp_path / "one", *flags)
    shutil.copytree(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    other = train(tmp_path / "two", *flags)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)


def save_classifier(folder, names):
    """A classifier of images of 16 x 16 pixels with these class names, and its processor."""
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = lion_hf.LionVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, **classes
    )
    lion_hf.LionForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return f"--model_name_or_path={folder}"


def test_evaluation_counts_classes_as_the_model_does(tmp_path, folder):
    """With permuted class names the accuracy follows the names, and unknown classes raise an error."""
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
    for part in ("weight", "bias"):  # permute the rows of the head with the names
        weights[f"classifier.{part}"] = weights[f"classifier.{part}"].roll(-1, 0)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    same = train(tmp_path / "out", model, *data)
    assert same["eval_loss"] == pytest.approx(known["eval_loss"], rel=1e-5)
    assert same["eval_accuracy"] == known["eval_accuracy"]

    foreign = save_classifier(tmp_path / "foreign", ["rose", "tulip", "lily"])
    with pytest.raises(UserError, match="which the model does not have; its classes are rose, tulip, lily"):
        train(tmp_path / "out", foreign, *data)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    """kill -9 during training, while two worker processes decode and augment images."""
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
    """With 25 images in global batches of 8, one process has no image of the last batch; nothing hangs."""
    flags = [*TINY, *MODEL, *FULL, "--max_train_samples=25", "--max_eval_samples=7", "--num_train_epochs=2"]
    flags += ["--per_device_train_batch_size=4", "--per_device_eval_batch_size=3", "--bad_images=skip"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(EXAMPLES / "run_image_classification.py"), *flags, f"--output_dir={tmp_path}"]
    result = subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "all_results.json").read_text())
    assert len(history(tmp_path)) == 8 and all(math.isfinite(loss) for loss in history(tmp_path).values())
    assert found["skipped_training_images"] == 0 and math.isfinite(found["eval_ema_loss"])
    # One process that evaluates the saved model gets the metrics of two.
    flags = [f"--model_name_or_path={tmp_path}", "--do_train=false", "--max_train_samples=25", "--max_eval_samples=7"]
    again = train(tmp_path / "again", *flags)
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert again["eval_accuracy"] == pytest.approx(found["eval_accuracy"])
