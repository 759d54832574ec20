"""Train the runs of `ablation_evidence.py`: the steps of the training scripts, several runs at a time on a GPU.

A run reads the same rows, masked tokens and batches, and uses the same optimizer groups, schedule and clipping as
`run_mlm.py` or `run_glue.py` with the recipe of `run_evidence.py`. What differs is the speed: all batches are collated
once and kept on the device, and on a GPU a whole step is one CUDA graph, of which several models replay theirs side by
side. Models this small otherwise leave a GPU waiting for Python.
"""

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run_glue import CLASSES as GLUE_CLASSES
from run_glue import apply_recipe, label_options
from run_mlm import MlmTrainingArguments
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from lion_hf.training.arguments import TextModelArguments
from lion_hf.training.data import EpochBatchSampler, Key
from lion_hf.training.glue.data import load_task, tokenize
from lion_hf.training.glue.tasks import CUSTOM
from lion_hf.training.parsing import parse_arguments
from lion_hf.training.text import (
    MaskingCollator,
    TextArguments,
    baselines,
    freeze_masks,
    get_tokenizer,
    load_texts,
    make_rows,
    model_options,
)
from lion_hf.training.trainer import LionTrainer, summed_loss


TEXT_CLASSES = (TextModelArguments, TextArguments, MlmTrainingArguments)
EVALUATION_ROWS = 250
IDS = torch.int16  # enough for the vocabulary of the recipe
WARM_UP_STEPS = 3  # before a step is captured
SIDE_BY_SIDE = 16  # PyTorch has 32 streams; models that shared one would share workspaces


class Rows(NamedTuple):
    """All batches of a training run, and its evaluation rows.

    Attributes:
        batches: "input_ids" (steps, batch, length), "labels" (steps, batch, length) or (steps, batch), and for padded
            rows "attention_mask" (steps, batch, length).
        evaluation: the same without the first axis.
        known: numbers that depend on the data alone, such as the unigram entropy.
    """

    batches: dict[str, torch.Tensor]
    evaluation: dict[str, torch.Tensor]
    known: dict[str, float]


# ------------------------------------------------------------------------------------------------------------ rows


def text_rows(flags: str, seed: int, folder: Path) -> Rows:
    """Return the rows of a masked language modelling run; its tokenizer is saved in `folder`."""
    argv = [*shlex.split(flags), "--seed", str(seed), "--output_dir", str(folder)]
    model, data, training = parse_arguments(TEXT_CLASSES, argv)
    train_texts, validation_texts, _ = load_texts(data, training)
    tokenizer = get_tokenizer(data, model, training, None, train_texts)
    train = make_rows(train_texts, tokenizer, data, "training")
    validation = make_rows(validation_texts, tokenizer, data, "validation")
    frozen = freeze_masks(validation, MaskingCollator(tokenizer, data.eval_mlm_probability, training.seed))
    known = baselines(train, frozen, len(tokenizer), tokenizer.all_special_ids)
    collator = MaskingCollator(tokenizer, data.mlm_probability, training.seed, data.max_length)
    ids = train["input_ids"][:]
    size, names = training.per_device_train_batch_size, ("input_ids", "labels")  # rows are blocks, without padding
    batches = []
    for keys in islice(keys_of(len(ids), training), training.max_steps):
        batch = collator([{"input_ids": ids[key.index], "key": key} for key in keys])
        batches.append(filled({name: batch[name].to(IDS) for name in names}, size))
    evaluation = {name: torch.tensor(frozen[name][:], dtype=IDS) for name in names}
    return Rows(stacked(batches), evaluation, known)


