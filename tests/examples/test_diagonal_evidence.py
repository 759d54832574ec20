"""The experiment on the diagonal: its variants compute the definition, its runs are fair, its files belong together."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lion_hf
from lion_hf.nn import Mixer, mixer
from lion_hf.nn.variants import VARIANTS
from lion_hf.ops import two_sided_attention


pytestmark = pytest.mark.usefixtures("examples")

STORED = Path(__file__).parents[2] / "examples" / "results"


@pytest.fixture(scope="module")
def variants(examples):
    """Import the variants, and unregister them afterwards."""
    known, operators = set(VARIANTS), set(mixer.OPERATORS)
    import diagonal_variants

    yield diagonal_variants
    for name in set(VARIANTS) - known:
        del VARIANTS[name]
    for name in set(mixer.OPERATORS) - operators:
        del mixer.OPERATORS[name]
    del sys.modules["diagonal_variants"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the variants


@pytest.mark.parametrize("length", [1, 2, 19])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "token"])
def test_the_fast_function_is_the_definition_with_every_gradient(variants, decay, normalize, length):
    shape = (2, 3, length, 4)
    tensors = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    log_decay = None if decay is None else -torch.rand(shape[:3] if decay == "token" else 3, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
    for factor in (0, 2, torch.tensor([-0.3, 0.0, 1.7], dtype=torch.float64, requires_grad=True)):
        leaves = [*tensors, *([factor] if isinstance(factor, torch.Tensor) else [])]
        for key_mask in (None, mask):
            options = {"normalize": normalize, "key_mask": key_mask}
            found = variants.attention_with_diagonal(*tensors, log_decay, factor=factor, **options)
            expected = two_sided_attention(*tensors, log_decay, diagonal=factor, **options)
            close(found, expected)
            weights = torch.randn_like(expected)
            for gradients in zip(
                *(torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected)), strict=True
            ):
                close(*gradients)


@pytest.mark.parametrize("base", ["selective", "decay"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("factor", [0, 2, "free"])
def test_a_mixer_counts_its_diagonal_as_often_as_its_name_says(variants, factor, normalize, base):
    layer = Mixer(24, 3, f"{base}-diagonal-{factor}", normalize=normalize, prefix_tokens=1).double()
    if factor == "free":
        assert layer.diagonal.tolist() == [1, 1, 1], "it starts as LION"
        torch.nn.init.normal_(layer.diagonal)
    x, mask = torch.randn(2, 9, 24, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [5]])
    query, key, value, log_decay, *_ = layer.recurrences(x)[0]
    often = layer.diagonal if factor == "free" else factor
    mixed = two_sided_attention(query, key, value, log_decay, diagonal=often, normalize=normalize, key_mask=mask)
    close(layer(x, mask), layer.o_proj(mixed.transpose(1, 2).flatten(2)))


def test_a_free_diagonal_starts_with_the_outputs_and_weights_of_lion(variants):
    models = []
    for mask_type in ("selective", "selective-diagonal-free"):
        torch.manual_seed(0)
        config = lion_hf.LionVisionConfig(
            mask_type=mask_type, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4
        )
        models.append(lion_hf.LionForImageClassification(config).double().eval())
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain, free = (model(image).logits for model in models)
    close(free, plain)
    free.square().sum().backward()
    factors = [weight for name, weight in models[1].named_parameters() if name.endswith("mixer.diagonal")]
    assert len(factors) == 2 and all((weight.grad != 0).all() for weight in factors)


# ----------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def commands(monkeypatch):
    """Replace training by made-up metrics; the flags of every run, by its folder."""
    import run_evidence

    seen = {}

    def run(script, flags, folder, module=None):
        seen[folder.name] = f"{run_evidence.program(script, module)} {flags}"
        better = 0.1 if "--learning_rate 0.002" in flags else 0
        measures = {"eval_masked_accuracy": 0.2, "eval_accuracy": 0.8, "eval_unigram_entropy": 6.0}
        return measures | {"eval_loss": 5 - better, "train_runtime": 70.0, "cpu_seconds": 60.0}

    monkeypatch.setattr(run_evidence, "run", run)
    monkeypatch.setattr(run_evidence, "learned_factors", lambda folder: [[0.5, 1.5]])
    return seen


def test_every_diagonal_has_the_same_runs_and_no_rate_is_chosen_on_reported_rows(commands, tmp_path):
    from run_evidence import DIAGONAL_TASKS, DIAGONALS, SEEDS, diagonal

    rows = diagonal(tmp_path / "data", tmp_path / "work", tmp_path / "results")
    assert list(rows) == [f"{task}, diagonal {name}" for task in DIAGONAL_TASKS for name in DIAGONALS]
    for task in DIAGONAL_TASKS:
        alike = []
        for name, variant in DIAGONALS.items():
            own = {k.removeprefix(f"{task}-{name}"): v for k, v in commands.items() if k.startswith(f"{task}-{name}-")}
            assert all(f"--mask_type {variant} " in flags for flags in own.values())
            alike.append({k: flags.replace(f"--mask_type {variant} ", "") for k, flags in own.items()})
            reported = [flags for flags in own.values() if "--validation_file" in flags]
            assert [flags.split("--seed ")[1] for flags in reported] == [str(seed) for seed in SEEDS]
            assert all("--learning_rate 0.002 " in flags for flags in reported), "the one with the lowest loss"
            sweep = [flags for flags in own.values() if flags not in reported]
            assert len(sweep) == len(DIAGONAL_TASKS[task][2]) and all("--validation_share" in flags for flags in sweep)
        assert all(own == alike[0] for own in alike)


@pytest.mark.usefixtures("without_curves")
def test_the_factors_of_a_trained_model_are_read_by_layer(variants, tmp_path, monkeypatch):
    from diagonal_results import learned_factors
    from run_mlm import main

    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("a red cat saw the old dog\nthe sad dog saw a new cat\n" * 20)
    flags = (
        "--output_dir out --train_file corpus.txt --mask_type selective-diagonal-free --hidden_size 16 "
        "--num_hidden_layers 2 --num_attention_heads 2 --vocab_size 60 --max_length 16 --max_steps 2 "
        "--learning_rate 0.05 --eval_strategy no --save_strategy no --use_cpu true --disable_tqdm true"
    )
    main(flags.split())
    model = lion_hf.LionForMaskedLM.from_pretrained("out")
    expected = [layer.mixer.diagonal.tolist() for layer in model.lion.layers]
    assert learned_factors(tmp_path / "out") == [[pytest.approx(x, abs=1e-3) for x in layer] for layer in expected]
    assert min(abs(x - 1) for layer in expected for x in layer) > 1e-3, "they are trained"


def test_a_finished_run_is_not_repeated_and_keeps_its_time(tmp_path, monkeypatch):
    import run_evidence

    started = []

    def train(command, **options):
        started.append(command)
        Path(command[command.index("--output_dir") + 1], "all_results.json").write_text('{"eval_loss": 1.5}')

    monkeypatch.setattr(run_evidence.subprocess, "run", train)
    once, twice = (
        run_evidence.run("run_mlm.py", "--seed 1", tmp_path / "out", run_evidence.DIAGONAL_MODULE) for _ in range(2)
    )
    assert once == twice and once["eval_loss"] == 1.5 and once["cpu_seconds"] >= 0
    assert len(started) == 1 and started[0][1:4] == ["-m", "lion_hf", "--import"]
    module = Path(*started[0][4].split("."))
    assert (STORED.parents[1] / module).with_suffix(".py").is_file(), "it is imported from the root of the repository"
    run_evidence.run("run_mlm.py", "--seed 2", tmp_path / "out")
    assert len(started) == 2 and started[1][1] == "examples/run_mlm.py", "other flags, without a module"


# -------------------------------------------------------------------------------------------------------- the results


def row(loss, accuracy):
    return {"seeds": [1, 2, 3], "loss": loss, "accuracy": accuracy}


def test_a_difference_that_seeds_explain_counts_as_none():
    from diagonal_results import difference, verdict

    rows = {
        "text, diagonal 1": row([5.0, 5.1, 5.2], [0.20, 0.21, 0.22]),
        "text, diagonal 2": row([5.1, 5.2, 5.3], [0.25, 0.26, 0.27]),
        "text, diagonal 0": row([5.5, 5.5, 5.6], [0.15, 0.16, 0.17]),
    }
    near, far = (difference(rows, "text", name, "loss") for name in "20")
    assert near.by_seed == pytest.approx([0.1] * 3) and near.seeds_range == pytest.approx(0.2)
    assert far.by_seed == pytest.approx([0.5, 0.4, 0.4]) and far.seeds_range == pytest.approx(0.2)
    assert (verdict(near, low_is_good=True), verdict(far, low_is_good=True)) == ("no difference", "worse")
    more = difference(rows, "text", "2", "accuracy", 100)
    assert more.mean == pytest.approx(5) and verdict(more, low_is_good=False) == "better"


def test_the_stored_runs_are_those_that_the_script_makes(commands, tmp_path):
    from run_evidence import diagonal

    def without_rate(command):
        return command.rpartition(" --learning_rate ")[0]

    stored = json.loads((STORED / "diagonal.json").read_text())
    made = diagonal(Path("DATA"), tmp_path, tmp_path)
    assert list(stored) == list(made)
    for name, found in stored.items():
        assert without_rate(found["command"]) == without_rate(made[name]["command"])
        assert found["seeds"] == made[name]["seeds"] and list(found["sweep"]) == list(made[name]["sweep"])
        assert float(found["learning_rate"]) == float(min(found["sweep"], key=found["sweep"].get))
        assert all(len(found[measure]) == 3 for measure in ("loss", "accuracy", "cpu_seconds"))
        assert max(found["cpu_seconds"]) < 300, "five minutes"


def test_the_table_and_the_plot_are_drawn_from_the_stored_runs(tmp_path, monkeypatch):
    import run_evidence

    shutil.copy(STORED / "diagonal.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_evidence.py", "diagonal", "--draw", "--results", str(tmp_path)])
    run_evidence.main()
    assert (tmp_path / "diagonal.md").read_text() == (STORED / "diagonal.md").read_text()
    assert (tmp_path / "diagonal.png").stat().st_size > 5000


def test_the_page_of_results_shows_means_and_ranges_of_the_stored_runs():
    from run_evidence import DIAGONALS, summary

    stored = json.loads((STORED / "diagonal.json").read_text())
    page = (STORED.parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    shown = {
        ("text", "loss", 1, 3): ("masked tokens: loss (nats)", "masked tokens: loss, lowest to highest"),
        ("text", "accuracy", 100, 1): ("masked tokens: accuracy (%)", "masked tokens: accuracy, lowest to highest"),
        ("images", "accuracy", 100, 1): ("Fashion-MNIST: accuracy (%)", "Fashion-MNIST: accuracy, lowest to highest"),
    }
    for (task, measure, factor, digits), (means, ranges) in shown.items():
        runs = [stored[f"{task}, diagonal {name}"][measure] for name in DIAGONALS]
        ends = [f"{factor * min(values):.{digits}f} to {factor * max(values):.{digits}f}" for values in runs]
        assert f"| {means} | {' | '.join(summary(values, factor, digits) for values in runs)} |" in page
        assert f"| {ranges} | {' | '.join(ends)} |" in page
