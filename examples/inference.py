"""Use trained LION models: fill masks, compare sentences, classify an image, draw attention and decays.

    python examples/inference.py --output_dir outputs/inference    # trains two small models first: 4 minutes
    python examples/inference.py --output_dir outputs/inference --text_model outputs/mlm --image_model outputs/digits \\
        --image seven.png --text "Return the [MASK] of the list."

Writes attention.png and decays.png.
"""

import argparse
from pathlib import Path

from flags import check_flags


if __name__ == "__main__":
    check_flags(__file__)

import torch
from demo import classify_digits, fill_masks, pretrain
from draw_decays import draw_decays, load
from matplotlib import pyplot as plt
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel, pipeline

from lion_hf.nn import variant_class
from lion_hf.training.errors import UserError, make_output_dir, run
from lion_hf.training.images import ImageArguments, load_digits
from lion_hf.training.reports import model_name


SENTENCES = (
    "Return the number of items in the list.",
    "Return how many elements the sequence has.",
    "Open the file for reading and return its contents.",
    "Read the file and return a string.",
    "Raise an exception if the argument is not an integer.",
)


def embed(folder: Path, sentences: tuple[str, ...]) -> torch.Tensor:
    """Return sentence embeddings (sentences, hidden_size) of norm 1: the mean of the last hidden states of real tokens.

    After `import lion_hf`, `sentence_transformers.SentenceTransformer(folder)` computes the same up to the norm.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, add_pooling_layer=False)
    inputs = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden_states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden_states * mask).sum(1) / mask.sum(1), dim=-1)


def compare_sentences(folder: Path, *more: str) -> None:
    sentences = (*more, *SENTENCES)
    embeddings = embed(folder, sentences)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    print("\nEach sentence and the most similar one (cosine of the mean-pooled embeddings):")
    for sentence, cosine, nearest in zip(sentences, *similarity.max(1), strict=True):
        print(f"  {cosine:.3f}  {sentence}  ->  {sentences[nearest]}")


def fill_text(folder: Path, text: str) -> str:
    """Print the five best guesses for every [MASK] of a text; return the text with the tokenizer's own mask token."""
    fill = pipeline("fill-mask", model=str(folder), top_k=5)
    text = text.replace("[MASK]", fill.tokenizer.mask_token)
    masks = text.count(fill.tokenizer.mask_token)
    if masks:
        found = fill(text)
        for number, guesses in enumerate([found] if masks == 1 else found, 1):
            print(f"\nmask {number}: " + ", ".join(f"{guess['token_str']} {guess['score']:.1%}" for guess in guesses))
    return text


def classify(folder: Path, image: Image.Image) -> None:
    print("\nThe pipeline classifies the image as:")
    for guess in pipeline("image-classification", model=str(folder), top_k=3)(image.convert("RGB")):
        print(f"  {guess['score']:6.1%}  {guess['label']}")


def attentions(model: PreTrainedModel, inputs) -> torch.Tensor:
    """Return the attention matrices, (layers, heads, tokens, tokens).

    In LION for text the rows do not sum to 1, and weights may be negative.
    """
    model.config.format = "attention"  # the other forms never build the matrix
    with torch.no_grad():
        return torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0]


def shades(weights: torch.Tensor) -> dict:
    """Return the colour scale of weights: from 0, or with 0 in the middle if some weights are negative."""
    largest = float(weights.abs().max()) or 1.0
    signed = bool((weights < 0).any())
    return {"cmap": "RdBu_r" if signed else "viridis", "vmin": -largest if signed else 0.0, "vmax": largest}


def draw_text_attention(row, model: PreTrainedModel, inputs) -> None:
    """Draw the attention matrix of each head in the last layer, each row divided by its largest weight."""
    heads = attentions(model, inputs)[-1]
    heads = heads / heads.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    tokens, colours = inputs.tokens(), shades(heads)
    axes = row.subplots(1, len(heads), squeeze=False)[0]
    for number, (axis, weights) in enumerate(zip(axes, heads, strict=True), 1):
        shown = axis.imshow(weights, **colours)
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        axis.set_yticks(range(len(tokens)), tokens if number == 1 else [""] * len(tokens), fontsize=7)
        axis.set_title(f"head {number}", fontsize=9)
    sign = "; blue is negative" if colours["vmin"] else "; none is negative"
    row.colorbar(shown, ax=axes, shrink=0.8).set_label(f"weight / largest of its row{sign}", fontsize=8)


