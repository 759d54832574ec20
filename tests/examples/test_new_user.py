"""The scripts as a new user meets them: own files, small models, interrupted runs, predictions and messages."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from glue_script import ONE_STEP, TINY, WORDS, rows, write
from image_script import DIGITS, picture, train
from small_models import text_config, vision_config
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import lion_hf
from lion_hf.training.reports import Report, plot_curves


pytestmark = pytest.mark.usefixtures("examples", "without_curves")

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(file for file in EXAMPLES.glob("*.py") if "check_flags(__file__)" in file.read_text())
EVALUATE = ["--disable_tqdm=true", "--use_cpu=true", "--do_train=false"]


# ----------------------------------------------------------------------------------------------- stopping and resuming


def losses(folder):
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_a_run_goes_on_where_the_tokenizer_has_ids_that_the_first_run_wrote_into_the_model(mlm, capsys, said):
    mlm("out", "--num_train_epochs=1")
    # First as 0.2 wrote the file, then as the Trainer does: with ids that a new model does not have.
    for ids in ({}, {"bos_token_id": 3, "eos_token_id": 4}):
        place = sorted(Path("out").glob("checkpoint-*"))[-1] / "config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | ids))
        mlm("out", f"--num_train_epochs={2 + len(ids) // 2}")
    assert "resuming from out/checkpoint-5" in capsys.readouterr().out
    assert not [line for line in said if "missing keys" in line or "other model" in line]


def test_what_decides_a_model_still_stops_a_run_that_would_go_on_with_another(mlm):
    from lion_hf.training.errors import UserError

    mlm("out", "--max_steps=1")
    with pytest.raises(UserError, match="holds another model: hidden_size is 16 there and 32 here"):
        mlm("out", "--max_steps=2", "--hidden_size=32")


def test_every_step_counts_once_in_the_one_train_loss_also_across_a_resume(mlm, capsys):
    """train_loss is the mean over all steps, however often losses are logged; log and table print the same number."""
    exact = mlm("single", "--num_train_epochs=3", "--logging_steps=1", "--save_strategy=no")
    steps = losses("single")
    assert exact["train_loss"] == pytest.approx(np.mean(list(steps.values())), rel=1e-5)
    capsys.readouterr()
    flags = ["--logging_steps=4", "--lr_scheduler_type=constant", "--warmup_steps=0"]
    whole = mlm("whole", "--num_train_epochs=3", "--save_strategy=no", *flags)
    printed = re.findall(r"train_loss\W+([\d.]+)", capsys.readouterr().out)
    assert len(printed) == 2 and float(printed[0]) == pytest.approx(float(printed[1]), abs=1e-3)
    assert max(losses("whole")) == max(steps)
    mlm("parts", "--num_train_epochs=1", *flags)
    parts = mlm("parts", "--num_train_epochs=3", *flags)
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_a_finished_run_is_only_evaluated_which_is_said_and_keeps_its_card(mlm, capsys, said):
    mlm("out", "--num_train_epochs=1", "--learning_rate=1e-9")
    assert [line for line in said if "--learning_rate (it was 1e-09) with a new --output_dir" in line]
    card, changes = Path("out/README.md").read_text(), ["--learning_rate=0.5", "--max_train_samples=24"]
    said.clear()
    capsys.readouterr()
    mlm("out", "--num_train_epochs=1", *changes, "--max_steps=5")
    printed = capsys.readouterr().out
    assert "already finished in out/checkpoint-5" in printed and "use another --output_dir" in printed
    assert Path("out/README.md").read_text() == card
    (told,) = [line for line in said if "not learned anything measurable" in line]
    assert "--learning_rate" not in told
    # A run that was stopped after its last checkpoint still writes its card.
    os.utime("out/README.md", (0, 0))
    mlm("out", "--num_train_epochs=1", *changes, "--max_steps=5")
    assert Path("out/README.md").read_text() != card


# --------------------------------------------------------------------------------------------------------- curves


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure of `plot_curves`, still open."""
    from matplotlib import pyplot as plt

    from lion_hf.training import reports

    figures = []
    monkeypatch.setattr(reports.plt, "close", figures.append)

    def draw(history, **options):
        common = {"title": "Model of train.csv", "pipeline_tag": "", "data": "", "command": "", "usage": ""}
        labels = {"metric": "eval_accuracy", "metric_label": "accuracy (%)", "loss_label": "loss"}
        plot_curves(history, tmp_path / "curves.png", Report(**common, **labels, **options))
        return figures[-1]

    yield draw
    monkeypatch.undo()
    plt.close("all")


