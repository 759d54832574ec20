"""Train LION, or a baseline, to predict masked tokens, from scratch or from a checkpoint.

    python examples/run_mlm.py --output_dir outputs/mlm
    python examples/run_mlm.py --output_dir outputs/mlm --train_file train.txt --validation_file validation.txt
    python examples/run_mlm.py examples/recipes/mlm/lion.yaml --preset lion-s-base --per_device_train_batch_size 64

Without data arguments, the script trains on Python's documentation and needs no network.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, set_seed
from transformers.trainer_utils import EvalPrediction

from lion_hf import LionConfig
from lion_hf.training.arguments import LionTrainingArguments, TextModelArguments
from lion_hf.training.checkpoints import check_disk, check_resumable, checkpoint_to_resume
from lion_hf.training.errors import UserError, run
from lion_hf.training.hidden_teacher import HiddenStateTeacher
from lion_hf.training.models import build_model, known_config, require_head
from lion_hf.training.parsing import parse_arguments
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


SMALL_MODEL = {
    "mask_type": "selective",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "classifier_pooling": "mean",  # with little data the first token learns nothing, see docs/results.md
}
# The values that --smoke sets in any recipe.
SMOKE = {
    "model_name_or_path": None,
    "warm_start": None,
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


@dataclass
class MlmTrainingArguments(LionTrainingArguments):
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    weight_decay: float = field(default=1e-5, metadata={"help": "Weight decay of matrices and embeddings."})


def hits_and_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what evaluation needs of each token: whether its prediction is correct, and its cross entropy.

    The cross entropy of tokens that are not masked is 0.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
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


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train and evaluate; return the metrics, which are also in `all_results.json`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data, training = parse_arguments(
        (TextModelArguments, TextArguments, MlmTrainingArguments), argv, description=__doc__, smoke=SMOKE
    )
    if not data.max_length >= 3 or not 0 < data.mlm_probability < 1 or not 0 < data.eval_mlm_probability < 1:
        raise UserError("--max_length must be at least 3, and masking probabilities between 0 and 1")
    check_vocabulary(data, model_args)
    config = known_config(AutoModelForMaskedLM, LionConfig.model_type, model_args, SMALL_MODEL)
    if not training.do_train:
        require_head(config, AutoModelForMaskedLM, model_args.model_name_or_path)
    set_seed(training.seed)
    checkpoint = checkpoint_to_resume(training)
    with training.main_process_first(desc="data and tokenizer"):
        train_texts, validation_texts, source = load_texts(data, training)
        tokenizer = get_tokenizer(data, model_args, training, checkpoint, train_texts)
        train = None if train_texts is None else make_rows(train_texts, tokenizer, data, "training")
        validation = make_rows(validation_texts, tokenizer, data, "validation")
    validation = freeze_masks(validation, MaskingCollator(tokenizer, data.eval_mlm_probability, training.seed))

    fixed = model_options(tokenizer, data.max_length)
    model = build_model(AutoModelForMaskedLM, LionConfig.model_type, model_args, SMALL_MODEL, fixed)
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
        data_collator=MaskingCollator(tokenizer, data.mlm_probability, training.seed, data.max_length),
        compute_metrics=masked_metrics,
        preprocess_logits_for_metrics=hits_and_losses,
    )
    metrics = train_and_evaluate(trainer, training, checkpoint, partial(with_baselines, known))
    if training.do_train:
        name = data.name("Python's documentation")
        finish(trainer, training, metrics, card(name, source, trainer, known, argv))
    return metrics


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
