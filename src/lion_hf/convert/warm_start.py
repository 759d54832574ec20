"""Warm start: LION encoders that begin with the weights of a BERT or a ViT instead of random ones.

    from lion_hf.warm_start import from_bert

    model = from_bert("google-bert/bert-base-uncased", "selective")  # LionForMaskedLM, as the source is BertForMaskedLM

Embeddings, projections, MLPs, norms and heads are copied. Decays are new, and so is what the operator makes of queries
and keys, so a short training has to follow; [`hidden_state_distillation_loss`] helps with it. Layers in
`softmax_layers` compute exactly what they did before.

Decays start from windows. The weights that a token gives to all others in both directions sum to

    W = 1 + 2 (lambda + lambda^2 + ...) = (1 + lambda) / (1 - lambda),   so   lambda = (W - 1) / (W + 1)

makes a head that reads about W tokens. LION-D: `decay_logit = logit(lambda) = log((W - 1) / 2)`. LION-S: the bias of
`decay_proj` is minus that and its weight 0, so that every token starts with the same decay; the weight's gradient, the
gate's times the input, is not 0, and separates tokens from the first step on. By default windows are spread
geometrically over the heads of each layer.

Images normalise their rows over positive weights, as softmax does, and need nothing more. Text does neither: a plain
copy would add up L signed products where softmax took a mean, and comes out a hundred times too large and uncorrelated
with what it was. So text starts from the first-order expansion of softmax at a higher temperature,

    softmax_j(x_ij) ~ (1 + beta x_ij) M_ij / N,   x_ij = q_i . k_j / sqrt(d),   beta = 1/4,

where N is the sum of a row of M in a text of `length` tokens. Both lie in the copied weights: in each head one
direction, the one that queries and keys use least, is given up and holds the constant 1, and query, key and value are
each multiplied by N^(-1/3), evenly, so that no projection becomes so small that an optimizer step overwrites it. The
LayerNorm after mixing (`layer_norm_after`), on by default here for every variant, starts with the size that the mixed
values had: the start is no nearer with it, but training bears larger learning rates, since sums can no longer grow.
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
from ..models.modeling_lion import (
    LionForMaskedLM,
    LionForMultipleChoice,
    LionForQuestionAnswering,
    LionForSequenceClassification,
    LionForTokenClassification,
    LionModel,
)
from ..models.modeling_lion_vision import LionForImageClassification, LionVisionModel
from ..nn.mixer import Mixer
from .names import convert_text_state_dict


logger = logging.get_logger(__name__)

# The class that each class of a source becomes. Of several sources of one class the first is its counterpart.
_BERT_CLASSES = {
    "BertModel": LionModel,
    "BertForMaskedLM": LionForMaskedLM,
    "BertForPreTraining": LionForMaskedLM,
    "BertForSequenceClassification": LionForSequenceClassification,
    "BertForTokenClassification": LionForTokenClassification,
    "BertForQuestionAnswering": LionForQuestionAnswering,
    "BertForMultipleChoice": LionForMultipleChoice,
}
_VIT_CLASSES = {"ViTModel": LionVisionModel, "ViTForImageClassification": LionForImageClassification}

# Options that the copied weights decide.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
_BERT_SIZES = (*_SIZES, "vocab_size", "max_position_embeddings", "type_vocab_size", "tie_word_embeddings")
_VIT_SIZES = (*_SIZES, "image_size", "patch_size", "num_channels", "qkv_bias")
# Options that both kinds of encoders have, and that may be overridden.
_SHARED = ("hidden_act", "hidden_dropout_prob", "initializer_range", "id2label", "label2id", "problem_type")
_BERT_SHARED = (*_SHARED, "pad_token_id", "bos_token_id", "eos_token_id", "classifier_dropout")

_VIT_NAMES = (
    (".attention.", ".mixer."),
    (".layernorm_before.", ".mixer_norm."),
    (".layernorm_after.", ".mlp_norm."),
    (".fc1.", ".up_proj."),
    (".fc2.", ".down_proj."),
)

# Share of the logits in the expansion of softmax: at 1, outliers among them swamp the mean; at 0, heads see distance only.
_LOGIT_SHARE = 0.25
# Root mean square of what softmax attention mixes, over that of one value: averaging leaves about a third.
_MIXED_SHARE = 0.35


def from_bert(
    model_or_path: PreTrainedModel | str | Path,
    mask_type: str = "selective",
    *,
    model_class: type[PreTrainedModel] | None = None,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    windows: Sequence[float] | None = None,
    length: int = 128,
    **config_overrides,
) -> PreTrainedModel:
    """A LION text encoder with the weights of a BERT; see the head of this module for what is copied and what is new.

    ```python
    source = "google-bert/bert-base-uncased"
    model = from_bert(source, "decay", model_class=LionForSequenceClassification, num_labels=3)
    model.save_pretrained("lion-bert")
    AutoTokenizer.from_pretrained(source).save_pretrained("lion-bert")  # the tokenizer stays the source's
    ```

    Args:
        model_or_path: a BERT of Transformers, or its Hub name or folder.
        mask_type: as in [`LionConfig`].
        model_class: class of the result, such as `LionForSequenceClassification`; by default the source's counterpart
            (`BertForMaskedLM` becomes `LionForMaskedLM`). A head that the source lacks is newly initialised.
        softmax_layers: layers, counted from 0, that stay as they are. With all of them and `pos_emb`, the result
            computes what the source does.
        pos_emb: keep the source's position table. Without it any length is taken; LION layers miss it little at the
            start, softmax layers, which know no order, miss it.
        windows: tokens that a head reads at the start, more than 1: (smallest, largest), spread geometrically over the
            heads, or one number per head. (16, 512) by default. LION-LIT has none.
        length: typical number of tokens of a text, for the scale of what is mixed.
        config_overrides: further options of [`LionConfig`] that the weights do not decide, such as `format`,
            `num_labels` or `layer_norm_after` (True unless given). Attention dropout is 0 unless given, since only the
            attention form has it.

    Returns:
        The model, in evaluation mode, with the source's dtype and device. Decays are float32 at least.

    Raises:
        ValueError: for another architecture, a decoder, relative positions, wrong windows, options that the weights
            decide, and those that [`LionConfig`] refuses.
        OSError: for a path where there is no model.
    """
    source = _load_source(model_or_path, "bert", _BERT_CLASSES, model_class)
    config = config_from_bert(
        source.config, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **config_overrides
    )
    windows = head_windows((16, 512) if windows is None else windows, config.num_attention_heads)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r}; it must be a whole number of tokens, at least 1.")
    model_class = model_class or _counterpart(source, _BERT_CLASSES)
    with_head = _counterpart(source, _BERT_CLASSES) is model_class
    model = _filled(model_class(config), source, _bert_weights(source, config, with_head))
    encoder, norm = model.base_model, model.base_model.embeddings.norm
    for layer in encoder.layers:
        if isinstance(layer.mixer, Mixer):
            _set_decays(layer.mixer, windows)
            _expand_softmax(layer.mixer, windows, length, norm)
        norm = layer.mlp_norm
    return model


def from_vit(
    model_or_path: PreTrainedModel | str | Path,
    mask_type: str = "selective",
    *,
    model_class: type[PreTrainedModel] | None = None,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    windows: Sequence[float] | None = None,
    **config_overrides,
) -> PreTrainedModel:
    """A LION image encoder with the weights of a ViT (a DeiT without distillation token is one).

    Arguments, result and errors are as in [`from_bert`], with these differences: `config_overrides` are options of
    [`LionVisionConfig`], such as `order="s"`, and `cls_tok` is True unless given; windows are (3, number of patches) by
    default and count along the scan, in both scans of a snake; queries and keys get LION's feature map, and need no
    `length`. The image processor stays the source's: `AutoImageProcessor.from_pretrained(source)`.
    """
    source = _load_source(model_or_path, "vit", _VIT_CLASSES, model_class)
    config = config_from_vit(
        source.config, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **config_overrides
    )
    patches = config.grid_size[0] * config.grid_size[1]
    windows = head_windows((3, max(4, patches)) if windows is None else windows, config.num_attention_heads)
    model_class = model_class or _counterpart(source, _VIT_CLASSES)
    model = _filled(model_class(config), source, _vit_weights(source, config))
    for layer in model.base_model.layers:
        if isinstance(layer.mixer, Mixer):
            _set_decays(layer.mixer, windows)
    return model


def config_from_bert(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    **config_overrides,
) -> LionConfig:
    """The configuration of what [`from_bert`] makes of a source with this one. It needs no weights, so that wrong options
    can be found early; they raise the same ValueError, and the arguments are the same.
    """
    _require_encoder(source)
    options = _options(source, _BERT_SIZES, _BERT_SHARED, {"layer_norm_after": True, **config_overrides})
    return _config(LionConfig, mask_type=mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **options)


def config_from_vit(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    **config_overrides,
) -> LionVisionConfig:
    """As [`config_from_bert`], for [`from_vit`]."""
    options = _options(source, _VIT_SIZES, _SHARED, {"cls_tok": True, **config_overrides})
    options["patch_size"] = _square(options["patch_size"])
    return _config(LionVisionConfig, mask_type=mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **options)


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


# --------------------------------------------------------------------------------------------------------- source


def _load_source(
    given: PreTrainedModel | str | Path,
    model_type: str,
    classes: Mapping[str, type],
    model_class: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    """The source itself, or from a path: as the counterpart of `model_class`, else of the class it was saved from."""
    if model_class not in (None, *classes.values()):
        names = dict.fromkeys(kind.__name__ for kind in classes.values())
        raise ValueError(f"model_class is {model_class!r}; allowed are {', '.join(names)}.")
    config = given.config if isinstance(given, PreTrainedModel) else AutoConfig.from_pretrained(given)
    name = type(given).__name__ if isinstance(given, PreTrainedModel) else str(given)
    if config.model_type != model_type:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} model; only {model_type!r} models ({', '.join(classes)}) can be "
            "carried over here. from_bert takes model_type 'bert', from_vit 'vit'."
        )
    if isinstance(given, PreTrainedModel):
        if model_class is None and _counterpart(given, classes) is None:
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


def _no_counterpart(name: str, classes: Mapping[str, type]) -> str:
    return (
        f"{name} has no counterpart in LION; those that have are {', '.join(classes)}. Say what is wanted by "
        f"model_class, such as {next(iter(classes.values())).__name__} for the encoder alone."
    )


def _counterpart(source: PreTrainedModel, classes: Mapping[str, type]) -> type[PreTrainedModel] | None:
    return next((classes[kind.__name__] for kind in type(source).__mro__ if kind.__name__ in classes), None)


def _require_encoder(config: PreTrainedConfig) -> None:
    for name, allowed in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        value = getattr(config, name, allowed)
        if value != allowed:
            raise ValueError(
                f"the source has {name}={value!r}, which LION, an encoder with absolute positions or none, cannot carry "
                f"over; only {name}={allowed!r} is allowed."
            )


def _options(
    source: PreTrainedConfig, sizes: Sequence[str], shared: Sequence[str], overrides: dict[str, object]
) -> dict[str, object]:
    decided = [name for name in overrides if name in sizes]
    if decided:
        raise ValueError(
            f"{decided[0]}={overrides[decided[0]]!r} cannot be chosen: the copied weights decide it "
            f"({decided[0]}={getattr(source, decided[0])!r})."
        )
    if not {"num_labels", "id2label", "label2id"}.isdisjoint(overrides):  # the source's classes would contradict them
        shared = [name for name in shared if name not in ("id2label", "label2id")]
    return {name: getattr(source, name) for name in (*sizes, *shared)} | overrides


def _config(config_class: type, **options: object) -> LionConfig | LionVisionConfig:
    try:
        return config_class(**options)
    except StrictDataclassError as error:  # what is wrong stands in its cause
        raise ValueError(str(error.__cause__ or error)) from error


def _square(patch_size: int | Sequence[int]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise ValueError(f"the source has patch_size {patch_size}; LION takes square patches only.")
    return sides.pop()


# -------------------------------------------------------------------------------------------------------- weights


def _bert_weights(source: PreTrainedModel, config: LionConfig, with_head: bool) -> dict[str, Tensor]:
    """The source's state dict by the names of LION, with the prefix that heads have."""
    prefix = "" if hasattr(source, "bert") else "bert."
    weights = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith("bert.") or (with_head and not name.startswith("cls.seq_relationship."))
    }
    answers = {name: weights.pop(name) for name in list(weights) if name.startswith("qa_outputs.")}
    return convert_text_state_dict(weights, config) | answers