HISTORY = [
    {"step": 10, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 10, "eval_loss": 1.9, "eval_accuracy": 0.81},
    {"step": 20, "loss": 1.8, "learning_rate": 5e-4, "samples_per_second": 90.0},
    {"step": 20, "eval_loss": 1.85, "eval_accuracy": 0.82},
]


def test_curves_have_baselines_whole_axes_and_points_in_the_middle_of_what_they_average(drawn):
    figure = drawn(HISTORY, metric_baseline=("most frequent class", 0.5), loss_baseline=("class frequencies", 2.5))
    loss, metric, *_ = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [5, 15] and loss.lines[1].get_xdata().tolist() == [10, 20]
    assert figure.axes[2].lines[0].get_xdata().tolist() == [10, 20]  # the learning rate stands at its step
    for axis, value in ((loss, 2.5), (metric, 50)):
        assert set(axis.lines[-1].get_ydata()) == {value} and axis.get_ylim()[0] == 0 < value < axis.get_ylim()[1]
    assert metric.get_ylim()[1] >= 100 and all(axis.get_ylim()[0] == 0 for axis in figure.axes)
    assert "train.csv" in figure.get_suptitle()


def test_curves_have_no_panel_without_data(drawn):
    def panels(history):
        return [axis.get_ylabel() for axis in drawn(history).axes if axis.axison]

    assert panels(HISTORY[:1]) == ["loss", "learning rate"]
    assert panels([entry for entry in HISTORY if "loss" in entry])[-1].startswith("throughput")
    assert panels([]) == []
    assert panels([{"step": 3, "eval_accuracy": float("nan"), "loss": 1.0}]) == ["loss"]


def test_a_negative_correlation_is_seen(drawn):
    axis = drawn([{"step": 1, "eval_accuracy": -0.4}], correlation=True, metric_baseline=("mean", 0.0)).axes[0]
    assert axis.get_ylim()[0] < -0.4 and axis.get_ylim()[1] >= 1


# -------------------------------------------------------------------------------------------------- learning rate


