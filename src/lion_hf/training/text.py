"""Text: its sources, its tokenizer, its rows of tokens, and token masking."""

import ast
import sysconfig
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetInfo, IterableDataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import get_worker_info
from transformers import AutoTokenizer, BertTokenizer, TrainingArguments
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..models.lion_inputs import skipped_positions
from .arguments import DataArguments, ModelArguments, require_at_least
from .data import Key, load_file, load_named, load_splits, parts_of, random_numbers, require_columns, say_split_off
from .errors import UserError, require_folder_or_hub_name, user_errors


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# With fewer tokens there is room for so few characters that most words are unknown.
MIN_VOCABULARY = 32
VOCABULARY = 4096
# Files with a vocabulary, at least one of which is in the folder of a tokenizer.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


@dataclass
class TextArguments(DataArguments):
    """The data of masked language modelling."""

    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    streaming: bool = field(
        default=False, metadata={"help": "Stream the training data instead of storing it. Requires --max_steps."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of a tokenizer. Default: the model's; for a new model one is trained."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": f"Size of the vocabulary of a newly trained tokenizer. Default: {VOCABULARY}."}
    )
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "Train a tokenizer with this many tokens, even if --tokenizer_name is given."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a row, including [CLS] and [SEP]."})
    line_by_line: bool = field(
        default=False,
        metadata={"help": "Make a row of each text, cut at --max_length and padded, instead of joining texts."},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Train on packed rows: several texts share one, do not read each other, and are cut at "
            "--max_length tokens. No padding is computed. LION only."
        },
    )
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens that are masked in training."})
    decay_mlm_probability: float | None = field(
        default=None,
        metadata={
            "help": "Share of tokens that are masked in training while the rate of --lr_scheduler_type "
            "warmup_stable_decay falls. Default: --mlm_probability, which is not smaller."
        },
    )
    eval_mlm_probability: float = field(
        default=0.15,
        metadata={"help": "Share of tokens that are masked in evaluation, the same throughout."},
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, MIN_VOCABULARY, "vocab_size", "train_tokenizer")
        for name in ("mlm_probability", "eval_mlm_probability", "decay_mlm_probability"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be greater than 0 and at most 1")
        if self.decay_mlm_probability is not None and self.decay_mlm_probability > self.mlm_probability:
            raise ValueError(
                f"--decay_mlm_probability is {self.decay_mlm_probability}; it must be at most --mlm_probability, "
                f"{self.mlm_probability}"
            )
        if self.packing and self.line_by_line:
            raise ValueError("--packing cannot be combined with --line_by_line, which makes a row of each text")


# ----------------------------------------------------------------------------------------------------------- texts


@cache
def python_documents() -> list[str]:
    """Return the documentation that comes with Python: the topics of `help()`, and the docstrings of each module."""
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


def load_texts(
    data: TextArguments, training: TrainingArguments
) -> tuple[Dataset | IterableDataset | None, Dataset, str]:
    """Return training and validation rows with the column "text", and a sentence about their source.

    Training rows are None if none are given and the model is only evaluated.
    """
    if data.streaming:
        train, validation = stream_texts(data, training)
        source = f"`{data.name('')}`, as a stream"
    elif data.dataset_name or data.train_file or data.validation_file:
        train, validation = load_splits(data, training, load_file)
        source = f"`{data.name('')}`"
    else:
        documents = python_documents()
        held_out = Dataset.from_dict({data.text_column: documents[::10]})
        rest = Dataset.from_dict({data.text_column: [text for i, text in enumerate(documents) if i % 10]})
        train, validation = parts_of(rest, held_out, data, training, training.seed)
        source = "English documentation that comes with Python (`help()` topics and docstrings; every 10th held out)"
    train = None if train is None else only_text(train, data.text_column, "training")
    validation = only_text(validation, data.text_column, "validation")
    known = "" if train is None or is_stream(train) else f"{len(train):,} training and "
    return train, validation, f"{source}: {known}{len(validation):,} validation texts."


def stream_texts(data: TextArguments, training: TrainingArguments) -> tuple[IterableDataset, Dataset]:
    """Return the training rows as a shuffled stream, and the validation rows.

    Validation rows are the first of the validation split or file, else the first of the stream, which training skips.
    """
    if training.do_train and training.max_steps <= 0:
        raise UserError("--streaming requires --max_steps, since the length of a stream is unknown")
    count = data.max_eval_samples or 2000
    if data.dataset_name:
        splits = load_named(data.dataset_name, data.dataset_config_name, streaming=True)
        if "train" not in splits:
            raise UserError(f"data set {data.dataset_name!r} has no split 'train'; it has {', '.join(splits)}")
        train, held_out = splits["train"], next((splits[k] for k in ("validation", "test") if k in splits), None)
    elif data.train_file:
        train = load_file(data.train_file, streaming=True)
        held_out = load_file(data.validation_file, streaming=True) if data.validation_file else None
    else:
        raise UserError("--streaming requires --dataset_name or --train_file")
    if held_out is None:
        if training.dataloader_num_workers:  # each worker would skip rows of its own share, not these
            raise UserError(
                "--dataloader_num_workers with --streaming requires separate validation data, such as --validation_file"
            )
        if not training.do_train:
            say_split_off(data, training.seed)
        train, held_out = train.skip(count), train
    rows = list(held_out.take(count))
    if not rows:
        raise UserError("the validation data is empty")
    if next(iter(train), None) is None:
        raise UserError(
            f"the stream ends within its first {count} rows, which are held out. Lower --max_eval_samples or give "
            "--validation_file"
        )
    if data.max_train_samples:
        train = train.take(data.max_train_samples)
    return train.shuffle(seed=training.seed, buffer_size=10_000), Dataset.from_list(rows)


def is_stream(rows: Dataset | IterableDataset) -> bool:
    """Return whether the rows are a stream, whose length is unknown."""
    return isinstance(rows, IterableDataset)


def only_text(part: Dataset | IterableDataset, column: str, name: str) -> Dataset | IterableDataset:
    """Return the rows that hold text, with "text" as their only column."""
    first = next(iter(part), None)
    if first is None:
        raise UserError(f"the {name} data is empty")
    if column not in first:
        info = DatasetInfo(builder_name=part.info.builder_name)
        require_columns(Dataset.from_list([first], info=info), {"--text_column": column})
    if not isinstance(first[column], str):
        raise UserError(f"column {column!r} holds {type(first[column]).__name__}, not text")
    part = part.select_columns(column).rename_columns({column: "text"} if column != "text" else {})
    part = part.filter(has_text, input_columns="text")
    if isinstance(part, Dataset) and len(part) == 0:
        raise UserError(f"the {name} data holds no text in column {column!r}")
    return part


def has_text(text: str | None) -> bool:
    return bool(text and text.strip())


# ------------------------------------------------------------------------------------------------ tokens and rows


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> BertTokenizer:
    """Train a lower-case WordPiece tokenizer. The same texts always give the same vocabulary.

    Characters get their ids here, in sorted order, because the trainer of `tokenizers` numbers them in random order and
    breaks ties between equally frequent pairs by these numbers.
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
            initial_alphabet=characters,  # otherwise chance decides between equally frequent characters
            limit_alphabet=len(characters),
            show_progress=False,
        ),
    )
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=model_max_length)


def check_vocabulary(data: TextArguments, model: ModelArguments) -> None:
    """Raise a `UserError` if a vocabulary size is given although the existing model determines it."""
    if model.source and data.vocab_size:
        option = "model_name_or_path" if model.model_name_or_path else "warm_start"
        raise UserError(f"--{option} uses the tokenizer of that model; it cannot be combined with --vocab_size")


def get_tokenizer(
    data: TextArguments,
    model: ModelArguments,
    training: TrainingArguments,
    checkpoint: str | None,
    train: Dataset | IterableDataset,
):
    """Return the tokenizer of the checkpoint, of `--tokenizer_name` or of the model, else a newly trained one.

    It is trained on the training text, of a stream on the first 100,000 texts.
    """
    name = checkpoint or (None if data.train_tokenizer else data.tokenizer_name or model.source)
    if name is None:
        name = training.output_dir
        if training.local_process_index == 0:  # the other processes load it
            texts = (row["text"] for row in islice(iter(train), 100_000 if data.streaming else None))
            size = data.train_tokenizer or data.vocab_size or VOCABULARY
            train_tokenizer(list(texts), size, max(512, data.max_length)).save_pretrained(name)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in VOCABULARIES):
        other = ". If it is the checkpoint of another model, use another --output_dir" if checkpoint else ""
        raise UserError(
            f"{name!r} holds no tokenizer: it has no tokenizer.json or {', '.join(VOCABULARIES[1:])}{other}"
        )
    require_folder_or_hub_name(name, "--tokenizer_name")
    with user_errors(f"cannot load a tokenizer from {name!r}", OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(name)
    missing = [k for k in ("cls_token", "sep_token", "mask_token", "pad_token") if getattr(tokenizer, k) is None]
    if missing:
        raise UserError(f"the tokenizer of {name!r} has no {', '.join(missing)}, which this script requires")
    return tokenizer


def make_rows(texts: Dataset | IterableDataset, tokenizer, data: TextArguments, name: str):
    """Return rows of token ids, [CLS] to [SEP].

    A row is a text, or a block of one length cut from a thousand joined texts, whose rest is dropped. With `packing`
    texts are cut into pieces of at most that length. A row for training ("training" is its `name`) holds several of
    them, whose lengths are its "lengths", and other rows hold one.
    """
    cut = tokenize_lines if data.line_by_line else tokenize_blocks
    if data.packing:
        cut = pack_texts if name == "training" else tokenize_pieces
    arguments = {"tokenizer": tokenizer, "max_length": data.max_length}
    options = {"batched": True, "remove_columns": ["text"], "fn_kwargs": arguments}
    if isinstance(texts, Dataset):
        options["desc"] = f"Tokenizing {name} text"
    rows = texts.map(cut, **options)
    if next(iter(rows), None) is None:
        if data.line_by_line:
            raise UserError(f"the {name} data holds no text in column {data.text_column!r}")
        raise UserError(
            f"the {name} text is shorter than one row of --max_length {data.max_length} tokens. Give more text or a "
            "smaller --max_length"
        )
    return rows if isinstance(rows, Dataset) else rows.repeat(None).map(add_position, with_indices=True)


def tokenize_lines(batch: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
    return {"input_ids": tokenizer(batch["text"], truncation=True, max_length=max_length)["input_ids"]}


def tokenize_blocks(batch: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
    width = max_length - 2
    rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = list(chain.from_iterable(rows))
    parts = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
    return {"input_ids": [[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts]}


def tokenize_pieces(batch: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
    width = max_length - 2
    rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
    parts = [ids[i : i + width] for ids in rows for i in range(0, len(ids), width)]
    return {"input_ids": [[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts]}


def pack_texts(batch: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
    """Return rows of at most `max_length` tokens from the pieces of a thousand texts, few and full ones.

    The longest piece comes first, and each goes into the fullest row that has room for it.
    """
    pieces = sorted(tokenize_pieces(batch, tokenizer, max_length)["input_ids"], key=len, reverse=True)
    packed: list[list[list[int]]] = []
    rooms: list[tuple[int, int]] = []  # sorted pairs of the room of a row and its number
    for piece in pieces:
        place = bisect_left(rooms, (len(piece), 0))
        if place == len(rooms):
            room, row = max_length, len(packed)
            packed.append([])
        else:
            room, row = rooms.pop(place)
        packed[row].append(piece)
        insort(rooms, (room - len(piece), row))
    return {
        "input_ids": [list(chain.from_iterable(row)) for row in packed],
        "lengths": [[len(piece) for piece in row] for row in packed],
    }


def add_position(row: dict, position: int) -> dict:
    worker = get_worker_info()  # each worker counts from 0
    return {"position": position if worker is None else position * worker.num_workers + worker.id}


def model_options(tokenizer, max_length: int) -> dict[str, int]:
    """Return the options of a new model that follow from tokenizer and length; vocabularies are multiples of 8."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "max_position_embeddings": max(512, max_length),
    } | {name: value for name, value in ids.items() if value is not None}


