"""Text without labels: files are cut into pieces of tokens, which form the same batches in every run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


# Batches are formed from this many batches' worth of pieces, sorted by length, so that little is padded.
_POOL = 32
# Rows have a multiple of this many tokens: of each new shape PyTorch's CPU libraries keep what they prepared, so that
# memory grows with the number of different lengths.
_MULTIPLE = 8
# Number of pieces to measure on, at most.
_HELD_OUT = 256


def read_lines(files: Sequence[str]) -> list[str]:
    """Return the lines of text files that are not empty.

    Raises:
        ValueError: if a file does not exist, is no text in UTF-8, or if there are fewer than two lines in all.
    """
    lines = []
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no file {name!r}; --text takes text files, one text a line")
        try:
            lines += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{name!r} is not text in UTF-8; --text takes text files, one text a line") from None
    if len(lines) < 2:
        raise ValueError(
            f"{' and '.join(map(repr, files))} holds {len(lines)} lines of text; training and measuring need at least "
            "two, and a few thousand are useful"
        )
    return lines


class Pieces:
    """Pieces of texts, split into those to train on and those to measure on.

    Args:
        lines: the texts.
        tokenizer: the source's tokenizer.
        max_length: maximum number of tokens of a piece. Longer texts become several pieces, or with a tokenizer
            written in Python only the first.
        batch_size: number of pieces in a batch.
        seed: seed of the split and of the order.
        mask_share: share of the tokens of training batches, without special tokens, that become the mask token.

    Raises:
        ValueError: if `max_length` leaves no room for text, or there is no mask token although `mask_share` is not 0.
    """

    def __init__(
        self,
        lines: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        seed: int,
        mask_share: float = 0.0,
    ):
        self.tokenizer, self.batch_size, self.seed, self.mask_share = tokenizer, batch_size, seed, mask_share
        self.max_length = max_length
        if mask_share and tokenizer.mask_token_id is None:
            raise ValueError(f"--mask_share is {mask_share}, but the source's tokenizer has no mask token")
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, min(_HELD_OUT, len(lines) // 20))
        self.held_out = self._cut([lines[i] for i in order[:held_out]], max_length)[:_HELD_OUT]
        self.training = self._cut([lines[i] for i in sorted(order[held_out:])], max_length)
        self.tokens = sum(map(len, self.training))

    def _cut(self, lines: Sequence[str], max_length: int) -> list[list[int]]:
        special = self.tokenizer.num_special_tokens_to_add()
        if max_length <= special:
            raise ValueError(
                f"--max_length is {max_length}, but the tokenizer adds {special} tokens to each text; give more"
            )
        options = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": self.tokenizer.is_fast}
        pieces = []
        for start in range(0, len(lines), 1000):
            pieces += self.tokenizer(list(lines[start : start + 1000]), **options)["input_ids"]
        return pieces

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step. It depends on the seed and the step only, so that a run can be resumed."""
        size = self.batch_size
        pool = size * _POOL
        number, place = divmod(step, _POOL)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chosen = torch.randint(len(self.training), (pool,), generator=generator).tolist()
        chosen.sort(key=lambda i: len(self.training[i]))
        start = int(torch.randperm(_POOL, generator=generator)[place]) * size
        return self._masked(self._padded([self.training[i] for i in chosen[start : start + size]]), step)

    def _masked(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        if not self.mask_share:
            return batch
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        hidden = (torch.rand(ids.shape, generator=generator) < self.mask_share) & ~special
        return batch | {"input_ids": ids.masked_fill(hidden, self.tokenizer.mask_token_id)}

    def measuring(self) -> list[dict[str, Tensor]]:
        """Return the pieces to measure on, in batches of similar length."""
        pieces = sorted(self.held_out, key=len)
        return [self._padded(pieces[i : i + self.batch_size]) for i in range(0, len(pieces), self.batch_size)]

    def _padded(self, pieces: Sequence[list[int]]) -> dict[str, Tensor]:
        length = min(-(-max(map(len, pieces)) // _MULTIPLE) * _MULTIPLE, self.max_length)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([piece + [pad] * (length - len(piece)) for piece in pieces])
        mask = torch.tensor([[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces])
        return {"input_ids": ids, "attention_mask": mask}
