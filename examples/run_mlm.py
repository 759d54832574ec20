"""Masked language modelling with LION, from scratch or from a checkpoint.

    python examples/run_mlm.py --output_dir outputs/mlm
    python examples/run_mlm.py --output_dir outputs/mlm --train_file train.txt --validation_file validation.txt
    python examples/run_mlm.py arguments.yaml --learning_rate 5e-4

Without data arguments it trains on the documentation that comes with Python, so it needs no network.
"""

import ast
import math
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import common
import numpy as np
import reporting
import torch
from common import UserError
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, DataCollatorForLanguageModeling, set_seed

from lion_hf import LionConfig


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL_MODEL = {"mask_type": "selective", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass
class TextArguments(common.DataArguments):
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Hub name or folder; else one is trained."})
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of a tokenizer trained here."})
    max_length: int = field(default=128, metadata={"help": "Tokens in a block, [CLS] and [SEP] included."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of masked tokens in training."})
    eval_mlm_probability: float = field(default=0.15, metadata={"help": "Share of masked tokens in evaluation."})


@dataclass
class MlmTrainingArguments(common.LionTrainingArguments):
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    weight_decay: float = field(default=1e-5, metadata={"help": "Weight decay of matrices and embeddings."})


class MaskingCollator(DataCollatorForLanguageModeling):
    """Masks training batches anew each time; evaluation batches come with their masks (`freeze_masks`)."""

    def torch_call(self, examples):
        if "labels" in examples[0]:
            return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}
        return super().torch_call(examples)


# ------------------------------------------------------------------------------------------------------------ data


def python_documents() -> list[str]:
    """The English documentation of Python itself: the topics of `help()`, and the docstrings of each module."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    documents, seen = [topics[name] for name in sorted(topics)], set()
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "turtledemo"}
    for file in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(library).parts):
            docstrings = [text for text in _docstrings(file) if not (text in seen or seen.add(text))]
            documents += ["\n\n".join(docstrings)] if docstrings else []
    return documents


def _docstrings(file: Path) -> Iterable[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                yield text


def load_texts(data: TextArguments, training: MlmTrainingArguments) -> tuple[Dataset, Dataset, str]:
    """Training and validation rows with the column "text", and a sentence about where they are from."""
    if data.dataset_name or data.train_file or data.validation_file:
        train, validation = common.load_splits(data, training, common.load_file)
        source = f"`{data.dataset_name or data.train_file}`"
    else:
        documents = python_documents()
        held_out = Dataset.from_dict({data.text_column: documents[::10]})
        rest = Dataset.from_dict({data.text_column: [text for i, text in enumerate(documents) if i % 10]})
        train, validation = common.hold_out(rest, held_out, data, training.seed)
        source = "English documentation that comes with Python (`help()` topics and docstrings; every 10th held out)"
    parts = []
    for name, part in (("training", train), ("validation", validation)):
        common.require_column(part, data.text_column, "--text_column")
        part = part.select_columns(data.text_column).rename_columns(
            {data.text_column: "text"} if data.text_column != "text" else {}
        )
        if not isinstance(part[0]["text"], str):
            raise UserError(f"column {data.text_column!r} holds {type(part[0]['text']).__name__}, not text")
        part = part.filter(lambda text: bool(text and text.strip()), input_columns="text")
        if len(part) == 0:
            raise UserError(f"the {name} data holds no text in column {data.text_column!r}")
        parts.append(part)
    return *parts, f"{source}: {len(parts[0]):,} training and {len(parts[1]):,} validation texts."


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> BertTokenizer:
    """A lower-case WordPiece tokenizer. The same texts always give the same vocabulary.

    Characters get their ids here, in sorted order: the trainer of `tokenizers` numbers them in random order and breaks
    ties between equally frequent pairs by these numbers.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = Counter(chain.from_iterable(tokenizer.normalizer.normalize_str(text) for text in texts))
    room = max(0, (vocab_size - len(SPECIAL_TOKENS)) // 4)
    characters = sorted(c for c, _ in counts.most_common(min(1000, room)) if not c.isspace())
    alphabet = [*characters, *(f"##{c}" for c in characters)]
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS + alphabet,
            limit_alphabet=len(characters),
            show_progress=False,
        ),
    )
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=model_max_length)


