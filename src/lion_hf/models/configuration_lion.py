"""Configurations of the LION text encoder (`LionConfig`) and image encoder (`LionVisionConfig`), and named sizes."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

from ..nn.names import BLOCK_OPTIONS, FEATURE_MAPS, MLP_TYPES, require_rate, require_size
from ..nn.variants import VARIANTS, variant_class
from .lion_adapters import register_adapters
from .lion_options import is_known, misspelt_option, plain, sorted_layers


logger = logging.get_logger(__name__)

# Every accepted spelling, in lower case, of the options that are names. The variants' are in their registry.
_SPELLINGS = {
    "format": {name: name for name in ("attention", "rnn", "chunk", "auto")},
    "order": {"normal": "normal", "s": "s", "snake": "s"},
    "mlp_type": {name: name for name in MLP_TYPES},
    "feature_map": {name: name for name in FEATURE_MAPS},
    "classifier_pooling": {name: name for name in ("first", "mean")},
    **{option: {name: name for name in names} for option, names in BLOCK_OPTIONS.items()},
}

_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "chunk_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "patch_size",
    "num_channels",
)

# Options that decide which parameters a model has, or what they mean: they cannot change at load or after the model was
# built. A warm start refuses all of them but those that it makes anew.
STRUCTURAL = (
    "mask_type",
    "order",
    "pos_emb",
    "layer_norm_after",
    "softmax_layers",
    *BLOCK_OPTIONS,
    "mlp_type",
    "feature_map",
    "normalize",
    "gate_eps",
)

_KINDS = ("lion", "lion_vision")

# What a decoder does, and no LION: every token reads both directions.
_DECODERS = ("is_decoder", "add_cross_attention")


class _LionOptions:
    """What both configurations share: spellings, refusal of misspelt names, options that follow the variant, presets.

    A class with it has `_in_plain_values` above `strict`."""

    # Options that follow the variant until they are set: the attribute of `Variant` that decides, by name.
    derived_options: Mapping[str, str] = MappingProxyType({})
    # First tokens of every row that do not decay.
    prefix_tokens = 0
    # Read by what serves decoders too; they decide nothing here.
    use_cache = False
    is_decoder = False
    add_cross_attention = False

    def __post_init__(self, **kwargs):
        use_cache = kwargs.pop("use_cache", self.use_cache)  # Transformers would drop it as one of generation's
        if not kwargs.pop("_stored", False):
            self._refuse_misspelt(kwargs)
            if alone := [name for name in kwargs if not is_known(type(self), name)]:
                logger.warning_once(
                    f"{type(self).__name__} keeps {', '.join(alone)}, which no LION reads and which changes nothing."
                )
        super().__post_init__(**kwargs)
        if use_cache != self.use_cache:
            self.use_cache = use_cache
        if self.transformers_version is not None:  # the arguments are those of a dict that `to_dict` made
            derived = {name for name in self.derived_options if getattr(self, name) == self._derived(name)}
            self.__dict__["_following"] = getattr(self, "_following", frozenset()) | derived

    @classmethod
    def _refuse_misspelt(cls, names) -> None:
        for name in names:
            if meant := misspelt_option(cls, name):
                raise ValueError(
                    f"{cls.__name__} has no option {name!r}; did you mean {meant!r}? The options are the "
                    "documented fields of the class."
                )

    @classmethod
    def _arguments(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """A stored configuration as arguments of the constructor. Options that equal what the stored variant derives
        count as derived, and no name is refused: the file may be another's."""
        mask_type = stored.get("mask_type", cls.__dataclass_fields__["mask_type"].default)
        variant = variant_class(_normalised("mask_type", mask_type, cls))
        derived = {name: getattr(variant, attribute) for name, attribute in cls.derived_options.items()}
        missing = object()
        return {k: v for k, v in stored.items() if derived.get(k, missing) != v} | {"_stored": True}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers, but an override that contradicts the stored structure, or is misspelt, is an error
        (ValueError). None leaves the stored value of what decides the structure, and of `format`."""
        cls._refuse_misspelt(kwargs)
        kind, own = config_dict.get("model_type"), {getattr(base, "model_type", None) for base in cls.__mro__}
        if kind in _KINDS and kind not in own:
            raise ValueError(
                f"{cls.__name__} was given the configuration of a {kind!r} model. Text models take a LionConfig, image "
                "models a LionVisionConfig; AutoConfig and AutoModel pick the class that fits a checkpoint."
            )
        if "order" in kwargs and "order" not in cls.__dataclass_fields__:
            _normalised("order", kwargs.pop("order"), cls)  # refused unless it means nothing here
        _drop_undecided(kwargs)
        cls.require_structure(config_dict, {name: kwargs[name] for name in STRUCTURAL if name in kwargs})
        result = super().from_dict(cls._arguments(config_dict), **kwargs)
        (
            result[0] if isinstance(result, tuple) else result
        ).validate()  # overrides are set one by one, after the checks
        return result

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers."""
        register_adapters(self.model_type)  # PEFT begins with this call
        output = super().to_dict()
        output.pop("_following", None)
        return output

    @classmethod
    def from_json_file(cls, json_file):
        """As in Transformers, from a stored configuration."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def with_options(self, options: dict[str, Any]) -> "PreTrainedConfig":
        """A copy with those of `options` that are options of this class, which leave the dict; itself where there are
        none. None means what it does in `from_dict`."""
        own = self.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        _drop_undecided(options)
        chosen = {name: options.pop(name) for name in own & options.keys()}
        if not chosen:
            return self
        config = copy.deepcopy(self)
        config.update(chosen)
        config.validate()
        return config

    @classmethod
    def require_structure(cls, stored: dict[str, Any], wanted: dict[str, Any] | PreTrainedConfig) -> None:
        """Raises ValueError where `wanted` (options by name, or a configuration) contradicts a stored configuration in
        what decides the parameters of a model, see `STRUCTURAL`."""
        if isinstance(wanted, PreTrainedConfig):
            wanted = wanted.structure()
        wanted = {name: value for name, value in wanted.items() if name in cls.__dataclass_fields__}
        if not wanted:
            return
        built = cls(**cls._arguments({k: v for k, v in stored.items() if k != "model_type"})).structure()
        for name, value in wanted.items():
            if _normalised(name, value, cls) != built[name]:
                raise ValueError(
                    f"{name}={value!r} contradicts the checkpoint, which has {name}={built[name]!r}. "
                    f"{name} decides the parameters of the model, or what they mean, and cannot change at load: leave "
                    "it out, or build a "
                    "new model from a new configuration."
                )

    def _derived(self, name: str) -> Any:
        """What the variant makes of an option that follows it."""
        return getattr(variant_class(self.mask_type), self.derived_options[name])

    def structure(self) -> dict[str, Any]:
        """The options that decide the parameters of a model, by name; see `STRUCTURAL`."""
        options = {name: getattr(self, name) for name in STRUCTURAL if hasattr(self, name)}
        if options["feature_map"] is None:
            options["feature_map"] = variant_class(self.mask_type).feature_map if self.normalize else "identity"
        return options

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """A named size of the paper; `PAPER_PRESETS` lists them. Keyword arguments override single options.

        Raises:
            ValueError: for an unknown name, or one that belongs to the other kind of model.
        """
        key = name.lower().removesuffix("-uncased")
        is_image = "patch_size" in cls.__dataclass_fields__
        known = {name for name, options in PAPER_PRESETS.items() if ("patch_size" in options) == is_image}
        if key not in known:
            raise ValueError(f"{name!r} is not a preset of {cls.__name__}; allowed are {', '.join(sorted(known))}.")
        return cls(**{**PAPER_PRESETS[key], **overrides})

    def _check_shape(self) -> None:
        for name in _COUNTS:
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("layer_norm_eps", "initializer_range", "gate_eps"):
            require_size(name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "each head needs the same whole number of features."
            )
        if self.softmax_layers and self.softmax_layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"softmax_layers is {self.softmax_layers}; with num_hidden_layers {self.num_hidden_layers} its numbers "
                f"must be from 0 to {self.num_hidden_layers - 1}."
            )
        activations = _activations()
        if activations is not None and self.hidden_act not in activations:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; allowed are {', '.join(sorted(activations))}.")
        signed = self.structure()["feature_map"] == "identity" != variant_class(self.mask_type).feature_map
        if self.normalize and signed:
            raise ValueError(
                "feature_map is 'identity' with normalize=True, which divides by sums of scores of either sign. Choose "
                "feature_map='elu' or 'unit_silu', or normalize=False."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "classifier_dropout"):
            if getattr(self, name, None) is not None:
                require_rate(name, getattr(self, name))


def _activations() -> Mapping | None:
    """Transformers' activations by name; None without torch, which they need and configurations do not."""
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        return None
    return ACT2FN


