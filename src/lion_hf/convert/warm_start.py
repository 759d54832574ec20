"""Warm starts: the parts that `from_encoder`, `from_bert` and `from_vit` share.

Embeddings, projections, MLPs, norms and heads are copied. Decays are new, and the operator uses queries and keys in a
new way, so a short training must follow; `hidden_state_distillation_loss` helps with it. Layers in `softmax_layers`
compute exactly what they computed in the source.

Decays start from windows. With a decay lambda, the weights that a token gives to the tokens on both sides sum to

    W = 1 + 2 (lambda + lambda^2 + ...) = (1 + lambda) / (1 - lambda),

so a head with lambda = (W - 1) / (W + 1) reads about W tokens. By default, windows are spread geometrically over the
heads of each layer.

- LION-D: `decay_logit = logit(lambda) = log((W - 1) / 2)`.
- LION-S: the bias of `decay_proj` is minus that value and its weight is 0, so every token starts with the same decay.
  The gradient of the weight is the gate's times the input. It is not 0, so decays of tokens differ after one step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..hub import hint_if_missing
from ..models.configuration_lion import LionConfig, LionVisionConfig
from ..models.lion_layers import stays_float32
from ..nn.mixer import Mixer
from .families import REFUSED, Family, refusal


logger = logging.get_logger(__name__)

# Parts of an encoder that every source has.
_COPIED = ("embeddings.", "layers.", "norm.")
# Options of the structure that a warm start sets anew.
MADE_ANEW = (
    "mask_type", "order", "pos_emb", "layer_norm_after", "softmax_layers", "gate_eps", "short_conv", "token_shift",
    "output_gate", "output_norm",
)  # fmt: skip


def hidden_state_distillation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """Measure the relative distance between the hidden states of a student and a teacher.

    The distance of a row is the mean over layers and real tokens of::

        ||student - teacher||^2 / ||teacher||^2

    Dividing by the norm gives all layers and tokens the same weight. The embeddings count as the first layer.

    Args:
        student: hidden states, each (batch, length, hidden_size), as returned with `output_hidden_states=True`.
        teacher: as many hidden states of the same shapes. No gradient flows into them.
        attention_mask: (batch, length), 1 for real tokens. Default: all tokens are real.

    Returns:
        The distances, of shape (batch,), in float32 or wider; 0 for a row without real tokens. Use their mean as a
        loss.

    Raises:
        ValueError: if the number or the shapes of the hidden states differ.
    """
    shapes = [[tuple(x.shape) for x in states] for states in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the student has {len(student)} hidden states of {shapes[0][:1]}, the teacher {len(teacher)} of "
            f"{shapes[1][:1]}; number and shapes must be equal."
        )
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    error = 0
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.detach().to(dtype)
        squares = (ours.to(dtype) - theirs).square().sum(-1)
        error = error + squares / theirs.square().sum(-1).clamp(min=torch.finfo(dtype).tiny) / len(student)
    real = torch.ones_like(error) if attention_mask is None else attention_mask
    return error.masked_fill(real == 0, 0).sum(1) / real.to(dtype).sum(1).clamp(min=1)


def load_source(
    given: PreTrainedModel | str | Path,
    families: Mapping[str, Family],
    model_class: type[PreTrainedModel] | None,
) -> tuple[PreTrainedModel, Family]:
    """Return the source and its family. A path is loaded as the counterpart of `model_class`, or else as the class that
    was saved."""
    while isinstance(inside := getattr(given, "_orig_mod", getattr(given, "module", None)), nn.Module):
        given = inside  # torch.compile, DistributedDataParallel
    name = type(given).__name__ if isinstance(given, PreTrainedModel) else str(given)
    config = given.config if isinstance(given, PreTrainedModel) else source_config(given, families)
    if getattr(given, "is_quantized", False) or getattr(config, "quantization_config", None):
        raise ValueError(f"{name!r} is quantised, so its weights cannot be copied; give the source in full precision.")
    family = family_of(config, name, families)
    classes = family.classes
    if model_class not in (None, *classes.values()):
        names = dict.fromkeys(kind.__name__ for kind in classes.values())
        raise ValueError(f"model_class is {model_class!r}; allowed are {', '.join(names)}.")
    if isinstance(given, PreTrainedModel):
        if model_class is None and counterpart(given, classes) is None:
            raise ValueError(_no_counterpart(name, classes))
        return given, family
    if model_class is None:
        stored = (config.architectures or [next(iter(classes))])[0]
        if stored not in classes:
            raise ValueError(_no_counterpart(f"{name}, a {stored}", classes))
    else:
        stored = next(source for source, kind in classes.items() if kind is model_class)
    source, info = getattr(transformers, stored).from_pretrained(given, dtype="auto", output_loading_info=True)
    # Transformers initialises what the checkpoint lacks, such as a head, and reports it. It is not copied.
    weights = source.state_dict()
    source.load_state_dict({name: weights[name].to("meta") for name in info["missing_keys"]}, strict=False, assign=True)
    return source, family


def source_config(given: str | Path, families: Mapping[str, Family]) -> PreTrainedConfig:
    """Return the configuration at a path, without running code that came with it.

    Raises:
        ValueError: if a model of its kind is not supported.
        OSError: if there is no model at the path.
    """
    if (hint := hint_if_missing(given)) is not None:
        raise FileNotFoundError(f"{str(given)!r} is neither a folder nor a name on the Hub{hint or '.'}")
    stored, _ = PreTrainedConfig.get_config_dict(given)
    if stored.get("model_type") in REFUSED:  # among them kinds that Transformers does not know
        raise ValueError(refusal(str(given), stored["model_type"], families))
    return AutoConfig.from_pretrained(given)


def family_of(config: PreTrainedConfig, name: str, families: Mapping[str, Family]) -> Family:
    """Return the family of a configuration. Raises ValueError if it is none of `families`."""
    if config.model_type in families:
        return families[config.model_type]
    if len(families) > 1:
        raise ValueError(refusal(name, config.model_type, families))
    ((model_type, family),) = families.items()
    raise ValueError(
        f"{name!r} is a {config.model_type!r} model; only {model_type!r} models ({', '.join(family.classes)}) are "
        "supported here. Use from_bert for model_type 'bert', from_vit for 'vit', from_encoder for others."
    )


def counterpart(source: PreTrainedModel, classes: Mapping[str, type]) -> type[PreTrainedModel] | None:
    """Return the LION class that is built from a source by default, or None if it has no counterpart."""
    return next((classes[kind.__name__] for kind in type(source).__mro__ if kind.__name__ in classes), None)


def _no_counterpart(name: str, classes: Mapping[str, type]) -> str:
    return (
        f"{name} has no counterpart in LION; classes with one are {', '.join(classes)}. Give model_class, such as "
        f"{next(iter(classes.values())).__name__} for the encoder alone."
    )


def config_options(
    decided: dict[str, object], shared: dict[str, object], overrides: dict[str, object]
) -> dict[str, object]:
    """Merge the options that LION takes from the configuration of its source with the user's.

    Args:
        decided: options that the copied weights determine; overriding one raises ValueError.
        shared: options that may be overridden.
        overrides: the user's options.
    """
    for name, value in overrides.items():
        if name in decided:
            raise ValueError(
                f"{name}={value!r} cannot be chosen: the copied weights determine it ({name}={decided[name]!r})."
            )
    if not {"num_labels", "id2label", "label2id"}.isdisjoint(overrides):  # the source's classes would contradict these
        shared = {name: value for name, value in shared.items() if name not in ("id2label", "label2id")}
    return decided | shared | overrides


def new_config(
    family: Family, mask_type: str, decided: dict[str, object], free: Sequence[str] = (), **options: object
) -> LionConfig | LionVisionConfig:
    """Build a configuration; invalid options raise ValueError, as all other arguments of a warm start do.

    An option that decides which parameters exist, or what they mean, must have the value in `decided`, or else its
    default, except for those in `MADE_ANEW` and `free`."""
    config_class = LionConfig if family.kind == "text" else LionVisionConfig
    try:
        config = config_class(mask_type=mask_type, **options)
        defaults = config_class(mask_type=mask_type, **decided).structure()
    except StrictDataclassError as error:  # the reason is in its cause
        raise ValueError(str(error.__cause__ or error)) from error
    for name, value in config.structure().items():
        if name not in (*MADE_ANEW, *free) and value != defaults[name]:
            raise ValueError(
                f"{name}={value!r} cannot be chosen: the copied weights require {name}={defaults[name]!r}."
            )
    return config


def filled(model: PreTrainedModel, source: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Copy the source's weights, dtype and device to the model; warn about weights that are not copied or are new."""
    if model.base_model is model:
        weights = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in weights.items()}
    model.to(source.dtype)
    for name, parameter in model.named_parameters():
        if stays_float32(model, name) and source.dtype != torch.float64:  # a decay close to 1 needs the bits
            parameter.data = parameter.data.float()
    own = model.state_dict()
    weights = {**_biases_of_0(own, weights), **weights}
    absent = {name for name, x in weights.items() if x.is_meta}
    weights = {name: x for name, x in weights.items() if name not in absent}
    fitting = {name: x for name, x in weights.items() if name in own and own[name].shape == x.shape}
    missing = model.load_state_dict(fitting, strict=False).missing_keys
    new = [name for name in missing if not (name in absent or name.startswith(tuple(_made_anew(model))))]
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    if alien := [name for name in new if name.startswith(tuple(f"{inside}{part}" for part in _COPIED))]:
        raise ValueError(
            f"{type(source).__name__} has no weight for {alien[0]} under a name that is known here; Transformers "
            f"{transformers.__version__} may name it otherwise. Install the version that lion_hf is tested with."
        )
    if lost := sorted(weights.keys() - fitting.keys()):
        logger.warning(f"{type(model).__name__} does not use these weights of {type(source).__name__}: {lost}")
    if new:
        logger.warning(f"These weights are not in {type(source).__name__} and are newly initialised: {new}")
    return model.to(source.device).eval()


def _biases_of_0(own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return biases of 0 for layers that have none in the source, but one here."""
    weight_of = {name: f"{name.removesuffix('bias')}weight" for name in own if name.endswith(".bias")}
    return {
        name: torch.zeros_like(own[name])
        for name, weight in weight_of.items()
        if weight in weights and name not in weights
    }


def _made_anew(model: PreTrainedModel) -> list[str]:
    """Return the prefixes of weights that no source has: of the variant, its options and the norm after mixing."""
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, Mixer)}
    return [f"{name}.{own}" for name, mixer in mixers.items() for own in (*mixer.weight_names(), "norm.")]
