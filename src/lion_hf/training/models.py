"""Build the model that the arguments describe: new, with the weights of another encoder, or existing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, modeling_auto

from ..convert import config_from_bert, config_from_encoder, config_from_vit, from_bert, from_encoder, from_vit
from ..convert.encoder import FAMILIES, kept_layers
from ..models.configuration_lion import MODERN_PRESETS, PRESETS, STRUCTURAL, LionConfig, LionVisionConfig
from ..models.lion_presets import preset_options
from ..nn.variants import VARIANTS
from .arguments import LIVE_OPTIONS, ModelArguments
from .errors import UserError, require_folder_or_hub_name, user_errors


# All presets by name, those of the paper first.
NAMED = {**PRESETS, **MODERN_PRESETS}
LION_TYPES = ("lion", "lion_vision")
# Functions that derive a configuration, and a model, from sources of which all layers become LION by default.
ALL_BECOME_LION = {"bert": (config_from_bert, from_bert), "vit": (config_from_vit, from_vit)}
# Types of baselines that the size flags fit, for text and for images.
BASELINES = {"lion": ("bert", "modernbert"), "lion_vision": ("vit", "deit")}
# Models of an Auto class, in words.
PURPOSES = {
    "AutoModel": "a model",
    "AutoModelForMaskedLM": "a text model that can fill masks",
    "AutoModelForSequenceClassification": "a text model",
    "AutoModelForImageClassification": "an image model",
}
LABEL_OPTIONS = ("id2label", "label2id", "problem_type", "num_labels")
# Options that only LION has; new models of other types are built without their defaults.
LION_OPTIONS = (*STRUCTURAL, "cls_tok", "drop_path_rate", "classifier_pooling", "linear_rope_theta")
# The new text model of the scripts if no flag says otherwise. The mean of the tokens and rotary positions, which the
# models of the paper do not have, make the difference on small data (docs/results.md).
SMALL_TEXT_MODEL = {
    "mask_type": "selective",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "classifier_pooling": "mean",
    "linear_rope_theta": 10000.0,
}
# The variants that were compared with and without rotary positions. Others have the default of their own.
ROTATED = ("lit", "decay", "selective")


def existing_config(name_or_path: str, auto_class, flag: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a checkpoint, by Hub name or folder, that `auto_class` can load.

    Messages about a missing folder start with the `flag`.
    """
    if Path(name_or_path).exists() and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(f"{name_or_path!r} is not a checkpoint: it has no config.json")
    require_folder_or_hub_name(name_or_path, flag)
    with user_errors(f"cannot load {name_or_path!r}", OSError, ValueError, StrictDataclassError):
        config = AutoConfig.from_pretrained(name_or_path)
    if type(config) not in auto_class._model_mapping:
        raise UserError(
            f"{name_or_path!r} is a {config.model_type!r} model, which {auto_class.__name__} cannot load: "
            f"this script requires {PURPOSES[auto_class.__name__]}"
        )
    return config


def require_head(config: PreTrainedConfig, auto_class, name: str) -> None:
    """Raise a `UserError` for a model without the head that a script evaluates, which would be random."""
    wanted = auto_class.__name__.removeprefix("AutoModel")
    heads = {found[0] for x in config.architectures or [] if (found := re.search(r"(For[A-Z]\w+|Model)$", x))}
    # Names of custom classes do not reveal their head.
    heads &= {"Model"} | {x.removeprefix("AutoModel") for x in modeling_auto.__all__ if x.startswith("AutoModelFor")}
    if heads and not heads & {wanted, "ForPreTraining"}:
        raise UserError(
            f"{name!r} holds {', '.join(config.architectures)}, which has no trained head for this script. Train it "
            "first, without --do_train false"
        )


