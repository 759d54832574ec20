"""A stack of blocks over tokens of text, images or anything else, with key masks, packing and unpadding."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops.checks import check_key_mask, is_abstract, is_exporting, values_can_be_read
from ..ops.packing import LEAST_PADDING, UnpaddedRow, unpad
from .block import Block
from .local_attention import LocalMixer
from .mixer import Mixer
from .mixer_checks import NO_MATRIX_OF_PACKED_ROWS
from .mlp import MLP
from .names import BLOCK_OPTIONS, MLP_TYPES, require_name, require_options, require_rate
from .norms import token_norm
from .softmax import SoftmaxMixer


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    key_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    padding: Tensor | None = None,
    unpadding: bool | None = False,
    keep_shape: bool = False,
    training: bool = False,
    **mixing,
) -> Tensor:
    """Run blocks one after another, and decide how padding and packed rows are computed.

    Args:
        blocks: modules with the interface of `Block`.
        x: (batch, length, dim).
        key_mask: (batch, length), bool, True for real tokens; None if all tokens are real.
        cu_seqlens: (sequences + 1,), int32 or int64, the bounds of the sequences of a packed row (batch 1).
        padding: (batch, length), bool, True for masked tokens whose outputs are not used; by default all masked tokens.
        unpadding: whether to remove the padding at the ends of rows before the first block. Removed positions are
            restored after the last block with their input values and get no gradient. True: whenever there is padding.
            None: in training on a CPU, if there is enough padding to save time. False: never. Unpadding joins the rows
            of the batch into one, so it is skipped if a mixer does not support packed rows, or if the attention matrix
            is needed.
        keep_shape: never remove padding, so that hooks and recorded hidden states see (batch, length, dim).
        training: whether the blocks are in training mode; used by `unpadding=None`, and to decide whether `dropout`
            needs the attention matrix.
        mixing: further keyword arguments of the mixers, such as `format`, `chunk_size`, `paths` and `dropout`.

    Returns:
        (batch, length, dim).

    Raises:
        ValueError: if `cu_seqlens` is given and the attention matrix is needed (`output_attentions`, or `dropout` in
            training).
    """
    needs_matrix = bool(mixing.get("output_attentions")) or (training and mixing.get("dropout", 0) > 0)
    if cu_seqlens is not None and needs_matrix:
        raise ValueError(NO_MATRIX_OF_PACKED_ROWS)
    if key_mask is not None:
        check_key_mask(key_mask, *x.shape[:2])
        key_mask = key_mask.to(torch.bool)
    row, whole = None, x
    packs = all(getattr(block.mixer, "takes_packed_rows", True) for block in blocks)
    if key_mask is not None and cu_seqlens is None and packs and not needs_matrix and not keep_shape:
        row = unpadded_row(key_mask, x, unpadding, training, padding)
    if row is not None:
        x, key_mask, cu_seqlens = row.join(x), row.key_mask, row.cu_seqlens
    for block in blocks:
        x = block(x, key_mask, cu_seqlens=cu_seqlens, **mixing)
    return x if row is None else row.restore(x, whole)


def unpadded_row(
    key_mask: Tensor, x: Tensor, unpadding: bool | None, training: bool, padding: Tensor | None = None
) -> UnpaddedRow | None:
    """Return the rows of a batch joined without padding, or None if they stay as they are."""
    # An exported graph cannot read the mask. A compiled graph can break here.
    if unpadding is False or is_exporting():
        return None
    if is_abstract(key_mask) and not (unpadding and torch.compiler.is_compiling()):
        return None
    if unpadding:
        return unpad(key_mask, padding=padding)
    # On an accelerator, reading the mask waits for the device. Whether unpadding saves time there is not measured yet.
    worthwhile = training and values_can_be_read(key_mask)
    return unpad(key_mask, LEAST_PADDING * len(key_mask) / x.shape[-1], padding) if worthwhile else None


class Encoder(nn.Module):
    """A stack of `Block`, followed by a norm if the blocks are pre-norm.

    By default it is pre-norm with normalised outputs, like the image encoders of the paper (arXiv 2502.16249).

    Example::

        >>> encoder = lion_hf.nn.Encoder(dim=256, depth=4, heads=4, variant="selective")
        >>> tokens, real = torch.randn(2, 1000, 256), torch.ones(2, 1000, dtype=torch.bool)
        >>> encoder(tokens, key_mask=real).shape
        torch.Size([2, 1000, 256])

    Args:
        dim: width of the tokens, a multiple of `heads`.
        depth: number of blocks.
        heads: number of heads.
        variant: name of the variant, as in `Mixer`.
        hidden: width inside the MLPs; `4 * dim` by default.
        mlp_type: "mlp" (default), or "glu" for gated MLPs.
        activation: activation of the MLPs, as in `MLP`.
        norm_position: "pre" (default) or "post", as in `Block`.
        norm_type: "layer" (LayerNorm, default) or "rms" (RMSNorm): the norms of the blocks and those below.
        norm_eps: eps of these norms.
        use_bias: whether projections of the mixers, MLPs and norms have a bias; True by default. Gates of decays and
            short convolutions keep theirs.
        final_norm: whether a norm follows the last block; by default if `norm_position` is "pre".
        embedding_norm: whether a norm precedes the first block; False by default.
        first_norm: whether the mixer of the first block reads normalised tokens; True by default. False requires
            pre-norm blocks.
        dropout: dropout rate of residual branches and inside the MLPs, in [0, 1).
        drop_path: rate of stochastic depth of the last block, in [0, 1). The rates of earlier blocks rise linearly
            from 0.
        attention_dropout: dropout rate of the attention matrix in training, in [0, 1), see `Mixer.forward`.
        softmax_layers: indices of blocks, counted from 0, that use softmax attention.
        local_layers: indices of other blocks that use softmax attention in a window, see `LocalMixer`.
        local_window: width of this window in tokens; 128 by default.
        rope_theta: base of the rotary positions (RoPE) in softmax and local layers; None (default) without.
        local_rope_theta: that of the local layers; `rope_theta` by default.
        linear_rope_theta: that of the layers with a `Mixer`, see there: a number, or one number or None for each block;
            None (default) without.
        unpad: whether to remove padding from batches, see `unpadding` of `run_blocks`.
        options: further options of `Block`, and of `Mixer` such as `normalize`, `prefix_tokens` or `output_gate`.

    Raises:
        TypeError: for an option that there is not.
        ValueError: if a name is unknown, a number is out of range, `dim` is not a multiple of `heads`, or
            `attention_dropout` is set although all mixers normalise their outputs, which disables it.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        variant: str = "selective",
        *,
        hidden: int | None = None,
        mlp_type: str = "mlp",
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        norm_position: str = "pre",
        norm_type: str = "layer",
        norm_eps: float = 1e-5,
        use_bias: bool = True,
        final_norm: bool | None = None,
        embedding_norm: bool = False,
        first_norm: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention_dropout: float = 0.0,
        softmax_layers: Sequence[int] = (),
        local_layers: Sequence[int] = (),
        local_window: int = 128,
        rope_theta: float | None = None,
        local_rope_theta: float | None = None,
        linear_rope_theta: float | Sequence[float | None] | None = None,
        unpad: bool | None = None,
        **options,
    ):
        super().__init__()
        own = (name for name in inspect.signature(Encoder.__init__).parameters if name != "options")
        known = (*own, *BLOCK_OPTIONS, *inspect.signature(Mixer.__init__).parameters)
        require_options(type(self), options, dict.fromkeys(known))
        require_name("mlp_type", mlp_type, MLP_TYPES)
        _check_layers(depth, softmax_layers, local_layers, options.get("direction", "both"))
        require_rate("attention_dropout", attention_dropout)
        self.attention_dropout, self.unpad = attention_dropout, unpad
        block_options = {"norm_position": norm_position, "norm_type": norm_type, "use_bias": use_bias}
        block_options |= {"norm_eps": norm_eps, "dropout": dropout}
        block_options |= {name: options.pop(name) for name in BLOCK_OPTIONS if name in options}
        thetas = linear_rope_theta if isinstance(linear_rope_theta, Sequence) else [linear_rope_theta] * depth
        if len(thetas) != depth:
            raise ValueError(
                f"linear_rope_theta is {linear_rope_theta!r}; it must be a number, or a list with an entry for each of "
                f"the {depth} blocks."
            )
        biases = {"qkv_bias": options.pop("qkv_bias", True) and use_bias, "out_bias": use_bias}

        def block(i: int) -> Block:
            if i in softmax_layers:
                mixer = SoftmaxMixer(dim, heads, rope_theta=rope_theta, **biases)
            elif i in local_layers:
                theta = rope_theta if local_rope_theta is None else local_rope_theta
                mixer = LocalMixer(dim, heads, window=local_window, rope_theta=theta, **biases)
            else:
                place = {"layer_idx": i, "num_layers": depth, "rope_theta": thetas[i]}
                mixer = Mixer(dim, heads, variant, **place, **biases, **options)
            mlp = MLP(
                dim,
                4 * dim if hidden is None else hidden,
                activation=activation,
                gated=mlp_type == "glu",
                dropout=dropout,
                bias=use_bias,
            )
            rate = drop_path_rates(drop_path, depth)[i]
            return Block(dim, mixer, mlp, first_norm=first_norm or i > 0, drop_path=rate, **block_options)

        self.layers = nn.ModuleList(block(i) for i in range(depth))
        norm = functools.partial(token_norm, norm_type, dim, norm_eps, use_bias)
        final_norm = norm_position == "pre" if final_norm is None else final_norm
        self.norm = norm() if final_norm and depth else None
        self.embedding_norm = norm() if embedding_norm else None
        if attention_dropout and all(getattr(layer.mixer, "normalize", False) for layer in self.layers):
            raise ValueError(
                f"attention_dropout is {attention_dropout}, but all mixers normalise their outputs, which disables it. "
                "Set it to 0, or set normalize=False."
            )

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        paths: Sequence[tuple[Tensor, Tensor]] | None = None,
        format: str = "auto",
        chunk_size: int = 64,
    ) -> Tensor:
        """Encode tokens.

        Args:
            x: (batch, length, dim).
            key_mask: (batch, length), bool, True for real tokens, False for padding. Padded positions never affect real
                tokens. If padding is removed, the blocks do not compute padded positions, which get no gradient.
            cu_seqlens: bounds of packed sequences, as in `Mixer.forward`.
            paths: paths of two scans, as in `Mixer.forward`.
            format: "attention", "rnn", "chunk" or "auto" (default), as in `Mixer.forward`.
            chunk_size: maximum number of tokens per chunk, as in `Mixer.forward`.

        Returns:
            (batch, length, dim).

        Raises:
            ValueError: as in `run_blocks` and `Mixer.forward`.
        """
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = run_blocks(
            self.layers, x, key_mask, cu_seqlens=cu_seqlens, unpadding=self.unpad, training=self.training, paths=paths,
            format=format, chunk_size=chunk_size, dropout=self.attention_dropout,
        )  # fmt: skip
        return x if self.norm is None else self.norm(x)


def _check_layers(depth: int, softmax_layers: Sequence[int], local_layers: Sequence[int], direction: str) -> None:
    """Raise ValueError unless each layer without a `Mixer` exists, is of one kind, and may read both directions."""
    for name, layers in (("softmax_layers", softmax_layers), ("local_layers", local_layers)):
        if not all(0 <= i < depth for i in layers):
            raise ValueError(f"{name} is {layers!r}; with depth {depth}, its numbers must be from 0 to {depth - 1}.")
        if len(layers) and direction != "both":
            raise ValueError(f"direction is {direction!r}, but {name} read both directions.")
    if both := sorted({*softmax_layers} & {*local_layers}):
        raise ValueError(f"softmax_layers and local_layers both contain {both}; remove them from one of the lists.")


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rates of stochastic depth of `depth` blocks, which rise linearly from 0 to `last`."""
    require_rate("drop_path", last)
    return [last * i / max(depth - 1, 1) for i in range(depth)]
