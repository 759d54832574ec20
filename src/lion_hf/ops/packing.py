"""Rows without padding: sequences that the caller packed into one row, and padded batches joined into one row."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import warn_once
from .checks import check_cu_seqlens, is_abstract, is_exporting


# unpad=None removes padding if rows have at least this many padded features on average (positions times hidden_size).
# Computing rows one after another costs some time per row and layer; a padded position costs more the wider the model
# is. Measured on a CPU (training steps of widths 128 to 768).
LEAST_PADDING = 2048


def packed_bounds(
    batch: int,
    length: int,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """Return the bounds of the sequences that the caller packed into one row.

    The first of `cu_seqlens`, `seq_idx` and `position_ids` that is given determines the bounds. Transformers'
    `DataCollatorWithFlattening` can return all three.

    Args:
        batch: number of rows.
        length: number of tokens of each row.
        position_ids: (1, length). They are read only if the batch is 1 and there is no `attention_mask`. A row holds
            several texts if its positions rise by 1 inside each text and fall from one text to the next; a text may
            begin with any number. Otherwise the row is read as one text, with a warning if positions repeat (as in
            padding) or fall. A compiled graph raises an error when it runs on positions of several texts. Exported
            graphs do not read positions.
        attention_mask: (batch, length) or None; if given, `position_ids` are not read.
        cu_seqlens: (sequences + 1,), int32 or int64, the bounds themselves (`cu_seq_lens_q` of the collator).
        seq_idx: (1, length), a number that changes from one sequence to the next.

    Returns:
        (sequences + 1,) on the CPU, or None if the row holds a single sequence.

    Raises:
        ValueError: if `cu_seqlens` or `seq_idx` does not match a single row of this length.
    """
    if cu_seqlens is None:
        starts = None
        if seq_idx is not None:
            if batch != 1 or seq_idx.numel() != length:
                raise ValueError(
                    f"seq_idx has shape {tuple(seq_idx.shape)} for a batch of {batch} and {length} tokens; it must be "
                    f"(1, {length}), a number for every token of a single row. Concatenate the rows along their tokens."
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
    """Return a mask (length,) of the first tokens of texts; None unless positions are those of several texts."""
    steps = positions.diff()
    rises, falls = steps == 1, steps < 0
    several = rises.any() & falls.any() & (rises | falls).all()
    if torch.compiler.is_compiling():  # a graph cannot depend on the answer, so it checks when it runs
        torch._assert_async(
            ~several,
            "position_ids show that this row holds several texts, but a compiled graph cannot separate texts by their "
            "positions. Give cu_seq_lens_q or seq_idx as well "
            "(DataCollatorWithFlattening(return_flash_attn_kwargs=True)).",
        )
        return None
    if is_abstract(positions):
        return None
    if bool(several):
        return F.pad(falls, (1, 0), value=True).cpu()
    if bool((steps <= 0).any()):
        warn_once(
            "position_ids of this row repeat or fall, but do not rise by 1 inside each text. They do not show where "
            "texts begin, so the row is read as one text. For packed texts give cu_seq_lens_q or seq_idx "
            "(DataCollatorWithFlattening(return_flash_attn_kwargs=True)), for padding an attention_mask."
        )
    return None


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Return positions (1, length) that count the tokens of each sequence from 0."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return (torch.arange(len(starts)) - starts)[None]


def first_tokens(cu_seqlens: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Return the index (sequences,) of the first token of each sequence that `key_mask` (1, length) does not mask.

    If all tokens of a sequence are masked, it is the first one. No sequence may be empty.
    """
    starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
    if key_mask is None:
        return starts
    real = F.pad(key_mask[0].cpu().nonzero().squeeze(1), (0, 1), value=int(cu_seqlens[-1]))
    found = real[torch.searchsorted(real, starts.to(real.dtype))]
    return torch.where(found < stops, found, starts)


def sequence_means(x: Tensor, cu_seqlens: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Return the means (sequences, width) of the unmasked tokens of each sequence in a row x (1, length, width).

    `key_mask` is (1, length). If all tokens of a sequence are masked, its first token is returned. No sequence may be
    empty.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    owner = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff()).to(x.device)
    tokens, counts = x[0].to(dtype), cu_seqlens.diff().to(x.device, dtype)
    if key_mask is not None:
        real = key_mask[0].index_fill(0, first_tokens(cu_seqlens, key_mask).to(x.device), True)
        tokens = tokens.masked_fill(~real.unsqueeze(1), 0)
        counts = torch.zeros_like(counts).index_add(0, owner, real.to(dtype))
    sums = tokens.new_zeros(len(counts), x.shape[2]).index_add(0, owner, tokens)
    return (sums / counts.unsqueeze(1)).to(x.dtype)


