"""LION text encoders that begin with the weights of a BERT instead of random ones.

    from lion_hf.convert import from_bert

    model = from_bert("google-bert/bert-base-uncased", "selective")  # LionForMaskedLM, as the source is BertForMaskedLM

What is copied, and how decays start, is told in warm_start.py. Text does not normalise its rows: a plain copy would add
up L signed products where softmax took a mean, and comes out a hundred times too large and uncorrelated with what it
was. So text starts from the first-order expansion of softmax at a higher temperature,

    softmax_j(x_ij) ~ (1 + beta x_ij) M_ij / N,   x_ij = q_i . k_j / sqrt(d),   beta = 1/4,

where N is the sum of a row of M in a text of `length` tokens. Both lie in the copied weights: in each head one
direction, the one that queries and keys use least, is given up and holds the constant 1, and query, key and value are
each multiplied by N^(-1/3), evenly, so that no projection becomes so small that an optimizer step overwrites it. The
LayerNorm after mixing (`layer_norm_after`), on by default here for every variant, starts with the size that the mixed
values had: the start is no nearer with it, but training bears larger learning rates, since sums can no longer grow.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_lion import LionConfig
from ..models.lion_options import plain
from ..models.modeling_lion import (
    LionForMaskedLM,
    LionForMultipleChoice,
    LionForQuestionAnswering,
    LionForSequenceClassification,
    LionForTokenClassification,
    LionModel,
)
from ..nn.mixer import Mixer
from .names import convert_text_state_dict, without_wrappers
from .warm_start import (
    SHARED,
    SIZES,
    config_options,
    counterpart,
    filled,
    head_windows,
    load_source,
    new_config,
    set_windows,
)


# The class that each class of a source becomes. Of several sources of one class the first is its counterpart.
CLASSES = {
    "BertModel": LionModel,
    "BertForMaskedLM": LionForMaskedLM,
    "BertForPreTraining": LionForMaskedLM,
    "BertForSequenceClassification": LionForSequenceClassification,
    "BertForTokenClassification": LionForTokenClassification,
    "BertForQuestionAnswering": LionForQuestionAnswering,
    "BertForMultipleChoice": LionForMultipleChoice,
}

_SIZES = (*SIZES, "vocab_size", "max_position_embeddings", "type_vocab_size", "tie_word_embeddings")
_SHARED = (*SHARED, "pad_token_id", "bos_token_id", "eos_token_id", "classifier_dropout")

# Share of the logits in the expansion of softmax: at 1, outliers among them swamp the mean; at 0, heads see distance
# only.
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
    source = load_source(model_or_path, "bert", CLASSES, model_class)
    config = config_from_bert(
        source.config, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **config_overrides
    )
    windows = head_windows((16, 512) if windows is None else windows, config.num_attention_heads)
    length = plain(length)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r}; it must be a whole number of tokens, at least 1.")
    model_class = model_class or counterpart(source, CLASSES)
    with_head = counterpart(source, CLASSES) is model_class
    model = filled(model_class(config), source, _weights(source, config, with_head))
    encoder, norm = model.base_model, model.base_model.embeddings.norm
    for layer in encoder.layers:
        if isinstance(layer.mixer, Mixer):
            set_windows(layer.mixer, windows)
            _expand_softmax(layer.mixer, windows, length, norm)
        norm = layer.mlp_norm
    return model


def config_from_bert(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    **config_overrides,
) -> LionConfig:
    """The configuration of what [`from_bert`] makes of a source with this one. It needs no weights, so that wrong
    options can be found early; they raise the same ValueError, and the arguments are the same.
    """
    _require_encoder(source)
    options = config_options(source, _SIZES, _SHARED, {"layer_norm_after": True, **config_overrides})
    return new_config(LionConfig, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **options)


def _require_encoder(config: PreTrainedConfig) -> None:
    for name, allowed in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        value = getattr(config, name, allowed)
        if value != allowed:
            raise ValueError(
                f"the source has {name}={value!r}, which LION, an encoder with absolute positions or none, cannot "
                f"carry over; only {name}={allowed!r} is allowed."
            )


def _weights(source: PreTrainedModel, config: LionConfig, with_head: bool) -> dict[str, Tensor]:
    """The source's state dict by the names of LION, with the prefix that heads have."""
    prefix = "" if hasattr(source, "bert") else "bert."
    weights = {f"{prefix}{name}": tensor for name, tensor in without_wrappers(source.state_dict()).items()}
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith("bert.") or (with_head and not name.startswith("cls.seq_relationship."))
    }
    answers = {name: weights.pop(name) for name in list(weights) if name.startswith("qa_outputs.")}
    return convert_text_state_dict(weights, config) | answers


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
    decay = (windows - 1) / (windows + 1) if mixer.variant.decay else torch.ones_like(windows)
    distance = torch.arange(1, length, dtype=torch.float64)
    return 1 + 2 * ((1 - distance / length) * decay.unsqueeze(1) ** distance).sum(1)


def _least_used(query: Tensor, key: Tensor) -> Tensor:
    """Per head, the unit vector (heads, head_dim) along which queries and keys together vary least, for inputs that
    vary alike in every feature. Weights are (heads, head_dim, hidden_size)."""
    spread = sum(x @ x.transpose(1, 2) / x.square().sum((1, 2))[:, None, None] for x in (query, key))
    return torch.linalg.eigh(spread).eigenvectors[..., 0]


def _value_size(v_proj: nn.Linear, norm_before: nn.LayerNorm) -> Tensor:
    """Root mean square of a value, for inputs that the LayerNorm before it scales and shifts, else independent."""
    weight, bias, scale, shift = (x.double() for x in (*v_proj.parameters(), *norm_before.parameters()))
    mean, variance = weight @ shift + bias, weight.square() @ scale.square()
    return (variance + mean.square()).mean().sqrt()
