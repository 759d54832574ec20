"""Base of both configurations: spellings, options that follow others, stored options, presets."""

import copy
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..nn.names import (
    BLOCK_OPTIONS,
    DECAY_INITS,
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
    LINEAR,
    is_known,
    misspelt_option,
    plain,
    plain_rope,
    plain_windows,
    rope_thetas,
    sorted_layers,
    with_linear_theta,
)
from .lion_presets import MODERN_PRESETS, PAPER_PRESETS, preset_options


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
    "decay_init": {name: name for name in DECAY_INITS},
    **{option: {x: x for x in values} for option, values in BLOCK_OPTIONS.items() if isinstance(values[0], str)},
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
    "local_layers",
    "local_window",
    "rope_parameters",
    *BLOCK_OPTIONS,
    "final_norm",
    "embedding_norm",
    "first_norm",
    "mlp_type",
    "feature_map",
    "normalize",
    "gate_eps",
    *MIXER_OPTIONS,
)

# Options whose values are checked and completed when they are set.
_PLAIN = {
    "softmax_layers": functools.partial(sorted_layers, "softmax_layers"),
    "local_layers": functools.partial(sorted_layers, "local_layers"),
    "rope_parameters": plain_rope,
    "decay_windows": plain_windows,
}

_KINDS = ("lion", "lion_vision")

# Options of decoders. LION is an encoder: every token reads both directions.
_DECODERS = ("is_decoder", "add_cross_attention")


