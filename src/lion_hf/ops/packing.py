"""Rows without padding: sequences that a caller packed into one row, and padded batches made into one and restored."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_cu_seqlens, is_abstract, is_exporting


# unpad=None removes padding where rows have this many features of it on average, positions times hidden_size: one row
# after another costs some time for each row and layer, a padded position the more the wider the model. Measured on a
# CPU (training steps of widths 128 to 768).
LEAST_PADDING = 2048


def packed_bounds(
    batch: int,
    length: int,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """Bounds of the sequences that a caller packed into one row, (sequences + 1,) on the CPU; None if it holds one.

    They are told by the first of these that is given, as Transformers' `DataCollatorWithFlattening` makes them:

    - `cu_seqlens`, the bounds themselves (its `cu_seq_lens_q`);
    - `seq_idx` (1, length), a number that changes from one sequence to the next;
    - `position_ids` (1, length) that start again at 0: where the batch is 1 and there is no attention_mask, every entry
      is 0 or one more than the entry before it, the first is 0, and a later one too. A compiled graph raises an error
      when it meets such positions; a graph that is exported does not look.

    Raises:
        ValueError: where `cu_seqlens` or `seq_idx` does not fit a single row of this length.
    """
    if cu_seqlens is None:
        starts = None
        if seq_idx is not None:
            if batch != 1 or seq_idx.numel() != length:
                raise ValueError(
                    f"seq_idx has shape {tuple(seq_idx.shape)} for a batch of {batch} and {length} tokens; it must be "
                    f"(1, {length}), a number for every token of a single row. Join the rows along their tokens."
                )
            starts = F.pad(seq_idx.flatten().diff() != 0, (1, 0), value=True)
        elif position_ids is not None and attention_mask is None and batch == 1 and not is_exporting():
            starts = _restarts(position_ids.flatten())
        if starts is None:
            return None
        cu_seqlens = F.pad(starts.nonzero().squeeze(1), (0, 1), value=len(starts))
    cu_seqlens = cu_seqlens.cpu() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    check_cu_seqlens(cu_seqlens, batch, length)
    return cu_seqlens if len(cu_seqlens) > 2 else None


def _restarts(positions: Tensor) -> Tensor | None:
    """Where positions (length,) start again at 0; None unless they count from 0 several times and do nothing else."""
    starts = positions == 0
    counted = torch.cat([starts[:1], starts[1:] | (positions.diff() == 1)])
    several = counted.all() & (starts.sum() > 1)
    if torch.compiler.is_compiling():  # a graph cannot depend on the answer, so it looks when it runs
        torch._assert_async(
            ~several,
            "position_ids tell that this row holds several texts, which a compiled graph does not separate by them. "
            "Give cu_seq_lens_q or seq_idx as well (DataCollatorWithFlattening(return_flash_attn_kwargs=True)).",
        )
        return None
    return starts.cpu() if not is_abstract(positions) and bool(several) else None


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """(1, length): the tokens of every sequence, counted from 0."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return (torch.arange(len(starts)) - starts)[None]


def first_tokens(cu_seqlens: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """(sequences,): where the first token of each sequence that `key_mask` (1, length) lets in stands in the row; of a
    sequence without one, its very first. None of them may be empty."""
    starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
    if key_mask is None:
        return starts
    real = F.pad(key_mask[0].cpu().nonzero().squeeze(1), (0, 1), value=int(cu_seqlens[-1]))
    found = real[torch.searchsorted(real, starts.to(real.dtype))]
    return torch.where(found < stops, found, starts)


class UnpaddedRow(NamedTuple):
    """A batch whose rows stand in one row, one after the other, without the padding at their ends."""

    index: Tensor  # (tokens,)     where each token stands in the flattened batch
    cu_seqlens: Tensor  # (batch + 1,)  bounds of the rows, on the CPU
    key_mask: Tensor | None  # (1, tokens)   False for what is masked inside a row; None where nothing is

    def join(self, hidden_states: Tensor) -> Tensor:
        """(batch, length, hidden) -> (1, tokens, hidden)."""
        return hidden_states.flatten(0, 1).index_select(0, self.index)[None]

    def restore(self, hidden_states: Tensor, batch: int, length: int) -> Tensor:
        """(1, tokens, hidden) -> (batch, length, hidden), 0 where there was padding."""
        rows = hidden_states.new_zeros(batch * length, hidden_states.shape[-1])
        return rows.index_copy(0, self.index, hidden_states[0]).unflatten(0, (batch, length))


def unpad(key_mask: Tensor, least_padding: float = 1) -> UnpaddedRow | None:
    """Joins the rows of a key mask (batch, length) without the False at their left and right ends; of a row that is
    False throughout the first token stays, which the pooler reads.

    None where these are fewer than `least_padding` positions in the whole batch, or there is none.
    """
    begun, to_come = key_mask.cumsum(1) > 0, key_mask.flip(1).cumsum(1).flip(1) > 0
    kept = begun & to_come
    kept[:, :1] |= ~key_mask.any(1, keepdim=True)
    lengths = kept.sum(1).cpu()
    if kept.numel() - int(lengths.sum()) < max(1, least_padding):
        return None
    index = kept.flatten().nonzero().squeeze(1)
    inside = key_mask.flatten()[index]
    return UnpaddedRow(index, F.pad(lengths.cumsum(0), (1, 0)), None if bool(inside.all()) else inside[None])


@torch.compiler.disable  # the bounds are numbers of each batch, which a graph would be compiled for again and again
def map_sequences(
    function: Callable, cu_seqlens: Tensor, key_mask: Tensor | None, *tensors: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """`function(*tensors, key_mask=key_mask)` of each sequence of a packed row, outputs joined along the tokens.

    Tokens are dimension 2 of `tensors` and outputs, and dimension 1 of `key_mask`; a tensor without this dimension
    (None, a decay per head) goes to every sequence as it is. No sequence can reach another: it is never given it.
    """
    lengths = cu_seqlens.diff().tolist()
    sequences = zip(*(_split_row(x, lengths, 2) for x in tensors), _split_row(key_mask, lengths, 1), strict=True)
    outputs = [function(*parts, key_mask=mask) for *parts, mask in sequences]
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts, 2) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, 2)


def _split_row(x: Tensor | None, lengths: list[int], dim: int) -> list[Tensor | None]:
    return [x] * len(lengths) if x is None or x.dim() <= dim else x.split(lengths, dim)
