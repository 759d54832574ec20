"""Fine-tune LION, or a baseline, on the tasks of GLUE or on your own data.

    python examples/run_glue.py --output_dir outputs/rte --model_name_or_path outputs/mlm --task rte --seed 1
    python examples/run_glue.py --output_dir outputs/glue --model_name_or_path outputs/mlm --task all --parallel 8
    python examples/run_glue.py --output_dir outputs/glue --model_name_or_path outputs/mlm --task all --data_dir glue
    python examples/run_glue.py --output_dir outputs/reviews --model_name_or_path outputs/mlm --train_file train.csv
    python examples/run_glue.py examples/recipes/glue/lion.yaml --preset lion-s-base

One task with one seed is a single training run. Several tasks or seeds are trained in output_dir/task/seed each, and
summed up in a table with the GLUE score; the same command again skips finished runs and continues with the rest. By
default, learning rate, epochs, batch size and weight decay depend on the task (lion_hf.training.glue.tasks). Without
task and data arguments, the script trains on toy data made from Python's documentation and needs no network.
"""

import difflib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed
from transformers.utils import logging

from lion_hf import PRESETS, LionConfig
from lion_hf.training.arguments import LionTrainingArguments, TextModelArguments
from lion_hf.training.checkpoints import check_disk, check_resumable, checkpoint_to_resume
from lion_hf.training.errors import UserError, run
from lion_hf.training.glue.data import TaskData, all_texts, load_task, tokenize
from lion_hf.training.glue.metrics import (
    Baseline,
    constant_baseline,
    load_metric,
    metrics_by,
    predictions_and_losses,
    probabilities,
    write_submission,
)
from lion_hf.training.glue.sources import GlueArguments, normal_name
from lion_hf.training.glue.suite import plan_runs, run_suite, stop_with_parent, write_json
from lion_hf.training.glue.summary import RESULT
from lion_hf.training.glue.tasks import CUSTOM, TASKS, GlueTask, suited_rate
from lion_hf.training.hidden_teacher import HiddenStateTeacher
from lion_hf.training.models import SMALL_TEXT_MODEL, build_model, known_config, require_head
from lion_hf.training.parsing import given_values, parse_arguments
from lion_hf.training.reports import (
    Report,
    command_line,
    finish,
    model_name,
    train_and_evaluate,
    write_predictions,
)
from lion_hf.training.text import check_vocabulary, get_tokenizer, model_options, require_room, set_length_limit
from lion_hf.training.trainer import LionTrainer


logger = logging.get_logger(__name__)


