"""LION encoders from the weights of the encoders that people use.

    from lion_hf.convert import from_encoder

    model = from_encoder("answerdotai/ModernBERT-base")  # its global third becomes LION-S, local layers stay local

families.py, text_families.py and image_families.py say how the parts of a source become LION's; bert.py and vit.py say
how the layers that become LION start.
"""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_lion import LionConfig, LionVisionConfig
from ..models.lion_options import plain
from ..nn.variants import VARIANTS
from .bert import text_config, text_model
from .families import Family
from .image_families import IMAGE_FAMILIES
from .text_families import TEXT_FAMILIES
from .vit import image_model
from .warm_start import config_options, family_of, load_source, new_config


# By model_type.
FAMILIES = MappingProxyType({**TEXT_FAMILIES, **IMAGE_FAMILIES})

# Options of LION layers that may be chosen here, besides those that every warm start sets anew.
_FREE = ("normalize", "feature_map")


def from_encoder(
    model_or_path: PreTrainedModel | str | Path,
    mask_type: str = "selective",
    *,
    layers: str | Sequence[int] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    pos_emb: bool | None = None,
    windows: Sequence[float] | None = None,
    length: int = 128,
    image_size: int | Sequence[int] | None = None,
    **config_overrides,
) -> PreTrainedModel:
    """Build a LION encoder from the weights of another encoder, such as RoBERTa, DistilBERT, ModernBERT or DINOv2.

    Some layers become LION, the others keep the attention of the source: softmax over all tokens, or over a window of
    tokens where the source has local layers. With `layers=[]` the result computes what the source computes. Layers that
    become LION are only a start, and need training; see `lion_hf.convert.hidden_state_distillation_loss`.

    Example::

        model = from_encoder("answerdotai/ModernBERT-base", layers="all")
        model = from_encoder("FacebookAI/roberta-base", "decay", layers=[0, 2, 4], model_class=LionModel)

    Args:
        model_or_path: a model of Transformers, its name on the Hub, or its folder. `FAMILIES` lists the kinds by
            model_type.
        mask_type: the variant of the layers that become LION, as in `LionConfig`.
        layers: numbers of the layers that become LION, counted from 0; "all"; or None (default) for the layers with
            global attention where the source has local ones too, as a third of ModernBERT's, and for layers 0, 2, 4 ...
            of other sources.
        model_class: class of the result, such as `LionForSequenceClassification`. Default: the source's counterpart. A
            head that the source lacks is newly initialised.
        pos_emb: whether to keep the source's position table. Default: True if it has one. Without it, softmax layers
            lose the order of the tokens.
        windows: number of tokens that a head of LION reads at the start, as in `from_bert` and `from_vit`.
        length: typical number of tokens of a text, as in `from_bert`.
        image_size: side of the images in pixels, or (height, width), for image models; the position table is resized
            to it (bicubic). Default: the source's.
        config_overrides: further options that the weights do not determine, as in `from_bert` and `from_vit`, and
            `normalize` and `feature_map` of the layers that become LION.

    Returns:
        The model in evaluation mode, with the source's dtype and on its device. Decay parameters are at least float32.

    Raises:
        ValueError: if a source of this kind cannot be converted (the message says why), or an option is invalid or
            determined by the weights.
        OSError: if there is no model at the path.
    """
    source, family = load_source(model_or_path, FAMILIES, model_class)
    config = config_from_encoder(
        source.config, mask_type, layers=layers, pos_emb=pos_emb, image_size=image_size, **config_overrides
    )
    if family.kind == "text":
        return text_model(source, family, config, model_class, windows, length)
    return image_model(source, family, config, model_class, windows)


def config_from_encoder(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    layers: str | Sequence[int] | None = None,
    pos_emb: bool | None = None,
    image_size: int | Sequence[int] | None = None,
    **config_overrides,
) -> LionConfig | LionVisionConfig:
    """Return the configuration of the model that `from_encoder` would build, without loading weights.

    Args:
        source: configuration of the source.
        mask_type: as in `from_encoder`.
        layers: as in `from_encoder`.
        pos_emb: as in `from_encoder`.
        image_size: as in `from_encoder`.
        config_overrides: as in `from_encoder`.

    Returns:
        The configuration of the LION model.

    Raises:
        ValueError: as in `from_encoder`.
    """
    family = family_of(source, type(source).__name__, FAMILIES)
    decided = family.options(source)
    softmax, local = kept_layers(family, source, decided["num_hidden_layers"], layers)
    decided["softmax_layers"] = softmax
    if image_size is not None:
        if family.kind == "text":
            raise ValueError(f"image_size is {image_size!r}, but the source is a text model; leave it out.")
        decided["image_size"] = plain(image_size)
    if local:
        decided["local_layers"] = local
    has_table = "rope_parameters" not in decided
    if pos_emb and not has_table:
        raise ValueError(f"pos_emb is True, but {family.label} has no position table; leave it out.")
    overrides = {"pos_emb": has_table if pos_emb is None else pos_emb, **config_overrides}
    if family.kind == "image":
        options = config_options(decided, family.shared(source), overrides)
        return new_config(family, mask_type, decided, _FREE, **options)
    if not decided.get("use_bias", True) and "feature_map" not in overrides:
        # The expansion of softmax needs biases. Without them, positive scores divided by their sums are nearest to it.
        overrides = {"normalize": _can_normalize(mask_type), **overrides}
    return text_config(family, source, mask_type, decided, _FREE, overrides)


def _can_normalize(mask_type: str) -> bool | None:
    """Return True if the variant has positive scores, None if the option must follow the variant."""
    known = {word: cls for name, cls in VARIANTS.items() for word in (name, *cls.spellings)}
    variant = known.get(mask_type.lower()) if isinstance(mask_type, str) else None  # unknown: the configuration says so
    return True if variant is not None and not variant.signed else None


def kept_layers(
    family: Family, source: PreTrainedConfig, depth: int, layers: str | Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Return the numbers of the layers that keep softmax attention over all tokens, and over windows.

    Args:
        family: the family of the source.
        source: its configuration.
        depth: number of its layers.
        layers: as in `from_encoder`.
    """
    local = set(family.local_layers(source))
    layers = plain(layers)
    if layers is None:
        chosen = set(range(depth)) - local if local else set(range(0, depth, 2))
    elif layers == "all":
        chosen = set(range(depth))
    elif (
        isinstance(layers, str)
        or not isinstance(layers, Sequence)
        or any(type(i) is not int or not 0 <= i < depth for i in layers)
    ):
        raise ValueError(
            f"layers is {layers!r}; it must be 'all', or a list of the layers that become LION, from 0 to {depth - 1}. "
            "Leave it out for the default."
        )
    else:
        chosen = set(layers)
    kept = set(range(depth)) - chosen
    return sorted(kept - local), sorted(kept & local)
