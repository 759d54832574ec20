"""run_glue.py: the recipe of each task, metrics, and data from files and the Hub."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from glue_script import ONE_STEP, TINY, labelled_rows, write
from transformers import AutoModelForSequenceClassification, pipeline

from lion_hf.training.recipes import expand, presets_of


pytestmark = pytest.mark.usefixtures("examples")

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [(file, preset) for file in sorted((EXAMPLES / "recipes/glue").glob("*.yaml")) for preset in presets_of(file)]


# ---------------------------------------------------------------------------------------------------------- recipe


def test_the_table_holds_the_authors_numbers():
    """The learning rate is 1e-5 for all tasks; epochs, batch size, weight decay and seeds are the paper's."""
    from lion_hf.training.glue.tasks import SCORED, TASKS

    authors = {
        "mnli": (3, 48, 5e-6, 1),
        "qqp": (5, 16, 3e-6, 1),
        "qnli": (10, 16, 1e-6, 1),
        "sst2": (3, 16, 3e-6, 3),
        "rte": (2, 16, 1e-6, 5),
        "stsb": (8, 32, 3e-6, 5),
        "mrpc": (10, 32, 8e-6, 5),
        "cola": (10, 32, 1e-6, 4),
    }
    assert set(SCORED) == set(authors) == set(TASKS) - {"wnli"}
    for name, numbers in authors.items():
        task = TASKS[name]
        assert (task.epochs, task.batch_size, task.weight_decay, task.seeds) == numbers, name
    assert {task.learning_rate for task in TASKS.values()} == {1e-5}
    scores = {name: TASKS[name].evaluated for name in ("qqp", "stsb", "mrpc", "cola", "mnli", "rte")}
    assert scores == {
        "qqp": ("accuracy", "f1"),
        "stsb": ("spearmanr",),
        "mrpc": ("f1",),
        "cola": ("matthews_correlation",),
        "mnli": ("matched_accuracy", "mismatched_accuracy"),
        "rte": ("accuracy",),
    }


def test_every_variant_and_size_has_a_recipe_with_the_authors_numbers():
    sizes = {f"lion-{variant}-{size}" for variant in ("lit", "d", "s") for size in ("base", "large")}
    assert {preset for _, preset in RECIPES} == sizes | {"bert-base"} and len(RECIPES) == 7
    shared = {"task": "all", "max_length": 128, "learning_rate": 1e-5, "lr_scheduler_type": "linear"}
    shared |= {"warmup_steps": 0.06, "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6, "bf16": True}
    for file, preset in RECIPES:
        values = expand(file, preset)
        assert shared.items() <= values.items()
        assert values["model_name_or_path"] == f"outputs/recipes/mlm/{preset}"
        assert values["output_dir"] == f"outputs/recipes/glue/{preset}"
        assert not {"num_train_epochs", "weight_decay", "per_device_train_batch_size"} & set(values)


def parse(run_glue_module, *flags):
    argv = ["--output_dir=out", "--use_cpu=true", *flags]
    return run_glue_module.parse_arguments(run_glue_module.CLASSES, argv, smoke=run_glue_module.smoke_values)


def test_given_values_go_before_the_tables(tmp_path, monkeypatch):
    import run_glue

    from lion_hf.training.glue.tasks import TASKS

    monkeypatch.chdir(tmp_path)
    _, _, training = parse(run_glue, "--weight_decay=0", "--bf16=true")
    run_glue.apply_recipe(training, TASKS["mnli"], 768)
    assert (training.learning_rate, training.num_train_epochs, training.weight_decay) == (1e-5, 3, 0)
    assert training.per_device_train_batch_size == 48 and not training.bf16  # a CPU: float32
    _, _, training = parse(run_glue, "--learning_rate=2e-5", "--gradient_accumulation_steps=4")
    run_glue.apply_recipe(training, TASKS["stsb"], 768)
    assert training.learning_rate == 2e-5 and training.per_device_train_batch_size == 8  # 4 * 8 = 32
    _, _, training = parse(run_glue)
    training.bf16, training.mixed_precision = True, "bf16"  # as set on an accelerator
    run_glue.apply_recipe(training, TASKS["stsb"], 768)
    assert not training.bf16 and training.mixed_precision == "no"


# --------------------------------------------------------------------------------------------------------- metrics


def textbook(config, predictions, references):
    """The metrics equal their definitions."""
    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt((a * a).sum() * (b * b).sum())
        return (a * b).sum() / norm if norm else math.nan

    def ranks(a):
        return np.array([(a < value).sum() + ((a == value).sum() + 1) / 2 for value in a])

    if config == "stsb":
        return {"pearson": correlation(x, y), "spearmanr": correlation(ranks(x), ranks(y))}
    if config == "cola":
        value = correlation(x, y)
        return {"matthews_correlation": 0.0 if math.isnan(value) else value}
    result = {"accuracy": (x == y).mean()}
    if config in ("mrpc", "qqp"):
        hits = ((x == 1) & (y == 1)).sum()
        result["f1"] = 2 * hits / ((x == 1).sum() + (y == 1).sum()) if hits else 0.0
    return result


CLASSES = [
    ([0, 1, 1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1, 1, 0]),
    ([1, 1, 0, 1], [1, 1, 0, 1]),
    ([0, 0, 1], [1, 1, 0]),
    ([0, 0, 0, 0], [0, 1, 1, 0]),
    ([1, 1, 1, 1], [0, 1, 1, 0]),
    ([0, 0, 0], [0, 0, 0]),
]
NUMBERS = [
    ([0.1, 2.5, 4.9, 3.0, 3.0, 1.2], [0.0, 2.0, 5.0, 3.5, 2.8, 2.0]),
    ([5.0, 4.0, 3.0], [1.0, 2.0, 4.0]),
    ([2.5, 2.5, 2.5, 2.5], [0.0, 2.0, 5.0, 3.5]),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config", ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "mrpc", "qqp", "cola", "stsb"]
)
def test_metrics_agree_with_their_definitions(config):
    import evaluate

    from lion_hf.training.glue.metrics import LOCAL_METRIC

    metric = evaluate.load(str(LOCAL_METRIC), config, keep_in_memory=True)
    for predictions, references in NUMBERS if config == "stsb" else CLASSES:
        found = metric.compute(predictions=predictions, references=references)
        expected = textbook(config, predictions, references)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-6, nan_ok=True), (name, predictions)


