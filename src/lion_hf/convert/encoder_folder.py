"""Folders of LION encoders that start from other encoders: model, tokenizer or image processor, and card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..hub import hint_if_missing, save_with_code
from ..models.configuration_lion import LionConfig
from ..nn.variants import variant_class
from .checkpoint import published, require_writable
from .encoder import from_encoder
from .sentences import copy_sentence_files, sentence_folder, transformer_folder
from .source import ConversionError, first_line


_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

_CARD = """# {title}

{variant} with {parameters:,} parameters, started from the weights of `{source}` by lion_hf
([Linear Attention for Efficient Bidirectional Sequence Modeling](https://arxiv.org/abs/2502.16249)).

## Layers

{layers}

Layers that became LION are only a start: train the model, or distil it from `{source}`, before you use it.

## Licence of the weights

The licence of `{source}` covers these weights too. Read it before you use or share them. The Apache-2.0 licence of
lion_hf covers its code, not these weights.
"""


def is_encoder(source: str | Path) -> bool:
    """Return whether a path is a folder of an encoder, or can only be a name on the Hub such as "user/name".

    Raises:
        ConversionError: if it is a malformed folder of sentence-transformers.
    """
    path = Path(source)
    if path.exists():
        return Path(transformer_folder(path), "config.json").is_file()
    if str(source).count("/") != 1 or str(source).endswith(_SUFFIXES) or hint_if_missing(source) is not None:
        return False
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return True


def convert_encoder(
    source: str | Path,
    out: str | Path | None,
    mask_type: str = "selective",
    *,
    layers: str | Sequence[int] | None = None,
    tokenizer: str | None = None,
    with_code: bool = False,
    force: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Convert another encoder to a folder for `AutoModelForX.from_pretrained`, with `from_encoder`.

    The folder is written completely or not at all. If the source is one of sentence-transformers, the result is too.

    Args:
        source: folder of the source, or its name on the Hub.
        out: the folder to write. None builds the model and writes nothing.
        mask_type: as in `from_encoder`.
        layers: as in `from_encoder`.
        tokenizer: name or folder of the tokenizer of a text model. Default: the source's.
        with_code: add the modelling code, as `lion_hf.save_with_code` does.
        force: replace `out` if it holds a LION checkpoint.
        options: further options of `from_encoder`.

    Returns:
        The model, and notes, one line each.

    Raises:
        ConversionError: if the source cannot be converted, or an option or the output path is invalid. Nothing is
            written then. It is a ValueError.
        OSError: if there is no model at the path.
    """
    if out is not None:
        out = Path(out).resolve()
        require_writable(out, Path(source) if Path(source).exists() else None, force, folder=True)
    try:
        sentences = sentence_folder(source)
        inner = transformer_folder(source)
        model = from_encoder(inner, mask_type, layers=layers, **options)
    except ValueError as error:
        raise ConversionError(first_line(error)) from error
    companion, notes = _companion(inner, tokenizer, model)
    if out is not None:
        with published(out) as new:
            save_with_code(model, new) if with_code else model.save_pretrained(new)
            if companion is not None:
                companion.save_pretrained(new)
            if sentences is not None:
                copy_sentence_files(sentences, new)
            _card(model, str(source), sentences is not None).save(new / "README.md")
    return model, notes


def _companion(source: str | Path, tokenizer: str | None, model: PreTrainedModel) -> tuple[Any, list[str]]:
    """Return the tokenizer or image processor of the source, and notes if there is none."""
    if not isinstance(model.config, LionConfig):
        if tokenizer is not None:
            raise ConversionError("--tokenizer is for text models, but the source is an image model; remove it")
        try:
            return AutoImageProcessor.from_pretrained(source), []
        except Exception as error:  # files of processors raise errors of many types
            return None, [f"no image processor was written: {first_line(error)}"]
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer or source)
    except Exception as error:  # as above
        if tokenizer is not None:
            raise ConversionError(f"the tokenizer {tokenizer!r} does not load ({first_line(error)})") from error
        return None, ["no tokenizer was written: the source has none; give one with --tokenizer"]
    if len(loaded) > model.config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {len(loaded):,} tokens, but the model has only {model.config.vocab_size:,}; give the "
            "tokenizer that the source was trained with"
        )
    return loaded, []


def describe_layers(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return the kinds of attention of a model, with the numbers of their layers."""
    config = model.config
    lion = [i for i in range(config.num_hidden_layers) if i not in (*config.softmax_layers, *config.local_layers)]
    kinds = {
        variant_class(config.mask_type).label: lion,
        "softmax attention": config.softmax_layers,
        f"softmax attention in windows of {config.local_window}": config.local_layers,
    }
    return [(kind, ", ".join(map(str, layers))) for kind, layers in kinds.items() if layers]


def _card(model: PreTrainedModel, source: str, sentences: bool) -> ModelCard:
    variant = variant_class(model.config.mask_type).label
    data = ModelCardData(
        library_name="sentence-transformers" if sentences else "transformers",
        pipeline_tag="sentence-similarity" if sentences else None,
        base_model=None if Path(source).exists() else source,
        tags=["lion", "linear-attention", "arxiv:2502.16249"],
    )
    text = _CARD.format(
        title=f"{variant} from {Path(source).name}",
        variant=variant,
        parameters=model.num_parameters(),
        source=source if not Path(source).exists() else Path(source).name,
        layers="\n".join(f"- {kind}: {layers}" for kind, layers in describe_layers(model)),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
