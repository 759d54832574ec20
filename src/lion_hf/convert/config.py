"""Inference of configurations of the authors' checkpoints, from tensors, stored options and flags of the user."""

import math
import re
from typing import Any

from transformers import PreTrainedModel

from ..models.configuration_lion import LionConfig, LionVisionConfig, spellings
from ..models.modeling_lion import LionForMaskedLM, LionForSequenceClassification
from ..models.modeling_lion_vision import LionForImageClassification
from .source import ConversionError, Source, first_line


# All names that the authors use for a variant, in lower case; the last three are internal names.
_VARIANTS = {
    **spellings("mask_type"),
    "linear_attention": "lit",
    "nova": "decay",
    "nova-inputdep": "selective",
}
# Whether the authors' text models use their position table, by position_embedding_type. The names are BERT's.
_READS_TABLE = {"absolute": True, "relative_key": False, "relative_key_query": False}
# Number of heads by the size in the name of the authors' image models.
_HEADS_OF_SIZE = {"tiny": 3, "small": 6, "base": 12}

# Options that a flag can set: the flag, and why the file may not determine the option.
QUESTIONS = {
    "mask_type": ("--mask-type lit", "weights without decays belong to a LION-LIT, or to a plain BERT or ViT"),
    "num_attention_heads": ("--num-heads N", "the weights of LION-LIT do not determine the number of heads"),
    "cls_tok": (
        "--cls-tok true|false",
        "the weights do not determine whether images are classified from the class token",
    ),
    "order": ("--order normal|s", "the weights of LION-LIT do not determine the scan"),
    "image_size": (
        "--image-size N",
        "in pixels; without a position table the weights do not determine the size of the images",
    ),
    "pos_emb": ("--pos-emb true|false", "a position table may be in the weights but unused"),
}
# Boolean options.
_TRUTHS = ("cls_tok", "pos_emb", "layer_norm_after")
# Options of a text configuration that keep their names and that tensors do not determine.
_TEXT_STATED = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "problem_type",
    "id2label",
    "label2id",
)