def get_tokenizer(
    data: TextArguments, model: common.ModelArguments, folder: str, checkpoint: str | None, train: Dataset
):
    """The tokenizer of the checkpoint or model to go on with, one by name, or one trained on the training text."""
    name = checkpoint or data.tokenizer_name or model.model_name_or_path
    if name is None:
        # Written and read again, so that processes which share the folder share the vocabulary.
        train_tokenizer(train["text"], data.vocab_size, max(512, data.max_length)).save_pretrained(folder)
        name = folder
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{name!r} holds no tokenizer: it has neither tokenizer.json nor vocab.txt")
    with common.user_errors(f"cannot load a tokenizer from {name!r}", OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(name)
    missing = [k for k in ("cls_token", "sep_token", "mask_token", "pad_token") if getattr(tokenizer, k) is None]
    if missing:
        raise UserError(f"the tokenizer of {name!r} has no {', '.join(missing)}; masked language modelling needs them")
    return tokenizer


def make_blocks(texts: Dataset, tokenizer, max_length: int, name: str) -> Dataset:
    """Joins a thousand texts at a time and cuts them into blocks [CLS] .. [SEP] of one length; the rest is dropped."""
    width = max_length - 2

    def cut(batch: dict[str, list]) -> dict[str, list]:
        rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(chain.from_iterable(rows))
        parts = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
        blocks = [[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts]
        special = [[1, *[0] * width, 1]] * len(blocks)
        return {"input_ids": blocks, "attention_mask": [[1] * max_length] * len(blocks), "special_tokens_mask": special}

    blocks = texts.map(cut, batched=True, remove_columns=texts.column_names, desc=f"Tokenizing {name} text")
    if len(blocks) == 0:
        raise UserError(
            f"the {name} text fills no block of --max_length {max_length} tokens: give more text or a smaller length"
        )
    return blocks


def freeze_masks(blocks: Dataset, tokenizer, probability: float, seed: int) -> Dataset:
    """Masks the evaluation blocks once, so that every evaluation asks for the same tokens."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)
    masked = collator([blocks[i] for i in range(len(blocks))])
    if not (masked["labels"] != -100).any():
        raise UserError(
            "no token of the validation data is masked; give more validation text or --eval_mlm_probability"
        )
    return Dataset.from_dict({name: tensor.numpy() for name, tensor in masked.items()})


def baselines(train: Dataset, validation: Dataset, vocab_size: int) -> dict[str, float]:
    """What the training text's token counts alone achieve on the masked tokens of the evaluation."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in train.with_format("numpy").iter(batch_size=1000):
        counts += np.bincount(batch["input_ids"][:, 1:-1].ravel(), minlength=vocab_size)
    labels = validation.with_format("numpy")[:]["labels"]
    labels = labels[labels != -100]
    log_probability = np.log((counts + 1) / (counts + 1).sum())
    return {
        "most_frequent_accuracy": float((labels == counts.argmax()).mean()),
        "unigram_entropy": float(-log_probability[labels].mean()),
    }


# ------------------------------------------------------------------------------------------------------------ main


def masked_accuracy(prediction) -> dict[str, float]:
    """Share of masked tokens that are predicted right."""
    masked = prediction.label_ids != -100
    return {"masked_accuracy": float((prediction.predictions == prediction.label_ids)[masked].mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and evaluates; returns the metrics, which are also in `all_results.json`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data, training = common.parse_arguments(
        (common.ModelArguments, TextArguments, MlmTrainingArguments), argv, description=__doc__
    )
    if not data.max_length >= 3 or not 0 < data.mlm_probability < 1 or not 0 < data.eval_mlm_probability < 1:
        raise UserError("--max_length must be at least 3, and masking probabilities between 0 and 1")
    if model_args.model_name_or_path:
        common.existing_config(model_args.model_name_or_path, LionConfig.model_type)
    set_seed(training.seed)
    checkpoint = common.checkpoint_to_resume(training)
    with training.main_process_first(desc="data and tokenizer"):
        train_texts, validation_texts, source = load_texts(data, training)
        tokenizer = get_tokenizer(data, model_args, training.output_dir, checkpoint, train_texts)
        train = make_blocks(train_texts, tokenizer, data.max_length, "training")
        validation = make_blocks(validation_texts, tokenizer, data.max_length, "validation")
    validation = freeze_masks(validation, tokenizer, data.eval_mlm_probability, training.seed)

    fixed = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    fixed["max_position_embeddings"] = max(512, data.max_length)
    model = common.build_model(AutoModelForMaskedLM, LionConfig, model_args, SMALL_MODEL, fixed)
    if model.config.pos_emb and data.max_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_length {data.max_length} exceeds the model's {model.config.max_position_embeddings} positions"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    if checkpoint:
        common.check_resumable(checkpoint, model.config)
    known = baselines(train, validation, len(tokenizer))
    if training.process_index == 0:
        print(
            f"{model.num_parameters():,} parameters, {len(train):,} training and {len(validation):,} validation blocks"
        )

    trainer = common.LionTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=MaskingCollator(tokenizer, mlm_probability=data.mlm_probability),
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )

    def with_baselines(evaluation: dict[str, float]) -> dict[str, float]:
        loss = evaluation["eval_loss"]
        ratio = {"eval_perplexity": math.exp(loss), "eval_loss_over_unigram_entropy": loss / known["unigram_entropy"]}
        return ratio | {f"eval_{name}": value for name, value in known.items()}

    metrics = reporting.train_and_evaluate(trainer, training, checkpoint, with_baselines)
    report = reporting.Report(
        title=f"Masked language model, LION {model.config.mask_type}",
        pipeline_tag="fill-mask",
        data=source,
        command=reporting.command_line("run_mlm.py", argv),
        metric="eval_masked_accuracy",
        metric_label="masked accuracy (%)",
        metric_baseline=("most frequent token", known["most_frequent_accuracy"]),
        loss_label="cross entropy (nats per masked token)",
        loss_baseline=("unigram entropy", known["unigram_entropy"]),
        usage="import lion_hf\nfrom transformers import pipeline\n\n"
        f'pipeline("fill-mask", "{training.output_dir}")("the value of the {tokenizer.mask_token} is returned.")',
    )
    reporting.finish(trainer, training, metrics, report)
    return metrics


if __name__ == "__main__":
    common.run(main)