def build_model(
    auto_class, model_type: str, model: ModelArguments, defaults: dict[str, Any], fixed: dict[str, Any]
) -> PreTrainedModel:
    """Return the model to train: existing, with the weights of another encoder, a preset, or of the sizes of the flags.

    Args:
        auto_class: an Auto class such as `AutoModelForMaskedLM`.
        model_type: "lion" or "lion_vision"; `model.model_type` overrides it.
        model: the arguments.
        defaults: options of a new model that presets and flags override.
        fixed: options that follow from the data, such as the size of the vocabulary.
    """
    config = known_config(auto_class, model_type, model, defaults, fixed)
    if model.warm_start:
        return _warm_started(auto_class, model_type, model, config, fixed)
    if not model.model_name_or_path:
        with user_errors("wrong model options", ValueError):
            return auto_class.from_config(config)
    options = {k: v for k, v in fixed.items() if k in LABEL_OPTIONS}
    options |= {k: v for k, v in fixed.items() if k == "attention_probs_dropout_prob" and hasattr(config, k)}
    options |= {k: v for k, v in model.overrides().items() if k in LIVE_OPTIONS}
    if config.model_type in LION_TYPES:
        options["format"] = model.format
    with user_errors(f"cannot load {model.model_name_or_path!r}", OSError, ValueError, StrictDataclassError):
        return auto_class.from_pretrained(
            model.model_name_or_path, ignore_mismatched_sizes="id2label" in fixed, **options
        )


