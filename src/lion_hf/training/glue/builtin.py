"""Toy data that imitates each GLUE task, made from Python's own documentation without a network.

The labels can be learned, but neither the tasks nor their scores are those of GLUE.
"""

import random
import re
from collections.abc import Callable
from functools import cache

from datasets import Dataset

from ..text import python_documents
from .tasks import GlueTask


SIZES = {"train": 300, "validation": 80, "test": 40}


@cache
def documents() -> list[list[str]]:
    """Return the sentences of every document with at least ten, the longest documents first."""
    found = []
    for document in python_documents():
        sentences = re.split(r"(?<=[.:])\s+(?=[A-Z])", re.sub(r"\s+", " ", document))
        plain = [text for text in sentences if re.fullmatch(r"[A-Z][\w ,;'()-]{30,160}[.:]", text)]
        found += [list(dict.fromkeys(plain))] if len(set(plain)) >= 10 else []
    return sorted(found, key=len, reverse=True)


def builtin_splits(task: GlueTask) -> dict[str, Dataset]:
    """Return training, validation and test rows of a task, in the form of the Hub: test rows have the label -1."""
    names = {"train": "train"} | {part: "validation" for _, part in task.validation}
    names |= dict.fromkeys(task.test_parts.values(), "test")
    columns = task.columns or ("sentence",)
    maker = MAKERS[task.name]
    splits = {}
    for part, kind in names.items():
        source, rows = Source(random.Random(f"{task.name} {part}"), kind), []
        for _ in range(SIZES[kind]):
            texts, label = maker(source)
            rows.append(dict(zip(columns, texts, strict=True)) | {"label": label, "idx": len(rows)})
        if kind == "test":
            rows = [row | {"label": -1.0 if not task.labels else "-1"} for row in rows]
        splits[part] = Dataset.from_list(rows)
    return splits


class Source:
    """Draws sentences; training, validation and test share none."""

    def __init__(self, chooser: random.Random, kind: str):
        self.chooser = chooser
        step = {"train": range(3), "validation": range(3, 4), "test": range(4, 5)}[kind]
        parts = [[text for i, text in enumerate(sentences) if i % 5 in step] for sentences in documents()]
        self.documents = [part for part in parts if len(part) > 1]

    def coin(self) -> bool:
        return self.chooser.random() < 0.5

    def sentence(self, document: int | None = None) -> str:
        return self.chooser.choice(self.documents[document] if document is not None else self.two_documents()[0])

    def two_documents(self) -> list[list[str]]:
        return self.chooser.sample(self.documents, 2)

    def shuffled(self, text: str) -> str:
        words = text.split()
        return " ".join(self.chooser.sample(words, len(words)))

    def shortened(self, text: str) -> str:
        """Return the sentence without two of its words."""
        words = text.split()
        gone = self.chooser.sample(range(len(words)), 2)
        return " ".join(word for i, word in enumerate(words) if i not in gone)


def _acceptable(source: Source) -> tuple:
    text = source.sentence()
    return ((text,), "acceptable") if source.coin() else ((source.shuffled(text),), "unacceptable")


def _of_document(source: Source) -> tuple:
    """Draw a sentence from the longest document, or from the second longest."""
    which = source.coin()
    return (source.sentence(int(which)),), "positive" if which else "negative"


def _paraphrase(yes: str, no: str) -> Callable[[Source], tuple]:
    def make(source: Source) -> tuple:
        same = source.coin()
        first, other = source.chooser.sample(source.two_documents()[0], 2)
        return (first, source.shortened(first if same else other)), yes if same else no

    return make


def _same_sentence(source: Source) -> tuple:
    """Draw two halves of one sentence, or of sentences of two documents."""
    same = source.coin()
    first, other = (source.chooser.choice(document).split() for document in source.two_documents())
    second = first if same else other
    pair = " ".join(first[: len(first) // 2]), " ".join(second[len(second) // 2 :])
    return pair, "entailment" if same else "not_entailment"


def _inference(source: Source) -> tuple:
    """Draw two texts: the second is a part of the first, from the same document, or from another one."""
    kind = source.chooser.choice(("entailment", "neutral", "contradiction"))
    document, other = source.two_documents()
    first, near = source.chooser.sample(document, 2)
    second = {"entailment": source.shortened(first), "neutral": near, "contradiction": source.chooser.choice(other)}
    return (first, second[kind]), kind


def _similarity(source: Source) -> tuple:
    """Draw two texts, labelled with five times their share of common words."""
    first, other = (source.chooser.choice(document).split() for document in source.two_documents())
    kept = source.chooser.random()
    second = [word for word in first if source.chooser.random() < kept]
    second += [word for word in other if source.chooser.random() > kept]
    a, b = set(first), set(second)
    return (" ".join(first), " ".join(second)), round(5 * len(a & b) / len(a | b), 3)


MAKERS = {
    "cola": _acceptable,
    "sst2": _of_document,
    "custom": _of_document,
    "mrpc": _paraphrase("equivalent", "not_equivalent"),
    "qqp": _paraphrase("duplicate", "not_duplicate"),
    "qnli": _same_sentence,
    "rte": _same_sentence,
    "wnli": _same_sentence,
    "mnli": _inference,
    "stsb": _similarity,
}
