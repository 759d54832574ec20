"""Checks and shapes of what text models are given."""

import torch
from torch import Tensor

from ..ops.checks import is_binary, values_can_be_read


def are_counted(position_ids: Tensor) -> bool:
    """Whether positions are known to rise by 1 from token to token, as the default positions do."""
    return values_can_be_read(position_ids) and bool((position_ids.diff() == 1).all())


def check_positions(position_ids: Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless every token has one position, its own or shared by all rows."""
    if position_ids is None:
        return
    if position_ids.shape[-1:] != (length,) or position_ids.shape[:-1] not in ((), (1,), (batch,)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; it must be (batch, length) = ({batch}, {length}), or "
            f"(1, {length}) for all rows. Leave position_ids out to count the tokens from 0."
        )


def real_positions(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Positions of tokens, counted from 0 without padding, in which every position is -1, as in RoBERTa."""
    real = (input_ids != pad_token_id).long()
    return real.cumsum(1) * real - 1


def skipped_positions(config) -> int:
    """Number of rows of the position table before that of the first token."""
    return config.pad_token_id + 1 if config.roberta_positions else 0


def table_size(config) -> str:
    """The number of positions of a model with a position table, for messages."""
    if not config.roberta_positions:
        return f"max_position_embeddings = {config.max_position_embeddings}"
    return f"max_position_embeddings - pad_token_id - 1 = {config.max_position_embeddings - skipped_positions(config)}"


def bool_key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The mask as a boolean (batch, length), or None if nothing is masked. Raises ValueError for other masks."""
    if attention_mask is None:
        return None
    mask = attention_mask
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; LION masks keys only, so it must be "
            f"(batch, length) = ({batch}, {length}), (1, length) or (batch, 1, 1, length), with 1 for real tokens and "
            "0 for padding."
        )
    if values_can_be_read(mask):
        if not is_binary(mask):
            raise ValueError(
                "attention_mask has values other than 0 and 1; it must be 1 for real tokens and 0 for padding, not an "
                "additive mask. Pass the tokenizer's attention_mask unchanged."
            )
        if bool(mask.all()):
            return None
    mask = mask.to(torch.bool)
    return mask if mask.shape[0] == batch else mask.expand(batch, length)


def check_answers(name: str, positions: Tensor, key_mask: Tensor | None) -> None:
    """Raise ValueError for a label on padding, which can never be predicted."""
    if key_mask is None or not values_can_be_read(positions):
        return
    positions = positions.flatten().clamp(min=0)  # as the loss does
    outside = positions >= key_mask.shape[1]
    masked = ~outside & ~key_mask.gather(1, positions.masked_fill(outside, 0)[:, None])[:, 0]
    if bool(masked.any()):
        row = int(masked.nonzero()[0])
        raise ValueError(
            f"{name}[{row}] is {int(positions[row])}, where attention_mask is 0; an answer must be on real tokens. For "
            "no answer give the first real token, or a position beyond the row to exclude the row from the loss."
        )


def real_scores(logits: Tensor, key_mask: Tensor | None) -> Tensor:
    """Logits (batch, length) whose softmax is 0 where `key_mask` is False."""
    return logits if key_mask is None else logits.masked_fill(~key_mask, torch.finfo(logits.dtype).min)


def flat_choices(x: Tensor | None, batch: int, choices: int) -> Tensor | None:
    """Flatten (batch, choices, ...), or a shape with 1 in place of either, to rows of one batch. (1, length) and masks
    of such rows, (rows, 1, 1, length), stay as they are."""
    if x is None or x.dim() < 3:
        return x
    if x.shape[:2] != (batch, choices):
        if x.dim() == 4:
            return x
        sizes = (n if size == 1 else size for n, size in zip((batch, choices), x.shape, strict=False))
        x = x.expand(*sizes, *x.shape[2:])
    return x.flatten(0, 1)