def known_config(
    auto_class, model_type: str, model: ModelArguments, defaults: dict[str, Any], fixed: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """Return the configuration that the arguments describe, see `build_model`.

    That of an existing model is returned as stored, that of a new one with `fixed`. Called before data is read, this
    finds wrong arguments early.

    Raises:
        UserError: for options that cannot be combined, and for a checkpoint that the script cannot use.
    """
    if model.warm_start and (model.preset or model.model_type):
        first = "preset" if model.preset else "model_type"
        raise UserError(f"--warm_start determines the size and type of the model; it cannot be combined with --{first}")
    if model.model_name_or_path:
        return _config_to_go_on_with(auto_class, model)
    if model.warm_start:
        return _config_to_start_from(auto_class, model)
    allowed = (model_type, *BASELINES[model_type])
    model_type = model.model_type or model_type
    if model_type not in allowed:
        raise UserError(f"--model_type is {model_type!r}; allowed are {', '.join(allowed)}")
    options = _new_options(model_type, model, defaults)
    positions = [x["max_position_embeddings"] for x in (options, fixed or {}) if "max_position_embeddings" in x]
    options |= fixed or {}
    options |= {"max_position_embeddings": max(positions)} if positions else {}
    if model_type in LION_TYPES:
        options["format"] = model.format
    with user_errors("wrong model options", ValueError, StrictDataclassError):
        config = AutoConfig.for_model(model_type, **options)
        config.architectures = config.architectures or []  # `from_config` iterates over it for types with two classes
    return config


def _config_to_go_on_with(auto_class, model: ModelArguments) -> PreTrainedConfig:
    """Return the configuration of `--model_name_or_path`, which cannot be combined with options of a new model."""
    others = [name for name in ("warm_start", "preset", "model_type") if getattr(model, name) is not None]
    others += [name for name in model.overrides() if name not in LIVE_OPTIONS]
    first = next(iter(others), None)
    if first:
        raise UserError(f"--model_name_or_path determines the model; it cannot be combined with --{first}")
    config = existing_config(model.model_name_or_path, auto_class, "--model_name_or_path")
    live = [name for name in LIVE_OPTIONS if name in model.overrides() and not hasattr(config, name)]
    live += ["format"] if config.model_type not in LION_TYPES and model.format not in (None, "auto") else []
    if live:
        raise UserError(
            f"--{live[0]} is an option of LION; {model.model_name_or_path!r} is a {config.model_type!r} model"
        )
    return config


def _config_to_start_from(auto_class, model: ModelArguments) -> PreTrainedConfig:
    """Return the configuration of `--warm_start`; raise if no LION with the given options can start from it."""
    name = model.warm_start
    config = existing_config(name, auto_class, "--warm_start")
    if config.model_type in LION_TYPES:
        raise UserError(
            f"--warm_start: {name!r} is a LION already; to continue from a LION use --model_name_or_path instead"
        )
    with user_errors(f"cannot start from {name!r}", ValueError):
        derive, _, options = _conversion(config, model)
        derive(config, **options)
    return config


def _conversion(source: PreTrainedConfig, model: ModelArguments) -> tuple[Callable, Callable, dict[str, Any]]:
    """Return the functions that derive a configuration and a model from a source, and their options."""
    options, layers = model.overrides() | {"format": model.format}, model.layers_to_become_lion
    if source.model_type not in ALL_BECOME_LION:
        named = next((name for name in ("softmax_layers", "local_layers") if name in options), None)
        if named:
            raise UserError(
                f"--{named} cannot be combined with --warm_start of a {source.model_type!r} model; give the layers "
                "that become LION as --warm_start_layers"
            )
        return config_from_encoder, from_encoder, options | {"layers": layers}
    if layers is not None:
        if "softmax_layers" in options:
            raise UserError("--softmax_layers and --warm_start_layers decide the same; give one of them")
        family = FAMILIES[source.model_type]
        options["softmax_layers"], _ = kept_layers(family, source, source.num_hidden_layers, layers)
    return *ALL_BECOME_LION[source.model_type], options


def _new_options(model_type: str, model: ModelArguments, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a new model: those of the preset, or else the defaults, and those given by flags."""
    overrides = model.overrides()
    if model_type not in LION_TYPES:
        overrides = _options_of_baseline(model_type, model)
        defaults = {name: value for name, value in defaults.items() if name not in LION_OPTIONS}
    presets = [name for name, sizes in NAMED.items() if ("patch_size" in sizes) == (model_type == "lion_vision")]
    if not model.preset:
        overrides = {**defaults, **overrides}
        by_default = "linear_rope_theta" in defaults and "linear_rope_theta" not in model.overrides()
        if by_default and not _rotates_by_default(overrides):
            del overrides["linear_rope_theta"]
    elif model.preset.lower() not in presets:
        raise UserError(f"--preset is {model.preset!r}; allowed are {', '.join(presets)}")
    if "hidden_size" in overrides:
        overrides.setdefault("intermediate_size", 4 * overrides["hidden_size"])
    return preset_options(NAMED[model.preset.lower()], overrides) if model.preset else overrides


def _rotates_by_default(options: dict[str, Any]) -> bool:
    """Whether the variant, in any of its spellings, is one of `ROTATED`, and heads have an even width."""
    given = str(options.get("mask_type")).lower()
    name = next((name for name, cls in VARIANTS.items() if given in (name, *cls.spellings)), None)
    width = options.get("key_dim") or options["hidden_size"] // options["num_attention_heads"]
    return name in ROTATED and width % 2 == 0


def _options_of_baseline(model_type: str, model: ModelArguments) -> dict[str, Any]:
    """Return the given options; raise a `UserError` for one that the baseline does not have."""
    overrides = model.overrides()
    known = CONFIG_MAPPING[model_type].__dataclass_fields__
    foreign = [name for name in LION_OPTIONS if name in overrides and name not in known]
    foreign += ["preset"] if model.preset else ["format"] if model.format not in (None, "auto") else []
    if foreign:
        raise UserError(f"--{foreign[0]} is an option of LION; a {model_type!r} model does not have it")
    foreign = next((name for name in overrides if name not in known), None)
    if foreign:
        raise UserError(f"--{foreign} is not an option of a {model_type!r} model")
    if "hidden_dropout_prob" in overrides:  # the default of attention dropout is 0 for LION only
        overrides["attention_probs_dropout_prob"] = overrides["hidden_dropout_prob"]
    return overrides


def _warm_started(
    auto_class, model_type: str, model: ModelArguments, source: PreTrainedConfig, fixed: dict[str, Any]
) -> PreTrainedModel:
    """Return a LION with the weights of `--warm_start`, in float32 for training."""
    model_class = auto_class._model_mapping[{"lion": LionConfig, "lion_vision": LionVisionConfig}[model_type]]
    _, start, options = _conversion(source, model)
    options |= {k: v for k, v in fixed.items() if k in LABEL_OPTIONS}
    with user_errors(f"cannot start from {model.warm_start!r}", OSError, ValueError, StrictDataclassError):
        return start(model.warm_start, model_class=model_class, **options).float()
