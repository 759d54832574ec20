"""What stands beside the weights of a linearised encoder: tokenizer or image processor, pooling, and a card with what
was measured."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import ImageProcessingMixin, PreTrainedTokenizerBase

from ..convert.sentences import copy_sentence_files, modules_of, sentence_folder
from ..models.configuration_lion import LionConfig, LionVisionConfig
from ..models.modeling_lion_vision import LionForImageClassification
from ..nn.variants import variant_class
from .models import Pair
from .run import Linearizer


# Ways to pool, by their names in folders of sentence-transformers.
_POOLINGS = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}

_TEXT = """# {title}

`{source}` with linear attention ({variant}) in {count} of its {total} layers: {layers}. {kept}

It was converted by `lion-linearize` of [lion_hf](https://arxiv.org/abs/2502.16249): each of these layers learned to
imitate the attention of the source on {data} without labels, with a learned feature map (Hedgehog,
[arXiv 2402.04347](https://arxiv.org/abs/2402.04347)); then the whole model learned the source's hidden states{target}.

## Measured

On {measured}:

| | before | after |
|---|---|---|
{rows}

The error of a layer is that of its attention on the source's inputs: the squared distance to the source's, over the
squared size of the source's. That of the hidden states is the same, from end to end and over all layers. These numbers
say how close the model is to its source, not how good it is at a task.{limits}

## Training

| | |
|---|---|
{training}

## Use

```python
{use}
```

The licence of the weights is that of `{source}`.
"""
_USE_MODEL = """import lion_hf  # registers LION with the Auto classes
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder")"""
_USE_SENTENCES = """import lion_hf  # registers LION with the Auto classes
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("path/to/this/folder")
embeddings = encoder.encode(["a lion sleeps", "the lion sleeps in the grass"])"""
_USE_IMAGES = """import lion_hf  # registers LION with the Auto classes
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
model = {auto}.from_pretrained("path/to/this/folder")"""
# Options of the recipe that images do not use.
_TEXT_OPTIONS = ("max_length", "mask_share")
_NAMES = {
    "hidden": "error of the hidden states",
    "cosine": "cosine of the last hidden states",
    "embedding_cosine": "cosine of the embeddings",
    "spearman": "rank correlation of the cosines of all pairs of texts",
    "agreement": "share of images with the class of the source",
}


def pooling_of(source: str) -> str | None:
    """Return how a sentence encoder pools, "first" or "mean"; None for any other model.

    Raises:
        ValueError: if it pools in another way.
    """
    folder = sentence_folder(source)
    modules = [] if folder is None else modules_of(folder)
    paths = [module["path"] for module in modules if module["type"].endswith("Pooling")]
    if not paths:
        return None
    options = json.loads((folder / paths[0] / "config.json").read_text(encoding="utf-8"))
    on = [name for name, value in options.items() if name.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in options:  # newer folders store one name
        on = [f"pooling_mode_{options['pooling_mode']}".replace("_cls", "_cls_token").replace("_mean", "_mean_tokens")]
    if len(on) != 1 or on[0] not in _POOLINGS:
        raise ValueError(
            f"{source!r} pools by {', '.join(on) or 'nothing'}; supported are the mean of the tokens and the first "
            "token. Give --target hidden to train for hidden states alone"
        )
    return _POOLINGS[on[0]]


def write_folder(
    out: Path,
    run: Linearizer,
    companion: PreTrainedTokenizerBase | ImageProcessingMixin,
    source: str,
    after: dict,
    data: str,
    context: int | None = None,
) -> None:
    """Save model, tokenizer or image processor, card and, for a sentence encoder, the files of sentence-transformers.

    Args:
        out: the folder, which exists.
        run: the finished run.
        companion: the source's tokenizer or image processor.
        source: name of the source.
        after: the measurements after training.
        data: names of the text files, or of the folders and files of images.
        context: number of tokens that the result reads, if it is not that of the source.
    """
    run.pair.student.save_pretrained(out)
    if context is not None:
        companion.model_max_length = context
    companion.save_pretrained(out)
    sentences = sentence_folder(source)
    if sentences is not None:
        copy_sentence_files(sentences, out, context)
    card(run, source, after, data, sentences is not None).save(out / "README.md")


def card(run: Linearizer, source: str, after: dict, data: str, sentences: bool) -> ModelCard:
    """Build the model card (README.md), with metadata for the Hub; the arguments are those of `write_folder`."""
    pair, before = run.pair, run.progress.before
    config = pair.student.config
    rows = [(f"error of layer {i}", before["layers"][str(i)], after["layers"][str(i)]) for i in pair.layers]
    rows += [(label, before[name], after[name]) for name, label in _NAMES.items() if after.get(name) is not None]
    metadata = ModelCardData(
        library_name="sentence-transformers" if sentences else "transformers",
        pipeline_tag="sentence-similarity" if sentences else None,
        tags=["lion", "linear-attention", "arxiv:2502.16249", "arxiv:2402.04347"],
    )
    words = _text_words(run, sentences)
    if isinstance(config, LionVisionConfig):
        words = _image_words(run, "agreement" in after)
        metadata.pipeline_tag = "image-classification" if _classifies(pair) else "image-feature-extraction"
    content = _TEXT.format(
        title=f"{Path(source).name} with linear attention",
        source=source,
        variant=variant_class(config.mask_type).label,
        count=len(pair.layers),
        total=config.num_hidden_layers,
        layers=", ".join(map(str, pair.layers)),
        kept=_kept(pair),
        rows="\n".join(f"| {label} | {x:.4f} | {y:.4f} |" for label, x, y in rows),
        training="\n".join(f"| {name} | {value} |" for name, value in _training(run, data).items()),
        **words,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{content}")


def _text_words(run: Linearizer, sentences: bool) -> dict[str, str]:
    limit = run.recipe.max_length
    return {
        "data": "text",
        "target": " and embeddings" if run.pooling else "",
        "measured": f"{len(run.data.held_out):,} pieces of text that were not trained on, of at most {limit} tokens",
        "limits": f" Texts longer than\n{limit} tokens were not measured.",
        "use": _USE_SENTENCES if sentences else _USE_MODEL,
    }


def _image_words(run: Linearizer, classes: bool) -> dict[str, str]:
    height, width = (patches * run.pair.student.config.patch_size for patches in run.pair.student.config.grid_size)
    auto = "AutoModelForImageClassification" if _classifies(run.pair) else "AutoModel"
    return {
        "data": "images",
        "target": " and its classes. The classifier is the source's" if classes else "",
        "measured": f"{len(run.data.held_out):,} images that were not trained on, of {height} x {width} pixels",
        "limits": "",
        "use": _USE_IMAGES.format(auto=auto),
    }


def _classifies(pair: Pair) -> bool:
    return isinstance(pair.student, LionForImageClassification)


def _kept(pair: Pair) -> str:
    config: LionConfig | LionVisionConfig = pair.student.config
    parts = [
        f"{kind} attention: {', '.join(map(str, layers))}."
        for kind, layers in (("Softmax", config.softmax_layers), ("Local", getattr(config, "local_layers", ())))
        if layers
    ]
    return " ".join(parts) or "No layer keeps softmax attention."


def _training(run: Linearizer, data: str) -> dict[str, object]:
    """Return what the card says about the training, by name."""
    stages = [entry for entry in run.progress.log if entry[0] == 1]
    options = asdict(run.recipe)
    if isinstance(run.pair.student.config, LionVisionConfig):
        options = {name: value for name, value in options.items() if name not in _TEXT_OPTIONS}
        amount = {"images": data, "number of images": f"{len(run.data.training):,}"}
    else:
        amount = {"text": data, "tokens of text": f"{run.data.tokens:,}"}
    return amount | {
        "steps": f"{run.progress.step:,} (first stage until about {stages[-1][1] if stages else 0:,})",
        "minutes": f"{run.progress.seconds / 60:.1f} on {run.device.type}, {torch.get_num_threads()} threads",
        "options": ", ".join(f"{name} {value}" for name, value in options.items()),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
