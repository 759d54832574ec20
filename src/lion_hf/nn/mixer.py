"""The layer in which tokens read each other: projections, a feature map, a variant and an operator."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.api import attention_scores, bidirectional_linear_attention
from ..ops.checks import values_can_be_read
from ..ops.scans import averaged_scans
from .features import FUNCTIONS
from .names import FEATURE_MAPS, require_name
from .variants import Recurrence, Variant, variant_class


Path = tuple[Tensor, Tensor]

# Dimensions of a log-decay, by what a variant states.
_LOG_DECAY_DIMS = {None: None, "head": 1, "token": 3}


class Operator(NamedTuple):
    """An operator as mixers use it.

    Args:
        run: output of one scan.
        scores: the matrix of its attention form, or None where it has none.
        average: output under the mean of the masks of several scans, or None where there is none.
    """

    run: Callable[..., Tensor]
    scores: Callable[..., Tensor] | None = None
    average: Callable[..., Tensor] | None = None


# What `Recurrence.operator` can name. A mixer trusts its own activations: NaN in one row of a batch stays there.
OPERATORS = {
    "linear_attention": Operator(
        *(partial(f, check_values=False) for f in (bidirectional_linear_attention, attention_scores, averaged_scans))
    ),
}


class TokenMixer(nn.Module):
    """Base class of the layers in which tokens read each other: heads and their projections.

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads, each `dim // heads` wide.
        qkv_bias: whether the projections of query, key and value have a bias.
    """

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool = True):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"dim {dim} is not divisible by heads {heads}; each head needs the same number of features."
            )
        self.dim, self.num_heads, self.head_dim = dim, heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.o_proj = nn.Linear(dim, dim)

    @property
    def takes_packed_rows(self) -> bool:
        """Whether several sequences may stand in one row."""
        return True

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (batch, heads, length, head_dim), of (batch, length, dim)."""
        shape = (*x.shape[:-1], self.num_heads, self.head_dim)
        return tuple(proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))