def test_an_unknown_configuration_of_the_metric_names_those_there_are():
    import evaluate

    from lion_hf.training.glue.metrics import LOCAL_METRIC

    with pytest.raises(KeyError, match=r"'sst3'.*sst2"):
        evaluate.load(str(LOCAL_METRIC), "sst3")


# ------------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    "recipe, task",
    zip(RECIPES, ["mnli", "qqp", "qnli", "cola", "stsb", "mrpc", "wnli"], strict=True),
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_recipes_run_with_smoke(recipe, task, run_glue):
    file, preset = recipe
    metrics = run_glue([str(file), f"--preset={preset}", "--smoke", f"--task={task}"])
    from lion_hf.training.glue.tasks import TASKS

    assert {f"eval_{name}" for name in TASKS[task].evaluated} <= set(metrics)
    folder = Path(f"outputs/recipes/glue/{preset}-smoke")
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    kinds = {"lit": "lit", "d": "decay", "s": "selective"}
    kind = kinds.get(preset.split("-")[1])
    assert config.model_type == ("lion" if kind else "bert") and getattr(config, "mask_type", None) == kind
    assert config.attention_probs_dropout_prob == 0
    assert config.problem_type == ("regression" if task == "stsb" else "single_label_classification")
    for name in TASKS[task].test_parts:
        lines = (folder / "predictions" / f"{name}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 41
        values = [line.split("\t")[1] for line in lines[1:]]
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(40)]
        if task == "stsb":
            assert all(0 <= float(value) <= 5 for value in values)
        elif task in ("mnli", "qnli"):
            assert set(values) <= set(TASKS[task].labels)
        else:
            assert set(values) <= {"0", "1"}


def test_predictions_are_clipped_named_and_indexed(tmp_path):
    from lion_hf.training.glue.metrics import write_submission
    from lion_hf.training.glue.tasks import TASKS

    write_submission(tmp_path / "p" / "a.tsv", TASKS["stsb"], [4, 2], np.array([[-0.5], [7.0]]))
    assert (tmp_path / "p" / "a.tsv").read_text() == "index\tprediction\n4\t0.000\n2\t5.000\n"
    write_submission(tmp_path / "p" / "b.tsv", TASKS["rte"], [0, 1], np.array([[0.2, 0.8], [0.6, 0.4]]))
    assert (tmp_path / "p" / "b.tsv").read_text() == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"


