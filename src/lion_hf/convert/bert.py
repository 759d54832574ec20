"""Warm starts of LION text encoders from the weights of a BERT.

    from lion_hf.convert import from_bert

    model = from_bert("google-bert/bert-base-uncased", "selective")  # LionForMaskedLM, for a source of BertForMaskedLM

warm_start.py describes what is copied and how decays start. Text layers do not normalise the rows of their attention
matrix. With plain copies of the projections they would sum L signed products where softmax takes a mean: the result
would be about a hundred times too large, and uncorrelated with the source's. Text layers therefore start from the
first-order expansion of softmax at a higher temperature,

    softmax_j(x_ij) ~ (1 + beta x_ij) M_ij / N,   x_ij = q_i . k_j / sqrt(d),   beta = 1/4,

where N is the sum of a row of M in a text of `length` tokens. The copied weights are changed to compute it:

- The constant 1: in each head, one direction of queries and keys, the least used one, is replaced by the constant 1.
- The factor 1 / N: query, key and value are each multiplied by N^(-1/3). With equal shares, no projection becomes so
  small that an optimizer step overwrites it.

The LayerNorm after mixing (`layer_norm_after`) is on by default here, for every variant. Its weight starts at the size
of the mixed values. It brings the start no closer to the source, but training tolerates larger learning rates with it,
because sums can no longer grow.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_lion import LionConfig
from ..models.lion_options import plain
from ..nn.mixer import Mixer, head_windows
from ..nn.variants import VARIANTS, variant_class
from .families import Family, weights_of
from .text_families import BERT
from .warm_start import config_options, counterpart, filled, load_source, new_config


# LION's class by the source's class. Where several sources have the same LION class, the first is its counterpart.
CLASSES = BERT.classes

# Share of the logits in the expansion of softmax (beta). At 1, outliers dominate the mean; at 0, only distance counts.
_LOGIT_SHARE = 0.25
# Root mean square of the output of softmax attention over that of a value: averaging leaves about a third.
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
    """Build a LION text encoder from the weights of a BERT.

    Embeddings, MLPs, norms and a matching head are copied. The projections of attention are copied and changed to the
    first-order expansion of softmax; decays start from `windows`. The result needs training before use.

    Example::

        source = "google-bert/bert-base-uncased"
        model = from_bert(source, "decay", model_class=LionForSequenceClassification, num_labels=3)
        model.save_pretrained("lion-bert")
        AutoTokenizer.from_pretrained(source).save_pretrained("lion-bert")  # the tokenizer is the source's

    Args:
        model_or_path: a BERT model of Transformers, its name on the Hub, or its folder.
        mask_type: the variant, as in `LionConfig`.
        model_class: class of the result, such as `LionForSequenceClassification`. Default: the source's counterpart
            (`LionForMaskedLM` for `BertForMaskedLM`). A head that the source lacks is newly initialised.
        softmax_layers: layers that keep softmax attention, counted from 0. If all layers are listed and `pos_emb` is
            True, the result computes exactly what the source computes.
        pos_emb: keep the source's position table. Without it, the model accepts any length. At the start LION layers
            lose little without it; softmax layers lose the order of the tokens.
        windows: number of tokens that a head reads at the start, above 1: (smallest, largest), spread geometrically
            over the heads, or one number per head. Default: (16, 512). Ignored for LION-LIT.
        length: typical number of tokens of a text. It sets the scale of the projections.
        config_overrides: further options of `LionConfig` that the weights do not determine, such as `format`,
            `num_labels` or `layer_norm_after` (default here: True, unless the variant has an `output_norm`). The
            default of attention dropout is 0, because only the attention form supports it.

    Returns:
        The model in evaluation mode, with the source's dtype and on its device. Decay parameters are at least float32.

    Raises:
        ValueError: if the source has another architecture, is a decoder or uses relative positions, if windows are
            invalid, or if an option is determined by the weights or rejected by `LionConfig`.
        OSError: if there is no model at the path.
    """
    source, _ = load_source(model_or_path, {"bert": BERT}, model_class)
    config = config_from_bert(
        source.config, mask_type, softmax_layers=softmax_layers, pos_emb=pos_emb, **config_overrides
    )
    return text_model(source, BERT, config, model_class, windows, length)


def config_from_bert(
    source: PreTrainedConfig,
    mask_type: str = "selective",
    *,
    softmax_layers: Sequence[int] = (),
    pos_emb: bool = True,
    **config_overrides,
) -> LionConfig:
    """Return the configuration of the model that `from_bert` would build, without loading weights.

    Use it to find invalid options early: they raise the same ValueError.

    Args:
        source: configuration of the BERT.
        mask_type: as in `from_bert`.
        softmax_layers: as in `from_bert`.
        pos_emb: as in `from_bert`.
        config_overrides: as in `from_bert`.

    Returns:
        The configuration of the LION model.

    Raises:
        ValueError: as in `from_bert`.
    """
    decided = BERT.options(source)
    return text_config(
        BERT, source, mask_type, decided, (), {"softmax_layers": softmax_layers, "pos_emb": pos_emb, **config_overrides}
    )


def text_config(
    family: Family,
    source: PreTrainedConfig,
    mask_type: str,
    decided: dict[str, object],
    free: Sequence[str],
    overrides: dict[str, object],
) -> LionConfig:
    """Return the configuration of a text model that starts from a source.

    Args:
        family: the family of the source.
        source: its configuration.
        mask_type: the variant.
        decided: options that the copied weights determine.
        free: structural options that may be chosen, besides those that every warm start sets anew.
        overrides: the options that are chosen.
    """
    normed = {}
    known = {word for name, cls in VARIANTS.items() for word in (name, *cls.spellings)}
    if isinstance(mask_type, str) and mask_type.lower() in known:  # otherwise `new_config` raises an error
        stated = overrides.get("output_norm") or variant_class(mask_type).option("output_norm")
        normed["layer_norm_after"] = stated == "none" and not overrides.get("normalize")
    options = config_options(decided, family.shared(source), {**normed, **overrides})
    return new_config(family, mask_type, decided, free, **options)


def text_model(
    source: PreTrainedModel,
    family: Family,
    config: LionConfig,
    model_class: type[PreTrainedModel] | None,
    windows: Sequence[float] | None,
    length: int,
) -> PreTrainedModel:
    """Return the model of a configuration with the weights of its source. Arguments are those of `from_bert`."""
    windows = head_windows((16, 512) if windows is None else windows, config.num_attention_heads)
    length = plain(length)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r}; it must be a whole number of tokens, at least 1.")
    head = counterpart(source, family.classes)
    model_class = model_class or head
    copied = model_class if head is model_class else None
    if copied is not None:
        family.require_head(source.config, copied)
    weights = weights_of(source, family, copied)
    if not config.pos_emb:
        weights.pop("lion.embeddings.position_embeddings.weight", None)
    model = filled(model_class(config), source, weights)
    encoder, norm = model.base_model, model.base_model.embeddings.norm
    for layer in encoder.layers:
        if config.norm_position == "pre" and layer.mixer_norm is not None:
            norm = layer.mixer_norm
        if isinstance(layer.mixer, Mixer):
            if expands(layer.mixer):
                _expand_softmax(layer.mixer, windows, length, norm)
            layer.mixer.set_windows(windows)
        norm = layer.mlp_norm
    return model


def expands(mixer: Mixer) -> bool:
    """Return whether a mixer starts from the expansion of softmax. It needs biases for the constant, and sums that are
    not normalised; the activation after a convolution would leave nothing of it."""
    return not mixer.short_conv and not mixer.normalize and mixer.q_proj.bias is not None


@torch.no_grad()
def _expand_softmax(mixer: Mixer, windows: Tensor, length: int, norm_before: nn.Module) -> None:
    """Change the softmax projections in a text mixer so that its matrix is (1 + beta q.k / sqrt(d)) M / N."""
    norm_after = mixer.out_norm if mixer.norm is None else mixer.norm
    if norm_after is not None:
        norm_after.weight.fill_(_MIXED_SHARE * _value_size(mixer.v_proj, norm_before))
    heads = (mixer.num_heads, mixer.head_dim)
    size = _row_sums(mixer, windows, length) ** (-1 / 3)
    if norm_after is not None:  # with a norm, only the ratios between heads matter
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
    """Return the mean row sum of M in a text of `length` tokens, shape (heads,)."""
    decay = (windows - 1) / (windows + 1) if mixer.variant.decay else torch.ones_like(windows)
    distance = torch.arange(1, length, dtype=torch.float64)
    return 1 + 2 * ((1 - distance / length) * decay.unsqueeze(1) ** distance).sum(1)


def _least_used(query: Tensor, key: Tensor) -> Tensor:
    """Return for each head the unit vector along which queries and keys together vary least, (heads, head_dim).

    Assumes inputs with the same variance in every feature. Weights are (heads, head_dim, hidden_size)."""
    spread = sum(x @ x.transpose(1, 2) / x.square().sum((1, 2))[:, None, None] for x in (query, key))
    return torch.linalg.eigh(spread).eigenvectors[..., 0]


def _value_size(v_proj: nn.Linear, norm_before: nn.Module) -> Tensor:
    """Return the root mean square of a value, for independent inputs scaled and shifted by the norm before."""
    weight, bias, scale = (x.double() for x in (v_proj.weight, v_proj.bias, norm_before.weight))
    shift = getattr(norm_before, "bias", None)
    mean = bias if shift is None else weight @ shift.double() + bias
    variance = weight.square() @ scale.square()
    return (variance + mean.square()).mean().sqrt()