def _vit_weights(source: PreTrainedModel, config: LionVisionConfig) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in source.state_dict().items():
        name = name.removeprefix("vit.")
        for old, new in _VIT_NAMES:
            name = name.replace(old, new)
        name = f"norm.{name.removeprefix('layernorm.')}" if name.startswith("layernorm.") else name
        renamed[name if name.startswith("classifier.") else f"lion_vision.{name}"] = tensor
    if not config.pos_emb:
        del renamed["lion_vision.embeddings.position_embeddings"]
    return renamed


def _filled(model: PreTrainedModel, source: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model with the source's weights, dtype and device; says what could not be carried over and what is new."""
    if model.base_model is model:
        weights = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in weights.items()}
    model.to(source.dtype)
    for name, parameter in model.named_parameters():
        if "decay_" in name and source.dtype != torch.float64:  # a decay close to 1 needs the bits
            parameter.data = parameter.data.float()
    own = model.state_dict()
    absent = {name for name, x in weights.items() if x.is_meta}
    weights = {name: x for name, x in weights.items() if name not in absent}
    fitting = {name: x for name, x in weights.items() if name in own and own[name].shape == x.shape}
    missing = model.load_state_dict(fitting, strict=False).missing_keys
    new = [name for name in missing if "decay_" not in name and ".mixer.norm." not in name and name not in absent]
    if lost := sorted(weights.keys() - fitting.keys()):
        logger.warning(f"{type(model).__name__} has no place for these weights of {type(source).__name__}: {lost}")
    if new:
        logger.warning(f"{type(source).__name__} has no weights for these, which are newly initialised: {new}")
    return model.to(source.device).eval()