def require_room(config, tokenizer, max_length: int) -> None:
    """Raise a `UserError` if a model has too few positions for the length, or too few tokens for the tokenizer."""
    positions = getattr(config, "max_position_embeddings", max_length)
    positions -= skipped_positions(config) if config.model_type == "lion" else 0
    if getattr(config, "pos_emb", True) and max_length > positions:
        raise UserError(f"--max_length {max_length} exceeds the model's {positions} positions")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")


def set_length_limit(tokenizer, config) -> None:
    """Remove the length limit of the tokenizer of a LION without a position table, which reads texts of any length.

    With the limit, Transformers would warn about longer texts, and `truncation=True` would cut them.
    """
    if config.model_type == "lion" and not config.pos_emb:
        tokenizer.model_max_length = VERY_LARGE_INTEGER


# --------------------------------------------------------------------------------------------------------- masking


class MaskingCollator:
    """Pad rows of token ids to one length and mask a share of the tokens.

    As in BERT, 80 % of the chosen tokens become [MASK], 10 % a random token, and 10 % stay. The choice depends only on
    the seed and the `Key` of the row: it changes with the epoch, and is the same after a resume and on any number of
    processes.

    Rows of a stream are padded to `max_length`, since those of several processes are joined before they are dealt out.

    Rows have "input_ids", and "key" (or "position", in a stream); those with "labels" are only padded. Rows of several
    texts have their "lengths" too, and the batch then has "position_ids", which start from 0 in each text.

    With `decay_probability` the batch has "masked_in_decay": which tokens stay masked when the decay of the learning
    rate has begun. These are the tokens that a collator of that probability would mask.
    """

    uses_keys = True

    def __init__(
        self, tokenizer, probability: float, seed: int, max_length: int = 0, decay_probability: float | None = None
    ):
        self.max_length = max_length
        self.tokenizer, self.probability, self.seed = tokenizer, probability, seed
        self.decay_probability = decay_probability
        self.special = np.array(tokenizer.all_special_ids)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        streaming, packed = "position" in rows[0], "lengths" in rows[0]
        pad = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        if "labels" not in rows[0]:
            positions = [np.concatenate([np.arange(n) for n in row["lengths"]]) if packed else None for row in rows]
            rows = [self.mask(row["input_ids"], row.get("key") or Key(0, row["position"])) for row in rows]
            pad |= {"masked_in_decay": False} if "masked_in_decay" in rows[0] else {}
            if packed:
                rows = [row | {"position_ids": own} for row, own in zip(rows, positions, strict=True)]
                pad |= {"position_ids": 0}
        length = max(self.max_length if streaming else 0, *(len(row["input_ids"]) for row in rows))
        batch = {
            name: np.full((len(rows), length), fill, dtype=bool if fill is False else np.int64)
            for name, fill in pad.items()
        }
        for i, row in enumerate(rows):
            width = len(row["input_ids"])
            for name in pad:
                batch[name][i, :width] = 1 if name == "attention_mask" else row[name]
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def training_batch(self, batch: dict[str, torch.Tensor], decaying: bool) -> dict[str, torch.Tensor]:
        """Return the batch of a training step: with fewer masks in the decay, and packed rows joined into one.

        Args:
            batch: a batch of this collator, on any device.
            decaying: whether the decay of the learning rate has begun.
        """
        batch = dict(batch)
        kept = batch.pop("masked_in_decay", None)
        if kept is not None and decaying:
            back = (batch["labels"] != -100) & ~kept
            batch["input_ids"] = torch.where(back, batch["labels"], batch["input_ids"])
            batch["labels"] = batch["labels"].masked_fill(back, -100)
        if "position_ids" in batch:  # one row without padding, whose texts the positions tell apart
            real = batch.pop("attention_mask").bool()
            batch = {name: values[real][None] for name, values in batch.items()}
        return batch

    def mask(self, input_ids: list[int], key: Key) -> dict[str, np.ndarray]:
        """Return a row with masked "input_ids", and "labels" that are -100 at all other tokens; see also the class."""
        ids, random = np.array(input_ids), random_numbers(self.seed, key)
        chance, ordinary = random.random(len(ids)), ~np.isin(ids, self.special)
        asked = (chance < self.probability) & ordinary
        what = random.random(len(ids))
        hidden = np.where(asked & (what < 0.8), self.tokenizer.mask_token_id, ids)
        strangers = random.integers(len(self.tokenizer), size=len(ids))
        hidden = np.where(asked & (what >= 0.9), strangers, hidden)
        row = {"input_ids": hidden, "labels": np.where(asked, ids, -100)}
        if self.decay_probability is not None:
            row["masked_in_decay"] = (chance < self.decay_probability) & ordinary
        return row


def freeze_masks(rows: Dataset, collator: MaskingCollator) -> Dataset:
    """Mask the evaluation rows once, so that every evaluation predicts the same tokens."""
    masked = Dataset.from_list([collator.mask(row["input_ids"], Key(0, i)) for i, row in enumerate(rows)])
    if not any(label != -100 for row in masked for label in row["labels"]):
        raise UserError(
            "no token of the validation data is masked; give more validation text or raise --eval_mlm_probability"
        )
    return masked


def baselines(train: Dataset | IterableDataset, validation: Dataset, vocab_size: int, special) -> dict[str, float]:
    """Return what the token counts of the training text alone achieve on the masked tokens of the evaluation.

    Of a stream the first 10,000 rows are counted.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    rows = train if isinstance(train, Dataset) else train.take(10_000)
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        counts += np.bincount(np.concatenate(batch["input_ids"]), minlength=vocab_size)
    counts[special] = 0
    labels = np.concatenate(validation.with_format("numpy")["labels"][:])
    labels = labels[labels != -100]
    log_probability = np.log((counts + 1) / (counts + 1).sum())
    return {
        "most_frequent_accuracy": float((labels == counts.argmax()).mean()),
        "unigram_entropy": float(-log_probability[labels].mean()),
    }