def test_a_small_model_learns_the_toy_task(run_glue):
    flags = [*TINY, "--hidden_size=64", "--num_attention_heads=4", "--vocab_size=1000", "--initializer_range=0.1"]
    flags += ["--learning_rate=2e-3", "--num_train_epochs=6", "--hidden_dropout_prob=0", "--save_strategy=no"]
    assert run_glue(["--output_dir=out", "--task=SST-2", "--builtin_data=true", *flags])["eval_accuracy"] > 0.6


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_own_files_with_names_of_classes(suffix, run_glue):
    """Texts in column "text", classes by name: a validation set is split off, and the model stores the class names."""
    rows = [{"text": f"word{i} and, {i % 7}", "label": ("bad", "good", "so so")[i % 3]} for i in range(30)]
    data, name = Dataset.from_list(rows), f"train{suffix}"
    if suffix == ".parquet":
        data.to_parquet(name)
    elif suffix == ".jsonl":
        data.to_json(name)
    else:
        data.to_csv(name, sep="\t" if suffix == ".tsv" else ",")
    metrics = run_glue(["--output_dir=out", *ONE_STEP, f"--train_file={name}", "--validation_share=0.2"])
    assert 0 <= metrics["eval_accuracy"] <= 1
    classify = pipeline("text-classification", "out")
    assert classify("word1")[0]["label"] in ("bad", "good", "so so") and classify.model.config.num_labels == 3


