"""Parts that the text and the image encoder share: layers built from a configuration, and the base class."""

import os
import re

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn.block import Block
from ..nn.encoder import drop_path_rates
from ..nn.local_attention import LocalMixer
from ..nn.mixer import Mixer, TokenMixer
from ..nn.mlp import MLP
from ..nn.names import BLOCK_OPTIONS, MIXER_OPTIONS
from ..nn.norms import token_norm
from ..nn.softmax import SoftmaxMixer
from ..nn.variants import variant_class
from .lion_options import linear_rope_thetas, rope_thetas


class LionMixer(Mixer):
    """A `lion_hf.nn.Mixer` built from a configuration, for layer number `layer_idx`, counted from 0."""

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.mask_type,
            feature_map=config.feature_map,
            normalize=config.normalize,
            norm=getattr(config, "layer_norm_after", False),
            scans=scans_of(config),
            prefix_tokens=config.prefix_tokens,
            gate_eps=config.gate_eps,
            decay_init=config.decay_init,
            decay_windows=initial_windows(config),
            rope_theta=linear_rope_thetas(config.rope_parameters, config.num_hidden_layers)[layer_idx],
            **biases_of(config),
            layer_idx=layer_idx,
            num_layers=config.num_hidden_layers,
            **{name: getattr(config, name) for name in MIXER_OPTIONS},
        )

    def reset_parameters(self) -> None:
        """Do nothing: the model initialises all weights after it was built."""


def make_mixer(config, layer_idx: int) -> TokenMixer:
    """Build the mixer of layer number `layer_idx`, counted from 0: linear, softmax or local attention."""
    sizes, (theta, local_theta) = (config.hidden_size, config.num_attention_heads), rope_thetas(config.rope_parameters)
    if layer_idx in config.softmax_layers:
        return SoftmaxMixer(*sizes, rope_theta=theta, **biases_of(config))
    if layer_idx in config.local_layers:
        return LocalMixer(*sizes, window=config.local_window, rope_theta=local_theta, **biases_of(config))
    return LionMixer(config, layer_idx)


def biases_of(config) -> dict[str, bool]:
    """Return which projections of a mixer have a bias."""
    return {"qkv_bias": config.use_bias and getattr(config, "qkv_bias", True), "out_bias": config.use_bias}


def initial_windows(config) -> list[float]:
    """Return the windows of new decays with `decay_init="windows"`: from 4 tokens to all tokens of an input."""
    if config.decay_windows is not None:
        return config.decay_windows
    rows, columns = getattr(config, "grid_size", (1, getattr(config, "max_position_embeddings", 0)))
    return [4.0, float(max(4, rows * columns))]


def final_norm(config) -> nn.Module | None:
    """Build the norm after the last layer, if the configuration has one."""
    return encoder_norm(config) if config.structure()["final_norm"] else None


def encoder_norm(config) -> nn.Module:
    """Build a norm like those of the layers."""
    return token_norm(config.norm_type, config.hidden_size, config.layer_norm_eps, config.use_bias)


def scans_of(config) -> int:
    """Return the number of scans that each layer averages."""
    asked = 2 if getattr(config, "order", "normal") == "s" else 1
    return variant_class(config.mask_type).scans_taken(asked)


def float32_patterns(config) -> set[str]:
    """Regular expressions for the parameters that stay float32 in half precision and in quantised models: the
    `float32_weights` of the variant, by whole names, so that no other module with such an ending matches."""
    variant = variant_class(config.mask_type)
    names = [variant.weight_name(name, scan) for name in variant.float32_weights for scan in range(scans_of(config))]
    return {rf".*\bmixer\.{re.escape(name)}\b" for name in names}


def stays_float32(model, name: str) -> bool:
    """Return whether the parameter of this name stays float32 when the model is loaded in half precision."""
    return any(re.match(pattern, name) for pattern in model._keep_in_fp32_modules_strict)


