"""Files beside converted weights: tokenizer or image processor, and model card."""

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..models.configuration_lion import LionVisionConfig
from .source import ConversionError, Source, first_line


# DeiT's evaluation: resize the shorter side to 256 pixels, then crop the centre 224.
_CROP_RATIO = 0.875

_PAPER = "https://arxiv.org/abs/2502.16249"
_AUTHORS_CODE = "https://github.com/LIONS-EPFL/LION"
_VARIANT_NAMES = {"lit": "LION-LIT", "decay": "LION-D", "selective": "LION-S"}
# Pipeline and Auto class by model class.
_USES = {
    "LionForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "LionForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "LionForImageClassification": ("image-classification", "AutoModelForImageClassification"),
}

_TEXT = """# {title}

{variant} with {parameters:,} parameters: a linear attention encoder from
[Linear Attention for Efficient Bidirectional Sequence Modeling]({paper}) (NeurIPS 2025), converted to Transformers.

## Origin

The weights were trained with [the paper authors' code]({code}) and converted by lion_hf from `{file}`
({layout}). Tensors were renamed; their values did not change.{dropped}

## Licence of the weights

The authors publish their code and weights under a **non-commercial licence**, which also covers converted weights. Read
the licence in [their repository]({code}) before you use or share them. The Apache-2.0 licence of lion_hf covers its
code, not these weights.

## Use

```python
{imports}from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder"{trust})
```
"""


def load_tokenizer(name: str | None, source: Source, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of this name or folder; without a name, the one inside the checkpoint, or None.

    Raises:
        ConversionError: if the tokenizer does not load, has more tokens than the model, or is given for an image model.
    """
    if name is not None and source.kind == "image":
        raise ConversionError("--tokenizer is for text models, but the checkpoint holds an image model; remove it.")
    if name is None and source.tokenizer is None:
        return None
    origin = f"The tokenizer {name!r}" if name else "The tokenizer inside the checkpoint"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name) if name else BertTokenizer(**source.tokenizer)
    except Exception as error:  # tokenizer files raise errors of many types
        raise ConversionError(
            f"{origin} does not load ({first_line(error)}); give another with --tokenizer."
        ) from error
    if len(tokenizer) > vocab_size:
        raise ConversionError(
            f"{origin} has {len(tokenizer):,} tokens, but the model has only {vocab_size:,}; give the tokenizer that "
            "it was trained with."
        )
    return tokenizer


def image_processor(config: LionVisionConfig, crop_ratio: float | None = None):
    """Build an image processor that does what the authors' evaluation does.

    It resizes the shorter side with bicubic interpolation (to 256 for 224), crops the centre, and normalises with
    ImageNet's mean and standard deviation. For one channel it uses their averages over the three channels and expects
    images in mode "L".

    Args:
        config: configuration of the model.
        crop_ratio: side of the crop over the resized shorter side, from the checkpoint. Default: 0.875.

    Returns:
        The processor. None for other numbers of channels, and if Pillow, which Transformers needs, is not installed.

    Raises:
        ConversionError: if the ratio is not above 0 and at most 1.
    """
    side, ratio = config.image_size, _CROP_RATIO if crop_ratio is None else crop_ratio
    if isinstance(ratio, str) or not 0 < ratio <= 1:
        raise ConversionError(f"eval_crop_ratio is {ratio!r} in the checkpoint; it must be above 0 and at most 1.")
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config.num_channels == 1:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    elif config.num_channels != 3:
        return None
    options = {
        "size": {"shortest_edge": int(side / ratio)},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": config.num_channels == 3,
        "resample": 3,  # bicubic
        "image_mean": mean,
        "image_std": std,
    }
    try:
        from transformers import ViTImageProcessorPil

        return ViTImageProcessorPil(**options)
    except ImportError:
        return None


def model_card(model: PreTrainedModel, source: Source, dropped: dict[str, str], with_code: bool) -> ModelCard:
    """Build the model card (README.md) of a converted checkpoint, with metadata for the Hub.

    Args:
        model: the converted model.
        source: the checkpoint that it was converted from.
        dropped: reasons by the names of tensors that were not converted.
        with_code: whether the folder contains the modelling code.
    """
    pipeline, auto = _USES[type(model).__name__]
    variant = _VARIANT_NAMES[model.config.mask_type] + " (snake)" * (getattr(model.config, "order", "") == "s")
    data = ModelCardData(
        license="other",
        license_name="lion-authors-non-commercial",
        license_link=_AUTHORS_CODE,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["lion", "linear-attention", "arxiv:2502.16249", *(["custom_code"] if with_code else [])],
    )
    reasons = "".join(f"\n- `{name}`: {reason}" for name, reason in dropped.items())
    text = _TEXT.format(
        title=f"{variant} from {source.path.name}",
        variant=variant,
        parameters=model.num_parameters(),
        paper=_PAPER,
        code=_AUTHORS_CODE,
        file=source.path.name,
        layout=source.layout,
        dropped=f" Not converted:\n{reasons}" if dropped else "",
        imports="" if with_code else "import lion_hf  # registers LION with the Auto classes\n",
        auto=auto,
        trust=", trust_remote_code=True" if with_code else "",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
