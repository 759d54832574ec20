"""LION image encoder and its heads: a pre-norm ViT with attention replaced by LION (arXiv 2502.16249)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..nn.encoder import run_blocks
from ..nn.mixer import TokenMixer
from ..ops.backend import is_exporting
from ..ops.scans import snake_orders
from .configuration_lion import LionVisionConfig
from .lion_layers import (
    LionLayer,
    LionPreTrainedMixin,
    encoder_norm,
    final_norm,
    mixing_options,
    scans_of,
    sequence_classification_loss,
)


class LionVisionPatchEmbeddings(nn.Module):
    """Embed non-overlapping patches with one convolution, and flatten them row by row."""

    def __init__(self, config: LionVisionConfig):
        super().__init__()
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, channels, height, width) with "
                f"{self.num_channels} channels (config.num_channels). Convert the image, for example with "
                ".convert('RGB')."
            )
        height, width = pixel_values.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"The image is {height} x {width} pixels, which patch_size {self.patch_size} does not divide. Resize "
                "or crop both sides to multiples of it."
            )
        if is_exporting():  # replaces the check above in the graph: the reshape fails for other sizes, in ONNX too
            pixel_values = pixel_values.unflatten(2, (-1, self.patch_size)).flatten(2, 3)
            pixel_values = pixel_values.unflatten(3, (-1, self.patch_size)).flatten(3, 4)
        elif torch.jit.is_tracing():  # the same for traces; one -1 at a time keeps the batch size free
            shape = batch, channels, height, width = pixel_values.shape
            pixel_values = pixel_values.reshape(batch, channels, -1, self.patch_size, width)
            pixel_values = pixel_values.reshape(batch, channels, height, -1, self.patch_size).reshape(shape)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class LionVisionEmbeddings(nn.Module):
    """Patches after a class token, with learned positions if `config.pos_emb` and an optional mask token.

    A norm follows if `config.embedding_norm`."""

    def __init__(self, config: LionVisionConfig, use_mask_token: bool = False):
        super().__init__()
        self.grid_size = config.grid_size
        self.patch_size = config.patch_size
        self.patch_embeddings = LionVisionPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if use_mask_token else None
        positions = 1 + self.grid_size[0] * self.grid_size[1]
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, positions, config.hidden_size)) if config.pos_emb else None
        )
        self.norm = encoder_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
    ) -> Tensor:
        patches = self.patch_embeddings(pixel_values.to(self.cls_token.dtype))
        grid = tuple(side // self.patch_size for side in pixel_values.shape[2:])
        if bool_masked_pos is not None:
            patches = self._masked(patches, bool_masked_pos, grid)
        embeddings = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        positions = self.position_embeddings is not None
        if positions:
            embeddings = embeddings + self._positions(grid, interpolate_pos_encoding)
        embeddings = embeddings if self.norm is None else self.norm(embeddings)
        return self.dropout(embeddings) if positions else embeddings

    def _masked(self, patches: Tensor, bool_masked_pos: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos was given, but this model has no mask token. Use LionForMaskedImageModeling or "
                "LionVisionModel(config, use_mask_token=True)."
            )
        mask, shapes = bool_masked_pos.flatten(1), (tuple(patches.shape[:2]), (patches.shape[0], *grid))
        if tuple(bool_masked_pos.shape) not in shapes:
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}; it must be (batch, patches) = "
                f"{shapes[0]} or (batch, rows, columns) = {shapes[1]}, with 1 for masked patches and 0 for others."
            )
        return torch.where(mask.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

    def _positions(self, grid: tuple[int, int], interpolate: bool) -> Tensor:
        if grid == self.grid_size:
            return self.position_embeddings
        if not interpolate:
            sides = [n * self.patch_size for n in (*grid, *self.grid_size)]
            raise ValueError(
                f"The image is {sides[0]} x {sides[1]} pixels, but the position table is for "
                f"{sides[2]} x {sides[3]}. Resize the image or pass interpolate_pos_encoding=True."
            )
        table = self.position_embeddings[:, 1:].unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat([self.position_embeddings[:, :1], table], 1)


class LionVisionLayer(LionLayer):
    """A `LionLayer` that also has dropout inside its MLP, as in ViT."""

    def __init__(self, config: LionVisionConfig, layer_idx: int = 0):
        super().__init__(config, layer_idx, mlp_dropout=config.hidden_dropout_prob)


@auto_docstring(custom_intro="Base class of the LION image encoder and its heads.")
class LionVisionPreTrainedModel(LionPreTrainedMixin, PreTrainedModel):
    config: LionVisionConfig
    base_model_prefix = "lion_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["LionVisionEmbeddings", "LionVisionLayer"]
    _can_record_outputs = {"hidden_states": LionLayer, "attentions": TokenMixer}

    @torch.no_grad()
    def _init_weights(self, module):
        """Linear weights, special tokens and positions: truncated N(0, initializer_range**2). Biases: 0."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, LionVisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            if module.mask_token is not None:
                init.trunc_normal_(module.mask_token, std=std)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)


