"""LION-S and LION-D with another diagonal, as custom variants for `run_evidence.py diagonal`.

    python -m lion_hf --import examples.diagonal_variants examples/run_mlm.py --mask_type selective-diagonal-2 ...

LION counts the score of a token with itself once. Here it is counted 0 times, twice, or as often as each head of each
layer learns, from 1. The function is `two_sided_attention(..., diagonal=FACTOR)`, computed as LION's own operator plus
`FACTOR - 1` times the diagonal.
"""

import torch
from torch import Tensor, nn

from lion_hf.nn import Recurrence, register_variant, variant_class
from lion_hf.nn.mixer import OPERATORS, Operator
from lion_hf.ops import two_sided_attention


FACTORS = (0, 2, "free")


def attention_with_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    factor: Tensor | float,
    normalize: bool = False,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    **options,
) -> Tensor:
    """Return `two_sided_attention` with `diagonal=factor`, a number or (heads,), at the cost of LION's operator."""
    n, c = two_sided_attention(query, key, value, log_decay, key_mask=key_mask, return_denominator=True, **options)
    scale = options.get("scale") or query.shape[-1] ** -0.5
    own = scale * (query.to(n.dtype) * key.to(n.dtype)).sum(-1)
    own = own * (torch.as_tensor(factor, dtype=n.dtype).view(-1, 1) - 1)
    if key_mask is not None:
        own = own * key_mask.unsqueeze(1)
    n = n + own.unsqueeze(-1) * value
    return (n / (c + own + eps).unsqueeze(-1) if normalize else n).to(value.dtype)


OPERATORS["linear_attention_with_diagonal"] = Operator(attention_with_diagonal)


def register(base: str, factor: float | str) -> None:
    """Register the variant `base` with another factor of its diagonal: a number, or "free" for a learned one."""
    parent = variant_class(base)

    @register_variant(f"{base}-diagonal-{factor}")
    class OtherDiagonal(parent):
        label = f"{parent.label}, diagonal {factor}"
        spellings = ()
        description = f"{parent.label} with another diagonal: {factor} times the score of a token with itself."
        operators = ("linear_attention_with_diagonal",)
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
