"""Linear transformers of other papers as variants, in both directions (arXiv 2502.16249, appendix B.6)."""

from typing import Any

from .registry import Recurrence, Variant, at_least_float32, log_sigmoid, register_variant, without_prefix


try:  # configurations read names and defaults from here, and must not require torch
    import torch
    from torch import Tensor

    from .gates import GateLinear, LowRankGate
except ImportError:
    Tensor = Any


@register_variant("retnet")
class RetNet(Variant):
    """RetNet (arXiv 2307.08621): LION-D with the fixed decays 1 - 2**(-5 - h) for h = 0, 1, ... up to the last head.

    Heads read from about 63 tokens on, twice as far from one head to the next. As in the paper, each head of the output
    is normalised and multiplied by a gate silu(gate_proj(x)). Rotary positions, which the paper has, are off by default
    (`rope_theta`).
    """

    label = "RetNet"
    spellings = ("retention",)
    description = "linear attention whose weights fall with the distance, by one fixed decay per head (RetNet)."
    decay = "head"
    signed = True
    feature_map = "identity"
    preset = {"output_norm": "head_layer", "output_gate": "silu"}

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        heads = torch.arange(self.heads, device=x.device, dtype=dtype)
        return Recurrence(query, key, value, torch.log1p(-torch.exp2(-5 - heads)))


@register_variant("grfa")
class GatedRandomFeatures(Variant):
    """Gated random feature attention (arXiv 2103.02143): S_t = g_t S_{t-1} + (1 - g_t) k_t v_t^T, with row sums of 1.

    The gate of a token and head is g = sigmoid(decay_proj(x)). Positive feature maps stand in for random features.
    """

    label = "GRFA"
    spellings = ("gated-rfa",)
    description = "linear attention that weighs each token by 1 - g and what came before it by a gate g (gated RFA)."
    decay = "token"
    text_normalize = True
    operators = ("two_sided",)
    float32_weights = ("decay_proj",)

    def build(self) -> None:
        self.add("decay_proj", GateLinear(self.dim, self.heads))

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits = at_least_float32(self.decay_proj(x)).transpose(1, 2)
        query, key = per_head(query, self.heads), per_head(key, self.heads)
        key = key * torch.sigmoid(-logits).unsqueeze(-1).to(key.dtype)
        log_decay = without_prefix(log_sigmoid(logits), prefix_tokens)
        return Recurrence(query, key, value, log_decay, "two_sided", {"convention": "entered"})

    def set_windows(self, windows: Tensor) -> None:
        self.decay_proj.weight.zero_()
        self.decay_proj.bias.copy_(torch.log((windows - 1) / 2))

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return dim * heads


@register_variant("gla")
class GatedLinearAttention(Variant):
    """Gated linear attention (arXiv 2312.06635): S_t = diag(a_t) S_{t-1} + k_t v_t^T.

    The decay of a token and channel is a = sigmoid(decay_proj(x))**(1/16), by a projection of rank 16. As in the paper,
    each head of the output is normalised (RMS norm) and multiplied by a gate silu(gate_proj(x)).
    """

    label = "GLA"
    spellings = ("gated-linear-attention",)
    description = "linear attention whose weights fall with the distance, by a decay per token and channel (GLA)."
    decay = "token_channel"
    signed = True
    feature_map = "identity"
    operators = ("two_sided",)
    float32_weights = ("decay_proj",)
    preset = {"output_norm": "head_rms", "output_gate": "silu"}
    rank, temperature = 16, 16.0

    def build(self) -> None:
        self.add("decay_proj", LowRankGate(self.dim, self.rank, self.heads * self.key_dim))

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits = at_least_float32(self.decay_proj(x)).unflatten(-1, (self.heads, self.key_dim)).transpose(1, 2)
        log_decay = without_prefix(log_sigmoid(logits) / self.temperature, prefix_tokens)
        return Recurrence(query, key, value, log_decay, "two_sided", {"convention": "entered"})

    def set_windows(self, windows: Tensor) -> None:
        # sigmoid(bias)**(1/16) = decay, so the bias is the logit of decay**16.
        decay = ((windows - 1) / (windows + 1)) ** self.temperature
        self.decay_proj.up.weight.zero_()
        self.decay_proj.up.bias.copy_(torch.logit(decay, eps=1e-12).repeat_interleave(self.key_dim))

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return cls.rank * 2 * dim


def per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of x (batch, key_heads, length, width), each for a block of consecutive heads of the values."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
