"""Recurrences from other papers as variants: xLSTM's mLSTM, Mamba-2, HGRN2 and RWKV-6 (arXiv 2502.16249, B.6).

Each is the recurrence of its paper on both sides of a token, and counts the token itself once. With
`direction="forward"` the mixer is the causal layer. `preset` turns on what the blocks of the paper have beside the
recurrence.
"""

import math
from typing import Any

from .registry import Recurrence, Variant, at_least_float32, log_sigmoid, register_variant, without_prefix


try:  # configurations read names and defaults from here, and must not require torch
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from .gates import GateLinear
    from .linear_transformers import per_head
except ImportError:
    Tensor = Any


class _Recurrent(Variant):
    """What the variants of this file share: scores of either sign, and an operator with more options than LION's."""

    signed = True
    feature_map = "identity"
    operators = ("two_sided",)


def _own_score(query: Tensor, key: Tensor) -> Tensor:
    """Return the sum of query * key over the last dimension, in float32 or wider."""
    return (at_least_float32(query) * at_least_float32(key)).sum(-1)


def _set(init: Any, weight: Tensor, values: Tensor) -> None:
    """Copy values to a weight. The `copy_` of Transformers does not change weights that were loaded."""
    getattr(init, "copy_", torch.Tensor.copy_)(weight, values)


def _log_rate(windows: Tensor) -> Tensor:
    """Return log(-log(decay)) of the decays with which a head reads about `windows` tokens on both sides together."""
    return torch.log(torch.log((windows + 1) / (windows - 1)))


@register_variant("lstm")
class MatrixLSTM(_Recurrent):
    """The mLSTM of xLSTM (arXiv 2405.04517): a forget gate and an exponential input gate for each head and token.

    The state decays by `sigmoid(forget_gate(x))` and keys are multiplied by `exp(input_gate(x))`. Outputs are divided
    by the magnitude of their row sums, but never by less than 1. The gates are linear layers from dim to heads. Their
    weights start at 0 and their biases as in xLSTM-7B (arXiv 2503.13427): 3 to 6 over the heads for the forget gate,
    and -10 for the input gate.

    Attributes:
        gate_soft_cap (float | None): class attribute: gates are bounded to this magnitude, by `cap * tanh(gate / cap)`.
            None (default) is the paper; xLSTM-7B uses 15.
    """

    label = "mLSTM"
    spellings = ("mlstm", "xlstm")
    description = "the mLSTM of xLSTM on both sides: forget gates and exponential input gates for each head and token."
    decay = "token"
    preset = {"output_gate": "sigmoid", "output_norm": "head_layer"}
    norm_eps = 1e-6
    float32_weights = ("forget_gate", "input_gate")
    gate_soft_cap: float | None = None

    def build(self) -> None:
        self.add("forget_gate", GateLinear(self.dim, self.heads))
        self.add("input_gate", GateLinear(self.dim, self.heads))

    def init_weights(self, init: Any) -> None:
        for gate in (self.forget_gate, self.input_gate):
            init.zeros_(gate.weight)
        init.constant_(self.input_gate.bias, -10.0)
        _set(init, self.forget_gate.bias, torch.linspace(3.0, 6.0, self.heads))

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        forget, write = (self._gate(gate, x) for gate in (self.forget_gate, self.input_gate))
        log_decay = without_prefix(log_sigmoid(forget), prefix_tokens)
        arguments = {"convention": "entered", "log_weight": write, "normalize": "clamp"}
        return Recurrence(query, key, value, log_decay, "two_sided", arguments)

    def _gate(self, gate: "nn.Module", x: Tensor) -> Tensor:
        logits, cap = at_least_float32(gate(x)).transpose(1, 2), self.gate_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def set_windows(self, windows: Tensor) -> None:
        self.forget_gate.weight.zero_()
        self.forget_gate.bias.copy_(torch.log((windows - 1) / 2))

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return 2 * dim * heads