class UnpaddedRow(NamedTuple):
    """A batch whose rows are joined into one row, without the padding at their ends."""

    index: Tensor  # (tokens,)     index of each token in the flattened batch
    cu_seqlens: Tensor  # (batch + 1,)  bounds of the rows, on the CPU
    key_mask: Tensor | None  # (1, tokens)   False for tokens that are still masked; None if there are none

    def join(self, hidden_states: Tensor) -> Tensor:
        """Join (batch, length, hidden) into (1, tokens, hidden)."""
        return hidden_states.flatten(0, 1).index_select(0, self.index)[None]

    def restore(self, hidden_states: Tensor, padded: Tensor) -> Tensor:
        """Restore (batch, length, hidden) from (1, tokens, hidden).

        Removed positions are copied from `padded` (batch, length, hidden), without a gradient. They are not set to 0,
        where the gradient of a LayerNorm is 1 / sqrt(eps).
        """
        rows = padded.detach().flatten(0, 1).to(hidden_states.dtype)
        return rows.index_copy(0, self.index, hidden_states[0]).view_as(padded)


def unpad(key_mask: Tensor, least_padding: float = 1, padding: Tensor | None = None) -> UnpaddedRow | None:
    """Join the rows of a batch into one row, without the padding at their left and right ends.

    The first token of a row without any real token is kept, because the pooler reads it.

    Args:
        key_mask: (batch, length), bool, True for real tokens.
        least_padding: smallest number of positions to remove from the whole batch; with fewer, nothing is removed.
        padding: (batch, length), bool, True for the masked tokens that may be removed; by default all masked tokens.

    Returns:
        A named tuple with `index` (tokens,), the index of each kept token in the flattened batch; `cu_seqlens`
        (batch + 1,), the bounds of the rows, on the CPU; and `key_mask` (1, tokens), or None if no kept token is
        masked. Its method `join(x)` turns (batch, length, dim) into (1, tokens, dim). `restore(y, x)` turns y
        (1, tokens, dim) back into (batch, length, dim), with the removed positions of x. The result is None if fewer
        than `least_padding` positions can be removed.
    """
    wanted = key_mask if padding is None else key_mask | ~padding
    begun, to_come = wanted.cumsum(1) > 0, wanted.flip(1).cumsum(1).flip(1) > 0
    kept = begun & to_come
    kept[:, :1] |= ~key_mask.any(1, keepdim=True)
    lengths = kept.sum(1).cpu()
    if kept.numel() - int(lengths.sum()) < max(1, least_padding):
        return None
    index = kept.flatten().nonzero().squeeze(1)
    inside = key_mask.flatten()[index]
    return UnpaddedRow(index, F.pad(lengths.cumsum(0), (1, 0)), None if bool(inside.all()) else inside[None])


@torch.compiler.disable  # the bounds differ in every batch, and a graph would be compiled for each of them
def map_sequences(
    function: Callable, cu_seqlens: Tensor, key_mask: Tensor | None, *tensors: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Call a function on each sequence of a packed row and concatenate the outputs along the tokens.

    Each call gets the tokens of one sequence only, so sequences cannot influence each other.

    Args:
        function: called as `function(*tensors, key_mask=key_mask)`. It returns a tensor or a tuple of tensors, whose
            dimension 2 are tokens.
        cu_seqlens: (sequences + 1,), the bounds of the sequences.
        key_mask: (1, length) or None.
        tensors: their dimension 2 are tokens. None and tensors without this dimension (a decay per head) are passed to
            every call unchanged.

    Returns:
        The concatenated output, or a tuple of concatenated outputs if `function` returns tuples.
    """
    lengths = cu_seqlens.diff().tolist()
    sequences = zip(*(_split_row(x, lengths, 2) for x in tensors), _split_row(key_mask, lengths, 1), strict=True)
    outputs = [function(*parts, key_mask=mask) for *parts, mask in sequences]
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts, 2) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, 2)


def _split_row(x: Tensor | None, lengths: list[int], dim: int) -> list[Tensor | None]:
    return [x] * len(lengths) if x is None or x.dim() <= dim else x.split(lengths, dim)
