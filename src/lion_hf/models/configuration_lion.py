"""Configurations of the LION text encoder (`LionConfig`) and image encoder (`LionVisionConfig`), and named sizes."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

from ..nn.names import (
    BLOCK_OPTIONS,
    FEATURE_MAPS,
    MIXER_OPTIONS,
    MLP_TYPES,
    OUTPUT_GATES,
    OUTPUT_NORMS,
    did_you_mean,
)
from ..nn.variants import VARIANTS, variant_class
from .lion_adapters import register_adapters
from .lion_options import (
    IMAGE_DERIVED,
    TEXT_DERIVED,
    check_shape,
    is_known,
    misspelt_option,
    plain,
    sorted_layers,
)
from .lion_presets import PAPER_PRESETS


logger = logging.get_logger(__name__)

# Accepted spellings, in lower case, of options whose values are names. Those of variants are in their registry.
_SPELLINGS = {
    "format": {name: name for name in ("attention", "rnn", "chunk", "auto")},
    "order": {"normal": "normal", "s": "s", "snake": "s"},
    "mlp_type": {name: name for name in MLP_TYPES},
    "feature_map": {name: name for name in FEATURE_MAPS},
    "classifier_pooling": {name: name for name in ("first", "mean")},
    "output_gate": {name: name for name in OUTPUT_GATES},
    "output_norm": {name: name for name in OUTPUT_NORMS},
    **{option: {name: name for name in names} for option, names in BLOCK_OPTIONS.items()},
}

# Options that determine which parameters a model has, or what they mean. They cannot change when a model is loaded or
# after it was built. A warm start accepts only those of them that it sets itself.
STRUCTURAL = (
    "mask_type",
    "order",
    "pos_emb",
    "roberta_positions",
    "pooler_norm",
    "token_transform",
    "append_patch_mean",
    "layer_norm_after",
    "softmax_layers",
    *BLOCK_OPTIONS,
    "mlp_type",
    "feature_map",
    "normalize",
    "gate_eps",
    *MIXER_OPTIONS,
)

_KINDS = ("lion", "lion_vision")

# Options of decoders. LION is an encoder: every token reads both directions.
_DECODERS = ("is_decoder", "add_cross_attention")


class _LionOptions:
    """Base of both configurations: spellings, misspelt names, options that follow the variant, presets.

    Classes derived from it need the decorator `_in_plain_values` above `strict`."""

    # Options that follow the variant until they are set, with the function of the variant that gives their value.
    derived_options: Mapping[str, Callable[[type], Any]] = MappingProxyType({})
    # Number of tokens at the beginning of every row that do not decay.
    prefix_tokens = 0
    # Read by code of Transformers that also handles decoders. They have no effect here.
    use_cache = False
    is_decoder = False
    add_cross_attention = False

    def __post_init__(self, **kwargs):
        use_cache = kwargs.pop("use_cache", self.use_cache)  # Transformers would drop it as a generation option
        if not kwargs.pop("_stored", False):
            self._refuse_misspelt(kwargs)
            if alone := [name for name in kwargs if not is_known(type(self), name)]:
                logger.warning_once(
                    f"{type(self).__name__} has no option named {', '.join(alone)}: stored, but without effect."
                )
        super().__post_init__(**kwargs)
        if use_cache != self.use_cache:
            self.use_cache = use_cache
        if self.transformers_version is not None:  # the arguments come from `to_dict`
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
        """Arguments of the constructor from a stored configuration. Options with the default value of the stored
        variant count as not set. Unknown names are accepted: another program may have written the file."""
        mask_type = stored.get("mask_type", cls.__dataclass_fields__["mask_type"].default)
        variant = variant_class(_normalised("mask_type", mask_type, cls))
        derived = {name: value_of(variant) for name, value_of in cls.derived_options.items()}
        missing = object()
        return {k: v for k, v in stored.items() if derived.get(k, missing) != v} | {"_stored": True}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers, but an override that is misspelt, or differs from a stored structural option, raises
        ValueError. None keeps the stored value of structural options and of `format`."""
        cls._refuse_misspelt(kwargs)
        kind, own = config_dict.get("model_type"), {getattr(base, "model_type", None) for base in cls.__mro__}
        if kind in _KINDS and kind not in own:
            raise ValueError(
                f"{cls.__name__} was given the configuration of a {kind!r} model. Text models take a LionConfig, image "
                "models a LionVisionConfig; AutoConfig and AutoModel pick the class that fits a checkpoint."
            )
        if "order" in kwargs and "order" not in cls.__dataclass_fields__:
            _normalised("order", kwargs.pop("order"), cls)  # an error unless it has no effect here
        _drop_undecided(kwargs)
        cls.require_structure(config_dict, {name: kwargs[name] for name in STRUCTURAL if name in kwargs})
        result = super().from_dict(cls._arguments(config_dict), **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.validate()  # overrides are set one by one, after the checks
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return all options as a dict, as in Transformers."""
        register_adapters(self.model_type)  # PEFT calls `to_dict` before it looks for adapters
        output = super().to_dict()
        output.pop("_following", None)
        return output

    @classmethod
    def from_json_file(cls, json_file):
        """Read a configuration from a JSON file, as in Transformers."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def with_options(self, options: dict[str, Any]) -> "PreTrainedConfig":
        """Return a copy with the entries of `options` that this class has, and remove them from the dict. Without such
        entries, return the configuration itself. None means the same as in `from_dict`."""
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
        """Raise ValueError if `wanted` (options by name, or a configuration) differs from a stored configuration in a
        structural option, see `STRUCTURAL`."""
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
                    f"{name} determines the parameters of the model and cannot change when it is loaded. Leave it out, "
                    "or build a new model from a new configuration."
                )

    def _derived(self, name: str) -> Any:
        """The value that the variant gives to an option that follows it."""
        return self.derived_options[name](variant_class(self.mask_type))

    def structure(self) -> dict[str, Any]:
        """Return the options that determine the parameters of a model, by name; see `STRUCTURAL`."""
        options = {name: getattr(self, name) for name in STRUCTURAL if hasattr(self, name)}
        if options["feature_map"] is None:
            options["feature_map"] = variant_class(self.mask_type).feature_map if self.normalize else "identity"
        heads = options["key_heads"] or self.num_attention_heads
        options |= {"key_heads": heads, "key_dim": options["key_dim"] or self.hidden_size // self.num_attention_heads}
        return options

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """Return the configuration of a model of the paper. Keyword arguments override single options.

        Args:
            name: such as "lion-s-base"; `PAPER_PRESETS` lists all of them.

        Raises:
            ValueError: if the name is unknown or belongs to the other kind of model.
        """
        key = name.lower().removesuffix("-uncased")
        is_image = "patch_size" in cls.__dataclass_fields__
        known = {name for name, options in PAPER_PRESETS.items() if ("patch_size" in options) == is_image}
        if key not in known:
            raise ValueError(f"{name!r} is not a preset of {cls.__name__}; allowed are {', '.join(sorted(known))}.")
        return cls(**{**PAPER_PRESETS[key], **overrides})


def spellings(option: str) -> dict[str, str]:
    """Return every accepted spelling of an option, in lower case, with the name that it stands for."""
    if option == "mask_type":
        return {word: name for name, cls in VARIANTS.items() for word in (name, *cls.spellings)}
    return _SPELLINGS[option]


def _drop_undecided(options: dict[str, Any]) -> None:
    """Remove structural options that are None, so that the stored values stay."""
    for name in STRUCTURAL:
        if name in options and options[name] is None:
            del options[name]


def _in_plain_values(cls: type) -> type:
    """Class decorator above `strict`: normalises spellings and converts numpy values before types are checked, and
    sets the options that follow the variant when the variant is set."""
    checked = cls.__setattr__

    def __setattr__(self, name: str, value: Any) -> None:
        value = _normalised(name, plain(value), type(self))
        if name not in self.__dataclass_fields__ and (meant := misspelt_option(type(self), name)):
            logger.warning_once(
                f"{type(self).__name__} has no option {name!r}: stored, but without effect. Did you mean {meant!r}?"
            )
        if name == "format" and value is None:  # keep the current value, or the default
            value = getattr(self, name)
        if name in self.derived_options:  # None: the option follows the variant
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
            " A custom variant must be registered first: import the file with its class, decorated with "
            "lion_hf.nn.register_variant (for a script: python -m lion_hf --import MODULE SCRIPT)."
            if name == "mask_type"
            else ""
        )
        raise ValueError(
            f"{name} is {value!r} in {owner.__name__}; allowed are {', '.join(map(repr, allowed))}, in any case."
            f"{did_you_mean(value, allowed)}{hint}"
        )
    value = allowed[value.lower()]
    if name == "order" and value == "s" and "order" not in owner.__dataclass_fields__:
        raise ValueError(f"order is 's' in {owner.__name__}; text is one-dimensional, so only 'normal' is allowed.")
    return value