def test_a_checkpoint_in_half_precision_is_trained_in_float32(run_glue):
    train = write("train.csv", "text,label\n" + labelled_rows(16))
    run_glue(["--output_dir=first", *ONE_STEP, f"--train_file={train}"])
    half = AutoModelForSequenceClassification.from_pretrained("first").to(torch.bfloat16)
    half.save_pretrained("first")
    flags = [flag for flag in ONE_STEP if "size" not in flag and "num_" not in flag]
    run_glue(["--output_dir=second", *flags, f"--train_file={train}", "--model_name_or_path=first"])
    model = AutoModelForSequenceClassification.from_pretrained("second", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_a_classifier_pools_is_chosen_for_new_and_existing_models(run_glue):
    from lion_hf.training.arguments import TextModelArguments
    from lion_hf.training.errors import UserError
    from lion_hf.training.models import known_config

    data = f"--train_file={write('train.csv', 'text,label' + chr(10) + labelled_rows(16))}"
    run_glue(["--output_dir=first", *ONE_STEP, data, "--classifier_pooling=first"])
    run_glue(["--output_dir=small", *ONE_STEP, data])
    load = AutoModelForSequenceClassification.from_pretrained
    assert load("first").config.classifier_pooling == "first" != load("small").config.classifier_pooling
    arguments = TextModelArguments(preset="lion-s-base")
    paper = known_config(AutoModelForSequenceClassification, "lion", arguments, {"classifier_pooling": "mean"})
    assert paper.classifier_pooling == "first"
    flags = [flag for flag in ONE_STEP if "size" not in flag and "num_" not in flag]
    again = [*flags, data, "--model_name_or_path=first"]
    run_glue(["--output_dir=same", *again])
    run_glue(["--output_dir=mean", *again, "--classifier_pooling=mean"])
    assert [load(name).config.classifier_pooling for name in ("same", "mean")] == ["first", "mean"]
    run_glue(["--output_dir=bert", *ONE_STEP, data, "--model_type=bert"])
    baseline = "--classifier_pooling is an option of LION; .* 'bert' model"
    for model in (["--model_type=bert", *ONE_STEP], [*flags, "--model_name_or_path=bert"]):
        with pytest.raises(UserError, match=baseline):
            run_glue(["--output_dir=out", data, *model, "--classifier_pooling=mean"])


def test_numbers_are_predicted_and_not_classified(run_glue):
    train = write("train.csv", "text,score\n" + labelled_rows(20, ("0.5", "1.25", "4.0")))
    test = write("test.csv", "text\nwords\nmore words\n")
    flags = [f"--train_file={train}", f"--test_file={test}", "--label_column=score", "--validation_share=0.2"]
    metrics = run_glue(["--output_dir=out", *ONE_STEP, *flags])
    assert {"eval_pearson", "eval_spearmanr"} <= set(metrics)
    lines = Path("out/predictions/custom.csv").read_text().splitlines()
    assert lines[0] == "text,prediction" and len(lines) == 3
    assert all(math.isfinite(float(line.split(",")[1])) for line in lines[1:])


def load(task, **options):
    from lion_hf.training.glue.data import load_task
    from lion_hf.training.glue.sources import GlueArguments

    return load_task(task, GlueArguments(**options))


def test_rows_keep_their_labels(tmp_path, monkeypatch):
    """Class names, numbers and numbers as text mean the same class; rows without any text are left out."""
    from lion_hf.training.glue.tasks import TASKS

    monkeypatch.chdir(tmp_path)
    text = 'a,b,entailment\n,c,not_entailment\n,,entailment\n"d, e",,entailment\n'
    write("names.csv", "sentence1,sentence2,label\n" + text)
    write("numbers.csv", "one,two,class\n" + text.replace("not_entailment", "1").replace("entailment", "0"))
    named = load(TASKS["rte"], train_file="names.csv", validation_file="names.csv")
    numbered = load(
        TASKS["rte"],
        train_file="numbers.csv",
        validation_file="numbers.csv",
        sentence1_column="one",
        sentence2_column="two",
        label_column="class",
    )
    assert named.train["labels"][:] == numbered.train["labels"][:] == [0, 1, 0]
    assert named.train["sentence1"][:] == numbered.train["one"][:] == ["a", None, "d, e"]


def test_a_folder_per_task_and_both_parts_of_mnli(tmp_path):
    from lion_hf.training.glue.tasks import TASKS

    row = {"premise": "a b", "hypothesis": "c", "label": 2, "idx": 5}
    names = ["train", "validation_matched-00000-of-00001", "validation_mismatched", "test_matched", "test_mismatched"]
    (tmp_path / "MNLI").mkdir()
    (tmp_path / "ax").mkdir()
    for i, name in enumerate(names):
        Dataset.from_list([row] * (i + 1)).to_parquet(tmp_path / "MNLI" / f"{name}.parquet")
    Dataset.from_list([row | {"label": -1}] * 7).to_json(tmp_path / "ax" / "test.jsonl")
    parts = load(TASKS["mnli"], data_dir=str(tmp_path))
    assert {word: len(part) for word, part in parts.validation.items()} == {"matched": 2, "mismatched": 3}
    assert {name: len(part) for name, part in parts.test.items()} == {"MNLI-m": 4, "MNLI-mm": 5, "AX": 7}
    assert parts.index["AX"] == [5] * 7 and "labels" not in parts.test["AX"].column_names


def test_data_and_metric_of_the_hub_by_name(tmp_path, monkeypatch, run_glue):
    """Hub data takes the path of local data; if the Hub's metric cannot be loaded, the local one is used and logged."""
    import evaluate

    from lion_hf.training.glue import sources

    asked, real = [], evaluate.load
    rows = [{"sentence": f"word{i} and more", "label": i % 2, "idx": i} for i in range(16)]
    names = ClassLabel(names=["unacceptable", "acceptable"])
    labelled = Dataset.from_list(rows).cast_column("label", names)
    unlabelled = Dataset.from_list([row | {"label": -1} for row in rows]).cast_column("label", names)

    def named(*name):
        asked.append(name)
        return {"train": labelled, "validation": labelled, "test": unlabelled}

    def load_metric(name, *args, **kwargs):
        asked.append(name)
        if name == "glue":
            raise FileNotFoundError("no network")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(sources, "load_named", named)
    monkeypatch.setattr(evaluate, "load", load_metric)
    metrics = run_glue(["--output_dir=out", *ONE_STEP, "--task=cola"])
    assert asked[:2] == [("nyu-mll/glue", "cola"), "glue"] and asked[2].endswith("glue/offline.py")
    assert "eval_matthews_correlation" in metrics
    assert len(Path("out/predictions/CoLA.tsv").read_text().splitlines()) == 17


ROWS = labelled_rows(30)
SENTENCES = "".join(f"t{i},a sentence of its own {i}\n" for i in range(40))
WRONG = {
    "unknown task": ("", ["--task=sst3"], "did you mean 'sst2'"),
    "no label column": (
        "text,class\na,1\nb,0\n",
        [],
        "no column 'label' (set --label_column); the columns are text, class",
    ),
    "no text column": (
        "words,label\na,1\nb,0\n",
        [],
        "no text column (accepted are 'sentence1' and 'sentence2'; 'text'; 'sentence', or any",
    ),
    "no rows": ("text,label\n", [], "no rows"),
    "no text": ("text,label\n,1\n,0\n", [], "no text in column 'text'"),
    "numbers as text": ("text,label\n1,1\n2,0\n", [], "holds int64, not text"),
    "text as classes": ("text,label\n" + SENTENCES, [], "looks like text, not classes"),
    "one class": ("text,label\na,1\nb,1\n", [], "the same value 1 in every row"),
    "label missing": (f"text,label\n{ROWS}last,\n", [], "row 31 of the training data has no label"),
    "no class of the task": (f"sentence,label\n{ROWS}last,2\n", ["--task=sst2"], "label 2 in column 'label'"),
    "unlabelled": (f"sentence,label\n{ROWS}last,-1\n", ["--task=sst2"], "row 31 of the training data has no label"),
    "not finite": ("text,label\na,0.5\nb,inf\n", [], "not a finite number"),
    "one row to correlate": ("text,label\na,0.5\nb,1.5\nc,3.5\n", [], "give more"),
    "class not seen": (f"text,label\n{ROWS}", ["--validation_file=other.csv"], "label 7 in column 'label'"),
    "other columns": (f"text,label\n{ROWS}", ["--test_file=words.csv"], "the test data has no column 'text'"),
    "two sources": (f"text,label\n{ROWS}", ["--data_dir=."], "only one source of data can be given"),
    "several tasks": (f"text,label\n{ROWS}", ["--task=all"], "--data_dir"),
    "folder lacks task": (None, ["--task=rte", "--data_dir=."], "has no folder 'rte'"),
    "no network": (None, ["--task=rte"], "--data_dir"),
    "no model": (
        None,
        ["--task=rte", "--model_name_or_path=outputs/mlm/lion"],
        "--model_name_or_path: there is no folder 'outputs/mlm/lion'",
    ),
    "no seeds": (None, ["--task=rte", "--num_seeds=0"], "at least 1"),
    "no processes": (None, ["--task=rte", "--num_seeds=2", "--parallel=0"], "at least 1"),
    "mnli not there": (None, ["--task", "rte", "mrpc", "--from_mnli=true"], "--from_mnli requires mnli"),
    "unknown metric": (f"text,label\n{ROWS}", ["--metric_name=nowhere/metric"], "cannot load the metric"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_one_line(case, run_glue):
    from lion_hf.training.errors import UserError

    content, flags, message = WRONG[case]
    write("other.csv", "text,label\na,7\n")
    write("words.csv", "words\na\n")
    Path("folder").mkdir()
    if content is not None:
        flags = [f"--train_file={write('train.csv', content)}", *flags]
    shape = [] if case == "no model" else TINY
    with pytest.raises(UserError) as error:
        run_glue(["--output_dir=out", *shape, "--max_steps=1", "--save_strategy=no", *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_evaluation_counts_classes_as_the_model_does(run_glue):
    """Evaluation data may list the classes in another order than the training data."""
    from lion_hf.training.errors import UserError

    flags = ["--disable_tqdm=true", "--use_cpu=true", "--do_train=false", "--model_name_or_path=model"]
    rows = "".join(f"good {i},yes\nbad {i},no\n" for i in range(15))
    write("train.csv", "text,label\n" + rows)
    run_glue(["--output_dir=model", "--train_file=train.csv", "--validation_file=train.csv", *ONE_STEP])
    metrics = run_glue(["--output_dir=out", "--train_file=train.csv", "--validation_file=train.csv", *flags])
    model = AutoModelForSequenceClassification.from_pretrained("model")
    assert model.config.id2label == {0: "no", 1: "yes"}
    turned = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    for name, value in turned.items():
        setattr(model.config, name, value)
    for parameter in (model.classifier.weight, model.classifier.bias):
        parameter.data = parameter.data.flip(0)
    model.save_pretrained("model")
    same = run_glue(["--output_dir=out", "--train_file=train.csv", "--validation_file=train.csv", *flags])
    assert same["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert same["eval_accuracy"] == metrics["eval_accuracy"]
    for content, message in (
        ("a,yes\nb,no\nc,maybe\n" * 5, "the class 'maybe', which the model does not have; its classes are yes, no"),
        ("a,0.5\nb,1.5\nc,2.5\n" * 5, "numbers to predict, but the model has 2 classes"),
    ):
        write("other.csv", "text,label\n" + content)
        with pytest.raises(UserError, match=message):
            run_glue(["--output_dir=out", "--train_file=other.csv", "--validation_file=other.csv", *flags])