def test_the_rate_suits_the_width_and_is_the_papers_for_the_papers_models():
    from lion_hf.training.glue.tasks import CUSTOM, TASKS, suited_rate

    assert {suited_rate(TASKS["rte"], width) for width in (768, 1024)} == {1e-5}
    rates = [suited_rate(CUSTOM, width) for width in (16, 64, 192, 384, 768, 1024)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 3e-3 and rates[4] == 5e-5
    assert suited_rate(TASKS["rte"], 192) == suited_rate(CUSTOM, 192) == 4e-4


@pytest.mark.parametrize("width, rate", [(16, "0.003"), (256, "0.0015")])
def test_the_rate_of_images_suits_the_width(width, rate, tmp_path, capsys):
    train(tmp_path, *DIGITS, f"--hidden_size={width}", "--num_hidden_layers=1", "--max_steps=1")
    assert f"learning rate {rate}\n" in capsys.readouterr().out


def test_a_small_model_learns_ones_own_data_without_a_flag_for_the_rate(run_glue):
    write("train.csv", "text,label\n" + rows(480, ("good", "bad", "so so")))
    size = ["--hidden_size=64", "--vocab_size=120", "--validation_share=0.2", "--num_train_epochs=4"]
    metrics = run_glue(["--output_dir=out", *TINY, *size, "--train_file=train.csv", "--save_strategy=no"])
    assert metrics["eval_accuracy"] > 0.8


@pytest.mark.parametrize("labels", [("good", "bad", "so so"), ("5.0", "1.5", "3.0")], ids=["classes", "numbers"])
def test_a_run_that_learns_nothing_says_so_in_the_log_and_in_the_card(labels, run_glue, said):
    write("train.csv", "text,label\n" + rows(60, labels))
    flags = ["--train_file=train.csv", "--validation_share=0.3", "--learning_rate=1e-9"]
    run_glue(["--output_dir=out", *ONE_STEP, *flags])
    assert [
        line for line in said if "the model has not learned anything measurable" in line and "--learning_rate" in line
    ]
    card = Path("out/README.md").read_text()
    assert "**This model has not learned anything measurable:**" in card
    name = "most frequent class" if labels[0] == "good" else "mean of the training labels"
    assert f"of a baseline: {name} |" in card


def test_baselines_are_what_a_constant_reaches():
    from lion_hf.training.glue.metrics import constant_baseline, load_metric
    from lion_hf.training.glue.sources import GlueArguments
    from lion_hf.training.glue.tasks import TASKS

    train_labels, labels = [1, 1, 1, 0], [1, 0, 0, 1, 1]
    metric = load_metric(TASKS["mrpc"], GlueArguments(builtin_data=True))
    found = constant_baseline(metric, TASKS["mrpc"], train_labels, labels)
    assert found.metric == pytest.approx(0.75)  # F1 of three hits among five
    shares = np.array([2 / 6, 4 / 6])  # each count plus one
    assert found.loss == pytest.approx(-np.log(shares)[labels].mean())
    metric = load_metric(TASKS["stsb"], GlueArguments(builtin_data=True))
    found = constant_baseline(metric, TASKS["stsb"], [1.0, 3.0], [0.0, 4.0])
    assert (found.metric, found.loss) == (0, 4)


def test_a_good_run_is_not_called_bad_and_no_number_is():
    def verdict(value, **options):
        names = ("title", "pipeline_tag", "data", "command", "metric_label", "loss_label", "usage")
        report = Report(**dict.fromkeys(names, ""), metric="eval_accuracy", **options)
        return report.at_baseline({"eval_accuracy": value, "eval_loss": value})

    baseline = {"metric_baseline": ("most frequent class", 0.5), "metric_error": 0.1}
    assert verdict(0.65, **baseline) is None and verdict(0.55, **baseline) and verdict(float("nan"), **baseline)
    assert verdict(0.5) is None  # without a baseline
    by_loss = {"judged_by_loss": True, "loss_baseline": ("unigram entropy", 3.0)}
    assert verdict(2.9, **by_loss) is None and "eval_loss is 3.1" in verdict(3.1, **by_loss)


def test_the_new_head_of_a_regression_starts_at_the_mean_of_the_labels(run_glue):
    write("train.csv", "text,label\n" + rows(40, ("5.5", "1.5", "3.5")))
    flags = ["--train_file=train.csv", "--learning_rate=0", "--validation_share=0.2"]
    run_glue(["--output_dir=out", *ONE_STEP, *flags])
    bias = lion_hf.LionForSequenceClassification.from_pretrained("out").classifier.bias.item()
    assert 2.5 < bias < 4.5
    # A trained regression head stays as it is; a classification head is replaced.
    shape = [flag for flag in ONE_STEP if "size" not in flag and "num_" not in flag]
    write("other.csv", "text,label\n" + rows(40, ("7.5", "9.5")))
    flags = ["--learning_rate=0", "--validation_share=0.2", "--train_file=other.csv"]
    for first, expected in (("out", bias), ("classes", 8.5)):
        if first == "classes":
            write("classes.csv", "text,label\n" + rows(40, ("good", "bad", "so so")))
            run_glue(["--output_dir=classes", *ONE_STEP, "--train_file=classes.csv"])
        run_glue([f"--output_dir=from_{first}", *shape, *flags, f"--model_name_or_path={first}"])
        model = lion_hf.LionForSequenceClassification.from_pretrained(f"from_{first}")
        assert model.classifier.bias.item() == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("kind", ["lion", "bert", "modernbert", "roberta", "electra", "gpt2"])
def test_a_regression_of_any_kind_of_model_starts_at_the_mean(kind):
    from run_glue import start_at

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = AutoConfig.for_model(kind, vocab_size=16, num_labels=1, pad_token_id=0, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    before = {name: x.clone() for name, x in model.named_parameters()}
    start_at(model, 100.0)
    changed = [name for name, x in model.named_parameters() if not torch.equal(x, before[name])]
    assert len(changed) == (0 if kind == "gpt2" else 1)  # the head of GPT-2 has no bias
    if changed:
        assert abs(model(torch.ones(1, 4, dtype=torch.long)).logits.item() - 100) < 10


# -------------------------------------------------------------------------------------------------------- predicting


@pytest.mark.parametrize(
    "names, has_head",
    [
        (["LionForSequenceClassification"], True),
        (["BertForPreTraining"], True),
        (["ReviewsForSale"], True),  # a custom class, whose head is unknown
        (["Reviews"], True),
        (None, True),
        (["LionForMaskedLM"], False),
        (["LionModel"], False),
        (["LionForQuestionAnswering"], False),
    ],
)
def test_a_head_is_judged_by_names_of_transformers_only(names, has_head):
    from lion_hf.training.errors import UserError
    from lion_hf.training.models import require_head

    config = lion_hf.LionConfig(architectures=names)
    if has_head:
        require_head(config, AutoModelForSequenceClassification, "folder")
    else:
        with pytest.raises(UserError, match="has no trained head"):
            require_head(config, AutoModelForSequenceClassification, "folder")


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_texts_are_predicted_alone_with_label_and_probabilities(run_glue):
    write("train.csv", "text,label\n" + rows(30, ("good", "bad", "so so")))
    run_glue(["--output_dir=model", *ONE_STEP, "--train_file=train.csv", "--validation_share=0.2"])
    write("test.csv", 'text,other\n"stone, river",1\nawful house,2\n')
    metrics = run_glue(["--output_dir=out", *EVALUATE, "--model_name_or_path=model", "--test_file=test.csv"])
    assert not any(name.startswith("eval_") for name in metrics)
    found = read_csv("out/predictions/custom.csv")
    assert [row["text"] for row in found] == ["stone, river", "awful house"]
    classify = pipeline("text-classification", "model", top_k=3)
    for row, answers in zip(found, classify([row["text"] for row in found]), strict=True):
        assert row["label"] == answers[0]["label"]
        for answer in answers:
            assert float(row[f"probability_{answer['label']}"]) == pytest.approx(answer["score"], rel=1e-4)


def test_images_are_predicted_alone_also_those_that_do_not_decode(tmp_path, folder):
    flags = [f"--train_dir={folder}", f"--validation_dir={folder}", "--image_size=16", "--max_steps=1"]
    train(tmp_path / "model", *flags)
    (tmp_path / "new" / "deep").mkdir(parents=True)
    picture(3).save(tmp_path / "new" / "b.png")
    picture(4).save(tmp_path / "new" / "deep" / "c.jpg")
    (tmp_path / "new" / "a.png").write_text("no image")
    (tmp_path / "new" / "notes.txt").write_text("no image either")
    alone = [f"--model_name_or_path={tmp_path / 'model'}", f"--test_dir={tmp_path / 'new'}", "--do_train=false"]
    train(tmp_path / "out", *alone)
    found = read_csv(tmp_path / "out" / "predictions.csv")
    assert [row["file"] for row in found] == ["a.png", "b.png", "deep/c.jpg"]
    assert set(found[0].values()) == {"a.png", ""}
    classify = pipeline("image-classification", model=str(tmp_path / "model"), top_k=3)
    for row in found[1:]:
        answers = {answer["label"]: answer["score"] for answer in classify(str(tmp_path / "new" / row["file"]))}
        assert row["label"] == max(answers, key=answers.get)
        assert {name: float(row[f"probability_{name}"]) for name in answers} == pytest.approx(answers, rel=1e-4)


def test_a_random_head_predicts_nothing(run_glue):
    from lion_hf.training.errors import UserError
    from lion_hf.training.text import train_tokenizer

    lion_hf.LionForMaskedLM(text_config()).save_pretrained("masked")
    train_tokenizer([" ".join(WORDS)], 60, 64).save_pretrained("masked")
    write("test.csv", "text\nstone\n")
    with pytest.raises(UserError, match="LionForMaskedLM, which has no trained head for this script"):
        run_glue(["--output_dir=out", *EVALUATE, "--model_name_or_path=masked", "--test_file=test.csv"])


def test_evaluating_without_data_says_that_the_built_in_data_was_taken(run_glue, folder):
    from lion_hf.training.errors import UserError

    write("train.csv", "text,label\n" + rows(30, ("good", "bad", "so so")))
    run_glue(["--output_dir=text", *ONE_STEP, "--train_file=train.csv", "--validation_share=0.2"])
    with pytest.raises(UserError, match="No data was given, so the built-in data is used"):
        run_glue(["--output_dir=out", *EVALUATE, "--model_name_or_path=text"])
    train("images", f"--train_dir={folder}", f"--validation_dir={folder}", "--image_size=16", "--max_steps=1")
    with pytest.raises(UserError, match="No data was given, so the built-in data is used"):
        train("out", "--model_name_or_path=images", "--do_train=false")


@pytest.mark.parametrize("kind", ["text", "images", "masked"])
def test_rows_split_off_the_training_data_are_never_evaluated_in_silence(kind, run_glue, mlm, folder, said):
    def evaluate(*flags):
        if kind == "text":
            run_glue(["--output_dir=out", *EVALUATE, "--model_name_or_path=model", *flags])
        elif kind == "images":
            train("out", "--model_name_or_path=model", "--do_train=false", *flags)
        else:
            import run_mlm

            run_mlm.main(["--output_dir=out", *EVALUATE, "--model_name_or_path=model", "--max_length=16", *flags])

    places = {"text": "file=train.csv", "images": f"dir={folder}", "masked": "file=corpus.txt"}
    if kind == "text":
        write("train.csv", "text,label\n" + rows(30, ("good", "bad", "so so")))
        run_glue(["--output_dir=model", *ONE_STEP, "--train_file=train.csv", "--validation_share=0.2"])
    elif kind == "images":
        train("model", f"--train_dir={folder}", f"--validation_dir={folder}", "--image_size=16", "--max_steps=1")
    else:
        mlm("model", "--max_steps=1", "--save_strategy=no")
    evaluate(f"--train_{places[kind]}", "--validation_share=0.3")
    assert [line for line in said if "rows split off" in line and "--validation_share 0.3" in line]
    said.clear()
    evaluate(f"--validation_{places[kind]}")
    assert not [line for line in said if "split off" in line]


# ----------------------------------------------------------------------------------------------------------- own data


def test_whole_numbers_are_classes_unless_they_are_to_be_numbers_and_that_is_said(run_glue, said):
    write("train.csv", "text,label\n" + rows(30, ("1", "3", "5")))
    flags = ["--train_file=train.csv", "--validation_share=0.3"]
    assert "eval_accuracy" in run_glue(["--output_dir=a", *ONE_STEP, *flags])
    assert [line for line in said if "1, 3, 5: they are used as classes" in line and "--label_type numbers" in line]
    assert "eval_pearson" in run_glue(["--output_dir=b", *ONE_STEP, *flags, "--label_type=numbers"])
    write("train.csv", "text,label\n" + rows(30, ("1.0", "3.0", "5.0")))
    assert "eval_pearson" in run_glue(["--output_dir=c", *ONE_STEP, *flags])
    assert [line for line in said if "--label_type classes" in line]
    assert "eval_accuracy" in run_glue(["--output_dir=d", *ONE_STEP, *flags, "--label_type=classes"])
    assert lion_hf.LionForSequenceClassification.from_pretrained("d").config.id2label == {0: "1", 1: "3", 2: "5"}


def test_a_tokenizer_has_a_limit_only_if_its_model_has_one(mlm, run_glue):
    write("train.csv", "text,label\n" + rows(30, ("good", "bad", "so so")))
    own = ["--train_file=train.csv", "--validation_share=0.2"]
    shape = [flag for flag in ONE_STEP if "size" not in flag and "num_" not in flag]
    mlm("free", "--max_steps=1", "--train_tokenizer=80")
    mlm("table", "--max_steps=1", "--train_tokenizer=80", "--pos_emb=true")
    run_glue(["--output_dir=tuned", *shape, *own, "--model_name_or_path=free", "--max_length=8"])
    run_glue(["--output_dir=bert", *ONE_STEP, *own, "--model_type=bert"])
    limits = {"free": None, "free/checkpoint-1": None, "tuned": None, "table": 512, "bert": 512}
    for folder, limit in limits.items():
        ids = AutoTokenizer.from_pretrained(folder)(" ".join(WORDS * 99), truncation=True, verbose=False)["input_ids"]
        assert len(ids) == limit if limit else len(ids) > 1000, folder


def test_the_first_error_names_all_columns_that_are_missing_and_all_names_that_are_taken(run_glue):
    from lion_hf.training.errors import UserError

    write("train.csv", "review,stars\na,1\nb,0\n")
    with pytest.raises(UserError) as error:
        run_glue(["--output_dir=out", *ONE_STEP, "--train_file=train.csv"])
    for part in ("'sentence1' and 'sentence2'", "'text'", "'sentence'", "--sentence1_column", "'label'"):
        assert part in str(error.value)
    end = "the columns are review, stars (if the first line of the file is data, add a line with the column names)"
    assert str(error.value).endswith(end)


def test_a_folder_without_images_is_told(tmp_path, folder, said):
    import shutil

    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "yew").mkdir()
    data = [f"--train_dir={tmp_path / 'images'}", f"--validation_dir={folder}", "--image_size=16", "--max_steps=1"]
    train(tmp_path / "out", *data)
    assert [line for line in said if "folders without images, which are not used as classes: yew" in line]


def test_broken_images_are_found_before_training_or_counted_where_there_are_many(tmp_path, folder, said, monkeypatch):
    import shutil

    from lion_hf.training import images
    from lion_hf.training.errors import UserError

    shutil.copytree(folder, tmp_path / "images")
    for name in ("elm/2.png", "oak/5.png"):
        (tmp_path / "images" / name).write_text("no image")
    data = [f"--train_dir={tmp_path / 'images'}", f"--validation_dir={folder}", "--image_size=16"]
    with monkeypatch.context() as patch:
        patch.setattr("lion_hf.training.image_trainer.ImageTrainer.train", lambda *a, **k: pytest.fail("it trains"))
        with pytest.raises(UserError, match="does not decode: .*, and 1 more do not"):
            train(tmp_path / "out", *data)
    monkeypatch.setattr(images, "TRIED", 3)
    metrics = train(tmp_path / "out", *data, "--num_train_epochs=1")
    assert metrics["skipped_training_images"] == 2 and [line for line in said if "does not decode" in line]


# --------------------------------------------------------------------------------------------------- recipes, flags


def test_every_script_drops_bf16_where_nothing_computes_in_it(tmp_path, said):
    import run_glue
    import run_image_classification
    import run_mlm

    classes = (
        run_glue.GlueTrainingArguments,
        run_mlm.MlmTrainingArguments,
        run_image_classification.ImageTrainingArguments,
    )
    for kind in classes:
        assert not kind(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16, kind


def test_a_recipe_on_a_cpu_names_smoke(tmp_path, monkeypatch, said):
    import run_mlm

    monkeypatch.setattr(run_mlm, "load_texts", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    recipe = [str(EXAMPLES / "recipes/mlm/lion.yaml"), "--preset=lion-s-base", f"--output_dir={tmp_path}", "--use_cpu"]
    for flags, expected in (([], 1), (["--smoke"], 0)):
        said.clear()
        with pytest.raises(KeyboardInterrupt):
            run_mlm.main([*recipe, *flags])
        assert len([line for line in said if "--smoke" in line]) == expected


def test_recipes_write_into_folders_that_no_other_run_owns():
    from lion_hf.training.recipes import expand, presets_of

    recipes = [(file, preset) for file in EXAMPLES.glob("recipes/*/*.yaml") for preset in presets_of(file)]
    folders = [expand(file, preset)["output_dir"] for file, preset in recipes]
    assert len(set(folders)) == len(folders) and all(folder.startswith("outputs/recipes/") for folder in folders)


def test_evidence_says_which_data_is_missing(tmp_path):
    from run_evidence import KINDS, NEEDED, problem_with

    assert set(NEEDED) == set(KINDS)
    assert "--data is required" in problem_with("text", None, tmp_path)
    for kind, names in NEEDED.items():
        problem = problem_with(kind, tmp_path, tmp_path)
        assert all(name in problem for name in names)
    for name in NEEDED["sentiment"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert "run text first" in problem_with("sentiment", tmp_path, tmp_path)
    row = {"folders": [str(tmp_path / "gone")]}
    (tmp_path / "text.json").write_text(json.dumps({"LION-S": row}))
    assert "gone" in problem_with("sentiment", tmp_path, tmp_path)


HEAVY = """
import runpy, sys
for script in sys.argv[1:]:
    sys.path.insert(0, script.rpartition("/")[0])
    sys.argv = [script, "--output_dri", "out"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 2, script
    assert not {"torch", "transformers", "matplotlib"} & set(sys.modules), script
"""


@pytest.mark.slow
def test_a_run_that_is_refused_leaves_no_empty_folder(tmp_path):
    """The folder is made first, so that a run does not fail at its end where nothing can be written."""
    code = "import sys; from lion_hf.training.errors import make_output_dir, run, UserError\n"
    code += (
        "def main():\n    for folder in sys.argv[1:]: make_output_dir(folder)\n    raise UserError('wrong')\nrun(main)"
    )
    (tmp_path / "mine").mkdir()
    command = [sys.executable, "-c", code, tmp_path / "new", tmp_path / "mine"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr == "error: wrong\n", process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_misspelt_flag_is_told_before_anything_heavy_is_imported():
    command = [sys.executable, "-c", HEAVY, *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: unknown argument '--output_dri'") == len(SCRIPTS) >= 9


@pytest.mark.parametrize("script", ["run_mlm", "run_glue", "run_image_classification"])
def test_no_flag_that_there_is_counts_as_misspelt(script):
    import importlib

    from flags import known_flags, problem_of

    from lion_hf.training.parsing import _Parser

    module = importlib.import_module(script)
    known = known_flags(str(EXAMPLES / f"{script}.py"))
    for action in _Parser(module.CLASSES)._actions:
        for flag in action.option_strings:
            assert not flag.startswith("--") or problem_of([flag], known) is None, flag
    assert problem_of(["--smoke", "--preset=lion-s-base"], known) is None
    assert problem_of(["--train_file=absent.csv"], known) == "data file 'absent.csv' does not exist"
    assert problem_of(["--train_file=*.absent", "--learning_rate", "-1"], known) is None
    assert problem_of(["--eval_strategy=epochs"], known).startswith(
        "--eval_strategy is 'epochs'; allowed are epoch, no"
    )
    assert problem_of(["--eval_strategy", "no", "--lr_scheduler_type=cosine"], known) is None
    assert problem_of(["absent.yaml"], known) == "argument file 'absent.yaml' does not exist"


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("cls_tok", [False, True])
def test_the_picture_of_attention_shows_what_is_classified(cls_tok):
    from inference import pooled_attention

    config = vision_config("decay", order="s", cls_tok=cls_tok, format="attention")
    model = lion_hf.LionForImageClassification(config).eval()
    pixels = torch.randn(1, config.num_channels, config.image_size, config.image_size)
    shown = pooled_attention(model, {"pixel_values": pixels})
    with torch.no_grad():
        layers = model(pixel_values=pixels, output_attentions=True).attentions
    for found, weights in zip(shown, layers, strict=True):
        weights = weights[0].mean(0)
        torch.testing.assert_close(found, weights[0, 1:] if cls_tok else weights.mean(0)[1:])


def test_colours_tell_the_sign():
    from inference import shades

    assert shades(torch.tensor([0.0, 2.0])) == {"cmap": "viridis", "vmin": 0.0, "vmax": 2.0}
    assert shades(torch.tensor([-3.0, 2.0])) == {"cmap": "RdBu_r", "vmin": -3.0, "vmax": 3.0}
