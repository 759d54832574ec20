"""Recipe files: choosing presets, the authors' values for masked language modelling, and a short run of each."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from lion_hf import MODERN_PRESETS, PRESETS
from lion_hf.training.errors import UserError
from lion_hf.training.recipes import expand, presets_of, read_values


EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted((EXAMPLES / "recipes").glob("*/*.yaml"))
MODERN = EXAMPLES / "recipes/mlm/modern.yaml"
PAPER = sorted({*(EXAMPLES / "recipes/mlm").glob("*.yaml")} - {MODERN})
RECIPES = [(file, preset) for file in PAPER for preset in presets_of(file)]

# The paper's text pretraining; the peak learning rate depends on the size.
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
    assert {preset for _, preset in RECIPES} == lion | {"bert-base"} and len(RECIPES) == 7


@pytest.mark.parametrize("path, preset", RECIPES, ids=[preset for _, preset in RECIPES])
def test_recipes_hold_the_numbers_of_the_paper(path, preset):
    recipe = expand(path, preset)
    assert {name: recipe[name] for name in NUMBERS} == NUMBERS
    assert recipe["learning_rate"] == PEAK[preset.rpartition("-")[2]]
    assert 8 * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 4096
    assert recipe["output_dir"] == f"outputs/recipes/mlm/{preset}"
    if preset == "bert-base":
        shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
        assert recipe["model_type"] == "bert" and shape.items() <= recipe.items() and "preset" not in recipe
    else:
        assert recipe["preset"] == preset


@pytest.mark.parametrize("path, preset", RECIPES, ids=[preset for _, preset in RECIPES])
def test_recipes_run_with_smoke(path, preset, tmp_path, examples):
    import run_mlm
    from transformers import AutoConfig

    metrics = run_mlm.main([str(path), "--preset", preset, "--smoke", f"--output_dir={tmp_path}"])
    assert metrics["epoch"] > 0 and metrics["eval_loss"] > 0
    config = AutoConfig.from_pretrained(tmp_path)
    if preset in PRESETS:  # values that --smoke does not change
        assert {"lit": "lit", "d": "decay", "s": "selective"}[preset.split("-")[1]] == config.mask_type
    else:
        assert config.model_type == "bert"


# ----------------------------------------------------------------------------------------------------------- phases


def test_the_modern_recipe_reads_as_many_tokens_in_every_step_of_every_phase():
    tokens = set()
    assert presets_of(MODERN) == list(MODERN_PRESETS)
    for phase in ("stable", "long", "decay"):
        values = expand(MODERN, "lion-s-modern-base", phase)
        rows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * 8
        tokens.add(rows * values["max_length"])
        shares = [values[name] for name in ("mlm_probability", "decay_mlm_probability", "eval_mlm_probability")]
        assert shares == [0.3, 0.15, 0.15] and values["packing"] and values["sparse_prediction"]
        assert values["lr_scheduler_type"] == "warmup_stable_decay" and values["optim"] == "stable_adamw"
        assert ("decay_steps" in values) == (phase == "decay")
    assert tokens == {4608 * 1024}
    assert [expand(MODERN, "lion-s-modern-base", x)["max_length"] for x in ("stable", "long")] == [1024, 8192]


def test_phases_write_to_their_own_folders_and_name_those_of_others(tmp_path, monkeypatch):
    from lion_hf.training.recipes import phase_runs, values_of

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("phases:\n  one:\n  two: {seed: 2, decay_from: '{one}'}\nseed: 1\noutput_dir: out\n")
    path = str(recipe)
    assert phase_runs([path, "--seed=3", "--smoke"]) == [
        (name, [path, "--seed=3", "--smoke", f"--phase={name}", f"--output_dir=out-smoke/{name}"])
        for name in ("one", "two")
    ]
    ((name, argv),) = phase_runs([path, "--phase", "two", "--output-dir", "there"])
    assert name == "two" and argv == [path, "--phase=two", "--output_dir=there/two"]
    values, flags = values_of(path, argv[1:])
    assert values == {"seed": 2, "decay_from": "there/one", "output_dir": "out"} and flags == argv[2:]
    assert phase_runs(["--seed=3"]) == [(None, ["--seed=3"])]
    with pytest.raises(UserError, match="--phase is 'three'; the phases of .*recipe.yaml are one, two"):
        phase_runs([path, "--phase=three"])
    recipe.write_text("phases:\n  one:\n")
    with pytest.raises(UserError, match="--output_dir is required"):
        phase_runs([path])


@pytest.mark.slow
def test_smoke_runs_every_phase_of_the_modern_recipe_and_the_loss_falls(tmp_path, examples, capsys):
    import json

    import run_mlm
    from transformers import AutoConfig

    argv = [str(MODERN), "--preset=lion-s-modern-base", "--smoke", f"--output_dir={tmp_path}"]
    run_mlm.main(argv)
    assert "the loss fell from" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "decay")
    assert config.mlp_type == "glu" and config.local_layers == [1, 2] and config.sparse_prediction
    states = {x: json.loads((tmp_path / x / "trainer_state.json").read_text()) for x in ("stable", "long", "decay")}
    assert [state["global_step"] for state in states.values()] == [20, 20, 30]
    rates = [entry["learning_rate"] for entry in states["decay"]["log_history"] if "learning_rate" in entry]
    assert max(rates[2:21]) == min(rates[2:21]) == rates[20] > rates[21] > rates[-1]
    assert "--phase decay" in (tmp_path / "decay/README.md").read_text(encoding="utf-8")


def test_a_loss_that_does_not_fall_is_an_error(tmp_path, examples):
    import json

    import run_mlm

    for name, losses in {"one": (5.0, 4.0), "two": (5.5, 4.0, 6.0, 6.0)}.items():
        (tmp_path / name).mkdir()
        history = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run_mlm.require_falling_loss([tmp_path / "one"])
    with pytest.raises(UserError, match="the loss did not fall: 5.000 in the first step, 5.375 in the last ones"):
        run_mlm.require_falling_loss([tmp_path / "one", tmp_path / "two"])


# ---------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_name_and_pattern_of_a_recipe_is_of_use(path):
    """Every section of a file matches a preset, and all presets of the paper have a recipe."""
    for pattern in read_values(path)["presets"]:
        assert any(fnmatchcase(name, pattern) for name in presets_of(path)), pattern
    trained = {name for file in FILES if file.parent.name != "glue" for name in presets_of(file)}
    assert set(PRESETS) <= trained


def test_presets_add_to_the_values_of_the_file_and_flags_override_both(tmp_path, monkeypatch, examples):
    import run_mlm

    from lion_hf.training.parsing import given_values

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "presets:\n  lion-*-base: {learning_rate: 0.5}\n  lion-s-*: {seed: 3, weight_decay: 0.25}\n  tiny:\n"
        "seed: 1\nlearning_rate: 0.125\noutput_dir: out/{preset}\n"
    )
    assert presets_of(recipe) == ["lion-lit-base", "lion-d-base", *(name for name in PRESETS if "-s-" in name), "tiny"]
    shared = {"seed": 1, "learning_rate": 0.125}
    assert expand(recipe, "tiny") == shared | {"output_dir": "out/tiny"}
    assert expand(recipe, "lion-d-base") == shared | {"learning_rate": 0.5, "output_dir": "out/lion-d-base"}
    both = {"seed": 3, "learning_rate": 0.5, "weight_decay": 0.25, "output_dir": "out/lion-s-base"}
    assert expand(recipe, "LION-S-base") == both
    monkeypatch.chdir(tmp_path)
    for flags in (["--preset=lion-s-base", "--seed=7"], ["--seed", "7", "--preset", "lion-s-base"]):
        given = given_values((run_mlm.MlmTrainingArguments,), [str(recipe), *flags])
        assert given == both | {"seed": 7}


def test_files_without_presets_leave_the_preset_to_the_model(tmp_path):
    plain = tmp_path / "plain.json"
    plain.write_text('{"output_dir": "{preset}", "preset": "lion-s-base"}')
    assert presets_of(plain) == []
    assert expand(plain) == {"output_dir": "{preset}", "preset": "lion-s-base"}
    assert expand(plain, "lion-d-base")["preset"] == "lion-d-base"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "mlm/lion.yaml requires --preset, one of lion-lit-base, lion-lit-large, lion-d-base"),
        (["--smoke"], "mlm/lion.yaml requires --preset, one of lion-lit-base"),
        (["--preset=lion-x"], "--preset is 'lion-x'; .*mlm/lion.yaml allows lion-lit-base, lion-lit-large"),
        (["--preset=lion-s-tiny-patch16-224"], "allows lion-lit-base"),
        (["--preset=lion-*-base"], "allows lion-lit-base"),
        (["--preset=bert-base"], "allows lion-lit-base"),
        (["--preset", "--smoke"], "requires --preset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_preset_that_is_missing_or_unknown_is_one_line_with_those_there_are(flags, message, tmp_path, examples):
    import run_mlm

    with pytest.raises(UserError, match=message) as error:
        run_mlm.main([str(EXAMPLES / "recipes/mlm/lion.yaml"), *flags, f"--output_dir={tmp_path}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", ["lion-s-base", "[lion-s-base]", "{lion-s-base: 3}"])
def test_a_section_of_another_form_is_refused(section, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"presets: {section}\n")
    with pytest.raises(UserError, match="'presets' must hold names of presets"):
        expand(recipe, "lion-s-base")
