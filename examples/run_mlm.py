"""Train LION, or a baseline, to predict masked tokens, from scratch or from a checkpoint.

    python examples/run_mlm.py --output_dir outputs/mlm
    python examples/run_mlm.py --output_dir outputs/mlm --train_file train.txt --validation_file validation.txt
    python examples/run_mlm.py examples/recipes/mlm/lion.yaml --preset lion-s-base --per_device_train_batch_size 64
    python examples/run_mlm.py examples/recipes/mlm/modern.yaml --preset lion-s-modern-base --phase stable

Without data arguments, the script trains on Python's documentation and needs no network.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, set_seed
from transformers.trainer_utils import EvalPrediction
from transformers.utils import is_torch_optimi_available

from lion_hf import MODERN_PRESETS, LionConfig
from lion_hf.training.arguments import LionTrainingArguments, TextModelArguments
from lion_hf.training.checkpoints import check_disk, check_resumable, checkpoint_to_resume, start_of_decay
from lion_hf.training.errors import UserError, run, say
from lion_hf.training.hidden_teacher import HiddenStateTeacher
from lion_hf.training.models import SMALL_TEXT_MODEL, build_model, known_config, require_head
from lion_hf.training.parsing import parse_arguments
from lion_hf.training.recipes import phase_runs, take
from lion_hf.training.reports import Report, command_line, finish, model_name, train_and_evaluate
from lion_hf.training.text import (
    MaskingCollator,
    TextArguments,
    baselines,
    check_vocabulary,
    freeze_masks,
    get_tokenizer,
    is_stream,
    load_texts,
    make_rows,
    model_options,
    require_room,
    set_length_limit,
)
from lion_hf.training.trainer import LionTrainer


# The values that --smoke sets in any recipe.
SMOKE = {
    "model_name_or_path": None,
    "warm_start": None,
    "warm_start_layers": None,
    "warm_start_distillation": None,
    "train_file": None,
    "validation_file": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "streaming": None,
    "dataloader_num_workers": None,
    "eval_strategy": "no",
    "tokenizer_name": None,
    "vocab_size": 512,
    "max_train_samples": 100,
    "max_eval_samples": 20,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "disable_tqdm": True,
}
# Options of the model in `smoke`, which a phase that continues from another does not set.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "preset")
SIZES += ("local_layers", "local_window")


def smoke(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that --smoke sets in a recipe with these values.

    A schedule with a stable phase gets enough steps to see the loss fall, a checkpoint to decay from, and rows that
    stay in proportion.
    """
    if values.get("lr_scheduler_type") != "warmup_stable_decay":
        return SMOKE
    short = {"max_steps": 20, "warmup_steps": 2, "learning_rate": 4e-3, "logging_steps": 1, "save_strategy": "steps"}
    short |= {"save_steps": 20, "decay_steps": min(10, values.get("decay_steps", 0)), "max_eval_samples": 5}
    short |= {"max_length": values["max_length"] // 16, "gradient_accumulation_steps": 1}
    short |= {"per_device_train_batch_size": max(1, values["per_device_train_batch_size"] // 3)}
    if values.get("preset") in MODERN_PRESETS:
        short |= {"num_hidden_layers": 3, "local_layers": [1, 2], "local_window": 16}
    if not is_torch_optimi_available():
        short["optim"] = "adamw_torch"
    begun = {name: values[name] for name in ("model_name_or_path", "decay_from") if values.get(name)}
    return SMOKE | short | (dict.fromkeys(SIZES) | begun if begun else {})


@dataclass
class MlmModelArguments(TextModelArguments):
    sparse_prediction: bool | None = field(
        default=None,
        metadata={
            "help": "Compute logits of masked tokens only, which saves memory. LION and modernbert; existing models "
            "accept it too."
        },
    )


@dataclass
class MlmTrainingArguments(LionTrainingArguments):
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of AdamW. Default: 2e-3 for a new LION-D or LION-S of width 256 or less, else "
            "1e-3."
        },
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Training batch size per device."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    weight_decay: float = field(default=1e-5, metadata={"help": "Weight decay of matrices and embeddings."})
    decay_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint before the decay of warmup_stable_decay, or the folder of a run whose last one it is. "
            "Training continues there, with its optimizer, and ends after --decay_steps."
        },
    )