class Options:
    """Options of a configuration and the origin of each. Contradictory origins raise ConversionError.

    Args:
        source: the checkpoint.
        flags: the user's values of the options in `QUESTIONS`; None for those not given.
        description: name of the options stored in the file, for messages.
    """

    def __init__(self, source: Source, flags: dict[str, Any], description: str):
        self.source = source
        given = {name: value for name, value in flags.items() if value is not None}
        self.flags = {name: _spelt(name, value) for name, value in given.items()}
        self.description = description
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.open: list[str] = []

    def settle(self, name: str, *, weights: Any = None, stated: Any = None, default: Any = None) -> Any:
        """Record and return the value on which all origins agree, else the default. Without either, record the option
        as open and return None."""
        if name in _TRUTHS and stated is not None:
            stated = self._truth(name, stated)
        elif isinstance(weights, int) and isinstance(stated, str) and stated.isdigit():
            stated = int(stated)
        answers = {"flag": self.flags.pop(name, None), self.description: stated, "weights": weights}
        answers = {origin: value for origin, value in answers.items() if value is not None}
        if not answers and default is not None:
            answers = {"default": default}
        if not answers:
            self.open.append(name)
            return None
        origin, value = next(iter(answers.items()))
        for other, contradiction in answers.items():
            if contradiction != value:
                remedy = "remove the flag" if origin == "flag" else "the file contradicts itself"
                raise ConversionError(
                    f"{name} is {value!r} according to the {origin}, but {contradiction!r} according to the {other}: "
                    f"{remedy}."
                )
        self.values[name], self.origins[name] = value, origin
        return value

    def _truth(self, name: str, stated: Any) -> bool:
        """Convert a boolean as files store it."""
        truths = {"true": True, "1": True, "false": False, "0": False}
        if str(stated).lower() not in truths:
            raise ConversionError(f"{self.source.path} contains {name}={stated!r}; it must be true or false.")
        return truths[str(stated).lower()]

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor; raise ConversionError if it is missing or has another number of dimensions."""
        tensor = self.source.weights.get(name)
        if tensor is None or tensor.dim() != dimensions:
            found = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
            raise ConversionError(f"{self.source.path}: {name} {found}; it must have {dimensions} dimension(s).")
        return tuple(tensor.shape)

    def depth(self, pattern: str) -> int:
        """Return the number of layers. A gap in the numbers is found later, when names are compared."""
        return len({match[1] for name in self.source.weights if (match := re.match(pattern, name))})

    def build(self, config_class: type) -> LionConfig | LionVisionConfig:
        """Build the configuration; raise ConversionError for open or unused options and for invalid values."""
        if self.open:
            needed = "; ".join("{} ({})".format(*QUESTIONS[name]) for name in self.open)
            raise ConversionError(f"{self.source.path} does not determine all options. Give {needed}.")
        if self.flags:
            useless = ", ".join(QUESTIONS[name][0].split()[0] for name in self.flags)
            raise ConversionError(
                f"The {self.source.kind} model in {self.source.path} has no such option; remove {useless}."
            )
        try:
            return config_class(**self.values)
        except Exception as error:  # values in a file can be anything
            raise ConversionError(
                f"{self.source.path} does not give a valid configuration: {first_line(error.__cause__ or error)}."
            ) from error


def infer_config(
    source: Source, flags: dict[str, Any]
) -> tuple[LionConfig | LionVisionConfig, dict[str, str], type[PreTrainedModel]]:
    """Infer the configuration of a checkpoint.

    Args:
        source: the checkpoint.
        flags: the user's values of the options in `QUESTIONS`; None for those not given.

    Returns:
        The configuration, the origin of each option ("flag", "args" or "configuration" of the file, "weights",
        "default"), and the class of the model.

    Raises:
        ConversionError: if an option remains open, origins contradict each other, or a tensor is missing.
    """
    if source.kind == "image":
        options = _image_options(source, flags)
        return options.build(LionVisionConfig), options.origins, LionForImageClassification
    options = _text_options(source, flags)
    return options.build(LionConfig), options.origins, _text_head(source)


def _image_options(source: Source, flags: dict[str, Any]) -> Options:
    weights, args = source.weights, source.stated
    options = Options(source, flags, "args")
    size, channels, patch_size, _ = options.shape("patch_embed.proj.weight", 4)
    mixer = "blocks.0.attn."
    _, heads = _variant(options, args.get("mask_type"), mixer + "a_i", mixer + "a_i.weight")
    options.settle("hidden_size", weights=size)
    options.settle("num_hidden_layers", weights=options.depth(r"blocks\.(\d+)\."))
    name = str(args.get("model")).lower()
    by_name = next((n for size, n in _HEADS_OF_SIZE.items() if size in name), None) if heads is None else None
    options.settle("num_attention_heads", stated=args.get("num_heads", by_name), weights=heads)
    options.settle("intermediate_size", weights=options.shape("blocks.0.mlp.fc1.weight", 2)[0])
    options.settle("qkv_bias", weights=mixer + "qkv.bias" in weights)
    options.settle("num_channels", weights=channels)
    options.settle("patch_size", weights=patch_size)
    snake = any(name.startswith(mixer + "a2_i") for name in weights)
    order = None if heads is None else "s" if snake else "normal"
    options.settle("order", stated=_lower(args.get("order")), weights=order)
    has_table = "pos_embed" in weights
    _settle_positions(options, has_table, args.get("pos_emb"), default=has_table)
    side = math.isqrt(max(options.shape("pos_embed", 3)[1] - 1, 0)) * patch_size if has_table else None
    options.settle("image_size", stated=args.get("input_size"), weights=side)
    options.settle("cls_tok", stated=args.get("cls_tok"))
    labels = options.shape("head.weight", 2)[0] if "head.weight" in weights else 0
    options.settle("num_labels", stated=args.get("nb_classes"), weights=labels)
    options.settle("hidden_dropout_prob", stated=args.get("drop"), default=0.0)
    options.settle("drop_path_rate", stated=args.get("drop_path"), default=0.0)
    return options


def _text_options(source: Source, flags: dict[str, Any]) -> Options:
    weights, stated = source.weights, source.stated
    options = Options(source, flags, "configuration")
    embeddings, layer = "bert.embeddings.", "bert.encoder.layer.0."
    mixer = layer + "attention.self."
    norm = mixer + "layer_norm.weight"
    mask_type, heads = _variant(options, stated.get("arch_type"), mixer + "ai", mixer + "Wa_i.weight", norm)
    vocabulary, size = options.shape(embeddings + "word_embeddings.weight", 2)
    options.settle("vocab_size", weights=vocabulary)  # with its padding, not the value in the file
    known = {
        "hidden_size": size,
        "num_hidden_layers": options.depth(r"bert\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": options.shape(layer + "intermediate.dense.weight", 2)[0],
        "type_vocab_size": options.shape(embeddings + "token_type_embeddings.weight", 2)[0],
        "layer_norm_after": norm in weights,
    }
    for name, value in known.items():
        options.settle(name, stated=stated.get(name), weights=value)
    has_table = embeddings + "position_embeddings.weight" in weights
    _settle_positions(options, has_table, _reads_table(source), default=mask_type == "lit")
    length = None
    if has_table:
        length = options.shape(embeddings + "position_embeddings.weight", 2)[0]
    elif embeddings + "position_ids" in weights:
        length = options.shape(embeddings + "position_ids", 2)[1]
    options.settle("max_position_embeddings", stated=stated.get("max_position_embeddings"), weights=length, default=512)
    for name in _TEXT_STATED:
        if stated.get(name) is not None:
            options.settle(name, stated=stated[name])
    if "classifier.weight" in weights:
        options.settle("num_labels", weights=options.shape("classifier.weight", 2)[0])
    if "cls.predictions.decoder.weight" in weights:
        tied = weights["cls.predictions.decoder.weight"].equal(weights[embeddings + "word_embeddings.weight"])
        options.settle("tie_word_embeddings", weights=tied)
    return options


def _variant(
    options: Options, stated: Any, decay: str, selective: str, lit: str | None = None
) -> tuple[str | None, int | None]:
    """Return mask_type and, if decays determine it, the number of heads.

    `decay`, `selective` and `lit` name parameters of the first layer that only this variant has. If none is present,
    the file or the user must give LION-LIT."""
    weights = options.source.weights
    if stated is not None and _lower(stated) not in _VARIANTS:
        raise ConversionError(
            f"{options.source.path} names the variant {stated!r}; allowed are {', '.join(map(repr, _VARIANTS))}."
        )
    heads = None
    if decay in weights:
        found, heads = "decay", options.shape(decay, 1)[0]
    elif selective in weights:
        found, heads = "selective", options.shape(selective, 2)[0]
    else:
        found = "lit" if lit in weights else None
    mask_type = options.settle("mask_type", stated=_VARIANTS.get(_lower(stated)), weights=found)
    if heads is None and mask_type not in ("lit", None):
        raise ConversionError(
            f"mask_type is {mask_type!r} according to the {options.origins['mask_type']}, but the weights contain no "
            f"decay ({decay} or {selective})."
        )
    return mask_type, heads


def _settle_positions(options: Options, has_table: bool, stated: bool | None, default: bool) -> None:
    if options.settle("pos_emb", stated=stated, default=default) and not has_table:
        raise ConversionError(
            f"pos_emb is true according to the {options.origins['pos_emb']}, but the weights contain no position table."
        )


def _reads_table(source: Source) -> bool | None:
    """Return whether a text checkpoint uses its position table, or None if it does not determine this."""
    stated = source.stated.get("position_embedding_type")
    if stated is not None and str(stated) not in _READS_TABLE:
        raise ConversionError(
            f"{source.path} has position_embedding_type={stated!r}, which no LION model uses; allowed are "
            f"{', '.join(map(repr, _READS_TABLE))}."
        )
    return None if stated is None else _READS_TABLE[stated]


def _text_head(source: Source) -> type[PreTrainedModel]:
    if any(name.startswith("cls.predictions.") for name in source.weights):
        return LionForMaskedLM
    if "classifier.weight" in source.weights:
        return LionForSequenceClassification
    raise ConversionError(
        f"{source.path} has neither a masked language modelling head (cls.predictions) nor a classifier; convert a "
        "checkpoint with a head."
    )


def _spelt(option: str, value: Any) -> Any:
    return spellings(option).get(_lower(value), value) if option in ("mask_type", "order") else value


def _lower(value: Any) -> str | None:
    return None if value is None else str(value).lower()