def pooled_attention(model: PreTrainedModel, inputs) -> torch.Tensor:
    """Return how much of each patch the classifier reads in each layer, (layers, patches), as a mean over the heads.

    The classifier reads the class token if `config.cls_tok` is set, else the mean over all tokens.
    """
    layers = attentions(model, inputs).mean(1)
    return (layers[:, 0] if model.config.cls_tok else layers.mean(1))[:, 1:]


def draw_image_attention(row, model: PreTrainedModel, inputs, image: Image.Image) -> None:
    """Draw what the classifier reads in each layer, all layers on one scale."""
    layers = pooled_attention(model, inputs)
    grid = tuple(side // model.config.patch_size for side in inputs["pixel_values"].shape[-2:])
    axes, colours = row.subplots(1, len(layers) + 1), shades(layers)
    axes[0].imshow(image, cmap="gray")
    axes[0].set_title("input", fontsize=9)
    for number, (axis, weights) in enumerate(zip(axes[1:], layers, strict=True), 1):
        shown = axis.imshow(weights.reshape(grid), **colours)
        axis.set_title(f"layer {number}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    sign = "; blue is negative" if colours["vmin"] else "; none is negative"
    row.colorbar(shown, ax=axes, shrink=0.8).set_label(f"weight{sign}", fontsize=7)


def draw_attention(text_model: Path, text: str, image_model: Path, image: Image.Image, path: Path) -> None:
    figure = plt.figure(figsize=(9, 7.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1))
    model = load(text_model)
    upper.suptitle(f"{model_name(model.config)}, text: what each token (row) reads in the last layer", fontsize=10)
    inputs = AutoTokenizer.from_pretrained(text_model)(text, return_tensors="pt", truncation=True)
    draw_text_attention(upper, model, inputs)
    model = load(image_model)
    reader = "the class token" if model.config.cls_tok else "the mean over all tokens, which is classified,"
    lower.suptitle(f"{model_name(model.config)}, image: what {reader} reads; mean over heads", fontsize=10)
    inputs = AutoImageProcessor.from_pretrained(image_model)(image.convert("RGB"), return_tensors="pt")
    draw_image_attention(lower, model, inputs, image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def opened(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(f"cannot read --image {str(path)!r}: {error}") from error


def require_kind(folder: Path, kind: str, flag: str) -> Path:
    if load(folder).config.model_type != kind:
        raise UserError(f"{flag} {str(folder)!r} is not a {kind!r} model")
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", default="outputs/inference", help="folder for pictures and new models (default: %(default)s)"
    )
    parser.add_argument(
        "--text_model", type=Path, help="folder of a LION model from run_mlm.py (default: trains a small one)"
    )
    parser.add_argument(
        "--image_model", type=Path, help="folder of a LION image classifier (default: trains a small one on digits)"
    )
    parser.add_argument("--image", type=Path, help="image to classify (default: a test digit)")
    parser.add_argument("--text", help="text, with [MASK] for each word to guess (default: built-in sentences)")
    given = parser.parse_args(arguments)
    if given.text is not None and not given.text.strip():
        raise UserError("--text is empty; give a text or leave it out")
    folder = make_output_dir(given.output_dir)
    image = opened(given.image) if given.image else load_digits(ImageArguments(), seed=0)[1]["image"][0]
    texts = require_kind(given.text_model, "lion", "--text_model") if given.text_model else folder / "mlm"
    images = require_kind(given.image_model, "lion_vision", "--image_model") if given.image_model else folder / "digits"
    if not given.text_model:
        pretrain(texts)
    if not given.image_model:
        classify_digits(images)
    sentence = fill_text(texts, given.text) if given.text else fill_masks(texts, count=3)
    compare_sentences(texts, *([given.text] if given.text else []))
    classify(images, image)
    draw_attention(texts, sentence, images, image, folder / "attention.png")
    with_decays = [model for model in (texts, images) if variant_class(load(model).config.mask_type).decay]
    if with_decays:
        draw_decays(with_decays, folder / "decays.png", text=sentence, image=image)
    print(f"\nThe pictures are in {folder}.")


if __name__ == "__main__":
    run(main)
