"""LION-S and LION-D with another diagonal, as custom variants for `run_evidence.py diagonal`.

    python -m lion_hf --import examples.diagonal_variants examples/run_mlm.py --mask_type selective-diagonal-2 ...

LION counts the score of a token with itself once. Here it is counted 0 times, twice, or as often as each head of each
layer learns, from 1. The function is `two_sided_attention(..., diagonal=FACTOR)`, computed from the matrix of LION's
attention form, of which the diagonal is multiplied. Rows of the experiment are short, so that this costs little, and
nothing cancels where a token reads hardly anything but itself.
"""

import torch
from torch import Tensor, nn

from lion_hf.nn import Recurrence, register_variant, variant_class
from lion_hf.nn.mixer import OPERATORS, Operator
from lion_hf.ops import attention_scores


FACTORS = (0, 2, "free")


def scores_with_diagonal(query: Tensor, key: Tensor, *inputs: Tensor, factor: Tensor | float, **options) -> Tensor:
    """Return `attention_scores` with its diagonal times `factor`, a number or (heads,)."""
    scores = attention_scores(query, key, *inputs, **options)
    factor = torch.as_tensor(factor, dtype=scores.dtype, device=scores.device).view(-1, 1, 1)
    own = torch.eye(query.shape[2], dtype=scores.dtype, device=scores.device)
    return scores * (1 + (factor - 1) * own)


def attention_with_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    factor: Tensor | float,
    normalize: bool = False,
    eps: float = 1e-6,
    format: str = "attention",
    chunk_size: int = 64,
    cu_seqlens: None = None,
    **options,
) -> Tensor:
    """Return `two_sided_attention` with `diagonal=factor`, a number or (heads,), in the attention form only."""
    scores = scores_with_diagonal(query, key, log_decay, factor=factor, **options)
    if normalize:
        scores = scores / (scores.sum(-1, keepdim=True) + eps)
    return torch.matmul(scores, value.to(scores.dtype)).to(value.dtype)


OPERATORS["linear_attention_with_diagonal"] = Operator(attention_with_diagonal, scores_with_diagonal)


def register(base: str, factor: float | str) -> None:
    """Register the variant `base` with another factor of its diagonal: a number, or "free" for a learned one."""
    parent = variant_class(base)

    @register_variant(f"{base}-diagonal-{factor}")
    class OtherDiagonal(parent):
        label = f"{parent.label}, diagonal {factor}"
        spellings = ()
        description = f"{parent.label} with another diagonal: {factor} times the score of a token with itself."
        operators = ("linear_attention_with_diagonal",)
        masks = ("key_mask",)
        scans = 1
        float32_weights = (*parent.float32_weights, *(("diagonal",) if factor == "free" else ()))

        def build(self) -> None:
            super().build()
            if factor == "free":
                self.add("diagonal", nn.Parameter(torch.empty(self.heads)))

        def init_weights(self, init) -> None:
            super().init_weights(init)
            if factor == "free":
                init.constant_(self.diagonal, 1.0)

        def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
            found = super().prepare(x, query, key, value, prefix_tokens)
            own = self.diagonal if factor == "free" else float(factor)
            arguments = {**found.arguments, "factor": own, "check_values": False}
            return found._replace(operator="linear_attention_with_diagonal", arguments=arguments)


for name in ("selective", "decay"):
    for how_often in FACTORS:
        register(name, how_often)