def spellings(option: str) -> dict[str, str]:
    """Every accepted spelling, in lower case, of an option that is a name, and the name it stands for."""
    if option == "mask_type":
        return {word: name for name, cls in VARIANTS.items() for word in (name, *cls.spellings)}
    return _SPELLINGS[option]


def _drop_undecided(options: dict[str, Any]) -> None:
    """Takes out options of the structure that are None, which leaves what is stored."""
    for name in STRUCTURAL:
        if name in options and options[name] is None:
            del options[name]


def _in_plain_values(cls: type) -> type:
    """Class decorator above `strict`: values are spelt as this package spells them, and made Python's own, before their
    types are checked, and options that follow the variant are set with it."""
    checked = cls.__setattr__

    def __setattr__(self, name: str, value: Any) -> None:
        value = _normalised(name, plain(value), type(self))
        if name not in self.__dataclass_fields__ and (meant := misspelt_option(type(self), name)):
            logger.warning_once(
                f"{type(self).__name__} keeps {name!r}, which no LION reads; if {meant!r} was meant, set that."
            )
        if name == "format" and value is None:  # as it is, or by default
            value = getattr(self, name)
        if name in self.derived_options:  # nobody set those that are None: they follow the variant
            following = getattr(self, "_following", frozenset())
            self.__dict__["_following"] = following | {name} if value is None else following - {name}
            value = self._derived(name) if value is None else value
        checked(self, name, value)
        if name == "mask_type":
            for follower in getattr(self, "_following", ()):
                checked(self, follower, self._derived(follower))

    cls.__setattr__ = __setattr__
    return cls