@auto_docstring(
    custom_intro="The LION image encoder without a head: tokens after the final LayerNorm, and a pooled vector."
)
class LionVisionModel(LionVisionPreTrainedModel):
    def __init__(self, config: LionVisionConfig, use_mask_token: bool = False):
        r"""
        use_mask_token (`bool`, *optional*, defaults to `False`):
            Whether to add a learned token that replaces masked patches, see `bool_masked_pos`.
        """
        super().__init__(config)
        self.embeddings = LionVisionEmbeddings(config, use_mask_token)
        self.layers = nn.ModuleList([LionVisionLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = final_norm(config)
        self.scans = scans_of(config)  # what the layers were built with, even if the configuration changes
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | BaseModelOutputWithPooling:
        r"""
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
            Resize the position table (bicubic) to images of another size. Models without a table need no resizing.
        bool_masked_pos (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*):
            True or 1 for patches, row by row, that the mask token replaces. Requires `use_mask_token=True`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (batch_size, 1 + num_patches, hidden_size), the class
            token first, and `pooler_output` (batch_size, hidden_size): the class token if `config.cls_tok`, otherwise
            the mean over all tokens, class token included.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing. Pass a tensor (batch, channels, height, width).")
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, bool_masked_pos)
        paths = None
        if self.scans > 1:
            height, width = (side // self.config.patch_size for side in pixel_values.shape[2:])
            paths = snake_orders(height, width, hidden_states.device)
        hidden_states = run_blocks(
            self.layers,
            hidden_states,
            paths=paths,
            training=self.training,
            output_attentions=bool(output_attentions),
            **mixing_options(self.config),
        )
        hidden_states = hidden_states if self.norm is None else self.norm(hidden_states)
        pooled = hidden_states[:, 0] if self.config.cls_tok else hidden_states.mean(1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


@auto_docstring(custom_intro="LION image encoder with a linear classifier on the pooled vector.")
class LionForImageClassification(LionVisionPreTrainedModel):
    stated_loss_type = "ForImageClassification"

    def __init__(self, config: LionVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion_vision = LionVisionModel(config)
        features = config.hidden_size * (2 if config.append_patch_mean else 1)
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | ImageClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Class indices (cross entropy), or as in `LionForSequenceClassification` for the other problem types.
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
            See `LionVisionModel`.

        Returns:
            `ImageClassifierOutput`: `logits` (batch_size, num_labels) and, with labels, `loss` (a scalar).
        """
        outputs = self.lion_vision(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        pooled = outputs.pooler_output
        if self.config.append_patch_mean:
            pooled = torch.cat([pooled, outputs.last_hidden_state[:, 1:].mean(1)], -1)
        logits = self.classifier(pooled)
        loss = sequence_classification_loss(self, logits, labels, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LionPixelShuffle(nn.PixelShuffle):
    """`nn.PixelShuffle` as a permutation of dimensions: PyTorch's backward pass fails for an empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        side = self.upscale_factor
        batch, channels, rows, columns = x.shape
        pixels = x.reshape(batch, channels // side**2, side, side, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return pixels.reshape(batch, channels // side**2, rows * side, columns * side)


@auto_docstring(
    custom_intro="LION image encoder with a decoder for masked patches: one convolution and a pixel shuffle."
)
class LionForMaskedImageModeling(LionVisionPreTrainedModel):
    # The loss is a mean over one batch. Trainer averages it over accumulated batches instead of counting labels.
    accepts_loss_kwargs = False

    def __init__(self, config: LionVisionConfig):
        super().__init__(config)
        self.lion_vision = LionVisionModel(config, use_mask_token=True)
        patch_size = config.patch_size
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, patch_size**2 * config.num_channels, kernel_size=1),
            LionPixelShuffle(patch_size),
        )
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MaskedImageModelingOutput:
        r"""
        bool_masked_pos (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*):
            True or 1 for masked patches, row by row; `(batch_size, rows, columns)` is accepted too. The loss is the
            mean absolute error over their pixels and channels, in float32, and 0 if no patch is masked.
            `Trainer.evaluate` needs `TrainingArguments(label_names=["bool_masked_pos"])`.
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
            See `LionVisionModel`.

        Returns:
            `MaskedImageModelingOutput`: `reconstruction` of all patches (batch_size, num_channels, height, width) and,
            with `bool_masked_pos`, `loss` (a scalar).
        """
        outputs = self.lion_vision(pixel_values, interpolate_pos_encoding, bool_masked_pos, return_dict=True, **kwargs)
        features = _grid_features(outputs.last_hidden_state, pixel_values, self.config.patch_size)
        reconstruction = self.decoder(features)
        loss = None
        if bool_masked_pos is not None:
            loss = _masked_l1_loss(reconstruction, pixel_values, bool_masked_pos, self.config.patch_size)
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _grid_features(hidden_states: Tensor, pixel_values: Tensor, patch_size: int) -> Tensor:
    """Turn tokens (batch, 1 + rows * columns, channels) into a map (batch, channels, rows, columns)."""
    grid = tuple(side // patch_size for side in pixel_values.shape[2:])
    return hidden_states[:, 1:].transpose(1, 2).unflatten(2, grid)


def _masked_l1_loss(reconstruction: Tensor, pixel_values: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    error = (reconstruction.to(dtype) - pixel_values.to(dtype)).abs().mean(1)
    by_patch = F.avg_pool2d(error.unsqueeze(1), patch_size).squeeze(
        1
    )  # with three dimensions an empty batch would fail
    mask = mask.reshape(by_patch.shape).bool().to(dtype)
    return (by_patch * mask).sum() / mask.sum().clamp(min=1)


@auto_docstring(
    custom_intro="LION image encoder as a backbone: feature maps of selected stages, for example for detectors."
)
class LionBackbone(BackboneMixin, LionVisionPreTrainedModel):
    def __init__(self, config: LionVisionConfig):
        config = copy.deepcopy(config)  # it is changed below; the caller may build other heads from it
        super().__init__(config)
        # Selects the last stage by default, and completes names and numbers of stages if only one of them was given.
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.lion_vision = LionVisionModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | BackboneOutput:
        r"""
        interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
            See `LionVisionModel`. True here, because backbones often receive images of other sizes.

        Returns:
            `BackboneOutput`: `feature_maps`, a tuple with one tensor for each of `config.out_features`, after the final
            LayerNorm if `config.apply_layernorm`. Each is (batch_size, hidden_size, height / patch_size, width /
            patch_size), or (batch_size, 1 + num_patches, hidden_size) if `config.reshape_hidden_states` is False.

        Example:
            >>> from lion_hf import LionBackbone, LionVisionConfig
            >>> config = LionVisionConfig(num_hidden_layers=4, out_features=["stage2", "stage4"])
            >>> backbone = LionBackbone(config)
        """
        kwargs["output_hidden_states"] = True
        outputs = self.lion_vision(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        stages = dict(zip(self.stage_names, outputs.hidden_states, strict=True))
        chosen = [stages[name] for name in self.out_features]
        norm = self.lion_vision.norm
        if self.config.apply_layernorm:
            chosen = [tokens if norm is None else norm(tokens) for tokens in chosen]
        if self.config.reshape_hidden_states:
            chosen = [_grid_features(tokens, pixel_values, self.config.patch_size) for tokens in chosen]
        return BackboneOutput(
            feature_maps=tuple(chosen),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "LionBackbone",
    "LionForImageClassification",
    "LionForMaskedImageModeling",
    "LionVisionModel",
    "LionVisionPreTrainedModel",
]