@register_variant("mamba2")
class Mamba2(_Recurrent):
    """Mamba-2, the state space model with one decay per head and token (arXiv 2405.21060).

    With the time step `dt = softplus(dt_proj(x) + dt_bias)` of each head and token, the state decays by
    `exp(-dt * exp(A_log))`, and keys (B of the paper) are multiplied by dt. Queries are C of the paper, values are x.
    `D` (heads,) multiplies the values of the token itself, once. Set the mixer's `key_heads` to the number of groups
    that share B and C, and `key_dim` to the size of the state. Time steps start between 0.001 and 0.1, and
    `exp(A_log)` between 1 and 16.

    Attributes:
        time_step_limit (tuple): class attribute: the least and the greatest time step; 0 and infinity by default, as in
            the paper.
    """

    label = "Mamba-2"
    spellings = ("mamba-2", "ssd")
    description = "Mamba-2 on both sides: each token sets a time step for each head, which decays what came before."
    decay = "token"
    preset = {"short_conv": 4, "output_gate": "silu", "output_norm": "group_rms"}
    gate_before_norm = True
    float32_weights = ("dt_proj", "dt_bias", "A_log", "D")
    time_step_limit = (0.0, math.inf)

    def build(self) -> None:
        self.add("dt_proj", GateLinear(self.dim, self.heads, bias=False))
        for name in ("dt_bias", "A_log", "D"):
            self.add(name, nn.Parameter(torch.empty(self.heads)))

    def init_weights(self, init: Any) -> None:
        like = torch.empty(self.heads)
        steps = like.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        _set(init, self.dt_bias, steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        _set(init, self.A_log, torch.empty(self.heads).uniform_(1, 16).log())
        init.ones_(self.D)

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits = at_least_float32(self.dt_proj(x)) + at_least_float32(self.dt_bias)
        steps = F.softplus(logits).clamp(*self.time_step_limit).transpose(1, 2)
        log_decay = without_prefix(-steps * at_least_float32(self.A_log).exp()[:, None], prefix_tokens)
        own = steps * per_head(_own_score(query, key), self.heads) + at_least_float32(self.D)[:, None]
        query, key = (per_head(t, self.heads) for t in (query, key))
        key = (key * steps.unsqueeze(-1)).to(query.dtype)
        arguments = {"convention": "entered", "diagonal": own, "scale": 1.0}
        return Recurrence(query, key, value, log_decay, "two_sided", arguments)

    def set_windows(self, windows: Tensor) -> None:
        self.dt_proj.weight.zero_()
        steps = F.softplus(self.dt_bias.double()).clamp(*self.time_step_limit)
        self.A_log.copy_(_log_rate(windows) - steps.log())

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return dim * heads + 2 * dim


@register_variant("hgrn2")
class HGRN2(_Recurrent):
    """HGRN2 (arXiv 2404.07904): a forget gate for each channel and token; the key is what the gate forgets, 1 - f.

    The gate is `f = b + (1 - b) * sigmoid(k_proj(x))`: the output of the mixer's `k_proj` is its logit, and `k_proj`
    stays float32. Queries pass SiLU. The lower bound b rises over the layers, so that upper layers look further. It is
    `layer_idx / num_layers`, which is where the learned bounds of the paper start, the cumulative sums of a softmax
    over the layers. Here it is fixed, so that a layer does not depend on the parameters of others.
    """

    label = "HGRN2"
    spellings = ("hgrn-2",)
    description = "HGRN2 on both sides: forget gates for each channel and token, bounded from below in upper layers."
    decay = "token_channel"
    rope = False  # keys are gates
    preset = {"output_norm": "head_rms"}
    float32_weights = ("k_proj",)

    def build(self) -> None:
        if self.scan:
            return  # all scans have the keys of the mixer, and so its gates
        old = self.mixer.k_proj
        self.mixer.k_proj = GateLinear(old.in_features, old.out_features, bias=old.bias is not None)
        if "decay" in self.mixer.shifted_names:  # the gates are the keys, so no projection of its own reads the input
            self.mixer.shifted_names = tuple(name for name in self.mixer.shifted_names if name != "decay")
            del self.mixer.mu_decay

    @property
    def lower_bound(self) -> float:
        """The least value of the forget gate."""
        return self.layer_idx / self.num_layers

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits, bound = at_least_float32(key), self.lower_bound
        key = (1 - bound) * torch.sigmoid(-logits)
        # Both are accurate for gates close to 1, and neither is -inf for very negative logits.
        log_decay = torch.log1p(-key) if bound else log_sigmoid(logits)
        log_decay = per_head(without_prefix(log_decay, prefix_tokens), self.heads)
        arguments = {"convention": "entered", "scale": 1.0}
        return Recurrence(F.silu(query), key.to(query.dtype), value, log_decay, "two_sided", arguments)

    def set_windows(self, windows: Tensor) -> None:
        """Set the biases of the gates. Windows below what the lower bound of the layer allows become the least one."""
        if self.mixer.k_proj.bias is None:
            return
        free = ((windows - 1) / (windows + 1) - self.lower_bound) / (1 - self.lower_bound)
        groups = torch.logit(free.clamp(min=1e-4)).view(self.key_heads, -1).mean(1)
        self.mixer.k_proj.bias.copy_(groups.repeat_interleave(self.key_dim))


@register_variant("rwkv6")
class RWKV6(_Recurrent):
    """RWKV-6, Finch (arXiv 2404.05892): a decay for each channel and token, and a bonus for the token itself.

    The decay is `exp(-exp(w))` with `w = decay_up(tanh(decay_down(x)))`, a map of low rank whose bias `decay_up.bias`
    is the decay w0 of each channel. A token reads its own value with `q . (bonus * k)`, with `bonus` (heads, key_dim).
    Neither end of the way between two tokens decays (convention "between"). With `token_shift`, the amount by which
    each projection p reads the neighbours depends on the token, by a map of low rank: with
    `change = shifted - x`, p reads `x + (mu_p + tanh(shift_down(x + mu_x * change))_p @ shift_up[p]) * change`, where
    each p has its own part of the outputs of `shift_down`. Everything starts spread over the channels and layers as in
    the paper.

    Attributes:
        decay_rank (int): class attribute: the rank of the decays, 64 by default; at most dim.
        shift_rank (int): class attribute: the rank of each token shift, 32 by default; at most dim.
    """

    label = "RWKV-6"
    spellings = ("rwkv-6", "finch")
    description = "RWKV-6 on both sides: decays for each channel and token, and a learned weight of the token itself."
    decay = "token_channel"
    preset = {"token_shift": True, "output_gate": "silu", "output_norm": "head_layer"}
    norm_eps = 64e-5
    float32_weights = ("decay_down", "decay_up", "bonus")
    decay_rank = 64
    shift_rank = 32

    def build(self) -> None:
        rank = min(self.decay_rank, self.dim)
        self.add("decay_down", GateLinear(self.dim, rank, bias=False))
        self.add("decay_up", GateLinear(rank, self.heads * self.key_dim))
        self.add("bonus", nn.Parameter(torch.empty(self.heads, self.key_dim)))
        if self.mixer.token_shift and not self.scan:  # the shift comes before the scans
            names, rank = self.mixer.shifted_names, min(self.shift_rank, self.dim)
            self.add("mu_x", nn.Parameter(torch.empty(self.dim)))
            self.add("shift_down", nn.Linear(self.dim, len(names) * rank, bias=False))
            self.add("shift_up", nn.Parameter(torch.empty(len(names), rank, self.dim)))

    def init_weights(self, init: Any) -> None:
        depth = self.layer_idx / max(self.num_layers - 1, 1)
        channel = torch.arange(self.bonus.numel(), dtype=torch.float32)
        place = channel / max(len(channel) - 1, 1)
        init.zeros_(self.decay_down.weight)
        init.uniform_(self.decay_up.weight, -0.01, 0.01)
        _set(init, self.decay_up.bias, 5 * place ** (0.7 + 1.3 * depth) - 6)
        bonus = depth * (1 - place) + 0.1 * ((channel + 1) % 3 - 1)
        _set(init, self.bonus, bonus.view_as(self.bonus))
        if self.mixer.token_shift and not self.scan:
            init.zeros_(self.shift_down.weight)
            init.uniform_(self.shift_up, -0.01, 0.01)
            self._init_amounts(init, depth)

    def _init_amounts(self, init: Any, depth: float) -> None:
        """Initialise how much each channel of each projection reads its neighbours."""
        place, rest = torch.arange(self.dim) / self.dim, 1 - self.layer_idx / self.num_layers
        amount = 1 - place**rest
        query = 1 - place ** (rest / 2)
        amounts = {"x": amount, "decay": amount, "k": amount, "v": amount - 0.3 * depth, "q": query, "gate": query}
        for name in ("x", *self.mixer.shifted_names):
            _set(init, getattr(self.mixer, f"mu_{name}"), amounts[name])

    def shift(self, x: Tensor, shifted: Tensor) -> dict[str, Tensor]:
        change, names = shifted - x, self.mixer.shifted_names
        low = torch.tanh(self.shift_down(torch.addcmul(x, self.mu_x, change))).chunk(len(names), -1)
        inputs = {}
        for name, part, up in zip(names, low, self.shift_up, strict=True):
            amount = getattr(self.mixer, f"mu_{name}") + torch.matmul(part, up)
            inputs[name] = torch.addcmul(x, amount, change)
        return inputs

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        logits = at_least_float32(self.decay_up(torch.tanh(at_least_float32(self.decay_down(x)))))
        logits = logits.unflatten(-1, self.bonus.shape).transpose(1, 2)
        # exp(-exp(20)) is 0 in every dtype, and exp of more could become infinite.
        log_decay = without_prefix(-logits.clamp(max=20).exp(), prefix_tokens)
        bonus = at_least_float32(self.bonus)[:, None]
        own = _own_score(per_head(query, self.heads), per_head(key, self.heads) * bonus)
        arguments = {"convention": "between", "diagonal": own, "scale": 1.0}
        return Recurrence(query, key, value, log_decay, "two_sided", arguments)

    def set_windows(self, windows: Tensor) -> None:
        self.decay_down.weight.zero_()
        self.decay_up.bias.copy_(_log_rate(windows).repeat_interleave(self.key_dim))

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        decays = 2 * dim * min(cls.decay_rank, dim) + 2 * dim
        return decays + 2 * 5 * dim * min(cls.shift_rank, dim)