def _normalised(name: str, value: Any, owner: type) -> Any:
    if name in _DECODERS and value:
        raise ValueError(
            f"{name} is {value!r} in {owner.__name__}; LION is an encoder that reads both directions. Leave it out, or "
            "choose a decoder such as GPT-2."
        )
    if name == "softmax_layers":
        return sorted_layers(value)
    if (name != "mask_type" and name not in _SPELLINGS) or not isinstance(value, str):
        return value
    allowed = spellings(name)
    if value.lower() not in allowed:
        hint = (
            " A variant of your own must be registered before it is used: import the file with its class, decorated "
            "with lion_hf.nn.register_variant (for a script: python -m lion_hf --import MODULE SCRIPT)."
            if name == "mask_type"
            else ""
        )
        raise ValueError(
            f"{name} is {value!r} in {owner.__name__}; allowed are {', '.join(map(repr, allowed))}, in any case.{hint}"
        )
    value = allowed[value.lower()]
    if name == "order" and value == "s" and "order" not in owner.__dataclass_fields__:
        raise ValueError(f"order is 's' in {owner.__name__}; text is one-dimensional, so only 'normal' is allowed.")
    return value


@_in_plain_values
@strict
class LionConfig(_LionOptions, PreTrainedConfig):
    r"""Configuration of [`LionModel`] and its heads: BERT with its attention replaced by LION (arXiv 2502.16249).

    The defaults are BERT-base's shape with LION-S. Besides the options of `BertConfig`:

    Args:
        mask_type (`str`, defaults to `"selective"`):
            The variant: `"lit"` (no decay), `"decay"` (one learned decay per head), `"selective"` (a decay per token
            and head), or one that was registered with `lion_hf.nn.register_variant`. The authors' spellings `"Lit"`,
            `"Decay"`, `"Selective"`, `"lion-lit"`, `"lion-d"`, `"lion-s"` mean the same.
        format (`str`, defaults to `"auto"`):
            How the same function is computed: `"attention"` (quadratic), `"chunk"` (linear time), `"rnn"` (linear time,
            constant memory) or `"auto"` (attention for short inputs, chunk for long ones). Can be changed at any time;
            `None` leaves what is stored.
        chunk_size (`int`, defaults to 64):
            Most tokens in one chunk of the chunk and rnn forms.
        pos_emb (`bool`, *optional*):
            Learned absolute positions. By default only for `"lit"`; the other two tell positions by their decay. The
            default follows `mask_type` when that is changed, until `pos_emb` is set.
        layer_norm_after (`bool`, *optional*):
            LayerNorm (eps 1e-5) over all heads after mixing. By default only for `"lit"`; it follows as `pos_emb` does.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on the attention matrix in training. Only the attention form has that matrix: with `format="auto"`
            it is chosen, with `"rnn"` or `"chunk"` training raises an error. Softmax layers apply it in every format.
        softmax_layers (`list[int]`, defaults to none):
            Layers, counted from 0, that keep softmax attention: a hybrid encoder. They have no decay, no
            `layer_norm_after` and quadratic time, whatever the format.
        unpad (`bool`, *optional*):
            Take the padding at the left and right ends of rows, masked tokens `pad_token_id`, out before the first
            layer and put its embeddings back after the last. All other tokens, pooled rows and their gradients are the
            same (a row of padding alone keeps its first token); only outputs at padding differ. By default in training
            on a CPU, outside `torch.compile`, where rows have 2048 / `hidden_size` padded positions or more on average
            (3 at base width); `True`: in every batch, and with `inputs_embeds`, or without a `pad_token_id`, all
            that is masked; `False`: in none. Never where the hidden states of all layers, attentions or attention
            dropout are asked for, which need the batch as it is, nor in exported graphs. Can be changed at any time.
        classifier_dropout (`float`, *optional*):
            Dropout before the classification heads; `hidden_dropout_prob` by default.
        classifier_pooling (`str`, defaults to `"first"`):
            What sequence classification and multiple choice read, through the pooler: `"first"`, the first real token
            of a text, as the paper does, or `"mean"`, the mean of its real tokens. With little fine-tuning data the
            mean learns more (examples/results). Can be changed at any time.
        norm_position (`str`, defaults to `"post"`):
            `"post"` as in BERT, or `"pre"`, which adds a LayerNorm after the last layer.
        mlp_type (`str`, defaults to `"mlp"`):
            `"mlp"`, or `"glu"` for MLPs whose values are multiplied by a gate, a third projection.
        feature_map (`str`, defaults to `"identity"`):
            Function of queries and keys: `"identity"`, `"elu"` (elu + 1) or `"unit_silu"` (silu + 1/2 at length 1).
            `None` is the variant's own where outputs are normalised.
        normalize (`bool`, defaults to `False`):
            Divide outputs by their row sums, as the image models do. It needs another feature map than `"identity"`,
            and attention dropout does not go with it.
        gate_eps (`float`, defaults to 1e-7):
            Added to the decays of `"selective"` before their logarithm, as the authors' text models do.

    Raises an error that names the option, the value and what is allowed when a value does not fit.

    ```python
    >>> from lion_hf import LionConfig, LionForMaskedLM

    >>> config = LionConfig(mask_type="decay", num_hidden_layers=2)
    >>> model = LionForMaskedLM(config)
    ```"""

    model_type = "lion"
    derived_options = MappingProxyType({"pos_emb": "pos_emb", "layer_norm_after": "norm"})

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = None
    classifier_pooling: str = "first"
    tie_word_embeddings: bool = True
    mask_type: str = "selective"
    format: str = "auto"
    chunk_size: int = 64
    pos_emb: bool | None = None
    layer_norm_after: bool | None = None
    softmax_layers: Any = ()  # a list of int, checked at every assignment
    unpad: bool | None = None
    norm_position: str = "post"
    mlp_type: str = "mlp"
    feature_map: str | None = "identity"
    normalize: bool = False
    gate_eps: float | int = 1e-7

    def __post_init__(self, **kwargs):
        order = kwargs.pop("order", None)  # refused unless it means nothing here
        if order is not None:
            _normalised("order", order, type(self))
        super().__post_init__(**kwargs)

    def validate_shape(self):
        """Raises ValueError for sizes that do not fit together."""
        self._check_shape()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; it must be None or a token of the vocabulary, 0 to "
                f"{self.vocab_size - 1} (vocab_size - 1)."
            )
        if variant_class(self.mask_type).pos_emb and not self.pos_emb:
            logger.warning_once(
                f"mask_type is {self.mask_type!r} with pos_emb=False: nothing tells this model the order of its "
                "tokens. Set pos_emb=True unless a bag of words is wanted."
            )
        if self.normalize and self.attention_probs_dropout_prob > 0:
            raise ValueError(
                f"attention_probs_dropout_prob is {self.attention_probs_dropout_prob} with normalize=True, where rows "
                "of the attention matrix keep their sums and nothing is dropped. Set one of them to 0 or False."
            )