class LionOptions:
    """Base of both configurations: spellings, misspelt names, options that follow the variant, presets.

    Classes derived from it need the decorator `in_plain_values` above `strict`."""

    # Options that follow the variant and the feature map until they are set, with the function that gives their value.
    derived_options: Mapping[str, Callable[[type, str | None], Any]] = MappingProxyType({})
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
        variant = variant_class(normalised("mask_type", mask_type, cls))
        feature_map = normalised("feature_map", stored.get("feature_map"), cls)
        derived = {name: value_of(variant, feature_map) for name, value_of in cls.derived_options.items()}
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
            normalised("order", kwargs.pop("order"), cls)  # an error unless it has no effect here
        if "rope_theta" in kwargs:
            kwargs["rope_parameters"] = with_theta(config_dict.get("rope_parameters"), kwargs.pop("rope_theta"))
        if (theta := kwargs.pop("linear_rope_theta", None)) is not None:
            rope = kwargs.get("rope_parameters", config_dict.get("rope_parameters"))
            kwargs["rope_parameters"] = with_linear_theta(rope, theta)
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
            if normalised(name, value, cls) != built[name]:
                raise ValueError(
                    f"{name}={value!r} contradicts the checkpoint, which has {name}={built[name]!r}. "
                    f"{name} determines the parameters of the model and cannot change when it is loaded. Leave it out, "
                    "or build a new model from a new configuration."
                )

    @property
    def rope_theta(self) -> float | None:
        """Theta of RoPE in softmax layers, None without RoPE. Setting it sets RoPE of all softmax and local layers."""
        return rope_thetas(self.rope_parameters)[0]

    @property
    def local_rope_theta(self) -> float | None:
        """Theta of RoPE in local layers, None without RoPE; `rope_parameters` sets it."""
        return rope_thetas(self.rope_parameters)[1]

    @property
    def linear_rope_theta(self) -> float | list[float | None] | None:
        """Theta of RoPE in LION's own layers, or one for each layer; None without RoPE. Setting it sets it there."""
        return ((self.rope_parameters or {}).get(LINEAR) or {}).get("rope_theta")

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """Called by Transformers at construction: fold `rope_theta`, `rope_scaling` and `linear_rope_theta` into
        `rope_parameters`."""
        theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        if self.rope_parameters is None and (scaling or theta is not None):
            self.rope_parameters = scaling or rope_of_theta(theta)
        if "linear_rope_theta" in kwargs:
            self.linear_rope_theta = kwargs.pop("linear_rope_theta")
        return kwargs

    def standardize_rope_params(self) -> None:
        """Do nothing: `rope_parameters` is complete since it was set."""

    def validate_rope(self) -> None:
        """Do nothing: `rope_parameters` was checked when it was set."""

    def _derived(self, name: str) -> Any:
        """The value that the variant and the feature map give to an option that follows them."""
        return self.derived_options[name](variant_class(self.mask_type), self.feature_map)

    def structure(self) -> dict[str, Any]:
        """Return the options that determine the parameters of a model, by name; see `STRUCTURAL`."""
        options = {name: copy.deepcopy(getattr(self, name)) for name in STRUCTURAL if hasattr(self, name)}
        if options["feature_map"] is None:
            options["feature_map"] = variant_class(self.mask_type).feature_map if self.normalize else "identity"
        if options["final_norm"] is None:
            options["final_norm"] = self.norm_position == "pre"
        heads = options["key_heads"] or self.num_attention_heads
        options |= {"key_heads": heads, "key_dim": options["key_dim"] or self.hidden_size // self.num_attention_heads}
        return options

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """Return the configuration of a named model. Keyword arguments override single options.

        Args:
            name: such as "lion-s-base"; `PAPER_PRESETS` lists the models of the paper, `MODERN_PRESETS` others.

        Raises:
            ValueError: if the name is unknown or belongs to the other kind of model.
        """
        key = name.lower().removesuffix("-uncased")
        is_image = "patch_size" in cls.__dataclass_fields__
        presets = {**PAPER_PRESETS, **MODERN_PRESETS}
        known = {name for name, options in presets.items() if ("patch_size" in options) == is_image}
        if key not in known:
            raise ValueError(f"{name!r} is not a preset of {cls.__name__}; allowed are {', '.join(sorted(known))}.")
        options = preset_options(presets[key], overrides)
        if "vocab_size" in overrides and "pad_token_id" not in overrides:  # another vocabulary has another padding
            options.pop("pad_token_id", None)
        if "local_layers" not in overrides and "local_layers" in options:  # those of a model with fewer layers
            options["local_layers"] = [i for i in options["local_layers"] if i < options["num_hidden_layers"]]
        return cls(**options)


def spellings(option: str) -> dict[str, str]:
    """Return every accepted spelling of an option, in lower case, with the name that it stands for."""
    if option == "mask_type":
        return {word: name for name, cls in VARIANTS.items() for word in (name, *cls.spellings)}
    return _SPELLINGS[option]


def rope_of_theta(theta: float | None) -> dict[str, Any] | None:
    """Return the `rope_parameters` that `rope_theta` stands for; None without a number."""
    return None if theta is None else {"rope_type": "default", "rope_theta": theta}


def with_theta(rope: dict[str, Any] | None, theta: float | None) -> dict[str, Any] | None:
    """Return `rope_parameters` with RoPE of this theta in softmax and local layers; that of LION's layers stays."""
    linear = ((rope or {}).get(LINEAR) or {}).get("rope_theta")
    return rope_of_theta(theta) if linear is None else with_linear_theta(rope_of_theta(theta), linear)


def _drop_undecided(options: dict[str, Any]) -> None:
    """Remove structural options that are None, so that the stored values stay."""
    for name in STRUCTURAL:
        if name in options and options[name] is None:
            del options[name]


def in_plain_values(cls: type) -> type:
    """Class decorator above `strict`: normalises spellings and converts numpy values before types are checked, and
    sets the options that follow the variant and the feature map when one of these is set."""
    checked = cls.__setattr__

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rope_theta":
            name, value = "rope_parameters", with_theta(self.rope_parameters, value)
        elif name == "linear_rope_theta":
            name, value = "rope_parameters", with_linear_theta(self.rope_parameters, value)
        value = normalised(name, plain(value), type(self))
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
        if name in ("mask_type", "feature_map"):
            for follower in getattr(self, "_following", ()):
                checked(self, follower, self._derived(follower))

    cls.__setattr__ = __setattr__
    return cls


def normalised(name: str, value: Any, owner: type) -> Any:
    if name in _DECODERS and value:
        raise ValueError(
            f"{name} is {value!r} in {owner.__name__}; LION is an encoder that reads both directions. Leave it out, or "
            "choose a decoder such as GPT-2."
        )
    if name in _PLAIN:
        return _PLAIN[name](value)
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
