"""Warm start: what [`from_bert`] and [`from_vit`] share.

Embeddings, projections, MLPs, norms and heads are copied. Decays are new, and so is what the operator makes of queries
and keys, so a short training has to follow; [`hidden_state_distillation_loss`] helps with it. Layers in
`softmax_layers` compute exactly what they did before.

Decays start from windows. The weights that a token gives to all others in both directions sum to

    W = 1 + 2 (lambda + lambda^2 + ...) = (1 + lambda) / (1 - lambda),   so   lambda = (W - 1) / (W + 1)

makes a head that reads about W tokens. LION-D: `decay_logit = logit(lambda) = log((W - 1) / 2)`. LION-S: the bias of
`decay_proj` is minus that and its weight 0, so that every token starts with the same decay; the weight's gradient, the
gate's times the input, is not 0, and separates tokens from the first step on. By default windows are spread
geometrically over the heads of each layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.configuration_lion import LionConfig, LionVisionConfig
from ..models.lion_layers import stays_float32
from ..nn.mixer import Mixer


logger = logging.get_logger(__name__)

# Options that the copied weights decide.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
# Options of the structure that a warm start does not take from its source.
MADE_ANEW = ("mask_type", "order", "pos_emb", "layer_norm_after", "softmax_layers", "gate_eps")
# Options that both kinds of encoders have, and that may be overridden.
SHARED = ("hidden_act", "hidden_dropout_prob", "initializer_range", "id2label", "label2id", "problem_type")


def head_windows(windows: Sequence[float], heads: int) -> Tensor:
    """One window per head, (heads,) in float64: `windows` itself, or spread geometrically from the smallest to the
    largest where it holds these two.

    Raises:
        ValueError: for any other number of windows, and for windows that are not finite numbers above 1.
    """
    try:
        given = torch.tensor(list(windows), dtype=torch.float64)
    except (TypeError, ValueError, OverflowError):  # no sequence, or none of numbers
        given = torch.empty(0)
    if given.shape not in ((2,), (heads,)) or not bool(((given > 1) & given.isfinite()).all()):
        raise ValueError(
            f"windows is {windows!r}; it must be (smallest, largest) or {heads} numbers, one per head, each a finite "
            "number of tokens above 1."
        )
    if len(given) == heads:
        return given
    return torch.logspace(0, 1, heads, base=float(given[1] / given[0]), dtype=torch.float64) * given[0]


def hidden_state_distillation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """How far a student's hidden states are from its teacher's: per row, the mean over layers and real tokens of

        |student - teacher|^2 / |teacher|^2 ,

    so that neither large layers nor large tokens count more than others. The embeddings are the first "layer".

    Args:
        student: hidden states, each (batch, length, hidden_size), as `output_hidden_states=True` returns them.
        teacher: the same number of the same shapes. No gradient flows into them.
        attention_mask: (batch, length), 1 for real tokens; all by default.

    Returns:
        (batch,), in float32 or wider; a row without a real token is 0. Take the mean over rows for a loss.

    Raises:
        ValueError: for hidden states that do not match.
    """
    shapes = [[tuple(x.shape) for x in states] for states in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the student has {len(student)} hidden states of {shapes[0][:1]}, the teacher {len(teacher)} of "
            f"{shapes[1][:1]}; they must be as many, of the same shapes."
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
    model_type: str,
    classes: Mapping[str, type],
    model_class: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    """The source itself, or from a path: as the counterpart of `model_class`, else of the class it was saved from."""
    if model_class not in (None, *classes.values()):
        names = dict.fromkeys(kind.__name__ for kind in classes.values())
        raise ValueError(f"model_class is {model_class!r}; allowed are {', '.join(names)}.")
    while isinstance(inside := getattr(given, "_orig_mod", getattr(given, "module", None)), nn.Module):
        given = inside  # torch.compile, DistributedDataParallel
    config = given.config if isinstance(given, PreTrainedModel) else AutoConfig.from_pretrained(given)
    name = type(given).__name__ if isinstance(given, PreTrainedModel) else str(given)
    if getattr(given, "is_quantized", False) or getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name!r} is quantised, and its weights are no longer numbers to copy; give the source in full precision."
        )
    if config.model_type != model_type:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} model; only {model_type!r} models ({', '.join(classes)}) can be "
            "carried over here. from_bert takes model_type 'bert', from_vit 'vit'."
        )
    if isinstance(given, PreTrainedModel):
        if model_class is None and counterpart(given, classes) is None:
            raise ValueError(_no_counterpart(name, classes))
        return given
    if model_class is None:
        stored = (config.architectures or [next(iter(classes))])[0]
        if stored not in classes:
            raise ValueError(_no_counterpart(f"{name}, a {stored}", classes))
    else:
        stored = next(source for source, kind in classes.items() if kind is model_class)
    source, info = getattr(transformers, stored).from_pretrained(given, dtype="auto", output_loading_info=True)
    # What the checkpoint lacks, such as a head, was made up, as Transformers says; without values it is not copied.
    weights = source.state_dict()
    source.load_state_dict({name: weights[name].to("meta") for name in info["missing_keys"]}, strict=False, assign=True)
    return source


def counterpart(source: PreTrainedModel, classes: Mapping[str, type]) -> type[PreTrainedModel] | None:
    """The LION class that a source becomes by default; None where it has no counterpart."""
    return next((classes[kind.__name__] for kind in type(source).__mro__ if kind.__name__ in classes), None)


def _no_counterpart(name: str, classes: Mapping[str, type]) -> str:
    return (
        f"{name} has no counterpart in LION; those that have are {', '.join(classes)}. Say what is wanted by "
        f"model_class, such as {next(iter(classes.values())).__name__} for the encoder alone."
    )


def config_options(
    source: PreTrainedConfig, sizes: Sequence[str], shared: Sequence[str], overrides: dict[str, object]
) -> dict[str, object]:
    """The options that a LION takes over from the configuration of its source, with the user's.

    Args:
        source: the source's configuration.
        sizes: options that the copied weights decide; an override of one raises ValueError.
        shared: options that both have and that may be overridden.
        overrides: the user's.
    """
    decided = [name for name in overrides if name in sizes]
    if decided:
        raise ValueError(
            f"{decided[0]}={overrides[decided[0]]!r} cannot be chosen: the copied weights decide it "
            f"({decided[0]}={getattr(source, decided[0])!r})."
        )
    if not {"num_labels", "id2label", "label2id"}.isdisjoint(overrides):  # the source's classes would contradict them
        shared = [name for name in shared if name not in ("id2label", "label2id")]
    return {name: getattr(source, name) for name in (*sizes, *shared)} | overrides


def new_config(config_class: type, mask_type: str, **options: object) -> LionConfig | LionVisionConfig:
    """A configuration; what is wrong with its options is a ValueError, as for all other arguments of a warm start.

    The blocks of a source are those of the configuration's defaults. So every option that decides the parameters of a
    model, or what they mean, must keep its default, but for those that a warm start makes anew."""
    try:
        config = config_class(mask_type=mask_type, **options)
        defaults = config_class(mask_type=mask_type).structure()
    except StrictDataclassError as error:  # what is wrong stands in its cause
        raise ValueError(str(error.__cause__ or error)) from error
    for name, value in config.structure().items():
        if name not in MADE_ANEW and value != defaults[name]:
            raise ValueError(
                f"{name}={value!r} cannot be chosen: the copied weights are of blocks with {name}={defaults[name]!r}."
            )
    return config


def filled(model: PreTrainedModel, source: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model with the source's weights, dtype and device; says what could not be carried over and what is new."""
    if model.base_model is model:
        weights = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in weights.items()}
    model.to(source.dtype)
    for name, parameter in model.named_parameters():
        if stays_float32(model, name) and source.dtype != torch.float64:  # a decay close to 1 needs the bits
            parameter.data = parameter.data.float()
    own = model.state_dict()
    absent = {name for name, x in weights.items() if x.is_meta}
    weights = {name: x for name, x in weights.items() if name not in absent}
    fitting = {name: x for name, x in weights.items() if name in own and own[name].shape == x.shape}
    missing = model.load_state_dict(fitting, strict=False).missing_keys
    new = [name for name in missing if not (name in absent or name.startswith(tuple(_made_anew(model))))]
    if lost := sorted(weights.keys() - fitting.keys()):
        logger.warning(f"{type(model).__name__} has no place for these weights of {type(source).__name__}: {lost}")
    if new:
        logger.warning(f"{type(source).__name__} has no weights for these, which are newly initialised: {new}")
    return model.to(source.device).eval()


def _made_anew(model: PreTrainedModel) -> list[str]:
    """How the names of weights begin that no source has: those of the variant, and of the norm after mixing."""
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, Mixer)}
    return [f"{name}.{own}" for name, mixer in mixers.items() for own in (*mixer.weight_names(), "norm.")]


@torch.no_grad()
def set_windows(mixer: Mixer, windows: Tensor) -> None:
    """Lets each head read about so many tokens at the start, in both scans of an image."""
    for view in mixer.views():
        view.set_windows(windows)