class Mixer(TokenMixer):
    """Linear attention in both directions, in place of self-attention (arXiv 2502.16249).

    ```python
    >>> mixer = lion_hf.nn.Mixer(dim=256, heads=4, variant="selective")
    >>> mixer(torch.randn(2, 1000, 256)).shape
    torch.Size([2, 1000, 256])
    ```

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads.
        variant: name of a registered variant: "lit" (no decay), "decay" (a learned decay per head), "selective" (a
            decay per token and head), or one of your own, see `register_variant`.
        feature_map: function of query and key: "identity", "elu" or "unit_silu". By default the variant's where outputs
            are normalised, else "identity".
        normalize: divide outputs by their row sums. By default as the variant states: True in the paper's variants. The
            paper's text models set it to False. Scores must be
            positive then, which "elu" and "unit_silu" see to.
        norm: LayerNorm (eps 1e-5) over all heads before the output projection.
        scans: 1, or 2 for the mean of two scans of a grid, each with decays of its own. A variant may take fewer.
        prefix_tokens: first tokens of every row that do not decay, such as the class token of an image.
        gate_eps: added to the decays of "selective" before their logarithm; 1e-7 in the authors' text models.
        qkv_bias: whether the projections of query, key and value have a bias.
        layer_idx, num_layers: place in the encoder, for variants that depend on it.

    Raises:
        ValueError: for an unknown name, sizes that do not fit, and a feature map that does not fit `normalize`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        variant: str = "selective",
        *,
        feature_map: str | None = None,
        normalize: bool | None = None,
        norm: bool = False,
        scans: int = 1,
        prefix_tokens: int = 0,
        gate_eps: float = 0.0,
        qkv_bias: bool = True,
        layer_idx: int = 0,
        num_layers: int = 1,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        self.variant: type[Variant] = variant_class(variant)
        self.normalize = self.variant.normalize if normalize is None else normalize
        self.feature_map = chosen_feature_map(self.variant, feature_map, self.normalize)
        self.scans = self.variant.scans_taken(scans)
        self.prefix_tokens, self.gate_eps = prefix_tokens, gate_eps
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.variant_weights: list[str] = []  # own names of what the variant adds
        for view in self.views():
            view.build()
        self.norm = nn.LayerNorm(dim, eps=1e-5) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills what the constructor left open: the variant's own weights."""
        self.init_variant(nn.init)

    @torch.no_grad()
    def init_variant(self, init: ModuleType) -> None:
        """Fills the variant's own weights with the functions of `init`."""
        for view in self.views():
            view.init_weights(init)

    def views(self) -> Iterator[Variant]:
        """The variant's view of each scan."""
        return (self.variant(self, scan) for scan in range(self.scans))

    @property
    def takes_packed_rows(self) -> bool:
        return "cu_seqlens" in self.variant.masks and not self.prefix_tokens

    def weight_names(self) -> list[str]:
        """How the names of the weights begin, in the mixer's own state dict, that its variant added."""
        weights = (getattr(self, name) for name in self.variant_weights)
        return [
            n if isinstance(w, nn.Parameter) else f"{n}." for n, w in zip(self.variant_weights, weights, strict=True)
        ]

    def recurrences(self, x: Tensor) -> list[Recurrence]:
        """What the variant asks for, for each scan of an input (batch, length, dim)."""
        query, key, value = self.project(x)
        feature_map = FUNCTIONS[self.feature_map]
        query, key = feature_map(query), feature_map(key)
        recurrences = [view.prepare(x, query, key, value, self.prefix_tokens) for view in self.views()]
        for recurrence in recurrences:
            _require_stated(self.variant, recurrence)
        return recurrences

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        paths: Sequence[Path] | None = None,
        format: str = "auto",
        chunk_size: int = 64,
        dropout: float = 0.0,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: (batch, length, dim).
            key_mask: (batch, length), True for real tokens, False for padding.
            cu_seqlens: (sequences + 1,), the bounds of the sequences in a packed row, see
                [`bidirectional_linear_attention`]. It does not go together with `dropout` and `output_attentions`.
            paths: one pair (order, inverse) for each of two scans, see [`snake_orders`].
            format: "attention", "rnn", "chunk" or "auto": how the same output is computed.
            chunk_size: most tokens in a chunk of the rnn and chunk forms.
            dropout: share of the entries of the attention matrix that training drops. Normalised mixers drop none.
            output_attentions: also return the attention matrix, which only the attention form has.

        Returns:
            (batch, length, dim); with `output_attentions` a pair of it and the matrix (batch, heads, length, length),
            divided by its row sums where the mixer normalises.

        Raises:
            ValueError: where the matrix is needed (`output_attentions`, or dropout in training) and `format` is "rnn"
                or "chunk"; for a mask or scans that the variant does not take; for two scans without paths.
        """
        dropout = dropout if self.training and not self.normalize else 0.0
        self._check_call(key_mask, cu_seqlens, paths)
        recurrences = self.recurrences(x)
        weights = None
        if output_attentions or dropout:
            require_matrix(format, output_attentions)
            weights = F.dropout(self._matrix(recurrences, key_mask, paths), dropout).to(recurrences[0].value.dtype)
            mixed = torch.matmul(weights, recurrences[0].value)
        else:
            form = {"format": format, "chunk_size": chunk_size}
            mixed = self._mixed(recurrences, key_mask, cu_seqlens, paths, form)
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = self.o_proj(mixed if self.norm is None else self.norm(mixed))
        return (mixed, weights) if output_attentions else mixed

    def _operator(self, recurrences: list[Recurrence]) -> Operator:
        first = recurrences[0]
        if first.operator not in OPERATORS or first.operator not in self.variant.operators:
            raise ValueError(
                f"{self.variant.label} asks for the operator {first.operator!r}; it states {self.variant.operators!r}, "
                f"and there are {', '.join(map(repr, OPERATORS))}."
            )
        if any(a is not b for other in recurrences[1:] for a, b in zip(_shared(first), _shared(other), strict=True)):
            raise ValueError(
                f"{self.variant.label} changes query, key or value, which several scans share: it can take one scan "
                "only, and must state scans = 1."
            )
        return OPERATORS[first.operator]

    def _mixed(self, recurrences: list[Recurrence], key_mask, cu_seqlens, paths, form: dict) -> Tensor:
        operator = self._operator(recurrences)
        query, key, value, log_decay, _, arguments = recurrences[0]
        options = {"normalize": self.normalize, **arguments, **form}
        if len(recurrences) == 1:
            return operator.run(query, key, value, log_decay, key_mask=key_mask, cu_seqlens=cu_seqlens, **options)
        decays = [recurrence.log_decay for recurrence in recurrences]
        return operator.average(query, key, value, decays, paths, **options)

    def _matrix(self, recurrences: list[Recurrence], key_mask, paths) -> Tensor:
        score = self._operator(recurrences).scores
        if score is None:
            raise ValueError(f"{self.variant.label} has no attention matrix: its operator builds none in any format.")
        if len(recurrences) == 1:
            query, key, _, log_decay, _, arguments = recurrences[0]
            scores = score(query, key, log_decay, key_mask=key_mask, **arguments)
        else:
            scores = 0
            for (order, inverse), (query, key, _, decay, _, arguments) in zip(paths, recurrences, strict=True):
                decay = decay if decay.dim() == 1 else decay[:, :, order]
                along = score(query.index_select(2, order), key.index_select(2, order), decay, **arguments)
                scores = scores + along.index_select(2, inverse).index_select(3, inverse) / len(paths)
        return scores / (scores.sum(-1, keepdim=True) + 1e-6) if self.normalize else scores

    def _check_call(self, key_mask, cu_seqlens, paths) -> None:
        if cu_seqlens is not None and self.prefix_tokens:
            raise ValueError(
                f"This mixer has prefix_tokens={self.prefix_tokens}, the first of a row, and takes no packed rows "
                "(cu_seqlens, unpadding). Give every sequence a row of its own."
            )
        taken = self.variant.masks
        for name, given in (("key_mask", key_mask), ("cu_seqlens", cu_seqlens)):
            if given is not None and name not in taken:
                raise ValueError(f"{self.variant.label} takes no {name}; it states masks = {taken!r}. Leave it out.")
        if self.scans == 1:
            return
        if paths is None or len(paths) != self.scans:
            raise ValueError(
                f"This mixer averages {self.scans} scans, so it needs as many paths; "
                "give paths=snake_orders(height, width)."
            )
        if key_mask is not None or cu_seqlens is not None:
            raise ValueError(
                f"This mixer averages {self.scans} scans of a grid, which take neither key_mask nor cu_seqlens. Leave "
                "them out, or build it with scans=1."
            )

    def extra_repr(self) -> str:
        return (
            f"variant={self.variant.name!r}, feature_map={self.feature_map!r}, normalize={self.normalize}, "
            f"scans={self.scans}"
        )


def _require_stated(variant: type[Variant], recurrence: Recurrence) -> None:
    """Raises an error where `prepare` returned something other than its class states."""
    if not isinstance(recurrence, Recurrence):
        raise TypeError(
            f"{variant.__name__}.prepare returned {type(recurrence).__name__}; it must return a Recurrence."
        )
    decay = recurrence.log_decay
    if (None if decay is None else decay.dim()) != _LOG_DECAY_DIMS[variant.decay]:
        found = "no log_decay" if decay is None else f"a log_decay of shape {tuple(decay.shape)}"
        raise ValueError(
            f"{variant.__name__} states decay = {variant.decay!r}, but prepare returned {found}. 'head' is (heads,), "
            "'token' is (batch, heads, length), and None is no log_decay."
        )
    if decay is not None and values_can_be_read(decay) and bool((decay > 0).any()):
        raise ValueError(
            f"{variant.__name__}.prepare returned a positive log_decay (largest: {decay.max().item()}); it is the "
            "logarithm of a decay in [0, 1], so every entry must be <= 0. Use logsigmoid, or clamp(max=0)."
        )


def _shared(recurrence: Recurrence) -> list:
    """What the scans of a mixer have in common."""
    return [*recurrence[:3], *(value for _, value in sorted(recurrence.arguments.items()))]


def chosen_feature_map(variant: type[Variant], name: str | None, normalize: bool) -> str:
    """The feature map of a mixer that was told `name`, or nothing.

    Raises:
        ValueError: for an unknown name, and for "identity" where scores must be positive.
    """
    if name is None:
        return variant.feature_map if normalize else "identity"
    require_name("feature_map", name, FEATURE_MAPS)
    if normalize and name == "identity" and variant.feature_map != "identity":
        raise ValueError(
            "feature_map is 'identity' with normalize=True, which divides by sums of scores of either sign. Choose "
            "'elu' or 'unit_silu', or normalize=False."
        )
    return name


def require_matrix(format: str, output_attentions: bool) -> None:
    """Raises ValueError for a form that never builds the attention matrix."""
    if format.lower() not in ("attention", "auto"):
        cause = "output_attentions=True" if output_attentions else "attention_probs_dropout_prob > 0 in training"
        raise ValueError(
            f"{cause} needs the attention matrix, which format={format!r} never builds. Set format "
            "(model.config.format) to 'attention' or 'auto'"
            + ("." if output_attentions else ", or attention_probs_dropout_prob to 0.")
        )
