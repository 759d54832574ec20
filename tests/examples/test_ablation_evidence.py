"""The study of the modern block: fair choices, resumable runs, steps as those of the Trainer, files that fit."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from lion_hf import LionConfig


pytestmark = pytest.mark.usefixtures("examples")

STORED = Path(__file__).parents[2] / "examples" / "results"


def record(model, task, stage, rate, seed, loss):
    extra = {"unigram_entropy": 6.6} if task == "text" else {}
    common = {"accuracy": 1 / (1 + loss), "parameters": 2_600_000, "device": "a processor", "command": "a command"}
    return {"model": model, "task": task, "stage": stage, "rate": rate, "seed": seed, "loss": loss} | common | extra


def stored(*records):
    from ablation_evidence import Run

    return {Run(*(r[name] for name in Run._fields)).key: r for r in records}


def rate_runs(model, losses, task="text"):
    from ablation_evidence import SENTIMENT_RATES, TEXT_RATES

    rates = TEXT_RATES if task == "text" else SENTIMENT_RATES
    return [record(model, task, "rate", rate, 17, loss) for rate, loss in zip(rates, losses, strict=True)]


# --------------------------------------------------------------------------------------------------------- choices


def test_the_rate_is_chosen_on_held_out_rows_once_all_rates_were_tried():
    from ablation_evidence import TEXT_RATES, best_rate

    sweep = rate_runs("A", [5.3, 5.1, 5.2, math.nan])
    reported = [record("A", "text", "final", rate, 17, loss) for rate, loss in zip(TEXT_RATES, range(4), strict=True)]
    others = rate_runs("B", [1, 2, 3, 4]) + rate_runs("A", [1, 2, 3, 4], "sentiment, mean")
    for runs in (stored(*sweep), stored(*reported, *others, *sweep)):
        assert best_rate(runs, "A", "text", TEXT_RATES) == TEXT_RATES[1]
    assert best_rate(stored(*reported, *sweep[:3]), "A", "text", TEXT_RATES) is None
    first = stored(*rate_runs("A", [math.nan, 5.1, 5.2, 5.3]))
    assert best_rate(first, "A", "text", TEXT_RATES) == TEXT_RATES[1]


def test_the_option_that_hurts_most_on_held_out_rows_is_left_out():
    from ablation_evidence import MODERN, OPTIONS, all_models, chosen_model

    def runs(**better):
        losses = {MODERN: 5.0} | {f"{MODERN} without {name}": better.get(name, 5.1) for name in OPTIONS}
        found = [run for name, loss in losses.items() for run in rate_runs(name, [9, loss, 8, 7])]
        return stored(*found, record(MODERN, "text", "final", 1e-3, 17, 1.0))

    assert chosen_model(runs()) == MODERN
    found = runs(windows=4.9, convolution=4.8)
    chosen = f"{MODERN} without convolution"
    assert chosen_model(found) == chosen
    reported = [name for name, model in all_models(found).items() if f"{MODERN} without " in name and model.reported]
    assert reported == [chosen]
    found.popitem(), found.pop(f"{MODERN} without RMSNorm | text | rate | 0.004 | 17")
    assert chosen_model(found) is None and not all_models(found)[chosen].reported


def test_a_model_is_given_again_when_it_is_reported_after_all():
    from ablation_evidence import MODERN, OPTIONS, Groups, fixed_models

    last = f"{MODERN} without convolution"
    names = [MODERN, *(f"{MODERN} without {name}" for name in OPTIONS)]
    runs = stored(*(run for name in names if name != last for run in rate_runs(name, [9, 5, 8, 7])))
    groups, given = Groups(runs, names[1:], 4), []
    while group := groups():
        given.append(list(group))
    assert given == [[last]]
    runs |= stored(*rate_runs(last, [9, 4, 8, 7]))
    assert list(groups()) == [last] and not groups()
    everything = Groups({}, None, 4)
    sizes, seen = [], []
    while group := everything():
        sizes.append(len(group))
        seen += group
    assert seen == list(fixed_models()) and set(sizes[:-1]) == {4}


def test_models_differ_from_the_published_one_as_their_names_say():
    from ablation_evidence import LION_S, MODERN, OPTIONS, PUBLISHED, fixed_models

    models = fixed_models()
    assert next(iter(models)) == PUBLISHED and models[PUBLISHED].options == LION_S
    for name, options in OPTIONS.items():
        assert models[f"LION-S, {name}"].options == LION_S | options
        rest = models[f"{MODERN} without {name}"]
        assert rest.options | options == models[MODERN].options and not rest.reported
        assert not set(options) & set(rest.options)
    for model in models.values():
        if "mask_type" in model.options:
            LionConfig(num_hidden_layers=4, hidden_size=192, num_attention_heads=3, **model.options)


def test_long_rows_have_as_many_tokens_in_a_step_and_windows_for_their_length():
    from ablation_evidence import LONG, PARTS, PUBLISHED, fixed_models
    from ablation_training import TEXT_CLASSES

    from lion_hf.training.parsing import parse_arguments

    sizes = []
    for length, part in PARTS.items():
        argv = [*part.recipe.split(), "--output_dir", "unused"]
        _, data, training = parse_arguments(TEXT_CLASSES, argv)
        sizes.append(training.per_device_train_batch_size * data.max_length)
        assert data.max_length == length and training.max_steps == 1200
    assert len(set(sizes)) == 1
    models, short = PARTS[LONG].models({}), fixed_models()
    assert next(iter(models)) == PUBLISHED and set(models) < set(short)
    name, windows = "LION-S, preset block, windows", {"local_window": 128, "decay_windows": [4, 512]}
    assert models[name].options == short[name].options | windows
    for name, model in models.items():
        assert model.reported and set(model.tasks()) == {"text"}
        assert set(model.options) == set(short[name].options)


# ------------------------------------------------------------------------------------------------------------ runs


class NoTraining:
    """A study whose training only notes what it was asked."""

    def __new__(cls, tmp_path, runs, **options):
        from ablation_evidence import Study

        class Noting(Study):
            def train_runs(self, models, runs):
                self.asked += runs
                for run in runs:
                    self.runs[run.key] = record(*run, loss=5 + abs(math.log(run.rate / 1e-3)))
                    self.report(run.key, self.runs[run.key])

        study = Noting(tmp_path, tmp_path, runs, lambda key, found: None, **options)
        study.asked = []
        return study


def test_all_runs_of_a_model_are_done_once_also_after_an_interruption(tmp_path):
    from ablation_evidence import SEEDS, SENTIMENT_RATES, TEXT_RATES, Model, read_runs, store

    model = Model({"mask_type": "selective"})
    study = NoTraining(tmp_path, {})
    study.train({"A": model})
    counts = {"text": len(TEXT_RATES), "sentiment, first": len(SENTIMENT_RATES), "sentiment, mean": 4}
    for task, rates in counts.items():
        finals = [run for run in study.asked if (run.task, run.stage) == (task, "final")]
        assert [run.seed for run in finals] == list(SEEDS) and len({run.rate for run in finals}) == 1
        assert [run.stage for run in study.asked if run.task == task] == ["rate"] * rates + ["final"] * len(SEEDS)
    order = [run.key for run in study.asked]
    store(tmp_path / "modern.json", {key: study.runs[key] for key in order[:9]})
    again = NoTraining(tmp_path, read_runs(tmp_path / "modern.json"))
    again.train({"A": model})
    assert [run.key for run in again.asked] == order[9:] and not list(tmp_path.glob("*.part"))
    late = NoTraining(tmp_path, {}, deadline=0)
    late.train({"A": model})
    only_rates = NoTraining(tmp_path, {})
    only_rates.train({"A": Model({}, reported=False)})
    assert not late.asked and {run.stage for run in only_rates.asked} == {"rate"}


TINY = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tiny_rows(steps=3):
    """Rows of three batches of four rows, of which the last has two."""
    from ablation_training import Rows, filled, stacked

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 48, (steps, 4, 8), generator=generator, dtype=torch.int16)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100).to(torch.int16)
    labels[:, 0, 0] = ids[:, 0, 0]
    whole = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    whole[-1] = {name: values[:2] for name, values in whole[-1].items()}
    return Rows(stacked([filled(batch, 4) for batch in whole]), whole[0], {}), whole


def tiny_model(name):
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    if name == "bert":
        return BertForMaskedLM(BertConfig(**TINY, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    return AutoModelForMaskedLM.from_config(LionConfig(**TINY, mask_type="selective", hidden_dropout_prob=0))


def tiny_arguments(tmp_path, **options):
    from run_mlm import MlmTrainingArguments

    fixed = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3, "save_strategy": "no"}
    fixed |= {"lr_floor": 0.02, "eval_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    return MlmTrainingArguments(**fixed, learning_rate=0.05, weight_decay=0.1, **options)


@pytest.mark.parametrize("name", ["lion", "bert"])
def test_steps_are_those_of_the_trainer(tmp_path, name):
    from ablation_training import Training

    from lion_hf.training.trainer import LionTrainer

    rows, batches = tiny_rows()
    expected = tiny_model(name)
    arguments = tiny_arguments(tmp_path, use_cpu=True)
    trainer = LionTrainer(model=expected, args=arguments, train_dataset=[0])
    loader = [{key: values.long() for key, values in batch.items()} for batch in batches]
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    training = Training(tiny_model(name), rows, arguments)
    for _ in range(training.steps):
        training.run()
    for (key, found), wanted in zip(training.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    with torch.no_grad():
        logits = expected(rows.evaluation["input_ids"].long()).logits
    labels = rows.evaluation["labels"].long()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert training.evaluate()["loss"] == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["lion", "bert"])
def test_graphs_side_by_side_train_as_single_steps(tmp_path, name):
    from ablation_training import Training, train_together

    rows, _ = tiny_rows()
    arguments = tiny_arguments(tmp_path)
    alone, *together = (Training(tiny_model(name), rows, arguments) for _ in range(3))
    for _ in range(alone.steps):
        alone.step()
    train_together(together, pytest.fail)
    for training in together:
        torch.testing.assert_close(training.losses, alone.losses, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- files


def test_the_table_gives_means_differences_and_held_out_losses(tmp_path):
    from ablation_evidence import BERT, PUBLISHED, fixed_models
    from ablation_results import draw, write_table

    finals = [record(PUBLISHED, "text", "final", 1e-3, seed, 5.0 + 0.1 * i) for i, seed in enumerate((17, 18, 19))]
    finals += [record(BERT, "text", "final", 1e-3, seed, 4.9 + 0.2 * i) for i, seed in enumerate((17, 18, 19))]
    finals += [record(BERT, "sentiment, first", "final", 1e-4, seed, 0.25) for seed in (17, 18, 19)]
    runs = stored(*finals, *rate_runs(PUBLISHED, [7.125, 6, 5, 4]))
    write_table(fixed_models(), runs, tmp_path / "modern.md")
    draw(fixed_models(), runs, tmp_path / "modern.png")
    text = (tmp_path / "modern.md").read_text()
    assert "| BERT | 2.60 | 5.100 ± 0.200 | -0.100, +0.000, +0.100 |" in text and "| 80.0 ± 0.0 |  |" in text
    assert f"| {PUBLISHED} | 7.125 | 6.000 | 5.000 | 4.000 |" in text
    assert (tmp_path / "modern.png").stat().st_size > 10_000


def test_stored_results_are_fair_and_their_files_belong_together(tmp_path, monkeypatch):
    from ablation_evidence import BERT, MODERN, PUBLISHED, SEEDS, all_models, best_rate, main, read_runs, store

    runs = read_runs(STORED / "modern.json")
    models, whole = all_models(runs), {PUBLISHED, MODERN, BERT, "ModernBERT"}
    for name, model in models.items():
        for task, rates in model.tasks().items():
            finals = [r for r in runs.values() if (r["model"], r["task"], r["stage"]) == (name, task, "final")]
            assert finals or name not in whole
            if finals:
                assert {r["rate"] for r in finals} == {best_rate(runs, name, task, rates)}
                seeds = sorted(r["seed"] for r in finals)  # runs are stored one by one, in this order
                assert seeds == list(SEEDS if name in whole else SEEDS[: len(seeds)])
    for run in runs.values():
        assert run["options"] == json.loads(json.dumps(models[run["model"]].options))
        assert run["device"] and run["command"]
        assert run["seconds"] < 300 or "EPYC" in run["device"]  # wall time of a machine that other work shared
    store(tmp_path / "modern.json", runs)
    monkeypatch.chdir(tmp_path)
    main(["--draw", "--results", str(tmp_path)])
    assert (tmp_path / "modern.md").read_text() == (STORED / "modern.md").read_text()