# ------------------------------------------------------------------------------------------------------ new weights


@torch.no_grad()
def _set_decays(mixer: Mixer, windows: Tensor) -> None:
    """Windows of the heads, in both scans of an image."""
    for view in mixer.views():
        view.set_windows(windows)


@torch.no_grad()
def _expand_softmax(mixer: Mixer, windows: Tensor, length: int, norm_before: nn.LayerNorm) -> None:
    """Makes a text mixer's A = (1 + beta q.k / sqrt(d)) M / N, with weights of a softmax layer."""
    if mixer.norm is not None:
        mixer.norm.weight.fill_(_MIXED_SHARE * _value_size(mixer.v_proj, norm_before))
    heads = (mixer.num_heads, mixer.head_dim)
    size = _row_sums(mixer, windows, length) ** (-1 / 3)
    if mixer.norm is not None:  # only the proportions of the heads matter
        size = size / size.mean()
    query, key, value = (
        [x.detach().double().cpu().unflatten(0, heads) for x in (proj.weight, proj.bias)]
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    unit = _least_used(query[0], key[0])
    constant = mixer.head_dim**0.25 * unit  # its square times 1 / sqrt(head_dim) is 1
    for parts in (query, key):
        weight, bias = parts
        weight -= unit.unsqueeze(2) * (unit.unsqueeze(1) @ weight)
        bias -= unit * (unit * bias).sum(1, keepdim=True)
        weight *= _LOGIT_SHARE**0.5
        bias *= _LOGIT_SHARE**0.5
        bias += constant
    for proj, (weight, bias) in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj), (query, key, value), strict=True):
        proj.weight.copy_((weight * size[:, None, None]).flatten(0, 1))
        proj.bias.copy_((bias * size[:, None]).flatten())