def make_mlp(config, dropout: float = 0.0) -> MLP:
    """Build the MLP of a layer, with the given rate of dropout inside it."""
    return MLP(
        config.hidden_size,
        config.intermediate_size,
        activation=ACT2FN[config.hidden_act],
        gated=config.mlp_type == "glu",
        dropout=dropout,
        bias=config.use_bias,
    )


class LionLayer(GradientCheckpointingLayer, Block):
    """A `lion_hf.nn.Block` built from a configuration, for layer number `layer_idx`, counted from 0.

    Args:
        config: a LionConfig or LionVisionConfig.
        layer_idx: number of the layer, counted from 0.
        mlp_dropout: rate of dropout inside the MLP.
    """

    def __init__(self, config, layer_idx: int = 0, mlp_dropout: float = 0.0):
        rates = drop_path_rates(getattr(config, "drop_path_rate", 0.0), config.num_hidden_layers)
        super().__init__(
            config.hidden_size,
            make_mixer(config, layer_idx),
            make_mlp(config, mlp_dropout),
            norm_eps=config.layer_norm_eps,
            first_norm=config.first_norm or layer_idx > 0,
            dropout=config.hidden_dropout_prob,
            drop_path=rates[layer_idx],
            **{name: getattr(config, name) for name in BLOCK_OPTIONS},
        )


def mixing_options(config) -> dict[str, object]:
    """Return the arguments of every mixer that can be changed at any time."""
    return {
        "format": config.format,
        "chunk_size": config.chunk_size,
        "dropout": config.attention_probs_dropout_prob,
    }


# Arguments of from_pretrained that are also needed to find the configuration.
_WHERE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LionPreTrainedMixin:
    """Common behaviour of the base classes of both encoders. It comes before `PreTrainedModel` in their bases."""

    supports_gradient_checkpointing = True
    # Name of a head's loss in Transformers' table. Subclasses with other names keep it.
    stated_loss_type: str | None = None

    def __init__(self, config, *args, **kwargs):
        expected = self.config_class
        if not self._takes(config):
            raise ValueError(
                f"{type(self).__name__} needs a {expected.__name__} (model_type {expected.model_type!r}), but was "
                f"given {type(config).__name__} with model_type {getattr(config, 'model_type', None)!r}. Text models "
                "take a LionConfig, image models a LionVisionConfig; AutoModel picks the class that fits a checkpoint."
            )
        config.validate_shape()  # options may have changed since it was built
        super().__init__(config, *args, **kwargs)
        # Loading reads the strict set, quantisers read the other one.
        self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = float32_patterns(config)
        self._built = config.structure()
        if self.stated_loss_type is not None:
            self.loss_type = self.stated_loss_type  # overrides what Transformers derives from the class name

    @classmethod
    def _takes(cls, config) -> bool:
        """Whether a configuration fits this class. Subclasses with their own model_type fit, and so does a class of the
        same model_type whose code came with a checkpoint."""
        return isinstance(config, cls.config_class) or (
            isinstance(config, PreTrainedConfig) and config.model_type == cls.config_class.model_type
        )

    def _initialize_weights(self, module, *args, **kwargs):
        """As in Transformers, which skips a mixer without parameters of its own, although its variant may initialise
        modules inside it. The functions of `init` do not overwrite loaded values."""
        initialized = getattr(module, "_is_hf_initialized", False)
        super()._initialize_weights(module, *args, **kwargs)
        if isinstance(module, Mixer) and not initialized:
            module.init_variant(init)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a model from a folder or the Hub, as in Transformers.

        Options of the configuration can be given as keyword arguments, such as `format="chunk"`, also together with
        `config`.

        Raises:
            ValueError: if an option or `config` differs from the checkpoint in an option that determines the
                parameters, such as `mask_type`.
        """
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config)
        if cls._takes(config):
            config = config.with_options(kwargs)
            where = {name: kwargs[name] for name in _WHERE_OPTIONS if name in kwargs}
            try:
                stored, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)
            except OSError:  # weights without a configuration
                stored = {}
            if stored.get("model_type") in (config.model_type, cls.config_class.model_type):
                cls.config_class.require_structure(stored, config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        """As in Transformers; the Auto classes call it. Accepts options of the configuration, and keeps the same
        parameters in float32 as `from_pretrained`."""
        if cls._takes(config):
            config = config.with_options(kwargs)
        if kwargs.get("dtype") == "auto":  # the dtype of the configuration
            del kwargs["dtype"]
        model = super()._from_config(config, **kwargs)
        model.config.dtype = model.dtype
        plan = model._get_dtype_plan(model.dtype)
        for name, parameter in model.named_parameters():
            for pattern in filter(lambda pattern: re.search(pattern, name), plan):
                parameter.data = parameter.data.to(plan[pattern])
        return model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the model to a folder, as in Transformers.

        Raises:
            ValueError: if the configuration was changed after the model was built and no longer fits its weights.
        """
        structure = self.config.structure()
        for name, built in _built_options(self.base_model).items():
            stated = structure[name]
            if stated != built:
                raise ValueError(
                    f"config.{name} is {stated!r}, but the model was built with {name}={built!r}, which determines its "
                    "modules. Set it back to save this model, or build a new model from the changed configuration."
                )
        return super().save_pretrained(save_directory, *args, **kwargs)

    # Layers with softmax attention choose the function that computes it themselves.
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        return self.get_correct_attn_implementation(attn_implementation)

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        """Return "eager" (the default) or "sdpa", which mean the same. Raise ValueError for anything else."""
        if requested_attention not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation is {requested_attention!r}; allowed are 'eager' and 'sdpa', which mean the same. "
                "config.format selects how LION is computed: 'attention', 'rnn', 'chunk' or 'auto'."
            )
        return requested_attention or "eager"


