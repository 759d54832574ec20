"""The recipe files of masked language modelling: the authors' numbers, and that each runs."""

from pathlib import Path

import pytest
import yaml


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes" / "mlm").glob("*.yaml"))

# Text pretraining of the paper; the peak learning rate is by size.
NUMBERS = {
    "dataset_name": "allenai/c4",
    "dataset_config_name": "en",
    "max_length": 128,
    "mlm_probability": 0.3,
    "eval_mlm_probability": 0.15,
    "max_steps": 70_000,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "lr_floor": 0.02,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 1e-5,
    "decay_all": True,
    "bf16": True,
    "max_grad_norm": 0,
    "hidden_dropout_prob": 0.1,
    "seed": 17,
}
PEAK = {"base": 8e-4, "large": 2e-4}


def test_there_is_a_recipe_for_every_text_model_of_the_paper():
    lion = {f"lion-{variant}-{size}" for variant in ("lit", "d", "s") for size in PEAK}
    assert {path.stem for path in RECIPES} == lion | {"bert-base"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_the_numbers_of_the_paper(path):
    recipe = yaml.safe_load(path.read_text())
    assert {name: recipe[name] for name in NUMBERS} == NUMBERS
    assert recipe["learning_rate"] == PEAK[path.stem.rpartition("-")[2]]
    assert 8 * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 4096
    assert recipe.get("preset") == path.stem or recipe["model_type"] == "bert"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_with_smoke(path, tmp_path, examples):
    import run_mlm
    from transformers import AutoConfig

    metrics = run_mlm.main([str(path), "--smoke", f"--output_dir={tmp_path}"])
    assert metrics["epoch"] > 0 and metrics["eval_loss"] > 0
    config, recipe = AutoConfig.from_pretrained(tmp_path), yaml.safe_load(path.read_text())
    if "preset" in recipe:  # what --smoke leaves alone
        assert {"lit": "lit", "d": "decay", "s": "selective"}[recipe["preset"].split("-")[1]] == config.mask_type
