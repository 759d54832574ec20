"""Two variants as a user writes them, outside the package."""

import torch
from torch import nn
from torch.nn import functional as F

from lion_hf.nn import GateLinear, Recurrence, Variant, register_variant


@register_variant("head_times_token")
class HeadTimesToken(Variant):
    """A decay per head times a decay per token; later layers start with slower decays."""

    label = "LION-HT"
    spellings = ("lion-ht",)
    description = "linear attention with a decay per head times a decay per token."
    decay = "token"
    float32_weights = ("head_logit", "token_proj")

    def build(self):
        self.add("head_logit", nn.Parameter(torch.empty(self.heads)))
        self.add("token_proj", GateLinear(self.dim, self.heads))

    def init_weights(self, init):
        init.normal_(self.head_logit, mean=1.0 + self.layer_idx / self.num_layers, std=0.1)
        init.constant_(self.token_proj.bias, -2.0)

    def prepare(self, x, query, key, value, prefix_tokens):
        logits = self.token_proj(x[:, prefix_tokens:])
        by_head, logits = self.head_logit, logits if logits.dtype == torch.float64 else logits.float()
        log_decay = F.logsigmoid(by_head)[:, None] + F.logsigmoid(-logits).transpose(1, 2)
        return Recurrence(query, key, value, F.pad(log_decay, (prefix_tokens, 0)))

    def set_windows(self, windows):
        self.token_proj.weight.zero_()
        self.token_proj.bias.fill_(-20.0)  # only the heads decay
        self.head_logit.copy_(torch.log((windows - 1) / 2))

    @classmethod
    def multiply_adds(cls, dim, heads):
        return dim * heads


@register_variant("gated_key")
class GatedKey(Variant):
    """No decay: each token scales its own key."""

    label = "LION-K"
    feature_map = "elu"
    scans = 1

    def build(self):
        self.add("key_gate", nn.Linear(self.dim, self.heads))

    def prepare(self, x, query, key, value, prefix_tokens):
        gate = torch.sigmoid(self.key_gate(x)).transpose(1, 2).unsqueeze(-1)
        return Recurrence(query, key * gate, value)