def smoke_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that --smoke sets: a new tiny model on built-in data.

    Its kind is that of the pretrained model, which the folder in the recipe names.
    """
    name = Path(str(values.get("model_name_or_path"))).name
    kind = {"preset": name} if name in PRESETS else {"model_type": "bert"} if name.startswith("bert") else {}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    gone = (
        "model_name_or_path",
        "warm_start",
        "warm_start_layers",
        "warm_start_distillation",
        "tokenizer_name",
        "dataset_name",
        "dataset_config_name",
        "data_dir",
        "sentence1_column",
    )
    gone += ("sentence2_column", "label_column")
    files = ("train_file", "validation_file", "test_file")
    rows = {"max_train_samples": 32, "per_device_train_batch_size": 8, "num_seeds": 1, "vocab_size": 512}
    quick = {"builtin_data": True, "eval_strategy": "no", "disable_tqdm": True}
    return dict.fromkeys((*gone, *files)) | kind | shape | rows | quick


@dataclass
class GlueTrainingArguments(LionTrainingArguments):
    """Training arguments whose None stands for the default of the task."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. Default: the task's 1e-5 for models at least 768 wide; for narrower ones and "
            "your own data 5e-5 * (768 / width) ** 1.5, at most 3e-3."
        },
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs. Default: the task's."})
    weight_decay: float | None = field(default=None, metadata={"help": "Weight decay. Default: the task's."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Training batch size per device. Default: the task's, divided by devices and accumulated steps."
        },
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    do_predict: bool = field(default=True, metadata={"help": "Write predictions for the test data, if there is any."})


CLASSES = (TextModelArguments, GlueArguments, GlueTrainingArguments)


def chosen_tasks(data: GlueArguments) -> list[GlueTask]:
    """Return the tasks that --task names, in the order of the table.

    Raises:
        UserError: if a name is unknown, or if several tasks share one --train_file.
    """
    names = {normal_name(name) for name in data.task or [CUSTOM.name]}
    known = [*TASKS, CUSTOM.name, "all"]
    for name in sorted(names - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--task is {name!r}; allowed are {', '.join(known)}{hint}")
    if "all" in names:
        names = (names - {"all"}) | set(TASKS)
    if len(names) > 1 and (data.train_file or CUSTOM.name in names):
        raise UserError("--train_file and custom stand for one data set; for several tasks give --data_dir")
    return [task for task in (*TASKS.values(), CUSTOM) if task.name in names]


def apply_recipe(training: GlueTrainingArguments, task: GlueTask, width: int) -> None:
    """Set the arguments that are None to the task's values for a model of this width; train STS-B in float32."""
    for name, value in (
        ("learning_rate", suited_rate(task, width)),
        ("num_train_epochs", task.epochs),
        ("weight_decay", task.weight_decay),
    ):
        if getattr(training, name) is None:
            setattr(training, name, value)
    if training.per_device_train_batch_size is None:
        parts = training.world_size * max(1, training.n_gpu) * training.gradient_accumulation_steps
        training.per_device_train_batch_size = max(1, round(task.batch_size / parts))
        if training.per_device_train_batch_size * parts != task.batch_size:
            logger.warning(
                f"{task.title} has a batch size of {task.batch_size}, which {parts} devices and accumulated steps "
                f"cannot share evenly; the batch size is {training.per_device_train_batch_size * parts}"
            )
    if task.name == "stsb":
        training.bf16 = training.fp16 = training.bf16_full_eval = training.fp16_full_eval = False
        training.mixed_precision = "no"


# ------------------------------------------------------------------------------------------------------------ runs


def label_options(task: GlueTask) -> dict[str, Any]:
    """Return the configuration values that describe the labels."""
    names = task.labels or ("score",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification" if task.labels else "regression",
    }


def make_model(task: GlueTask, model_args: TextModelArguments, tokenizer, max_length: int, mean: float | None = None):
    """Return the model to train, in float32.

    Attention dropout is 0 as in the recipe, for BERT too (ModernBERT has none by default). The new head of a regression
    starts at the `mean` of the labels, which training would take long to reach.
    """
    fixed = model_options(tokenizer, max_length) | label_options(task)
    if model_args.model_type != "modernbert":
        fixed["attention_probs_dropout_prob"] = 0.0
    config = known_config(AutoModelForSequenceClassification, LionConfig.model_type, model_args, SMALL_TEXT_MODEL)
    model = build_model(AutoModelForSequenceClassification, LionConfig.model_type, model_args, SMALL_TEXT_MODEL, fixed)
    require_room(model.config, tokenizer, max_length)
    trained_head = config.num_labels == 1 and any("SequenceClassification" in x for x in config.architectures or [])
    if mean is not None and not trained_head:
        start_at(model, mean)
    # Checkpoints in half precision are trained in float32 too. With --bf16, autocast decides what runs in bfloat16.
    return model.float()


def start_at(model: torch.nn.Module, value: float) -> None:
    """Set the bias of the last linear layer, if it has one. Its name differs between models."""
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    if last.bias is not None:
        torch.nn.init.constant_(last.bias, value)


def run_task(
    task: GlueTask, model_args, data: GlueArguments, training: GlueTrainingArguments, argv
) -> dict[str, float]:
    """Fine-tune one model on one task and return the metrics, which are also in `all_results.json`."""
    if data.max_length < 8:
        raise UserError(f"--max_length is {data.max_length}; it must be at least 8")
    check_vocabulary(data, model_args)
    config = known_config(AutoModelForSequenceClassification, LionConfig.model_type, model_args, SMALL_TEXT_MODEL)
    if not training.do_train:
        require_head(config, AutoModelForSequenceClassification, model_args.model_name_or_path)
    apply_recipe(training, task, config.hidden_size)
    set_seed(training.seed)
    checkpoint = checkpoint_to_resume(training)
    with training.main_process_first(desc="data and tokenizer"):
        parts = load_task(task, data, None if training.do_train else config)
        task = parts.task
        texts = None if parts.train is None else all_texts(parts.train, task)
        tokenizer = get_tokenizer(data, model_args, training, checkpoint, texts)
        encode = partial(tokenize, task=task, tokenizer=tokenizer, max_length=data.max_length)
        train = None if parts.train is None else encode(parts.train, name="training")
        validation = {word: encode(part, name="validation") for word, part in parts.validation.items()}
    mean = fmean(parts.train["labels"][:]) if parts.train is not None and not task.labels else None
    model = make_model(task, model_args, tokenizer, data.max_length, mean)
    set_length_limit(tokenizer, model.config)
    if checkpoint:
        check_resumable(checkpoint, AutoModelForSequenceClassification, model.config)
    check_disk(training, model)
    if training.process_index == 0:
        rate = f", learning rate {training.learning_rate:g}" if training.do_train else ""
        print(f"{model.num_parameters():,} parameters, {parts.source.removesuffix('.')}{rate}")
    metric = load_metric(task, data)
    trainer = LionTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation.get("", validation) or None,
        processing_class=tokenizer,
        hidden_teacher=HiddenStateTeacher.of(model_args, training.device),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_by(metric),
        preprocess_logits_for_metrics=predictions_and_losses,
    )
    metrics = train_and_evaluate(trainer, training, checkpoint)
    if training.do_predict:
        predict(trainer, parts, encode)
    baseline = None
    if training.do_train:
        labels = next(iter(parts.validation.values()))["labels"][:]
        baseline = constant_baseline(metric, task, parts.train["labels"][:], labels)
        finish(trainer, training, metrics, card(parts, data.name("toy data"), baseline, model, training, argv))
    if validation and trainer.is_world_process_zero():
        write_result(task, metrics, baseline, training, argv)
    return metrics


def predict(trainer: LionTrainer, parts: TaskData, encode: Callable) -> None:
    """Write a csv file of predictions for every test set, and for GLUE tasks a tsv file for submission."""
    for name, part in parts.test.items():
        predictions = trainer.predictions(encode(part, name="test"), probabilities)
        if trainer.is_world_process_zero():
            path = Path(trainer.args.output_dir) / "predictions" / f"{name}.csv"
            texts = {column: part[column][:] for column in parts.task.columns}
            write_predictions(path, texts, parts.task.labels, predictions)
            if parts.task.name in TASKS:
                write_submission(path.with_suffix(".tsv"), parts.task, parts.index[name], predictions)
            print(f"Predictions for {len(part):,} rows are in {path}")


def card(
    parts: TaskData, name: str, baseline: Baseline, model, training: GlueTrainingArguments, argv: Sequence[str]
) -> Report:
    task = parts.task
    inputs = '{"text": "one text", "text_pair": "another"}' if len(task.columns) > 1 else '"a text"'
    metric, correlation = task.evaluated[0], task.score[0] in ("spearmanr", "matthews_correlation")
    label = {"spearmanr": "Spearman correlation"}.get(metric, metric.replace("_", " "))
    return Report(
        title=f"{name if task.name == CUSTOM.name else task.title}, {model_name(model.config)}",
        pipeline_tag="text-classification",
        data=parts.source,
        command=command_line("run_glue.py", argv),
        metric=f"eval_{metric}",
        metric_label=label if correlation else f"{label} (%)",
        metric_baseline=(baseline.name, baseline.metric),
        metric_error=baseline.error,
        correlation=correlation,
        loss_label="cross entropy (nats per row)" if task.labels else "squared error",
        loss_baseline=("class frequencies" if task.labels else baseline.name, baseline.loss),
        usage="import lion_hf\nfrom transformers import pipeline\n\n"
        f'print(pipeline("text-classification", "{training.output_dir}")({inputs}))',
    )


def write_result(
    task: GlueTask,
    metrics: dict[str, float],
    baseline: Baseline | None,
    training: GlueTrainingArguments,
    argv: Sequence[str],
) -> None:
    """Write the metrics for the table of all runs, as the last file of a run. NaN and infinity become None."""
    spent = ("time", "per_second")
    values = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    result = {
        "task": task.name,
        "seed": training.seed,
        "score_metrics": task.evaluated,
        "metrics": {k: v if math.isfinite(v) else None for k, v in values.items() if not k.endswith(spent)},
        "baseline": None if baseline is None else baseline.score,
        "arguments": given_values(CLASSES, argv, smoke_values),
    }
    write_json(Path(training.output_dir) / RESULT, result)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and evaluate; return the metrics of one run, or the summary of several."""
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data, training = parse_arguments(CLASSES, argv, description=__doc__, smoke=smoke_values)
    tasks = chosen_tasks(data)
    runs = plan_runs(tasks, data.num_seeds, training.seed, training.output_dir, data.from_mnli)
    if len(runs) == 1:
        return run_task(tasks[0], model_args, data, training, argv)
    given = given_values(CLASSES, argv, smoke_values)
    return run_suite(runs, given, training, data.parallel, main, Path(__file__))


if __name__ == "__main__":
    stop_with_parent()
    run(main)
