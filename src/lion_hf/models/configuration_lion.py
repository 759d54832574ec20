"""Configurations of the LION text encoder (`LionConfig`) and image encoder (`LionVisionConfig`), and named sizes."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..nn.variants import variant_class
from .lion_config_base import STRUCTURAL as STRUCTURAL
from .lion_config_base import LionOptions, in_plain_values, logger, normalised
from .lion_config_base import spellings as spellings
from .lion_options import IMAGE_DERIVED, TEXT_DERIVED, check_shape
from .lion_presets import MODERN_PRESETS, PAPER_PRESETS


@in_plain_values
@strict
class LionConfig(LionOptions, PreTrainedConfig):
    r"""Configuration of `LionModel` and its heads: BERT with its attention replaced by LION (arXiv 2502.16249).

    The defaults are the size of BERT-base with LION-S. `BertConfig` has the other options.

    Args:
        mask_type (`str`, defaults to `"selective"`):
            The variant: `"lit"` (no decay), `"decay"` (one learned decay per head), `"selective"` (a decay per token
            and head), another one of the package, such as `"gla"`, or the name of one registered with
            `lion_hf.nn.register_variant`. The authors' spellings are accepted too: `"Lit"`, `"Decay"`, `"Selective"`,
            `"lion-lit"`, `"lion-d"`, `"lion-s"`.
        format (`str`, defaults to `"auto"`):
            How the same function is computed: `"attention"` (quadratic), `"chunk"` (linear time), `"rnn"` (linear time,
            constant memory) or `"auto"` (attention for short inputs, chunk for long ones). Can be changed at any time.
            `None` keeps the stored value.
        chunk_size (`int`, defaults to 64):
            Largest number of tokens in one chunk of the chunk and rnn forms.
        pos_emb (`bool`, *optional*):
            Add a learned table of absolute positions. By default only for `"lit"`; the others derive positions from
            the decay. The default follows `mask_type` until `pos_emb` is set.
        roberta_positions (`bool`, defaults to `False`):
            Count positions as RoBERTa does: without padding (`pad_token_id`), and from row `pad_token_id + 1` of the
            position table. `position_ids` still count from 0. Padding has row `pad_token_id`.
        layer_norm_after (`bool`, *optional*):
            LayerNorm (eps 1e-5) over all heads after mixing. By default only for `"lit"`; follows `mask_type` too.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on the attention matrix in training, which needs the attention form: `format="auto"` selects it,
            `"rnn"` and `"chunk"` raise ValueError in training. Softmax layers apply it whatever `format` is.
        softmax_layers (`list[int]`, defaults to none):
            Layers, counted from 0, that keep softmax attention (a hybrid encoder). They have no decay and no
            `layer_norm_after`, and take quadratic time whatever `format` is.
        local_layers (`list[int]`, defaults to none):
            Layers with softmax attention in a window, disjoint from `softmax_layers`. They take linear time.
        local_window (`int`, defaults to 128):
            Width of this window: token i reads the tokens j with `|i - j| <= local_window // 2`.
        rope_parameters (`dict`, *optional*):
            Rotary positions (RoPE) in softmax and local layers: `{"rope_type": "default", "rope_theta": 10000.0}`, or
            such a dict by kind of layer, `"full_attention"` for softmax layers, `"sliding_attention"` for local ones
            and `"linear_attention"` for the others, which rotate queries and keys before the feature map (a kind that
            is missing has none). `rope_theta` of the last kind may be a list, with a number or None for each layer of
            the model. No other type is supported. `rope_theta=10000.0` is short for the first form, and
            `linear_rope_theta=10000.0` adds RoPE in LION's own layers, where new text models learn more with it
            (examples/results/modern.md). By default none.
        unpad (`bool`, *optional*):
            Remove padding (masked tokens `pad_token_id` at both ends of rows) before the first layer and put its
            embeddings back after the last. Only outputs at padding change; a row of padding only keeps its first
            token. By default in training on a CPU, outside `torch.compile`, if rows have 2048 / `hidden_size` padded
            positions or more on average (3 at base width). `True`: in every batch; with `inputs_embeds`, or without a
            `pad_token_id`, all masked tokens at the ends count as padding. `False`: never. Ignored with
            `output_hidden_states`, `output_attentions` or attention dropout, which need the whole batch, and in
            exported graphs. Can be changed at any time.
        classifier_dropout (`float`, *optional*):
            Dropout before the classification heads; `hidden_dropout_prob` by default.
        classifier_pooling (`str`, defaults to `"first"`):
            Input of the pooler in sequence classification and multiple choice: `"first"` (the first real token of a
            text, as in the paper) or `"mean"` (the mean of its real tokens). The mean is better with little
            fine-tuning data (examples/results). Can be changed at any time.
        sparse_prediction (`bool`, defaults to `False`):
            `LionForMaskedLM` with labels computes logits of the predicted tokens only, (predicted tokens, vocab_size).
            Loss and gradients are the same; memory and time of the other logits are saved. Without labels all logits
            are returned. Can be changed at any time.
        sparse_pred_ignore_index (`int`, defaults to -100):
            The label of the tokens that `sparse_prediction` leaves out.
        pooler_act (`str`, defaults to `"tanh"`):
            Activation of the pooler: any of Transformers, such as `"relu"` (DistilBERT) or `"gelu"` (ModernBERT).
        pooler_norm (`bool`, defaults to `False`):
            LayerNorm after the activation of the pooler, as in ModernBERT.
        token_transform (`bool`, defaults to `False`):
            Give token classification and question answering a layer like the pooler's, on every token, as ModernBERT
            does.
        type_vocab_size (`int`, defaults to 2):
            Number of token types. 0: no table; `token_type_ids` are ignored.
        norm_position (`str`, defaults to `"post"`):
            `"post"` as in BERT, or `"pre"`.
        norm_type (`str`, defaults to `"layer"`):
            Norms of layers, embeddings and last layer: `"layer"` (LayerNorm) or `"rms"` (RMSNorm, without bias). Heads
            and `layer_norm_after` have LayerNorms.
        use_bias (`bool`, defaults to `True`):
            Whether the projections of queries, keys, values, outputs and output gates, MLPs and these norms have a
            bias. Gates of decays, short convolutions and heads keep theirs.
        final_norm (`bool`, *optional*):
            Norm after the last layer. By default if `norm_position` is `"pre"`.
        embedding_norm (`bool`, defaults to `True`):
            Norm of the embeddings.
        first_norm (`bool`, defaults to `True`):
            Norm before the mixer of the first layer. `False`, as in ModernBERT, requires `norm_position="pre"`.
        mlp_type (`str`, defaults to `"mlp"`):
            `"mlp"`, or `"glu"` for MLPs whose values are multiplied by a gate, a third projection.
        feature_map (`str`, *optional*):
            Function applied to queries and keys: `"identity"`, `"elu"` (elu + 1), `"unit_silu"` (silu + 1/2, scaled
            to length 1), `"silu"` (silu, scaled to length 1; the scores are then cosines, which are not divided by
            the root of the width) or `"hedgehog"` (learned; `lion-linearize` trains it). By default that of the
            variant if `normalize` is True, else `"identity"`.
        normalize (`bool`, *optional*):
            Divide outputs by their row sums, as in the image models. By default False for the variants of the paper
            and the feature map `"silu"`, and True where the variant requires it. Requires positive scores and no
            attention dropout.
        decay_init (`str`, defaults to `"normal"`):
            Decays of a new model: `"normal"` (as published, near 0.5: heads start with their neighbours) or
            `"windows"`, spread geometrically over the heads of each layer. It has no effect on fixed decays.
        decay_windows (`list[float]`, *optional*):
            Numbers of tokens that heads read with `decay_init="windows"`: (smallest, largest), or one per head. By
            default (4, `max_position_embeddings`).
        gate_eps (`float`, defaults to 1e-7):
            Added to the decays of `"selective"` before their logarithm, as in the authors' text models.
        short_conv (`int`, *optional*):
            Width of a convolution over neighbouring tokens of queries, keys and values; 0 for none. This and the
            options below follow the variant until they are set; see `lion_hf.nn.Mixer` for what they compute.
        token_shift (`bool`, *optional*):
            Mix the neighbours of each token into what the projections read.
        output_gate (`str`, *optional*):
            Multiply outputs by a gate: `"silu"`, `"sigmoid"` or `"none"`.
        output_norm (`str`, *optional*):
            Norm of the outputs: `"rms"`, `"group_rms"`, `"head_rms"`, `"head_layer"` or `"none"`. Not with
            `layer_norm_after`.
        key_heads (`int`, *optional*):
            Number of heads of queries and keys, a divisor of `num_attention_heads`, which it is by default.
        key_dim (`int`, *optional*):
            Width of each head of queries and keys; by default `hidden_size // num_attention_heads`.

    Raises:
        ValueError: for a misspelt option or a value that is not allowed.

    Example:
        >>> from lion_hf import LionConfig, LionForMaskedLM
        >>> config = LionConfig(mask_type="decay", num_hidden_layers=2)
        >>> model = LionForMaskedLM(config)"""

    model_type = "lion"
    derived_options = TEXT_DERIVED

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = None
    classifier_pooling: str = "first"
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = -100
    pooler_act: str = "tanh"
    pooler_norm: bool = False
    token_transform: bool = False
    tie_word_embeddings: bool = True
    mask_type: str = "selective"
    format: str = "auto"
    chunk_size: int = 64
    pos_emb: bool | None = None
    roberta_positions: bool = False
    layer_norm_after: bool | None = None
    softmax_layers: Any = ()  # a list of int, checked at every assignment, as are the options of type Any below
    local_layers: Any = ()
    local_window: int = 128
    rope_parameters: Any = None
    unpad: bool | None = None
    norm_position: str = "post"
    norm_type: str = "layer"
    use_bias: bool = True
    final_norm: bool | None = None
    embedding_norm: bool = True
    first_norm: bool = True
    mlp_type: str = "mlp"
    feature_map: str | None = None
    normalize: bool | None = None
    decay_init: str = "normal"
    decay_windows: Any = None
    gate_eps: float | int = 1e-7
    short_conv: int | None = None
    token_shift: bool | None = None
    output_gate: str | None = None
    output_norm: str | None = None
    key_heads: int | None = None
    key_dim: int | None = None

    def __post_init__(self, **kwargs):
        order = kwargs.pop("order", None)  # an error unless it has no effect here
        if order is not None:
            normalised("order", order, type(self))
        super().__post_init__(**kwargs)

    def validate_shape(self):
        """Raise ValueError if sizes do not fit together."""
        check_shape(self)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; it must be None or a token of the vocabulary, 0 to "
                f"{self.vocab_size - 1} (vocab_size - 1)."
            )
        if variant_class(self.mask_type).pos_emb and not self.pos_emb:
            logger.warning_once(
                f"mask_type is {self.mask_type!r} with pos_emb=False: this model has no information about the order of "
                "its tokens. Set pos_emb=True unless you need a bag of words."
            )
        if self.normalize and self.attention_probs_dropout_prob > 0:
            raise ValueError(
                f"attention_probs_dropout_prob is {self.attention_probs_dropout_prob}, but models with normalize=True "
                "have no attention dropout. Set attention_probs_dropout_prob=0 or normalize=False."
            )


# Options of `LionBackbone` alone. config.json holds them only if they differ from these defaults.
_BACKBONE_DEFAULTS = {
    "out_features": None,
    "out_indices": None,
    "apply_layernorm": True,
    "reshape_hidden_states": True,
}


@in_plain_values
@strict
class LionVisionConfig(LionOptions, BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of `LionVisionModel`, its heads and `LionBackbone` (arXiv 2502.16249).

    The defaults are the base size (patch 16, 224 pixels) with LION-S. `ViTConfig` has the other options.

    Args:
        mask_type, format, chunk_size, softmax_layers, local_layers, local_window, rope_parameters:
            As in `LionConfig`. Windows and RoPE count the tokens row by row, the class token first, whatever `order`
            is.
        order (`str`, defaults to `"normal"`):
            `"normal"` reads patches row by row; `"s"` (or `"snake"`) averages two snake scans, along rows and along
            columns (the natural variants of the paper). It has no effect without decay.
        pos_emb (`bool`, defaults to `False`):
            Add a learned position table. Without it, any image size divisible by `patch_size` is accepted.
        cls_tok (`bool`, defaults to `False`):
            Classify from the class token. Otherwise from the mean over all tokens, class token included.
        append_patch_mean (`bool`, defaults to `False`):
            Append the mean of the patches to the class token for the classifier, which reads `2 * hidden_size`
            features then, as in DINOv2. Requires `cls_tok`.
        drop_path_rate (`float`, defaults to 0.0):
            Rate of stochastic depth in the last layer. The rates of earlier layers rise linearly from 0 to it.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Applies to softmax layers and, with `normalize=False`, to the others. The paper's image models have none.
        out_features (`list[str]`, *optional*):
            Stages whose feature maps `LionBackbone` returns, in ascending order: `"stem"` (the embeddings),
            `"stage1"`, ... `"stageN"` (the output of each layer). The last stage by default.
        out_indices (`list[int]`, *optional*):
            The same stages by number: 0 is the stem, negative numbers count from the end.
        reshape_hidden_states (`bool`, defaults to `True`):
            Whether `LionBackbone` returns feature maps (batch, hidden_size, rows, columns). `False`: tokens (batch,
            1 + rows * columns, hidden_size), the class token first, as DPT and Depth Anything expect them.
        apply_layernorm (`bool`, defaults to `True`):
            Whether `LionBackbone` applies the final LayerNorm to the feature maps.
        norm_position, norm_type, use_bias, final_norm, embedding_norm, first_norm, mlp_type:
            As in `LionConfig`, but by default norm_position is `"pre"` and embedding_norm is False. The embedding norm
            follows the position table. The convolution of the patches keeps its bias.
        feature_map, gate_eps, decay_init, short_conv, token_shift, output_gate, key_heads, key_dim:
            As in `LionConfig`, but gate_eps is 0.0 by default.
        normalize (`bool`, *optional*):
            Divide outputs by their row sums. By default True, unless scores of the variant or feature map may be
            negative.
        output_norm (`str`, *optional*):
            As in `LionConfig`. By default `"rms"` if scores may be negative and the variant has no other norm.
        decay_windows (`list[float]`, *optional*):
            As in `LionConfig`, counted in patches along the scan. By default (4, number of patches).

    Example:
        >>> from lion_hf import LionForImageClassification, LionVisionConfig
        >>> config = LionVisionConfig(mask_type="decay", order="s", num_hidden_layers=2)
        >>> model = LionForImageClassification(config)"""

    model_type = "lion_vision"
    derived_options = IMAGE_DERIVED
    prefix_tokens = 1  # the class token

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    mask_type: str = "selective"
    format: str = "auto"
    chunk_size: int = 64
    order: str = "normal"
    pos_emb: bool = False
    cls_tok: bool = False
    append_patch_mean: bool = False
    softmax_layers: Any = ()  # a list of int, checked at every assignment, as are the options of type Any below
    local_layers: Any = ()
    local_window: int = 128
    rope_parameters: Any = None
    reshape_hidden_states: bool = True
    apply_layernorm: bool = True
    norm_position: str = "pre"
    norm_type: str = "layer"
    use_bias: bool = True
    final_norm: bool | None = None
    embedding_norm: bool = False
    first_norm: bool = True
    mlp_type: str = "mlp"
    feature_map: str | None = None
    normalize: bool | None = None
    decay_init: str = "normal"
    decay_windows: Any = None
    gate_eps: float | int = 0.0
    short_conv: int | None = None
    token_shift: bool | None = None
    output_gate: str | None = None
    output_norm: str | None = None
    key_heads: int | None = None
    key_dim: int | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as a dict, as in Transformers, without default values of backbone options."""
        output = super().to_dict()
        return {k: v for k, v in output.items() if k not in _BACKBONE_DEFAULTS or v != _BACKBONE_DEFAULTS[k]}

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages that `LionBackbone` can return, first the embeddings, then the output of each layer."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def encoder_stride(self) -> int:
        """Side in pixels of the square that `LionForMaskedImageModeling` predicts for a token: `patch_size`."""
        return self.patch_size

    @encoder_stride.setter
    def encoder_stride(self, value: int) -> None:
        if value != self.patch_size:
            raise ValueError(
                f"encoder_stride is {value}, but patch_size is {self.patch_size}; they must be equal. Leave "
                "encoder_stride out: it follows patch_size."
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of (rows, columns) of patches in an image of the configured size."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def validate_shape(self):
        """Raise ValueError if sizes do not fit together."""
        check_shape(self)
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if (not isinstance(self.image_size, int) and len(sides) != 2) or any(
            s < 1 or s % self.patch_size for s in sides
        ):
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; give one side or "
                "(height, width), each a positive multiple of patch_size."
            )


PRESETS = PAPER_PRESETS  # the name in 0.1

__all__ = ["MODERN_PRESETS", "PAPER_PRESETS", "PRESETS", "LionConfig", "LionVisionConfig"]
