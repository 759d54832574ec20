"""A stack of blocks over tokens: of text, images or anything else. Masks, packing and unpadding are settled here."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops.checks import is_abstract, is_exporting, values_can_be_read
from ..ops.packing import LEAST_PADDING, UnpaddedRow, unpad
from .block import Block
from .mixer import Mixer
from .mlp import MLP
from .names import BLOCK_OPTIONS, MLP_TYPES, require_name, require_rate
from .softmax import SoftmaxMixer


NO_MATRIX_OF_PACKED_ROWS = (
    "This row holds several packed sequences, for which no attention matrix is built, but output_attentions=True or "
    "attention_probs_dropout_prob > 0 in training needs one. Give every sequence a row of its own, or set "
    "output_attentions to False and attention_probs_dropout_prob to 0."
)


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
    """Runs blocks one after the other: the one place that decides how padding and packed rows are computed.

    Args:
        blocks: modules with the call of [`Block`].
        x: (batch, length, dim).
        key_mask: (batch, length), True for real tokens, or None where all are.
        cu_seqlens: (sequences + 1,), the bounds of the sequences of a packed row (batch 1).
        padding: (batch, length), True for masked tokens that nobody reads; all that are masked by default.
        unpadding: take the padding at the ends of rows out before the first block, and put it back after the last as it
            was, without a gradient. True: wherever there is any; None: in training on a CPU, where it pays; False:
            never. It makes one row of several, so that nothing is taken out where a mixer takes no packed rows.
        keep_shape: leave the padding where it is, for those who look at what happens inside.
        training: whether the blocks train, for `unpadding=None`, and for `dropout`.
        mixing: further arguments of the mixers, such as `format` and `paths`.

    Returns:
        (batch, length, dim).

    Raises:
        ValueError: for packed sequences where the attention matrix is needed.
    """
    needs_matrix = bool(mixing.get("output_attentions")) or (training and mixing.get("dropout", 0) > 0)
    if cu_seqlens is not None and needs_matrix:
        raise ValueError(NO_MATRIX_OF_PACKED_ROWS)
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
    """The rows of a batch joined without padding, or None where they stay as they are."""
    # An exported graph reads no mask, while one that is compiled can break here.
    if unpadding is False or is_exporting():
        return None
    if is_abstract(key_mask) and not (unpadding and torch.compiler.is_compiling()):
        return None
    if unpadding:
        return unpad(key_mask, padding=padding)
    # On an accelerator, reading the mask waits for the device; not yet timed whether that pays.
    worthwhile = training and values_can_be_read(key_mask)
    return unpad(key_mask, LEAST_PADDING * len(key_mask) / x.shape[-1], padding) if worthwhile else None


class Encoder(nn.Module):
    """A stack of [`Block`], with a norm after the last one where blocks are pre-norm.

    ```python
    >>> encoder = lion_hf.nn.Encoder(dim=256, depth=4, heads=4, variant="selective")
    >>> tokens, real = torch.randn(2, 1000, 256), torch.ones(2, 1000, dtype=torch.bool)
    >>> encoder(tokens, key_mask=real).shape
    torch.Size([2, 1000, 256])
    ```

    Args:
        dim: width of the tokens, a multiple of `heads`.
        depth: number of blocks.
        heads: number of heads.
        variant: as in [`Mixer`].
        hidden: width of the MLPs; 4 * dim by default.
        mlp_type: "mlp", or "glu" for gated ones.
        activation: as in [`MLP`].
        norm_position: "pre" or "post", as in [`Block`].
        norm_eps: eps of the LayerNorms of blocks and of the last one.
        dropout: rate on residual branches and inside the MLPs.
        drop_path: rate of stochastic depth of the last block; earlier blocks have linearly less.
        attention_dropout: share of the attention matrix that training drops, see [`Mixer.forward`].
        softmax_layers: blocks, counted from 0, that mix by softmax attention.
        unpad: whether padding is taken out of batches, see [`run_blocks`].
        options: further options of [`Block`], and arguments of [`Mixer`] such as `normalize` or `prefix_tokens`.

    Raises:
        ValueError: for options that do not fit.
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
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention_dropout: float = 0.0,
        softmax_layers: Sequence[int] = (),
        unpad: bool | None = None,
        **options,
    ):
        super().__init__()
        require_name("mlp_type", mlp_type, MLP_TYPES)
        if not all(0 <= i < depth for i in softmax_layers):
            raise ValueError(
                f"softmax_layers is {softmax_layers!r}; with depth {depth} its numbers must be from 0 to {depth - 1}."
            )
        require_rate("attention_dropout", attention_dropout)
        self.attention_dropout, self.unpad = attention_dropout, unpad
        block_options = {"norm_position": norm_position, "norm_eps": norm_eps, "dropout": dropout}
        block_options |= {name: options.pop(name) for name in BLOCK_OPTIONS if name in options}
        softmax_options = {k: v for k, v in options.items() if k == "qkv_bias"}

        def block(i: int) -> Block:
            if i in softmax_layers:
                mixer = SoftmaxMixer(dim, heads, **softmax_options)
            else:
                mixer = Mixer(dim, heads, variant, layer_idx=i, num_layers=depth, **options)
            mlp = MLP(
                dim,
                4 * dim if hidden is None else hidden,
                activation=activation,
                gated=mlp_type == "glu",
                dropout=dropout,
            )
            rate = drop_path_rates(drop_path, depth)[i]
            return Block(dim, mixer, mlp, drop_path=rate, **block_options)

        self.layers = nn.ModuleList(block(i) for i in range(depth))
        self.norm = self.layers[-1].final_norm() if depth else None
        if attention_dropout and all(getattr(layer.mixer, "normalize", False) for layer in self.layers):
            raise ValueError(
                f"attention_dropout is {attention_dropout}, but all mixers normalise and drop nothing. Set it to 0, or "
                "normalize=False."
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
        """
        Args:
            x: (batch, length, dim).
            key_mask: (batch, length), True for real tokens, False for padding. What padded positions hold reaches no
                real token; where padding is taken out, no block sees them, and they have no gradient.
            cu_seqlens, paths, format, chunk_size: as in [`Mixer.forward`].

        Returns:
            (batch, length, dim).
        """
        x = run_blocks(
            self.layers, x, key_mask, cu_seqlens=cu_seqlens, unpadding=self.unpad, training=self.training, paths=paths,
            format=format, chunk_size=chunk_size, dropout=self.attention_dropout,
        )  # fmt: skip
        return x if self.norm is None else self.norm(x)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of stochastic depth of `depth` blocks, linearly from 0 to that of the last one."""
    require_rate("drop_path", last)
    return [last * i / max(depth - 1, 1) for i in range(depth)]
