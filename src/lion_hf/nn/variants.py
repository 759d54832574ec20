"""The variants of the package. Each is one class; registry.py has their base class and `register_variant`."""

from typing import Any

from .registry import VARIANTS, Recurrence, Variant, at_least_float32, register_variant, variant_class, without_prefix


try:  # configurations read names and defaults from here, and must not require torch
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from .gates import GateLinear
except ImportError:
    Tensor = Any


__all__ = [
    "HGRN2",
    "RWKV6",
    "VARIANTS",
    "GatedLinearAttention",
    "GatedRandomFeatures",
    "HeadDecay",
    "HeadDecayPerChannel",
    "Lit",
    "Mamba2",
    "MatrixLSTM",
    "Recurrence",
    "RetNet",
    "TokenDecay",
    "TokenDecayPerChannel",
    "Variant",
    "at_least_float32",
    "register_variant",
    "variant_class",
    "without_prefix",
]


@register_variant("lit")
class Lit(Variant):
    """No decay. Outputs do not depend on the order of the tokens, so text needs a position table."""

    label = "LION-LIT"
    spellings = ("lion-lit",)
    feature_map = "elu"
    pos_emb = True
    norm = True
    scans = 1


@register_variant("decay")
class HeadDecay(Variant):
    """A learned decay per head, sigmoid(decay_logit), with the parameter `decay_logit` (heads,)."""

    label = "LION-D"
    spellings = ("lion-d",)
    description = "linear attention whose weights fall with the distance, by one learned decay per head."
    decay = "head"
    float32_weights = ("decay_logit",)

    def build(self) -> None:
        self.add("decay_logit", nn.Parameter(torch.empty(self.heads)))

    def init_weights(self, init: Any) -> None:
        init.normal_(self.decay_logit, mean=0.0, std=1.0)

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        return Recurrence(query, key, value, F.logsigmoid(at_least_float32(self.decay_logit)))

    def set_windows(self, windows: Tensor) -> None:
        self.decay_logit.copy_(torch.log((windows - 1) / 2))


def log_one_minus_sigmoid(logits: Tensor, eps: float) -> Tensor:
    """Return log(1 - sigmoid(logits) + eps), at most 0: the log-decay of LION-S."""
    if not eps:
        return F.logsigmoid(-logits)
    return (torch.sigmoid(-logits) + eps).log().clamp(max=0)  # the sum can exceed 1 by up to eps


@register_variant("selective")
class TokenDecay(Variant):
    """A decay per token and head, 1 - sigmoid(decay_proj(x)), with the linear layer `decay_proj` from dim to heads.

    The mixer's `gate_eps` is added before the logarithm: 1e-7 in the authors' text models, 0 in their image models.
    """

    label = "LION-S"
    spellings = ("lion-s",)
    description = (
        "linear attention whose weights fall with the distance, by a decay that each token sets for each head."
    )
    decay = "token"
    float32_weights = ("decay_proj",)

    def build(self) -> None:
        self.add("decay_proj", GateLinear(self.dim, self.heads))

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits = at_least_float32(self.decay_proj(x))  # of all tokens: a part of x would be copied
        log_decay = log_one_minus_sigmoid(logits, self.mixer.gate_eps)
        if prefix_tokens:
            log_decay[:, :prefix_tokens] = 0
        return Recurrence(query, key, value, log_decay.transpose(1, 2))

    def set_windows(self, windows: Tensor) -> None:
        self.decay_proj.weight.zero_()
        self.decay_proj.bias.copy_(-torch.log((windows - 1) / 2))  # negative, because the decay is 1 - sigmoid

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return dim * heads


# ------------------------------------------------------------------------------------------- with a decay per channel


@register_variant("decay-channel")
class HeadDecayPerChannel(Variant):
    """LION-D with a decay per head and channel of the key, sigmoid(decay_logit), `decay_logit` (heads, key_dim)."""

    label = "LION-D per channel"
    spellings = ("lion-d-channel",)
    description = "linear attention whose weights fall with the distance, by a learned decay per head and channel."
    decay = "channel"
    operators = ("two_sided",)
    float32_weights = ("decay_logit",)

    def build(self) -> None:
        self.add("decay_logit", nn.Parameter(torch.empty(self.heads, self.key_dim)))

    def init_weights(self, init: Any) -> None:
        init.normal_(self.decay_logit, mean=0.0, std=1.0)

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        log_decay = F.logsigmoid(at_least_float32(self.decay_logit))
        return Recurrence(query, key, value, log_decay, "two_sided", {"convention": "left"})

    def set_windows(self, windows: Tensor) -> None:
        self.decay_logit.copy_(torch.log((windows - 1) / 2).unsqueeze(1).expand_as(self.decay_logit))


@register_variant("selective-channel")
class TokenDecayPerChannel(Variant):
    """LION-S with a decay per token, head and channel of the key, 1 - sigmoid(decay_proj(x)).

    The linear layer `decay_proj` goes from dim to `heads * key_dim`. The mixer's `gate_eps` acts as in LION-S.
    """

    label = "LION-S per channel"
    spellings = ("lion-s-channel",)
    description = (
        "linear attention whose weights fall with the distance, by a decay that each token sets for each channel."
    )
    decay = "token_channel"
    operators = ("two_sided",)
    float32_weights = ("decay_proj",)

    def build(self) -> None:
        self.add("decay_proj", GateLinear(self.dim, self.heads * self.key_dim))

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits = at_least_float32(self.decay_proj(x)).unflatten(-1, (self.heads, self.key_dim)).transpose(1, 2)
        log_decay = without_prefix(log_one_minus_sigmoid(logits, self.mixer.gate_eps), prefix_tokens)
        return Recurrence(query, key, value, log_decay, "two_sided", {"convention": "left"})

    def set_windows(self, windows: Tensor) -> None:
        self.decay_proj.weight.zero_()
        self.decay_proj.bias.copy_(-torch.log((windows - 1) / 2).repeat_interleave(self.key_dim))

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return dim * dim


# After LION's variants, so that these come first in the registry.
from .linear_transformers import GatedLinearAttention, GatedRandomFeatures, RetNet  # noqa: E402
from .recurrent_variants import HGRN2, RWKV6, Mamba2, MatrixLSTM  # noqa: E402
