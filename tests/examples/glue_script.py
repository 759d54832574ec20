"""Flags of tiny runs of run_glue.py, and files of rows."""

from pathlib import Path

import numpy as np


TINY = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--vocab_size=100"]
TINY += ["--disable_tqdm=true", "--use_cpu=true", "--per_device_train_batch_size=8"]
ONE_STEP = [*TINY, "--max_steps=1", "--save_strategy=no", "--eval_strategy=no"]
WORDS = ["alpha", "beta", "gamma", "stone", "river", "house", "green", "quick", "brown", "light", "heavy"]


def write(name, text):
    Path(name).write_text(text)
    return name


def labelled_rows(count, labels=("0", "1")):
    return "".join(f"word{i} and word{i % 7},{labels[i % len(labels)]}\n" for i in range(count))


def rows(count, classes, seed=0):
    """Lines of csv: texts with one word that decides the class."""
    random = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        words = list(random.choice(WORDS, 6))
        words.insert(int(random.integers(7)), ("lovely", "awful", "ordinary")[i % len(classes)])
        lines.append(f"{' '.join(words)},{classes[i % len(classes)]}\n")
    return "".join(lines)