# Options of `LionBackbone` alone: config.json names them only where they differ from this.
_BACKBONE_DEFAULTS = {
    "out_features": None,
    "out_indices": None,
    "apply_layernorm": True,
    "reshape_hidden_states": True,
}


@_in_plain_values
@strict
class LionVisionConfig(_LionOptions, BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`LionVisionModel`], its heads and [`LionBackbone`] (arXiv 2502.16249).

    The defaults are the base size (patch 16, 224 pixels) with LION-S. Besides the options of `ViTConfig`:

    Args:
        mask_type, format, chunk_size, softmax_layers:
            As in [`LionConfig`].
        order (`str`, defaults to `"normal"`):
            `"normal"` reads patches row by row; `"s"` (or `"snake"`) averages two snake scans, along rows and along
            columns (the natural variants of the paper). Without decay it changes nothing.
        pos_emb (`bool`, defaults to `False`):
            Add a learned position table. Without it, any image size divisible by `patch_size` is accepted.
        cls_tok (`bool`, defaults to `False`):
            Classify from the class token; otherwise from the mean over all tokens, class token included.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth of the last block; earlier blocks have linearly less.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Applied in softmax layers only: the image models of the paper have no attention dropout.
        out_features (`list[str]`, *optional*):
            [`LionBackbone`] returns the feature maps of these stages, in ascending order: `"stem"` (the embeddings),
            `"stage1"`, ... `"stageN"` (the output of each layer). The last stage by default.
        out_indices (`list[int]`, *optional*):
            The same by number: 0 is the stem, negative numbers count from the end.
        reshape_hidden_states (`bool`, defaults to `True`):
            Whether [`LionBackbone`] gives feature maps (batch, hidden_size, rows, columns). `False`: tokens (batch,
            1 + rows * columns, hidden_size), the class token first, as DPT and Depth Anything take them.
        apply_layernorm (`bool`, defaults to `True`):
            Whether [`LionBackbone`] passes the feature maps through the final LayerNorm.
        norm_position (`str`, defaults to `"pre"`), mlp_type, gate_eps (defaults to 0.0):
            As in [`LionConfig`].
        feature_map (`str`, *optional*):
            As in [`LionConfig`]; the variant's own by default.
        normalize (`bool`, defaults to `True`):
            Divide outputs by their row sums.

    ```python
    >>> from lion_hf import LionForImageClassification, LionVisionConfig

    >>> config = LionVisionConfig(mask_type="decay", order="s", num_hidden_layers=2)
    >>> model = LionForImageClassification(config)
    ```"""

    model_type = "lion_vision"
    prefix_tokens = 1  # the class token

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    mask_type: str = "selective"
    format: str = "auto"
    chunk_size: int = 64
    order: str = "normal"
    pos_emb: bool = False
    cls_tok: bool = False
    softmax_layers: Any = ()  # a list of int, checked at every assignment
    reshape_hidden_states: bool = True
    apply_layernorm: bool = True
    norm_position: str = "pre"
    mlp_type: str = "mlp"
    feature_map: str | None = None
    normalize: bool = True
    gate_eps: float | int = 0.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; options of backbones are left out where nobody chose them."""
        output = super().to_dict()
        return {k: v for k, v in output.items() if k not in _BACKBONE_DEFAULTS or v != _BACKBONE_DEFAULTS[k]}

    @property
    def stage_names(self) -> list[str]:
        """Names of what [`LionBackbone`] can return: the embeddings, then each layer's output."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def encoder_stride(self) -> int:
        """Pixels in a side of what the decoder of [`LionForMaskedImageModeling`] makes of one token: `patch_size`."""
        return self.patch_size

    @encoder_stride.setter
    def encoder_stride(self, value: int) -> None:
        if value != self.patch_size:
            raise ValueError(
                f"encoder_stride is {value}, but patch_size is {self.patch_size}; the reconstruction has the size of "
                "the image only if they are equal. Leave encoder_stride out: it follows patch_size."
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches in a column and in a row of an image of the configured size."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def validate_shape(self):
        """Raises ValueError for sizes that do not fit together."""
        self._check_shape()
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if (not isinstance(self.image_size, int) and len(sides) != 2) or any(
            s < 1 or s % self.patch_size for s in sides
        ):
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; give one side or "
                "(height, width), each a positive multiple of patch_size."
            )


def _presets() -> Mapping[str, Mapping[str, Any]]:
    variants = {"lit": "lit", "d": "decay", "s": "selective"}
    text = {"base": (768, 12, 12), "large": (1024, 24, 16)}
    image = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
    presets = {}
    for short, mask_type in variants.items():
        for size, (width, layers, heads) in text.items():
            presets[f"lion-{short}-{size}"] = {"vocab_size": 30528} | _sizes(mask_type, width, layers, heads)
        for size, (width, layers, heads) in image.items():
            for order in ("normal", "s") if short != "lit" else ("normal",):
                name = f"lion-{short}-{size}-patch16-224" + ("-snake" if order == "s" else "")
                fixed = {"patch_size": 16, "image_size": 224, "order": order, "num_labels": 1000}
                presets[name] = fixed | _sizes(mask_type, width, layers, heads)
    return MappingProxyType({name: MappingProxyType(options) for name, options in presets.items()})


def _sizes(mask_type: str, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "mask_type": mask_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


# Every model of the paper by name: 6 text encoders and 15 image encoders. Other models, and variants, need no preset.
PAPER_PRESETS: Mapping[str, Mapping[str, Any]] = _presets()
PRESETS = PAPER_PRESETS  # the name in 0.1

__all__ = ["PAPER_PRESETS", "PRESETS", "LionConfig", "LionVisionConfig"]