@_in_plain_values
@strict
class LionConfig(_LionOptions, PreTrainedConfig):
    r"""Configuration of `LionModel` and its heads: BERT with its attention replaced by LION (arXiv 2502.16249).

    The defaults are the size of BERT-base with LION-S. `BertConfig` has the other options.

    Args:
        mask_type (`str`, defaults to `"selective"`):
            The variant: `"lit"` (no decay), `"decay"` (one learned decay per head), `"selective"` (a decay per token
            and head), another one of the package, such as `"gla"`, or the name of one registered with
            `lion_hf.nn.register_variant`. The authors' spellings are accepted too: `"Lit"`, `"Decay"`, `"Selective"`,
            `"lion-lit"`, `"lion-d"`, `"lion-s"`.
        format (`str`, defaults to `"auto"`):
            How the same function is computed: `"attention"` (quadratic), `"chunk"` (linear time), `"rnn"` (linear time,
            constant memory) or `"auto"` (attention for short inputs, chunk for long ones). Can be changed at any time.
            `None` keeps the stored value.
        chunk_size (`int`, defaults to 64):
            Largest number of tokens in one chunk of the chunk and rnn forms.
        pos_emb (`bool`, *optional*):
            Add a learned table of absolute positions. By default only for `"lit"`; the others derive positions from
            the decay. The default follows `mask_type` until `pos_emb` is set.
        roberta_positions (`bool`, defaults to `False`):
            Count positions as RoBERTa does: without padding (`pad_token_id`), and from row `pad_token_id + 1` of the
            position table. `position_ids` still count from 0. Padding has row `pad_token_id`.
        layer_norm_after (`bool`, *optional*):
            LayerNorm (eps 1e-5) over all heads after mixing. By default only for `"lit"`; follows `mask_type` too.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on the attention matrix in training, which needs the attention form: `format="auto"` selects it,
            `"rnn"` and `"chunk"` raise ValueError in training. Softmax layers apply it whatever `format` is.
        softmax_layers (`list[int]`, defaults to none):
            Layers, counted from 0, that keep softmax attention (a hybrid encoder). They have no decay and no
            `layer_norm_after`, and take quadratic time whatever `format` is.
        unpad (`bool`, *optional*):
            Remove padding (masked tokens `pad_token_id` at both ends of rows) before the first layer and put its
            embeddings back after the last. Only outputs at padding change; a row of padding only keeps its first
            token. By default in training on a CPU, outside `torch.compile`, if rows have 2048 / `hidden_size` padded
            positions or more on average (3 at base width). `True`: in every batch; with `inputs_embeds`, or without a
            `pad_token_id`, all masked tokens at the ends count as padding. `False`: never. Ignored with
            `output_hidden_states`, `output_attentions` or attention dropout, which need the whole batch, and in
            exported graphs. Can be changed at any time.
        classifier_dropout (`float`, *optional*):
            Dropout before the classification heads; `hidden_dropout_prob` by default.
        classifier_pooling (`str`, defaults to `"first"`):
            Input of the pooler in sequence classification and multiple choice: `"first"` (the first real token of a
            text, as in the paper) or `"mean"` (the mean of its real tokens). The mean is better with little
            fine-tuning data (examples/results). Can be changed at any time.
        pooler_act (`str`, defaults to `"tanh"`):
            Activation of the pooler: any of Transformers, such as `"relu"` (DistilBERT) or `"gelu"` (ModernBERT).
        pooler_norm (`bool`, defaults to `False`):
            LayerNorm after the activation of the pooler, as in ModernBERT.
        token_transform (`bool`, defaults to `False`):
            Give token classification and question answering a layer like the pooler's, on every token, as ModernBERT
            does.
        type_vocab_size (`int`, defaults to 2):
            Number of token types. 0: no table; `token_type_ids` are ignored.
        norm_position (`str`, defaults to `"post"`):
            `"post"` as in BERT, or `"pre"`, which adds a LayerNorm after the last layer.
        mlp_type (`str`, defaults to `"mlp"`):
            `"mlp"`, or `"glu"` for MLPs whose values are multiplied by a gate, a third projection.
        feature_map (`str`, *optional*):
            Function applied to queries and keys: `"identity"`, `"elu"` (elu + 1) or `"unit_silu"` (silu + 1/2, scaled
            to length 1). By default that of the variant if `normalize` is True, else `"identity"`.
        normalize (`bool`, *optional*):
            Divide outputs by their row sums, as in the image models. By default False for the variants of the paper,
            and True where the variant requires it. Requires positive scores and no attention dropout.
        gate_eps (`float`, defaults to 1e-7):
            Added to the decays of `"selective"` before their logarithm, as in the authors' text models.
        short_conv (`int`, *optional*):
            Width of a convolution over neighbouring tokens of queries, keys and values; 0 for none. This and the
            options below follow the variant until they are set; see `lion_hf.nn.Mixer` for what they compute.
        token_shift (`bool`, *optional*):
            Mix the neighbours of each token into what the projections read.
        output_gate (`str`, *optional*):
            Multiply outputs by a gate: `"silu"`, `"sigmoid"` or `"none"`.
        output_norm (`str`, *optional*):
            Norm of the outputs: `"rms"`, `"group_rms"`, `"head_rms"`, `"head_layer"` or `"none"`. Not with
            `layer_norm_after`.
        key_heads (`int`, *optional*):
            Number of heads of queries and keys, a divisor of `num_attention_heads`, which it is by default.
        key_dim (`int`, *optional*):
            Width of each head of queries and keys; by default `hidden_size // num_attention_heads`.

    Raises:
        ValueError: for a misspelt option or a value that is not allowed.

    Example:
        >>> from lion_hf import LionConfig, LionForMaskedLM
        >>> config = LionConfig(mask_type="decay", num_hidden_layers=2)
        >>> model = LionForMaskedLM(config)"""

    model_type = "lion"
    derived_options = TEXT_DERIVED

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
    pooler_act: str = "tanh"
    pooler_norm: bool = False
    token_transform: bool = False
    tie_word_embeddings: bool = True
    mask_type: str = "selective"
    format: str = "auto"
    chunk_size: int = 64
    pos_emb: bool | None = None
    roberta_positions: bool = False
    layer_norm_after: bool | None = None
    softmax_layers: Any = ()  # a list of int, checked at every assignment
    unpad: bool | None = None
    norm_position: str = "post"
    mlp_type: str = "mlp"
    feature_map: str | None = None
    normalize: bool | None = None
    gate_eps: float | int = 1e-7
    short_conv: int | None = None
    token_shift: bool | None = None
    output_gate: str | None = None
    output_norm: str | None = None
    key_heads: int | None = None
    key_dim: int | None = None

    def __post_init__(self, **kwargs):
        order = kwargs.pop("order", None)  # an error unless it has no effect here
        if order is not None:
            _normalised("order", order, type(self))
        super().__post_init__(**kwargs)

    def validate_shape(self):
        """Raise ValueError if sizes do not fit together."""
        check_shape(self)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; it must be None or a token of the vocabulary, 0 to "
                f"{self.vocab_size - 1} (vocab_size - 1)."
            )
        if variant_class(self.mask_type).pos_emb and not self.pos_emb:
            logger.warning_once(
                f"mask_type is {self.mask_type!r} with pos_emb=False: this model has no information about the order of "
                "its tokens. Set pos_emb=True unless you need a bag of words."
            )
        if self.normalize and self.attention_probs_dropout_prob > 0:
            raise ValueError(
                f"attention_probs_dropout_prob is {self.attention_probs_dropout_prob}, but models with normalize=True "
                "have no attention dropout. Set attention_probs_dropout_prob=0 or normalize=False."
            )


