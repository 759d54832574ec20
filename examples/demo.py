"""Train a small text model and a small image model on built-in data, without a network.

    python examples/demo.py --output_dir outputs/demo

The script pretrains a small LION-S on Python's documentation and fills masks with it, trains a small LION-D on
handwritten digits, and draws the decay masks and the decays that both models learned. It takes a few minutes on two CPU
cores. The exit code is 1 if either model failed to learn.
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import run_image_classification
import run_mlm
import torch
from draw_decays import draw_decays
from draw_masks import draw_masks
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    pipeline,
)

from lion_hf.training.errors import make_output_dir, run
from lion_hf.training.images import ImageArguments, load_digits
from lion_hf.training.text import python_documents


DIGITS_GOAL = 0.95
FRESH = ["--save_strategy=no", "--resume_from_checkpoint=no"]
TEXT_FLAGS = ["--mask_type=selective", "--max_length=64", "--learning_rate=2e-3", "--num_train_epochs=3", *FRESH]
DIGITS_FLAGS = ["--mask_type=decay", *FRESH]


def pretrain(folder: Path) -> dict[str, float]:
    """Pretrain a small LION-S on Python's documentation and return its metrics."""
    metrics = run_mlm.main(["--output_dir", str(folder), *TEXT_FLAGS])
    print(
        f"\nmasked accuracy {metrics['eval_masked_accuracy']:.1%}, against "
        f"{metrics['eval_most_frequent_accuracy']:.1%} for always predicting the most frequent token\n"
        f"loss {metrics['eval_loss']:.3f} nats per masked token, against {metrics['eval_unigram_entropy']:.3f} from "
        f"token frequencies alone (ratio {metrics['eval_loss_over_unigram_entropy']:.3f})"
    )
    return metrics


def masked_sentences(tokenizer, count: int) -> list[tuple[str, str]]:
    """Return sentences of the held-out documents with one word masked, each with that word."""
    chooser, found = random.Random(0), []
    for document in python_documents()[::10]:
        sentences = re.findall(r"(?<=\. )[A-Z][a-z][\w ,']{40,110}\.(?=\s)", re.sub(r"\s+", " ", document))
        for sentence in sentences[:1]:
            words = [m for m in re.finditer(r"\b[a-z]{3,}\b", sentence) if len(tokenizer.tokenize(m[0])) == 1]
            if words:
                word = chooser.choice(words)
                found.append((sentence[: word.start()] + tokenizer.mask_token + sentence[word.end() :], word[0]))
    return chooser.sample(found, min(count, len(found)))


def fill_masks(folder: Path, count: int = 10) -> str:
    """Fill masks in held-out sentences with the pipeline and return the last sentence, unmasked."""
    fill = pipeline("fill-mask", model=str(folder), top_k=5)
    right, sentence = 0, ""
    print(f"\nFilling {count} masks in sentences that the model was not trained on:")
    for masked, truth in masked_sentences(fill.tokenizer, count):
        guesses = [guess["token_str"] for guess in fill(masked)]
        right += truth in guesses
        sentence = masked.replace(fill.tokenizer.mask_token, truth)
        print(f"\n  {masked}\n    correct: {truth}   guesses: {', '.join(guesses)}")
    print(f"\n{right} of {count} words are among the five best guesses.")
    return sentence


def classify_digits(folder: Path) -> float:
    """Train a small LION-D on 8 x 8 digits and return the test accuracy of the saved model, loaded again."""
    run_image_classification.main(["--output_dir", str(folder), *DIGITS_FLAGS])
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    _, test = load_digits(ImageArguments(), seed=0)
    with torch.no_grad():
        guesses = model(**processor(test["image"][:], return_tensors="pt")).logits.argmax(-1)
    accuracy = (guesses == torch.tensor(test["label"][:])).float().mean().item()
    print(f"\ntest accuracy of the digits model, loaded from its folder: {accuracy:.1%} of {len(test)} images")
    return accuracy


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/demo", help="folder for all outputs (default: outputs/demo)")
    folder = make_output_dir(parser.parse_args().output_dir)
    start = time.perf_counter()
    text, digits = folder / "mlm", folder / "digits"

    print("1. Masked language modelling: LION-S on Python's documentation")
    metrics = pretrain(text)
    sentence = fill_masks(text)
    print("\n2. Image classification: LION-D on handwritten digits")
    accuracy = classify_digits(digits)
    print("\n3. Pictures")
    draw_masks(folder / "masks.png")
    draw_decays([text, digits], folder / "decays.png", text=sentence)

    print(f"\nDone in {time.perf_counter() - start:.0f} seconds. Everything is in {folder}:")
    for name, content in (
        ("mlm/", "LION-S model, tokenizer, README.md, curves.png, all_results.json"),
        ("digits/", "LION-D model, image processor, README.md, curves.png, all_results.json"),
        ("masks.png", "the decay masks of the three variants"),
        ("decays.png", "the decays that the two models learned"),
    ):
        print(f"  {name:<12} {content}")

    failures = []
    if metrics["eval_masked_accuracy"] <= metrics["eval_most_frequent_accuracy"]:
        failures.append("the language model is no better than always predicting the most frequent token")
    if accuracy < DIGITS_GOAL:
        failures.append(f"the digits model reaches {accuracy:.1%}; at least {DIGITS_GOAL:.0%} is expected")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