CLASSES = (MlmModelArguments, TextArguments, MlmTrainingArguments)


def hits_and_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what evaluation needs of each token: whether its prediction is correct, and its cross entropy.

    The cross entropy of tokens that are not masked is 0. The logits are those of all tokens or, with
    `sparse_prediction`, of the masked ones.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if logits.dim() < 3:
        asked = labels != -100
        hits, losses = torch.zeros_like(asked), torch.zeros(labels.shape, device=labels.device)
        found = torch.nn.functional.cross_entropy(logits.float(), labels[asked], reduction="none")
        return hits.masked_scatter(asked, logits.argmax(-1) == labels[asked]), losses.masked_scatter(asked, found)
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return logits.argmax(-1) == labels, losses.view_as(labels)


def masked_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and cross entropy per masked token, independent of the batches."""
    (hits, losses), asked = prediction.predictions, prediction.label_ids != -100
    return {"masked_accuracy": float(hits[asked].mean()), "loss": float(losses[asked].astype(np.float64).mean())}


def with_baselines(known: dict[str, float], evaluation: dict[str, float]) -> dict[str, float]:
    """Return perplexity, the baselines, and the ratio of the loss to the unigram entropy."""
    loss = evaluation["eval_loss"]
    found = {"eval_perplexity": math.exp(loss)} | {f"eval_{name}": value for name, value in known.items()}
    return found | ({"eval_loss_over_unigram_entropy": loss / known["unigram_entropy"]} if known else {})


def suited_rate(config, model: MlmModelArguments) -> float:
    """Return the default learning rate. BERT and LION-LIT do not train at the higher one (docs/results.md)."""
    has_decays = config.model_type == LionConfig.model_type and config.mask_type in ("decay", "selective")
    return 2e-3 if has_decays and not model.source and config.hidden_size <= 256 else 1e-3


def check_arguments(data: TextArguments, model: MlmModelArguments, config) -> None:
    """Raise a `UserError` for arguments that do not fit together."""
    if not data.max_length >= 3 or not 0 < data.mlm_probability < 1 or not 0 < data.eval_mlm_probability < 1:
        raise UserError("--max_length must be at least 3, and masking probabilities between 0 and 1")
    if data.packing and config.model_type != LionConfig.model_type and not model.warm_start:
        raise UserError(f"--packing is an option of LION; a {config.model_type!r} model does not have it")
    if data.packing and model.warm_start_distillation:
        raise UserError("--packing cannot be combined with --warm_start_distillation, whose teacher reads padded rows")
    check_vocabulary(data, model)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train and evaluate, all phases of a recipe that has some; return the metrics of the last.

    They are also in `all_results.json`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    runs, metrics = phase_runs(argv), {}
    for phase, flags in runs:
        if phase is not None:
            say(f"phase {phase}, in {take('output_dir', flags)[0]}")
        _, shown = take("phase", argv)
        metrics = train(flags, shown if phase is None else [*shown, "--phase", phase])
    if len(runs) > 1 and "--smoke" in argv:
        require_falling_loss([take("output_dir", flags)[0] for _, flags in runs])
    return metrics


def require_falling_loss(folders: Sequence[str]) -> None:
    """Raise a `UserError` unless the loss at the end of the last run is below that of the first step of the first."""
    histories = [json.loads(Path(x, "trainer_state.json").read_text(encoding="utf-8"))["log_history"] for x in folders]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    first, last = losses[0][0], float(np.mean(losses[-1][-5:]))
    if not last < first:
        raise UserError(f"the loss did not fall: {first:.3f} in the first step, {last:.3f} in the last ones")
    say(f"the loss fell from {first:.3f} in the first step to {last:.3f} in the last ones")


def train(argv: Sequence[str], command: Sequence[str]) -> dict[str, float]:
    """Train and evaluate one run with these arguments; `command` are those that the model card shows."""
    model_args, data, training = parse_arguments(CLASSES, argv, description=__doc__, smoke=smoke)
    begun = start_of_decay(training.decay_from, training)
    if begun and not model_args.describes_a_model():
        model_args.model_name_or_path = begun
    config = known_config(AutoModelForMaskedLM, LionConfig.model_type, model_args, SMALL_TEXT_MODEL)
    check_arguments(data, model_args, config)
    if training.learning_rate is None:
        training.learning_rate = suited_rate(config, model_args)
    if not training.do_train:
        require_head(config, AutoModelForMaskedLM, model_args.model_name_or_path)
    set_seed(training.seed)
    checkpoint = checkpoint_to_resume(training) or begun
    with training.main_process_first(desc="data and tokenizer"):
        train_texts, validation_texts, source = load_texts(data, training)
        tokenizer = get_tokenizer(data, model_args, training, checkpoint, train_texts)
        train = None if train_texts is None else make_rows(train_texts, tokenizer, data, "training")
        validation = make_rows(validation_texts, tokenizer, data, "validation")
    validation = freeze_masks(validation, MaskingCollator(tokenizer, data.eval_mlm_probability, training.seed))

    fixed = model_options(tokenizer, data.max_length)
    model = build_model(AutoModelForMaskedLM, LionConfig.model_type, model_args, SMALL_TEXT_MODEL, fixed)
    require_room(model.config, tokenizer, data.max_length)
    set_length_limit(tokenizer, model.config)
    if checkpoint:
        check_resumable(checkpoint, AutoModelForMaskedLM, model.config)
    check_disk(training, model)
    known = {} if train is None else baselines(train, validation, len(tokenizer), tokenizer.all_special_ids)
    if training.process_index == 0:
        rows = "no" if train is None else "a stream of" if is_stream(train) else f"{len(train):,}"
        print(f"{model.num_parameters():,} parameters, {rows} training and {len(validation):,} validation rows")
    trainer = LionTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        hidden_teacher=HiddenStateTeacher.of(model_args, training.device),
        data_collator=MaskingCollator(
            tokenizer, data.mlm_probability, training.seed, data.max_length, data.decay_mlm_probability
        ),
        compute_metrics=masked_metrics,
        preprocess_logits_for_metrics=hits_and_losses,
    )
    metrics = train_and_evaluate(trainer, training, checkpoint, partial(with_baselines, known))
    if training.do_train:
        name = data.name("Python's documentation")
        finish(trainer, training, metrics, card(name, f"{source} {masking(data)}", trainer, known, command))
    return metrics


def masking(data: TextArguments) -> str:
    """Return a sentence about the shares of masked tokens."""
    late = data.decay_mlm_probability
    later = "" if late is None else f" ({late:.0%} while the learning rate decays)"
    return (
        f"Training masks {data.mlm_probability:.0%} of the tokens{later}, evaluation {data.eval_mlm_probability:.0%}."
    )


def card(name: str, source: str, trainer: LionTrainer, known: dict[str, float], argv: Sequence[str]) -> Report:
    return Report(
        title=f"Masked language model of {name}, {model_name(trainer.model.config)}",
        pipeline_tag="fill-mask",
        data=source,
        command=command_line("run_mlm.py", argv),
        metric="eval_masked_accuracy",
        metric_label="masked accuracy (%)",
        metric_baseline=("most frequent token", known["most_frequent_accuracy"]),
        loss_label="cross entropy (nats per masked token)",
        loss_baseline=("unigram entropy", known["unigram_entropy"]),
        judged_by_loss=True,
        usage="import lion_hf\nfrom transformers import pipeline\n\n"
        f'fill = pipeline("fill-mask", "{trainer.args.output_dir}")\n'
        f'print(fill("the value of the {trainer.processing_class.mask_token} is returned."))',
    )


if __name__ == "__main__":
    run(main)