# Options of `LionBackbone` alone. config.json holds them only if they differ from these defaults.
_BACKBONE_DEFAULTS = {
    "out_features": None,
    "out_indices": None,
    "apply_layernorm": True,
    "reshape_hidden_states": True,
}


@_in_plain_values
@strict
class LionVisionConfig(_LionOptions, BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of `LionVisionModel`, its heads and `LionBackbone` (arXiv 2502.16249).

    The defaults are the base size (patch 16, 224 pixels) with LION-S. `ViTConfig` has the other options.

    Args:
        mask_type, format, chunk_size, softmax_layers:
            As in `LionConfig`.
        order (`str`, defaults to `"normal"`):
            `"normal"` reads patches row by row; `"s"` (or `"snake"`) averages two snake scans, along rows and along
            columns (the natural variants of the paper). It has no effect without decay.
        pos_emb (`bool`, defaults to `False`):
            Add a learned position table. Without it, any image size divisible by `patch_size` is accepted.
        cls_tok (`bool`, defaults to `False`):
            Classify from the class token. Otherwise from the mean over all tokens, class token included.
        append_patch_mean (`bool`, defaults to `False`):
            Append the mean of the patches to the class token for the classifier, which reads `2 * hidden_size`
            features then, as in DINOv2. Requires `cls_tok`.
        drop_path_rate (`float`, defaults to 0.0):
            Rate of stochastic depth in the last layer. The rates of earlier layers rise linearly from 0 to it.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Applies to softmax layers and, with `normalize=False`, to the others. The paper's image models have none.
        out_features (`list[str]`, *optional*):
            Stages whose feature maps `LionBackbone` returns, in ascending order: `"stem"` (the embeddings),
            `"stage1"`, ... `"stageN"` (the output of each layer). The last stage by default.
        out_indices (`list[int]`, *optional*):
            The same stages by number: 0 is the stem, negative numbers count from the end.
        reshape_hidden_states (`bool`, defaults to `True`):
            Whether `LionBackbone` returns feature maps (batch, hidden_size, rows, columns). `False`: tokens (batch,
            1 + rows * columns, hidden_size), the class token first, as DPT and Depth Anything expect them.
        apply_layernorm (`bool`, defaults to `True`):
            Whether `LionBackbone` applies the final LayerNorm to the feature maps.
        norm_position, mlp_type, feature_map, gate_eps, short_conv, token_shift, output_gate, key_heads, key_dim:
            As in `LionConfig`, but by default norm_position is `"pre"` and gate_eps is 0.0.
        normalize (`bool`, *optional*):
            Divide outputs by their row sums. By default True, unless scores of the variant may be negative.
        output_norm (`str`, *optional*):
            As in `LionConfig`. By default `"rms"` if scores of the variant may be negative and it has no other norm.

    Example:
        >>> from lion_hf import LionForImageClassification, LionVisionConfig
        >>> config = LionVisionConfig(mask_type="decay", order="s", num_hidden_layers=2)
        >>> model = LionForImageClassification(config)"""

    model_type = "lion_vision"
    derived_options = IMAGE_DERIVED
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
    append_patch_mean: bool = False
    softmax_layers: Any = ()  # a list of int, checked at every assignment
    reshape_hidden_states: bool = True
    apply_layernorm: bool = True
    norm_position: str = "pre"
    mlp_type: str = "mlp"
    feature_map: str | None = None
    normalize: bool | None = None
    gate_eps: float | int = 0.0
    short_conv: int | None = None
    token_shift: bool | None = None
    output_gate: str | None = None
    output_norm: str | None = None
    key_heads: int | None = None
    key_dim: int | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as a dict, as in Transformers, without default values of backbone options."""
        output = super().to_dict()
        return {k: v for k, v in output.items() if k not in _BACKBONE_DEFAULTS or v != _BACKBONE_DEFAULTS[k]}

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages that `LionBackbone` can return, first the embeddings, then the output of each layer."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def encoder_stride(self) -> int:
        """Side in pixels of the square that `LionForMaskedImageModeling` predicts for a token: `patch_size`."""
        return self.patch_size

    @encoder_stride.setter
    def encoder_stride(self, value: int) -> None:
        if value != self.patch_size:
            raise ValueError(
                f"encoder_stride is {value}, but patch_size is {self.patch_size}; they must be equal. Leave "
                "encoder_stride out: it follows patch_size."
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of (rows, columns) of patches in an image of the configured size."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def validate_shape(self):
        """Raise ValueError if sizes do not fit together."""
        check_shape(self)
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if (not isinstance(self.image_size, int) and len(sides) != 2) or any(
            s < 1 or s % self.patch_size for s in sides
        ):
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; give one side or "
                "(height, width), each a positive multiple of patch_size."
            )


PRESETS = PAPER_PRESETS  # the name in 0.1

__all__ = ["PAPER_PRESETS", "PRESETS", "LionConfig", "LionVisionConfig"]
