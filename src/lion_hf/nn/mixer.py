"""The layer that mixes tokens: projections, a feature map, a variant and an operator."""

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.checks import check_key_mask, is_exporting, makes_graph
from .features import of_both
from .gates import autocasts
from .learned_features import MODULES, require_positive_scores
from .local import Sequences, neighbours, short_conv
from .mixer_checks import NO_MATRIX_OF_PACKED_ROWS as NO_MATRIX_OF_PACKED_ROWS
from .mixer_checks import (
    chosen_feature_map,
    chosen_normalize,
    head_windows,
    require_added,
    require_matrix,
    require_rope,
    require_stated,
)
from .names import (
    COSINE_MAPS,
    DECAY_INITS,
    DIRECTIONS,
    MIXER_OPTIONS,
    require_mixer_option,
    require_name,
    require_rate,
    require_size,
    tells_misspelt,
)
from .norms import OutputNorm
from .operators import OPERATORS, Operator, Path, has_matrix, matrix_of_identity, require_operator, run_scans
from .registry import Recurrence, Variant, variant_class
from .rotary import apply_rotary


_GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


class TokenMixer(nn.Module):
    """Base class of the layers that mix tokens, with the projections of their heads.

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads, each `dim // heads` wide.
        qkv_bias: whether the projections of query, key and value have a bias; True by default.
        out_bias: whether the projection of the output has a bias; True by default.
        key_heads: number of heads of query and key, `heads` (default) or a divisor of it.
        key_dim: width of each head of query and key, by default that of the values.

    Raises:
        ValueError: if `dim` is not a multiple of `heads`, `heads` not of `key_heads`, or a number is below 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
        key_heads: int | None = None,
        key_dim: int | None = None,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"dim {dim} is not divisible by heads {heads}; every head must have the same number of features."
            )
        self.dim, self.num_heads, self.head_dim = dim, heads, dim // heads
        require_mixer_option("key_heads", key_heads, heads)
        require_mixer_option("key_dim", key_dim)
        self.key_heads, self.key_dim = key_heads or heads, key_dim or self.head_dim
        self.q_proj = nn.Linear(dim, self.key_heads * self.key_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, self.key_heads * self.key_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.o_proj = nn.Linear(dim, dim, bias=out_bias)

    @property
    def takes_packed_rows(self) -> bool:
        """Whether the mixer supports several sequences in one row (`cu_seqlens`)."""
        return True

    def checked_mask(self, x: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Return the key mask as bool. Raises ValueError for additive masks and if shapes do not match."""
        if not makes_graph() and (x.dim() != 3 or x.shape[2] != self.dim):
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, length, {self.dim}).")
        if key_mask is None:
            return None
        check_key_mask(key_mask, *x.shape[:2])
        return key_mask.to(torch.bool)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, (batch, heads, length, width) each, for x (batch, length, dim)."""
        return self.split_heads(self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def split_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value (batch, length, heads * width) as (batch, heads, length, width)."""
        rows = value.shape[:-1]
        query = query.view(*rows, self.key_heads, self.key_dim).transpose(1, 2)
        key = key.view(*rows, self.key_heads, self.key_dim).transpose(1, 2)
        return query, key, value.view(*rows, self.num_heads, self.head_dim).transpose(1, 2)