def _row_sums(mixer: Mixer, windows: Tensor, length: int) -> Tensor:
    """Mean sum of a row of M in a text of `length` tokens, (heads,)."""
    decay = (windows - 1) / (windows + 1) if mixer.variant.decays else torch.ones_like(windows)
    distance = torch.arange(1, length, dtype=torch.float64)
    return 1 + 2 * ((1 - distance / length) * decay.unsqueeze(1) ** distance).sum(1)


def _least_used(query: Tensor, key: Tensor) -> Tensor:
    """Per head, the unit vector (heads, head_dim) along which queries and keys together vary least, for inputs that vary
    alike in every feature. Weights are (heads, head_dim, hidden_size)."""
    spread = sum(x @ x.transpose(1, 2) / x.square().sum((1, 2))[:, None, None] for x in (query, key))
    return torch.linalg.eigh(spread).eigenvectors[..., 0]


def _value_size(v_proj: nn.Linear, norm_before: nn.LayerNorm) -> Tensor:
    """Root mean square of a value, for inputs that the LayerNorm before it scales and shifts, else independent."""
    weight, bias, scale, shift = (x.double() for x in (*v_proj.parameters(), *norm_before.parameters()))
    mean, variance = weight @ shift + bias, weight.square() @ scale.square()
    return (variance + mean.square()).mean().sqrt()


__all__ = [
    "config_from_bert",
    "config_from_vit",
    "from_bert",
    "from_vit",
    "head_windows",
    "hidden_state_distillation_loss",
]