# Options that have no effect on the modules if all layers use softmax attention.
_MIXER_OPTIONS = ("mask_type", "order", "layer_norm_after", "feature_map", "normalize", *MIXER_OPTIONS)


def _built_options(encoder: nn.Module) -> dict[str, object]:
    """The options that determined the modules of an encoder, by name, without those that had no effect, such as the
    order in a model without decay. `softmax_layers` and `local_layers` are those of the current layers: some may have
    been removed."""
    mixers = [layer.mixer for layer in encoder.layers]
    kinds = {"softmax_layers": SoftmaxMixer, "local_layers": LocalMixer}
    layers = {name: [i for i, mixer in enumerate(mixers) if isinstance(mixer, kind)] for name, kind in kinds.items()}
    variant = next((mixer.variant for mixer in mixers if isinstance(mixer, Mixer)), None)
    hidden = {*_MIXER_OPTIONS} if variant is None else {"order"} if variant.scans_taken(2) == 1 else set()
    hidden |= set() if layers["local_layers"] else {"local_window"}
    if not any(layers.values()):  # then only RoPE of LION's own layers counts
        count, stated = len(mixers), (encoder._built["rope_parameters"], encoder.config.rope_parameters)
        thetas = [linear_rope_thetas(rope, count) for rope in stated]
        hidden |= {"rope_parameters"} if thetas[0] == thetas[1] else set()
    return {name: value for name, value in encoder._built.items() if name not in hidden} | layers


def sequence_classification_loss(model, logits: Tensor, labels: Tensor | None, **kwargs) -> Tensor | None:
    """Transformers' classification or regression loss, corrected for gradient accumulation.

    If Trainer passes `num_items_in_batch`, the number of labels in all accumulated batches, Transformers divides cross
    entropy by it. Squared error and binary cross entropy stay means of one batch: their sum over the accumulated
    batches would be too large, and an empty batch of a process without rows would give NaN.
    """
    if labels is None:
        return None
    loss = model.loss_function(labels, logits, model.config, **kwargs)  # also sets config.problem_type if it is None
    items, problem = kwargs.get("num_items_in_batch"), model.config.problem_type
    if items is None or problem == "single_label_classification":
        return loss
    summed = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    total = summed(logits, labels.to(logits.device).view_as(logits), reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