class Mixer(TokenMixer):
    """Bidirectional linear attention, in place of self-attention (arXiv 2502.16249).

    Example::

        >>> mixer = lion_hf.nn.Mixer(dim=256, heads=4, variant="selective")
        >>> mixer(torch.randn(2, 1000, 256)).shape
        torch.Size([2, 1000, 256])

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: number of heads, each `dim // heads` wide.
        variant: name of a registered variant: "lit" (no decay), "decay" (a learned decay per head), "selective" (a
            decay per token and head), another one of the package, or a custom variant, see `register_variant`.
        feature_map: function of query and key: "identity", "elu", "unit_silu", "silu" (silu, scaled to length 1;
            scores are then cosines, with the scale 1 instead of `key_dim**-0.5`), or "hedgehog", which is learned: its
            modules are `q_feature` and `k_feature`, see `Hedgehog`. By default that of the variant if outputs are
            normalised, otherwise "identity".
        normalize: whether to divide outputs by their row sums. Row sums must be positive, which "elu", "unit_silu" and
            "hedgehog" ensure. By default that of the variant, which is True for all variants of the paper, but False
            for the feature map "silu". The text models of the paper set it to False. Variants whose scores may be
            negative (`signed`) do not support it.
        norm: whether to apply a LayerNorm (eps 1e-5) over all heads before the output projection.
        scans: 1, or 2 for the mean of two scans of a grid, each with its own decays. Variants may use fewer.
        prefix_tokens: number of tokens at the beginning of each row that do not decay in LION-S, such as the class
            token of an image. Variants without a decay per token ignore it.
        gate_eps: added to the decays of "selective" before their logarithm; 1e-7 in the authors' text models.
        qkv_bias: whether the projections of query, key, value and output gate have a bias.
        out_bias: whether the projection of the output, and the LayerNorm of `norm`, have a bias.
        rope_theta: base of the angles of rotary position embeddings, which rotate query and key before the feature map,
            see `lion_hf.nn.rotary.apply_rotary`; None (default) for none. Positions are indices in the row, whatever
            the order of the scans is, and count from the first real token of each row or packed sequence: behind a
            feature map, scores depend on the positions themselves, not only on the distance.
        decay_init: "normal" (default): the initial decays of the variant. "windows": those of `set_windows`.
        decay_windows: windows of `decay_init="windows"`, in tokens: (smallest, largest), by default (4, 512), or one
            per head.
        layer_idx: index of the layer in the encoder, counted from 0, for variants that depend on it.
        num_layers: number of layers of the encoder, for variants that depend on it.
        direction: "both" (default), or "forward" or "backward" for the causal layer, whose tokens read themselves and
            the tokens before or after them.
        short_conv: width of a depthwise convolution over neighbouring tokens of query, key and value, followed by SiLU;
            0 for none. It is centred for direction "both", otherwise causal. Its modules are `q_conv`, `k_conv` and
            `v_conv`. By default, as for all options below, what the variant's preset says, or the option is off.
        token_shift: whether each projection p reads `x + mu_p * (shifted - x)` with learned weights `mu_p` (dim,), for
            p in q, k, v, gate and decay. `shifted` is the mean of both neighbours of a token for direction "both",
            otherwise the token before or after it; a missing or masked neighbour is 0.
        output_gate: "silu" or "sigmoid": multiply the output by this function of `gate_proj(x)`; "none".
        output_norm: norm of the output, `out_norm`: "rms" (RMS norm over all heads), "group_rms" (over the heads that
            share a key, see `key_heads`), "head_rms" (over each head), "head_layer" (group norm, each head a group) or
            "none". The gate comes after it, unless the variant sets `gate_before_norm`.
        key_heads: number of heads of query and key, a divisor of `heads`: each serves a group of heads of the values.
        key_dim: width of each head of query and key, `dim // heads` by default.

    Padding, packed sequences and prefix tokens are safe under all of them: neighbours are tokens of the same sequence,
    masked ones count as 0, and each prefix token is a sequence of its own.

    Raises:
        TypeError: for an option that there is not.
        ValueError: if a name is unknown, a number is out of range, `dim` is not a multiple of `heads`, `gate_eps` is
            negative or not finite; if the feature map is "identity" although outputs are normalised and the variant
            does not use it by default, or outputs of a signed variant or feature map are normalised; if `norm` and
            `output_norm` are both set, or several scans have one direction; for windows as in `head_windows`; if
            `rope_theta` is not positive, or heads of query and key have an odd width with it, or the variant does not
            support it.
    """

    @tells_misspelt
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
        out_bias: bool = True,
        rope_theta: float | None = None,
        decay_init: str = "normal",
        decay_windows: Sequence[float] = (4, 512),
        layer_idx: int = 0,
        num_layers: int = 1,
        direction: str = "both",
        short_conv: int | None = None,
        token_shift: bool | None = None,
        output_gate: str | None = None,
        output_norm: str | None = None,
        key_heads: int | None = None,
        key_dim: int | None = None,
    ):
        stated = variant_class(variant)
        key_heads = stated.option("key_heads") if key_heads is None else key_heads
        key_dim = stated.option("key_dim") if key_dim is None else key_dim
        super().__init__(dim, heads, qkv_bias=qkv_bias, out_bias=out_bias, key_heads=key_heads, key_dim=key_dim)
        self.variant: type[Variant] = stated
        self.normalize = chosen_normalize(self.variant, normalize, feature_map)
        self.feature_map = chosen_feature_map(self.variant, feature_map, self.normalize)
        self.scans = self.variant.scans_taken(scans)
        require_rope(self.variant, rope_theta, self.key_dim)
        self.rope_theta = rope_theta
        require_size("gate_eps", gate_eps)
        require_name("scans", scans, (1, 2))
        if not isinstance(prefix_tokens, int) or prefix_tokens < 0:
            raise ValueError(f"prefix_tokens is {prefix_tokens!r}; it must be a number of tokens, 0 or more.")
        self.prefix_tokens, self.gate_eps = prefix_tokens, gate_eps
        self.layer_idx, self.num_layers = layer_idx, num_layers
        require_name("direction", direction, DIRECTIONS)
        if direction != "both" and self.scans > 1:
            raise ValueError(f"direction is {direction!r} with scans={scans}; a grid is read in both directions.")
        self.direction = direction
        self.variant_weights: list[str] = []  # names of the parameters and modules that the variant adds
        options = {"short_conv": short_conv, "token_shift": token_shift}
        self._build_options(qkv_bias, norm, output_gate=output_gate, output_norm=output_norm, **options)
        for view in self.views():
            view.build()
            require_added(view)
        self.norm = nn.LayerNorm(dim, eps=1e-5, bias=out_bias) if norm else None
        require_name("decay_init", decay_init, DECAY_INITS)
        self.initial_windows = head_windows(decay_windows, heads).tolist() if decay_init == "windows" else None
        self.reset_parameters()

    def _build_options(self, bias: bool, norm: bool, **options) -> None:
        """Build the modules of the options in `MIXER_OPTIONS`; None is what the variant says."""
        for name, value in options.items():
            value = self.variant.option(name) if value is None else value
            require_mixer_option(name, value)
            setattr(self, name, value)
        if norm and self.output_norm != "none":
            raise ValueError(
                f"norm=True with output_norm={self.output_norm!r} would normalise the output twice. Set norm to False "
                "or output_norm to 'none'."
            )
        if self.short_conv:
            for name in "qkv":
                width = getattr(self, f"{name}_proj").out_features
                conv = nn.Conv1d(width, width, self.short_conv, groups=width, bias=self.variant.short_conv_bias)
                setattr(self, f"{name}_conv", conv)
        if self.feature_map in MODULES:
            require_positive_scores(self.feature_map, self.variant)
            for name in "qk":
                setattr(self, f"{name}_feature", MODULES[self.feature_map](self.key_heads, self.key_dim))
        gated = self.output_gate != "none"
        self.shifted_names: tuple[str, ...] = ()
        if self.token_shift:
            by_token = self.variant.decay in ("token", "token_channel")
            self.shifted_names = ("q", "k", "v", *(["gate"] if gated else []), *(["decay"] if by_token else []))
            for name in self.shifted_names:
                self.register_parameter(f"mu_{name}", nn.Parameter(torch.empty(self.dim)))
        self.gate_proj = nn.Linear(self.dim, self.dim, bias=bias) if gated else None
        normed = self.output_norm != "none"
        eps = self.variant.norm_eps
        self.out_norm = OutputNorm(self.dim, self.num_heads, self.output_norm, eps, self.key_heads) if normed else None

    def reset_parameters(self) -> None:
        """Initialise the weights of the variant."""
        self.init_variant(nn.init)

    @torch.no_grad()
    def init_variant(self, init: ModuleType) -> None:
        """Initialise the weights of the variant and its options with the functions of `init`, such as `torch.nn.init`.

        Decays start from the windows of the options, if there are any. Convolutions get PyTorch's default, norms 1, and
        token shifts the mean of a token and its neighbours.
        """
        for conv in (getattr(self, f"{name}_conv") for name in "qkv" if self.short_conv):
            bound = self.short_conv**-0.5
            for weight in conv.parameters():
                init.uniform_(weight, -bound, bound)
        for name in self._learned_maps():
            getattr(self, name).init_weights(init)
        for name in self.shifted_names:
            init.constant_(getattr(self, f"mu_{name}"), 0.5)
        if self.out_norm is not None:
            init.ones_(self.out_norm.weight)
        for view in self.views():
            view.init_weights(init)
        if self.initial_windows is not None:
            self._init_windows(self.initial_windows)

    def _init_windows(self, windows: Sequence[float]) -> None:
        """Set the windows, but keep the weights that Transformers has loaded from a checkpoint."""
        loaded = [weight for weight in self.parameters() if getattr(weight, "_is_hf_initialized", False)]
        kept = [weight.clone() for weight in loaded]
        self.set_windows(windows)
        for weight, value in zip(loaded, kept, strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def set_windows(self, windows: Sequence[float] | Tensor) -> None:
        """Set the decays so that each head reads about as many tokens as its window, in both directions together.

        By default decays start near 0.5, and heads read their neighbours only. Windows from a few tokens up to the
        length of the input let a new model learn from distant tokens at once. Variants without decay ignore them.

        Args:
            windows: one number of tokens per head, or (smallest, largest), see `lion_hf.convert.head_windows`.

        Raises:
            ValueError: as in `head_windows`.
        """
        windows = head_windows(windows, self.num_heads)
        for view in self.views():
            view.set_windows(windows)

    def views(self) -> Iterator[Variant]:
        """Yield the variant's view of each scan."""
        return (self.variant(self, scan) for scan in range(self.scans))

    @property
    def takes_packed_rows(self) -> bool:
        """Whether the mixer supports several sequences in one row; not with `prefix_tokens`."""
        return "cu_seqlens" in self.variant.masks and not self.prefix_tokens

    def weight_names(self) -> list[str]:
        """Return prefixes of the names, in the mixer's state dict, of the weights of the variant and of the options."""
        names = [f"mu_{name}" for name in self.shifted_names]
        names += [f"{name}_conv" for name in "qkv" if self.short_conv]
        names += self._learned_maps()
        names += [name for name in ("gate_proj", "out_norm") if getattr(self, name) is not None]
        weights = {name: getattr(self, name) for name in (*self.variant_weights, *names)}
        return [name if isinstance(weight, nn.Parameter) else f"{name}." for name, weight in weights.items()]

    def _learned_maps(self) -> list[str]:
        """Return the names of the modules of a learned feature map."""
        return ["q_feature", "k_feature"] if self.feature_map in MODULES else []

    def recurrences(
        self, x: Tensor, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> list[Recurrence]:
        """Return the variant's `Recurrence` of each scan for an input x (batch, length, dim).

        Args:
            x: (batch, length, dim).
            key_mask: as in `forward`. Only mixers with `short_conv`, `token_shift` or `rope_theta` read it here.
            cu_seqlens: as in `forward`, see `key_mask`.
        """
        return self._prepared(x, Sequences(key_mask, cu_seqlens, self.prefix_tokens))[0]

    def _prepared(self, x: Tensor, sequences: Sequences) -> tuple[list[Recurrence], Tensor]:
        """Return the recurrences, and the input of the output gate."""
        inputs = {}
        if self.token_shift:
            shifted = neighbours(x, self.direction, sequences)
            inputs = next(self.views()).shift(x, shifted)
        query, key = self.q_proj(inputs.get("q", x)), self.k_proj(inputs.get("k", x))
        value = self.v_proj(inputs.get("v", x))
        if self.short_conv:
            dtype = value.dtype  # query and key may be logits of gates, in a wider dtype than the convolutions
            query, key, value = (
                short_conv(y.to(dtype), getattr(self, f"{name}_conv"), self.short_conv, self.direction, sequences)
                for name, y in (("q", query), ("k", key), ("v", value))
            )
        query, key, value = self.split_heads(query, key, value)
        if self.rope_theta is not None:
            query, key = apply_rotary(query, key, self.rope_theta, sequences.cu_seqlens, sequences.key_mask)
        if self.feature_map in MODULES:
            query, key = self.q_feature(query), self.k_feature(key)
        else:
            query, key = of_both(self.feature_map, query, key)
        decayed = inputs.get("decay", x)
        recurrences = [view.prepare(decayed, query, key, value, self.prefix_tokens) for view in self.views()]
        for recurrence in recurrences:
            require_stated(self.variant, recurrence)
        if self.feature_map in COSINE_MAPS:  # unless the variant has a scale of its own
            recurrences = [r._replace(arguments={"scale": 1.0, **r.arguments}) for r in recurrences]
        return recurrences, inputs.get("gate", x)

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
        """Mix the tokens.

        Args:
            x: (batch, length, dim).
            key_mask: (batch, length), True for real tokens, False for padding.
            cu_seqlens: (sequences + 1,), the bounds of the sequences of a packed row (batch 1), see
                `bidirectional_linear_attention`. Not together with `output_attentions`, nor with `dropout` in training.
            paths: one pair (order, inverse) for each of two scans, see `snake_orders`; ignored for a single scan.
            format: how the same output is computed: "attention", "rnn", "chunk" or "auto" (default).
            chunk_size: maximum number of tokens per chunk of the rnn and chunk forms; 64 by default.
            dropout: dropout rate of the attention matrix in training, in [0, 1). Ignored if outputs are normalised.
            output_attentions: whether to return the attention matrix as well. It requires the attention form.

        Returns:
            (batch, length, dim); with `output_attentions` a pair of it and the attention matrix
            (batch, heads, length, length), divided by its row sums if outputs are normalised.

        Raises:
            ValueError: if shapes of `x`, `key_mask` and `paths` do not match, or the mask is additive; if the matrix is
                needed (`output_attentions`, or dropout in training) and `format` is "rnn" or "chunk", or the row is
                packed; if the variant does not support the given mask; if two scans are given no
                paths, or a mask.
        """
        if dropout:
            require_rate("dropout", dropout)
            dropout = dropout if self.training and not self.normalize else 0.0
        key_mask = self.checked_mask(x, key_mask)
        self._check_call(x.shape[1], key_mask, cu_seqlens, paths)
        x = self._in_autocast_dtype(x)
        recurrences, gate = self._prepared(x, Sequences(key_mask, cu_seqlens, self.prefix_tokens))
        weights = None
        if output_attentions or dropout:
            require_matrix(format, output_attentions, cu_seqlens)
            weights = F.dropout(self._matrix(recurrences, key_mask, paths), dropout).to(recurrences[0].value.dtype)
            mixed = torch.matmul(weights, recurrences[0].value)
        else:
            form = {"format": format, "chunk_size": chunk_size}
            mixed = self._mixed(recurrences, key_mask, cu_seqlens, paths, form)
        mixed = self.o_proj(self._normed(mixed.transpose(1, 2).flatten(2), gate))
        return (mixed, weights) if output_attentions else mixed

    def _in_autocast_dtype(self, x: Tensor) -> Tensor:
        """Cast float32 tokens to the dtype of autocast, once for all projections and their gradients.

        Autocast would cast them for each linear layer. A token shift subtracts neighbours first, in float32."""
        if x.dtype != torch.float32 or self.token_shift or is_exporting() or not autocasts(x.device.type):
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))

    def _normed(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """Apply the norm and the gate to the output (batch, length, dim) for the gate's input of the same shape."""
        if self.norm is not None:
            mixed = self.norm(mixed)
        steps = [] if self.out_norm is None else [self.out_norm]
        if self.gate_proj is not None:
            factor = _GATES[self.output_gate](self.gate_proj(gate))
            steps.insert(0 if self.variant.gate_before_norm else len(steps), lambda y: y * factor)
        for step in steps:
            mixed = step(mixed)
        return mixed

    def _operator(self, recurrences: list[Recurrence]) -> Operator:
        name = require_operator(self.variant, recurrences)
        # LION's own operator is the default of the general one, which also has directions and groups of heads.
        if name == "linear_attention" and (self.direction != "both" or self.key_heads != self.num_heads):
            name = "two_sided"
        return OPERATORS[name]

    def _masks(self, operator: Operator, key_mask, cu_seqlens) -> dict:
        """Return the arguments of an operator for a single scan."""
        masks = {"key_mask": key_mask, "cu_seqlens": cu_seqlens}
        return masks | ({"direction": self.direction} if operator.options else {})

    def _mixed(self, recurrences: list[Recurrence], key_mask, cu_seqlens, paths, form: dict) -> Tensor:
        operator = self._operator(recurrences)
        masks = self._masks(operator, key_mask, cu_seqlens)
        return run_scans(operator, recurrences, paths, self.normalize, form, masks)

    def _matrix(self, recurrences: list[Recurrence], key_mask, paths) -> Tensor:
        operator = self._operator(recurrences)
        if not has_matrix(operator, recurrences):
            raise ValueError(
                f"{self.variant.label} has no attention matrix: its operator builds none in any form. Set "
                "output_attentions to False and the attention dropout to 0."
            )
        if operator.scores is None:
            masks = self._masks(operator, key_mask, None)
            return matrix_of_identity(operator, recurrences, paths, self.normalize, masks)
        if len(recurrences) == 1:
            query, key, _, log_decay, _, arguments = recurrences[0]
            scores = operator.scores(query, key, log_decay, key_mask=key_mask, **arguments)
        else:
            scores = 0
            for (order, inverse), (query, key, _, decay, _, arguments) in zip(paths, recurrences, strict=True):
                decay = decay if decay.dim() == 1 else decay[:, :, order]
                along = operator.scores(query.index_select(2, order), key.index_select(2, order), decay, **arguments)
                scores = scores + along.index_select(2, inverse).index_select(3, inverse) / len(paths)
        return scores / (scores.sum(-1, keepdim=True) + 1e-6) if self.normalize else scores

    def _check_call(self, length: int, key_mask, cu_seqlens, paths) -> None:
        if not makes_graph() and length < self.prefix_tokens:
            raise ValueError(f"This mixer has prefix_tokens={self.prefix_tokens}, but x holds {length} tokens.")
        if cu_seqlens is not None and self.prefix_tokens:
            raise ValueError(
                f"This mixer has prefix_tokens={self.prefix_tokens}, counted from the beginning of a row, so it does "
                "not support packed rows (cu_seqlens). Give each sequence its own row."
            )
        taken = self.variant.masks
        for name, given in (("key_mask", key_mask), ("cu_seqlens", cu_seqlens)):
            if given is not None and name not in taken:
                raise ValueError(
                    f"{self.variant.label} does not support {name}; its class sets masks = {taken!r}. Leave it out."
                )
        if self.scans == 1:
            return
        if paths is None or len(paths) != self.scans:
            raise ValueError(
                f"This mixer averages {self.scans} scans, so it needs {self.scans} paths. Pass "
                "paths=snake_orders(height, width)."
            )
        for path in () if makes_graph() else paths:
            if any(len(order) != length for order in path):
                raise ValueError(
                    f"paths are for {len(path[0])} tokens, but x holds {length}. snake_orders(height, width) counts a "
                    "class token before the patches; give prefix_tokens=0 if there is none."
                )
        if key_mask is not None or cu_seqlens is not None:
            raise ValueError(
                f"This mixer averages {self.scans} scans of a grid, which support neither key_mask nor cu_seqlens. "
                "Leave them out, or build the mixer with scans=1."
            )

    def extra_repr(self) -> str:
        """Return the options that `repr` shows."""
        return (
            f"variant={self.variant.name!r}, feature_map={self.feature_map!r}, normalize={self.normalize}, "
            f"scans={self.scans}"
        ) + "".join(
            f", {name}={getattr(self, name)!r}"
            for name, off in {
                **MIXER_OPTIONS,
                "direction": "both",
                "key_heads": self.num_heads,
                "rope_theta": None,
            }.items()
            if getattr(self, name) != (self.head_dim if name == "key_dim" else off)
        )