def sentiment_rows(flags: str, seed: int, folder: Path) -> Rows:
    """Return the rows of a fine-tuning run, padded to one length; `folder` holds the tokenizer."""
    argv = [*shlex.split(flags), "--seed", str(seed), "--output_dir", str(folder)]
    _, data, training = parse_arguments(GLUE_CLASSES, argv)
    parts = load_task(CUSTOM, data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad = partial(padded, tokenizer=tokenizer, length=data.max_length)
    encode = partial(tokenize, task=parts.task, tokenizer=tokenizer, max_length=data.max_length, name="rows")
    train, (validation, *_) = encode(parts.train), map(encode, parts.validation.values())
    ids, labels = train["input_ids"][:], train["labels"][:]
    size, steps = training.per_device_train_batch_size, training.max_steps
    whole, batches = pad(ids, labels), []
    for keys in islice(keys_of(len(ids), training), steps if steps > 0 else -(-len(ids) // size)):
        rows = [key.index for key in keys]
        batches.append(filled({name: values[rows] for name, values in whole.items()}, size))
    most = torch.tensor(labels).mode().values
    evaluation = pad(validation["input_ids"][:], validation["labels"][:])
    return Rows(stacked(batches), evaluation, {"baseline": float((evaluation["labels"] == most).float().mean())})


def filled(batch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Return the last batch of an epoch with as many rows as the others: copies of a row, whose labels do not count."""
    rows = len(batch["labels"])
    index = torch.arange(size).clamp(max=rows - 1)
    batch = {name: values[index] for name, values in batch.items()}
    batch["labels"][rows:] = -100
    return batch


def stacked(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}


def padded(ids: Sequence[Sequence[int]], labels: Sequence[int], tokenizer, length: int) -> dict[str, torch.Tensor]:
    """Return rows of one length with their mask and labels."""
    found = tokenizer.pad({"input_ids": list(ids)}, padding="max_length", max_length=length, return_tensors="pt")
    return {
        "input_ids": found["input_ids"].to(IDS),
        "attention_mask": found["attention_mask"].to(IDS),
        "labels": torch.tensor(labels, dtype=IDS),
    }


def keys_of(length: int, training) -> Iterable[list[Key]]:
    """Yield the keys of each batch of a run, epoch after epoch, as `LionTrainer` reads them."""
    sampler = EpochBatchSampler(length, training.per_device_train_batch_size, seed=training.seed)

    def epoch(number: int) -> EpochBatchSampler:
        sampler.set_epoch(number)
        return sampler

    return chain.from_iterable(map(epoch, count()))


def stored_rows(make: Callable[[], Rows], file: Path) -> Rows:
    """Return the rows of a file, or make and store them."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        torch.save(tuple(make()), unfinished)
        unfinished.replace(file)
    return Rows(*torch.load(file, weights_only=True))


# ---------------------------------------------------------------------------------------------------------- models


def new_text_model(options: dict[str, Any], flags: str, seed: int, tokenizer_folder: Path) -> torch.nn.Module:
    """Return a new masked language model: the sizes of the flags, changed by `options`, which may name a type."""
    argv = [*shlex.split(flags), "--output_dir", str(tokenizer_folder)]
    model, data, _ = parse_arguments(TEXT_CLASSES, argv)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sizes = model.overrides()
    dropout = sizes.pop("hidden_dropout_prob", 0.0)
    sizes |= {"intermediate_size": 4 * sizes["hidden_size"]} | model_options(tokenizer, data.max_length)
    kind = options.get("model_type", "lion")
    if kind in ("lion", "bert"):  # ModernBERT has no dropout by default
        sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    set_seed(seed)
    config = AutoConfig.for_model(kind, **sizes | {k: v for k, v in options.items() if k != "model_type"})
    return AutoModelForMaskedLM.from_config(config)


def new_classifier(folder: Path, pooling: str, seed: int) -> torch.nn.Module:
    """Return a classifier of two classes with the encoder in `folder` and a new head that reads `pooling`."""
    config = AutoConfig.from_pretrained(folder)
    options = label_options(CUSTOM) | {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    options |= {"problem_type": "single_label_classification"}
    if config.model_type != "bert":  # whose classifier reads the first token
        options["classifier_pooling"] = "cls" if (config.model_type, pooling) == ("modernbert", "first") else pooling
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


# -------------------------------------------------------------------------------------------------------- training


class Training:
    """A model, its optimizer and its batches on one device. `step()` never waits for the device.

    Args:
        model: the model; it is moved to the device of the arguments.
        rows: batches and evaluation rows.
        arguments: training arguments, with the learning rate.
    """

    def __init__(self, model: torch.nn.Module, rows: Rows, arguments):
        trainer = LionTrainer(model=model, args=arguments)
        self.device, self.clip = arguments.device, arguments.max_grad_norm
        self.model, self.rows = model.to(self.device).train(), rows
        # Logits of the masked tokens alone: the same loss in less time, but of a shape that no CUDA graph can have.
        labels_of_tokens = rows.batches["labels"].dim() == 3
        self.sparse = self.device.type == "cpu" and labels_of_tokens and hasattr(model.config, "sparse_prediction")
        if self.sparse:
            model.config.sparse_prediction = True
        self.steps = len(rows.batches["labels"])
        self.batches = {name: values.to(self.device) for name, values in rows.batches.items()}
        self.rates = torch.tensor(scheduled_rates(trainer, self.steps), device=self.device)
        self.optimizer = trainer.create_optimizer()
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)
        self.losses = torch.zeros(self.steps, device=self.device)
        self.rate = self.rates[0].clone()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
            group["capturable"] = self.device.type == "cuda"
        self.graph = self.stream = None

    def run(self) -> None:
        """Train on the next batch, by the graph of a step if there is one."""
        if self.graph is None:
            self.step()
        else:
            with torch.cuda.stream(self.stream):
                self.graph.replay()

    def step(self) -> None:
        """Train on the next batch."""
        batch = {name: values.index_select(0, self.at)[0].long() for name, values in self.batches.items()}
        self.rate.copy_(self.rates.index_select(0, self.at)[0])
        self.optimizer.zero_grad(set_to_none=True)
        if self.sparse:
            loss = self.model(**batch).loss
        else:
            labels = batch.pop("labels")
            loss = summed_loss(self.model(**batch), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.losses.index_copy_(0, self.at, loss.detach().float()[None])
        self.at += 1

    def capture(self) -> None:
        """Make a CUDA graph of a step; `run` then replays it. The steps that warm it up are undone."""
        # A stream of its own: the libraries' workspaces belong to a stream, and graphs of several runs replay together.
        self.stream = torch.cuda.Stream()
        before = [p.detach().clone() for p in self.parameters]
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_STEPS):
                self.step()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.at.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        self.graph = graph

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy per label that counts, and the mean training loss of the last 50 steps."""
        self.model.eval()
        loss, hits, labels_seen = 0.0, 0, 0
        for start in range(0, len(self.rows.evaluation["labels"]), EVALUATION_ROWS):
            part = {k: v[start : start + EVALUATION_ROWS].to(self.device) for k, v in self.rows.evaluation.items()}
            labels = part.pop("labels").long()
            logits = self.model(**{name: values.long() for name, values in part.items()}).logits.float()
            asked = labels != -100
            logits, labels = logits[asked], labels[asked]
            loss += float(F.cross_entropy(logits, labels, reduction="sum").double())
            hits += int((logits.argmax(-1) == labels).sum())
            labels_seen += len(labels)
        self.model.train()
        found = {"loss": loss / labels_seen, "accuracy": hits / labels_seen}
        return found | {"train_loss": float(self.losses[-50:].mean())}


def scheduled_rates(trainer: LionTrainer, steps: int) -> list[float]:
    """Return the learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=trainer.args.learning_rate)
    trainer.lr_scheduler = None
    scheduler, rates = trainer.create_scheduler(steps, optimizer), []
    for _ in range(steps):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    trainer.lr_scheduler = None
    return rates


def text_training(options: dict[str, Any], flags: str, rate: float, seed: int, rows: Rows, folder: Path) -> Training:
    """Return the training of a new masked language model; `folder` holds the tokenizer."""
    argv = [*shlex.split(flags), "--learning_rate", f"{rate:g}", "--seed", str(seed), "--output_dir", str(folder)]
    *_, arguments = parse_arguments(TEXT_CLASSES, argv)
    return Training(new_text_model(options, flags, seed, folder), rows, arguments)


def sentiment_training(
    start: Path, pooling: str, flags: str, rate: float, seed: int, rows: Rows, folder: Path
) -> Training:
    """Return the fine-tuning of the encoder in `start`."""
    argv = [*shlex.split(flags), "--learning_rate", f"{rate:g}", "--seed", str(seed), "--output_dir", str(folder)]
    *_, arguments = parse_arguments(GLUE_CLASSES, argv)
    model = new_classifier(start, pooling, seed)
    apply_recipe(arguments, CUSTOM, model.config.hidden_size)
    return Training(model, rows, arguments)


def train_together(trainings: Sequence[Training], on_problem: Callable[[str], None]) -> float:
    """Train all to the end: side by side on a GPU, one after another on a CPU. Return the seconds per run, of the clock
    on a GPU, and of CPU time on a CPU, which other work shares.

    Where a step cannot be captured as a graph, it runs as it is, and `on_problem` is told.
    """
    on_cpu = trainings[0].device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    begin = clock()
    if on_cpu:
        for training in trainings:
            for _ in range(training.steps):
                training.run()
    for part in (trainings[i : i + SIDE_BY_SIDE] for i in range(0, len(trainings), SIDE_BY_SIDE)):
        if part[0].device.type == "cuda":
            _replay_together(part, on_problem)
    return (clock() - begin) / len(trainings)


def _replay_together(trainings: Sequence[Training], on_problem: Callable[[str], None]) -> None:
    for training in trainings:
        try:
            training.capture()
        except RuntimeError as error:
            on_problem(f"a step cannot be captured, so it runs without a graph: {error}")
    for _ in range(trainings[0].steps):
        for training in trainings:
            training.run()
    torch.cuda.synchronize()
    for training in trainings:
        training.graph = None  # frees its memory
