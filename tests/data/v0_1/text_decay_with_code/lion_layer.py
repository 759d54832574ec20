"""The LION layer: the one place where both encoders mix tokens, and what their base classes share."""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init

from .lion_ops import attention_scores, averaged_scans, bidirectional_linear_attention
from .lion_packing import map_sequences


class TokenMixer(nn.Module):
    """What the layers of an encoder have in common that let tokens read each other: heads and their projections."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, bias = config.hidden_size, getattr(config, "qkv_bias", True)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (batch, heads, length, head_dim), of (batch, length, hidden_size)."""
        heads = (self.num_heads, self.head_dim)
        return tuple(
            proj(hidden_states).unflatten(-1, heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )


class SoftmaxMixer(TokenMixer):
    """Softmax attention, for the `softmax_layers` of a hybrid encoder. It knows no order: tokens come as a set."""

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None = None,
        orders: list[tuple[Tensor, Tensor]] | None = None,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As [`LionMixer`]; `orders` and `config.format` change nothing, and the matrix is there in every format. Rows
        whose keys are all masked read 0."""
        query, key, value = self.project(hidden_states)
        weights = None
        if output_attentions:
            weights = F.dropout(self._attention_matrix(query, key, key_mask), self._dropout()).to(value.dtype)
            mixed = torch.matmul(weights, value)
        elif cu_seqlens is None:
            mixed = self._attend(query, key, value, key_mask)
        else:
            mixed = map_sequences(self._attend, cu_seqlens, key_mask, query, key, value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), weights

    def _attend(self, query, key, value, key_mask) -> Tensor:
        masked, visible = _masked_and_visible(key_mask)
        value = value if masked is None else value.masked_fill(masked.transpose(2, 3), 0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=self._dropout())

    def _attention_matrix(self, query, key, key_mask) -> Tensor:
        masked, visible = _masked_and_visible(key_mask)
        scores = torch.matmul(query * self.head_dim**-0.5, key.transpose(2, 3))
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = _at_least_float32(scores).softmax(-1)
        return weights if masked is None else weights.masked_fill(masked, 0)

    def _dropout(self) -> float:
        return self.config.attention_probs_dropout_prob if self.training else 0.0


def _masked_and_visible(key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Keys that count 0, and keys that the softmax runs over, (batch, 1, 1, length) each.

    Where every key is masked all are let in, so that the softmax is finite."""
    if key_mask is None:
        return None, None
    masked = ~key_mask[:, None, None, :]
    return masked, ~masked | masked.all(-1, keepdim=True)


class LionMixer(TokenMixer):
    """Projections, feature map, decay and the operator; takes the place of self-attention (arXiv 2502.16249).

    Text encoders (`config.model_type == "lion"`) use query and key as they are, do not normalise, and may add a
    LayerNorm over all heads. Image encoders (`"lion_vision"`) pass query and key through a positive feature map,
    divide by the row sums, keep the class token from decaying, and may scan the grid in two orders.

    Decay of LION-D: `decay_logit` (heads,), g = log sigmoid(decay_logit). Decay of LION-S: `decay_proj`, a linear
    layer to (heads,), g = log(1 - sigmoid(decay_proj(x))). The second scan of an image has its own `decay_logit_2`
    or `decay_proj_2`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.is_image = config.model_type == "lion_vision"
        # Decides the parameters below, so a later change of the config is not followed.
        self.mask_type = config.mask_type
        width = config.hidden_size
        self.decay_names = decay_names(config)  # one per scan
        for name in self.decay_names:
            if config.mask_type == "decay":
                self.register_parameter(name, nn.Parameter(torch.empty(self.num_heads)))
            else:
                self.register_module(name, nn.Linear(width, self.num_heads))
        self.norm = nn.LayerNorm(width, eps=1e-5) if getattr(config, "layer_norm_after", False) else None

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None = None,
        orders: list[tuple[Tensor, Tensor]] | None = None,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: (batch, length, hidden_size).
            key_mask: (batch, length), True for real tokens.
            orders: the two scans of an image in snake order, see [`snake_orders`].
            output_attentions: also return the attention matrix, which only the attention form has.
            cu_seqlens: (sequences + 1,), the bounds of the sequences in a packed row, see
                [`bidirectional_linear_attention`]; not together with what needs the matrix.

        Returns:
            (batch, length, hidden_size), and None or the matrix (batch, heads, length, length), normalised where the
            model normalises.

        Raises:
            ValueError: when the matrix is needed (`output_attentions`, or attention dropout in training) and
                `config.format` is "rnn" or "chunk".
        """
        query, key, value = self.project(hidden_states)
        if self.is_image:
            query, key = self._feature_map(query), self._feature_map(key)
        dropout = 0.0 if self.is_image or not self.training else self.config.attention_probs_dropout_prob
        form = {"format": self.config.format, "chunk_size": self.config.chunk_size}
        weights = None
        if output_attentions or dropout:
            self._require_matrix(output_attentions)
            weights = self._attention_matrix(hidden_states, query, key, key_mask, orders)
            dropped = F.dropout(weights, dropout).to(value.dtype)
            mixed = torch.matmul(dropped, value)
            weights = dropped if output_attentions else None
        elif len(self.decay_names) == 2:
            decays = [self._log_decay(hidden_states, name) for name in self.decay_names]
            mixed = averaged_scans(query, key, value, decays, orders, **form)
        else:
            options = {"normalize": self.is_image, "key_mask": key_mask, "cu_seqlens": cu_seqlens, **form}
            mixed = bidirectional_linear_attention(query, key, value, self._log_decay(hidden_states), **options)
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.norm is not None:
            mixed = self.norm(mixed)
        return self.o_proj(mixed), weights

    def _attention_matrix(self, hidden_states, query, key, key_mask, orders) -> Tensor:
        if len(self.decay_names) < 2:
            scores = attention_scores(query, key, self._log_decay(hidden_states), key_mask=key_mask)
        else:
            scores = 0
            for (order, inverse), name in zip(orders, self.decay_names, strict=True):
                decay = self._log_decay(hidden_states, name)
                decay = decay if decay.dim() == 1 else decay[:, :, order]
                along = attention_scores(query.index_select(2, order), key.index_select(2, order), decay)
                scores = scores + along.index_select(2, inverse).index_select(3, inverse) / 2
        return scores / (scores.sum(-1, keepdim=True) + 1e-6) if self.is_image else scores

    def _require_matrix(self, output_attentions: bool) -> None:
        if self.config.format not in ("attention", "auto"):
            cause = "output_attentions=True" if output_attentions else "attention_probs_dropout_prob > 0 in training"
            raise ValueError(
                f"{cause} needs the attention matrix, which format={self.config.format!r} never builds. Set "
                "model.config.format to 'attention' or 'auto'"
                + ("." if output_attentions else ", or attention_probs_dropout_prob to 0.")
            )

    def _feature_map(self, x: Tensor) -> Tensor:
        return F.elu(x).add_(1) if self.mask_type == "lit" else _UnitSiLU.apply(x)

    def _log_decay(self, hidden_states: Tensor, name: str | None = None) -> Tensor | None:
        """None, (heads,) or (batch, heads, length), in float32 or wider; `name` is the first scan's by default."""
        if not self.decay_names:
            return None
        gate = getattr(self, name or self.decay_names[0])
        if self.mask_type == "decay":
            return F.logsigmoid(_at_least_float32(gate))
        if self.is_image:  # the class token does not decay
            logits = _at_least_float32(gate(hidden_states[:, 1:].to(gate.weight.dtype)))
            return F.pad(F.logsigmoid(-logits).transpose(1, 2), (1, 0))
        logits = _at_least_float32(gate(hidden_states.to(gate.weight.dtype)))
        # The authors' text gate: log(1 - sigmoid(z)) with 1e-7 inside the logarithm, which can exceed 0 by as much.
        return (torch.sigmoid(-logits) + 1e-7).log().clamp(max=0).transpose(1, 2)


class _UnitSiLU(torch.autograd.Function):
    """silu(x) + 1/2, divided by its norm over the last dimension: few passes over memory, and two tensors kept.

    Computed in float32 or wider. The norm is never 0, since silu(x) > -0.28."""

    @staticmethod
    def forward(ctx, x):
        y = F.silu(_at_least_float32(x)).add_(0.5)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y = y.div_(norm).to(x.dtype)
        ctx.save_for_backward(x, y, norm)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, norm = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: the norm kept has no graph
            features = F.normalize(F.silu(_at_least_float32(x)) + 0.5, dim=-1).to(x.dtype)
            return torch.autograd.grad(features, x, dy, create_graph=True)[0]
        dy, y = dy.to(norm.dtype), y.to(norm.dtype)
        dx = torch.addcmul(dy, y, (dy * y).sum(-1, keepdim=True), value=-1).div_(norm)
        return torch.ops.aten.silu_backward(dx, x.to(norm.dtype)).to(x.dtype)


def make_mixer(config, layer: int) -> TokenMixer:
    """What mixes the tokens in layer number `layer`, counted from 0."""
    return (SoftmaxMixer if layer in config.softmax_layers else LionMixer)(config)


def decay_names(config) -> list[str]:
    """Names of the decay parameters or modules of a mixer, one per scan; none for LION-LIT."""
    stem = {"lit": None, "decay": "decay_logit", "selective": "decay_proj"}[config.mask_type]
    scans = [stem, f"{stem}_2"] if getattr(config, "order", "normal") == "s" else [stem]
    return scans if stem else []


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# What from_pretrained and a configuration both take to find a file.
_WHERE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LionPreTrainedMixin:
    """What the base classes of both encoders share; stands before `PreTrainedModel` in their bases."""

    supports_gradient_checkpointing = True

    def __init__(self, config, *args, **kwargs):
        expected = self.config_class
        if getattr(config, "model_type", None) != expected.model_type:
            raise ValueError(
                f"{type(self).__name__} needs a {expected.__name__} (model_type {expected.model_type!r}), but was given "
                f"{type(config).__name__} with model_type {getattr(config, 'model_type', None)!r}. Text models take a "
                "LionConfig, image models a LionVisionConfig; AutoModel picks the class that fits a checkpoint."
            )
        super().__init__(config, *args, **kwargs)
        # A decay close to 1 needs more than 8 bits: it stays float32 when a model is loaded in half precision.
        self._keep_in_fp32_modules_strict = set(decay_names(config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in Transformers. A configuration object that contradicts the checkpoint's own in what decides the
        parameters (mask_type, order, pos_emb, layer_norm_after, softmax_layers) raises ValueError, as such an option does."""
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config)
        if isinstance(config, PreTrainedConfig) and config.model_type == cls.config_class.model_type:
            where = {name: kwargs[name] for name in _WHERE_OPTIONS if name in kwargs}
            try:
                stored, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)
            except OSError:  # weights without a configuration: the given one is all there is
                stored = {}
            if stored.get("model_type") == config.model_type:
                cls.config_class.require_structure(stored, config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers, but a configuration that was changed after the model was built, and describes other modules
        now (mask_type, order, pos_emb, layer_norm_after, softmax_layers), raises ValueError: the weights would not fit it."""
        for name, built in _built_options(self.base_model).items():
            stated = getattr(self.config, name)
            if stated != built:
                raise ValueError(
                    f"config.{name} is {stated!r}, but the model was built with {name}={built!r}, which decides its modules. Set "
                    "it back to save this model, or build a new one from the changed configuration."
                )
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation in (None, "eager"):
            return "eager"
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}, but LION has no softmax attention to replace. Choose how it "
            "is computed by config.format: 'attention', 'rnn', 'chunk' or 'auto'. (softmax_layers always use SDPA.)"
        )

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """LION has no softmax attention: anything but "eager" raises ValueError and names `config.format`."""
        self._check_and_adjust_attn_implementation(attn_implementation)


def _built_options(encoder: nn.Module) -> dict[str, object]:
    """The options of a configuration that decide modules, as the modules of an encoder show them. One that shows nowhere,
    such as the order of a model without decay, is absent."""
    mixers = [layer.mixer for layer in encoder.layers]
    built = {
        "pos_emb": encoder.embeddings.position_embeddings is not None,
        "softmax_layers": [i for i, mixer in enumerate(mixers) if isinstance(mixer, SoftmaxMixer)],
    }
    for mixer in (mixer for mixer in mixers if isinstance(mixer, LionMixer)):
        built["mask_type"] = mixer.mask_type
        if not mixer.is_image:
            built["layer_norm_after"] = mixer.norm is not None
        elif mixer.decay_names:
            built["order"] = "s" if len(mixer.decay_names) == 2 else "normal"
    return built


def init_mixer(module: LionMixer) -> None:
    """LION-D logits from N(0, 1); everything else in the mixer is initialised as any linear layer."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("decay_logit"):
            init.normal_(parameter, mean=0.0, std=1.0)


def sequence_classification_loss(model, logits: Tensor, labels: Tensor | None, **kwargs) -> Tensor | None:
    """Transformers' classification or regression loss, right under gradient accumulation for every problem type.

    Transformers divides cross entropy by `num_items_in_batch`, the number of labels in all accumulated batches, when
    the Trainer gives it, but leaves squared error and binary cross entropy a mean, which would then count once per
    accumulated batch, and be NaN for the empty batch of a process that has no row left.
    """
    if labels is None:
        return None
    loss = model.loss_function(labels, logits, model.config, **kwargs)  # also settles the problem type
    items, problem = kwargs.get("num_items_in_batch"), model.config.problem_type
    if items is None or problem == "single_label_classification":
        return loss
    summed = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    total = summed(logits, labels.to(logits.device).view_as(logits), reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
