"""What a trained LION is good for: fills masks, compares sentences, classifies images, shows attention and decays.

    python examples/inference.py --output_dir outputs/inference    # trains two small models first: 4 minutes
    python examples/inference.py --output_dir outputs/inference --text_model outputs/mlm --image_model outputs/digits \\
        --image seven.png

Writes attention.png and decays.png.
"""

import argparse
from pathlib import Path

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


SENTENCES = (
    "Return the number of items in the list.",
    "Return how many elements the sequence has.",
    "Open the file for reading and return its contents.",
    "Read the file and return a string.",
    "Raise an exception if the argument is not an integer.",
)


def embed(folder: Path, sentences: tuple[str, ...]) -> torch.Tensor:
    """Sentence embeddings (sentences, hidden_size) of length 1: the mean of the last hidden states over real tokens.

    `sentence_transformers.SentenceTransformer(folder)` computes the same, after `import lion_hf`.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, add_pooling_layer=False)
    inputs = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden_states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden_states * mask).sum(1) / mask.sum(1), dim=-1)


def compare_sentences(folder: Path) -> None:
    embeddings = embed(folder, SENTENCES)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    print("\nEach sentence and the one nearest to it (cosine of the mean-pooled embeddings):")
    for sentence, cosine, nearest in zip(SENTENCES, *similarity.max(1), strict=True):
        print(f"  {cosine:.3f}  {sentence}  ->  {SENTENCES[nearest]}")


def classify(folder: Path, image: Image.Image) -> None:
    print("\nThe image is, by the pipeline:")
    for guess in pipeline("image-classification", model=str(folder), top_k=3)(image.convert("RGB")):
        print(f"  {guess['score']:6.1%}  {guess['label']}")


def attentions(model: PreTrainedModel, inputs) -> torch.Tensor:
    """(layers, heads, tokens, tokens), absolute: LION for text neither normalises nor bounds its weights below by 0."""
    model.config.format = "attention"  # the form that has the matrix
    with torch.no_grad():
        return torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].abs()


def draw_text_attention(row, model: PreTrainedModel, inputs) -> None:
    """The heads of the last layer, tokens by tokens, each row on its own scale."""
    heads = attentions(model, inputs)[-1]
    tokens = inputs.tokens()
    for number, (axis, weights) in enumerate(zip(row.subplots(1, len(heads), squeeze=False)[0], heads, strict=True), 1):
        axis.imshow(weights / weights.amax(-1, keepdim=True), cmap="viridis", vmin=0, vmax=1)
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        axis.set_yticks(range(len(tokens)), tokens if number == 1 else [""] * len(tokens), fontsize=7)
        axis.set_title(f"head {number}", fontsize=9)


def draw_image_attention(row, model: PreTrainedModel, inputs, image: Image.Image) -> None:
    """What the class token reads in each layer, mean over the heads."""
    layers = attentions(model, inputs).mean(1)[:, 0, 1:]
    grid = tuple(side // model.config.patch_size for side in inputs["pixel_values"].shape[-2:])
    axes = row.subplots(1, len(layers) + 1)
    axes[0].imshow(image, cmap="gray")
    for number, (axis, weights) in enumerate(zip(axes[1:], layers, strict=True), 1):
        axis.imshow(weights.reshape(grid), cmap="viridis", vmin=0)
        axis.set_title(f"layer {number}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()


def draw_attention(text_model: Path, text: str, image_model: Path, image: Image.Image, path: Path) -> None:
    figure = plt.figure(figsize=(9, 7.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1))
    upper.suptitle("text: what each token (row) reads, last layer", fontsize=10)
    inputs = AutoTokenizer.from_pretrained(text_model)(text, return_tensors="pt", truncation=True)
    draw_text_attention(upper, load(text_model), inputs)
    lower.suptitle("image: what the class token reads", fontsize=10)
    inputs = AutoImageProcessor.from_pretrained(image_model)(image.convert("RGB"), return_tensors="pt")
    draw_image_attention(lower, load(image_model), inputs, image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def opened(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(f"--image {str(path)!r} cannot be read: {error}") from error


def require_kind(folder: Path, kind: str, flag: str) -> Path:
    if load(folder).config.model_type != kind:
        raise UserError(f"{flag} {str(folder)!r} is no {kind!r} model")
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/inference", help="where pictures and new models are written")
    parser.add_argument(
        "--text_model", type=Path, help="folder of a LION trained by run_mlm.py; trained here by default"
    )
    parser.add_argument("--image_model", type=Path, help="folder of a LION classifier; trained on digits by default")
    parser.add_argument("--image", type=Path, help="the image to classify; a test digit by default")
    given = parser.parse_args(arguments)
    folder = make_output_dir(given.output_dir)
    image = opened(given.image) if given.image else load_digits(ImageArguments(), seed=0)[1]["image"][0]
    texts = require_kind(given.text_model, "lion", "--text_model") if given.text_model else folder / "mlm"
    images = require_kind(given.image_model, "lion_vision", "--image_model") if given.image_model else folder / "digits"
    if not given.text_model:
        pretrain(texts)
    if not given.image_model:
        classify_digits(images)
    sentence = fill_masks(texts, count=3)
    compare_sentences(texts)
    classify(images, image)
    draw_attention(texts, sentence, images, image, folder / "attention.png")
    with_decays = [model for model in (texts, images) if variant_class(load(model).config.mask_type).decay]
    if with_decays:
        draw_decays(with_decays, folder / "decays.png", text=sentence, image=image)
    print(f"\nPictures of attention and decays are in {folder}.")


if __name__ == "__main__":
    run(main)
