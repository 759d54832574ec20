"""The causal layers of the papers, token by token, written from their equations. They share no line with lion_hf.

Each function takes the weights of a mixer by name and computes what its paper says for one token after the other, in
float64. Symbols are those of the papers.

    retnet             RetNet, arXiv 2307.08621, eq. 6 and 8
    gla                gated linear attention, arXiv 2312.06635, eq. 3 and section 4.4
    grfa               gated random feature attention, arXiv 2103.02143, section 3.2, with the features of the mixer
    lstm               mLSTM, arXiv 2405.04517, eq. 19 to 27, stabilised by eq. 15 to 17
    hgrn2              HGRN2, arXiv 2404.07904, eq. 4
    rwkv6              RWKV-6, arXiv 2404.05892, section 4
    mamba2             Mamba-2, arXiv 2405.21060, eq. 1 and figure 6
    decay, selective   LION, arXiv 2502.16249, eq. 9: the token that is left decays
    decay-channel, selective-channel   the same with a decay for each channel of the key

A masked token writes nothing, its neighbours see zeros, and its decay acts. A prefix token does not decay, and takes no
part in convolutions and shifts.
"""

import math
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """The numbers of a layer that its weights do not hold."""

    heads: int
    key_heads: int
    key_dim: int
    prefix: int = 0
    layer: int = 0
    layers: int = 1
    eps: float = 1e-5  # of the output norm
    features: str = "identity"
    cap: float | None = None  # of the gates of mLSTM


class Layer:
    """One causal layer: the weights of a mixer, an input x (batch, length, dim) and a mask (batch, length)."""

    def __init__(self, weights, x, mask, shape):
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.x, self.shape = x.double(), shape
        self.batch, self.length, self.dim = x.shape
        self.mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()

    # ------------------------------------------------------------------------------------------- parts of the blocks

    def linear(self, name, x):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def seen(self, i, b):
        """Whether neighbours see token i."""
        return i >= self.shape.prefix and bool(self.mask[b, i])

    def input_of(self, name):
        """The input of a projection: the token, moved towards the token before it by the amount mu."""
        if f"mu_{name}" not in self.w:
            return self.x
        before = torch.zeros_like(self.x)
        for b in range(self.batch):
            for i in range(1, self.length):
                if self.seen(i - 1, b) and i >= self.shape.prefix:
                    before[b, i] = self.x[b, i - 1]
        change = before - self.x
        mu = self.w[f"mu_{name}"]
        if "mu_x" in self.w:  # RWKV-6: the amount depends on the token, by a map of low rank
            names = [n for n in ("q", "k", "v", "gate", "decay") if f"mu_{n}" in self.w]
            n, rank = names.index(name), self.w["shift_up"].shape[1]
            low = torch.tanh((self.x + change * self.w["mu_x"]) @ self.w["shift_down.weight"].T)
            mu = mu + low[..., n * rank : (n + 1) * rank] @ self.w["shift_up"][n]
        return self.x + mu * change

    def conv(self, name, x):
        """Depthwise convolution over a token and those before it, then SiLU."""
        if f"{name}.weight" not in self.w:
            return x
        taps = self.w[f"{name}.weight"][:, 0]  # (channels, width), the last is that of the token itself
        width = taps.shape[1]
        y = torch.zeros_like(x)
        for b in range(self.batch):
            for i in range(self.length):
                for back in range(width):
                    j = i - back
                    alone = i < self.shape.prefix
                    if j < 0 or not self.mask[b, j] or (back and (alone or j < self.shape.prefix)):
                        continue
                    y[b, i] += taps[:, width - 1 - back] * x[b, j]
        if f"{name}.bias" in self.w:
            y = y + self.w[f"{name}.bias"]
        return y * torch.sigmoid(y)

    def projected(self, letter, heads):
        """(batch, length, heads, width) of q, k or v."""
        y = self.conv(f"{letter}_conv", self.linear(f"{letter}_proj", self.input_of(letter)))
        return y.reshape(self.batch, self.length, heads, -1)

    def qkv(self):
        s = self.shape
        q, k = (self.of_heads(self.features(self.projected(n, s.key_heads))) for n in "qk")
        return q, k, self.projected("v", s.heads)

    def of_heads(self, x):
        """Give each head the group that it belongs to, (batch, length, heads, ...)."""
        each = self.shape.heads // x.shape[2]
        return torch.stack([x[:, :, h // each] for h in range(self.shape.heads)], 2)

    def features(self, x):
        if self.shape.features == "elu":
            return torch.where(x > 0, x + 1, torch.exp(x))
        if self.shape.features == "unit_silu":
            y = x / (1 + torch.exp(-x)) + 0.5
            return y / (y * y).sum(-1, keepdim=True).sqrt()
        return x

    def output(self, o, kind="none", gate=None, gate_first=False):
        """Norm and gate of o (batch, length, heads, width), then the output projection."""
        flat = o.reshape(self.batch, self.length, -1)
        opening = 1.0
        if gate is not None:
            z = self.linear("gate_proj", self.input_of("gate"))
            opening = torch.sigmoid(z) if gate == "sigmoid" else z * torch.sigmoid(z)
        if gate_first:
            flat = flat * opening
        flat = self.normed(flat, kind)
        if not gate_first:
            flat = flat * opening
        return self.linear("o_proj", flat)

    def normed(self, flat, kind):
        if kind == "none":
            return flat
        number = self.shape.key_heads if kind == "group_rms" else self.shape.heads
        parts = flat.reshape(self.batch, self.length, number, -1)
        if kind == "head_layer":
            parts = parts - parts.mean(-1, keepdim=True)
        parts = parts / (parts.pow(2).mean(-1, keepdim=True) + self.shape.eps).sqrt()
        return parts.reshape(flat.shape) * self.w["out_norm.weight"]

    # ---------------------------------------------------------------------------------------------------- recurrences

    def state(self, *shape):
        return torch.zeros(self.batch, self.shape.heads, *shape, dtype=torch.float64)

    def write(self, i):
        """1 where token i writes, 0 where it is masked: (batch, 1)."""
        return self.mask[:, i, None].double()

    def undecayed(self, decay):
        """Decays of 1 for prefix tokens, for (batch, length, ...)."""
        decay = decay.clone()
        decay[:, : self.shape.prefix] = 1
        return decay


def outer(k, v):
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def read(q, state):
    return (q.unsqueeze(-1) * state).sum(-2)


def logsigmoid(x):
    return -torch.log1p(torch.exp(-x.abs())) + x.clamp(max=0)


def sigmoid(x):
    return torch.exp(logsigmoid(x))


def softplus(x):
    return -logsigmoid(-x)


# --------------------------------------------------------------------------------------------------------- the layers


def retnet(layer):
    """S_n = gamma S_(n-1) + K_n^T V_n, o_n = Q_n S_n, gamma_h = 1 - 2^(-5-h), keys scaled, group norm, swish gate."""
    q, k, v = layer.qkv()
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(layer.shape.heads)]).double()[None, :, None, None]
    s, outputs = layer.state(k.shape[-1], v.shape[-1]), []
    for i in range(layer.length):
        s = s * gamma + layer.write(i)[..., None, None] * outer(k[:, i] / math.sqrt(k.shape[-1]), v[:, i])
        outputs.append(read(q[:, i], s))
    return layer.output(torch.stack(outputs, 1), "head_layer", "silu")


def gla(layer):
    """S_t = Diag(alpha_t) S_(t-1) + k_t^T v_t, alpha = sigmoid(x W1 W2 + b)^(1/16), head norm, swish gate."""
    q, k, v = layer.qkv()
    logits = layer.linear("decay_proj.up", layer.linear("decay_proj.down", layer.input_of("decay")))
    alpha = torch.exp(logsigmoid(logits) / 16).reshape(layer.batch, layer.length, layer.shape.heads, -1)
    alpha = layer.undecayed(alpha)
    s, outputs = layer.state(k.shape[-1], v.shape[-1]), []
    for i in range(layer.length):
        s = alpha[:, i, :, :, None] * s + layer.write(i)[..., None, None] * outer(k[:, i], v[:, i])
        outputs.append(read(q[:, i] / math.sqrt(q.shape[-1]), s))
    return layer.output(torch.stack(outputs, 1), "head_rms", "silu")


def grfa(layer):
    """S_t = g_t S_(t-1) + (1 - g_t) k_t v_t, z_t = g_t z_(t-1) + (1 - g_t) k_t, o_t = q_t S_t / q_t z_t."""
    q, k, v = layer.qkv()
    logits = layer.linear("decay_proj", layer.input_of("decay"))
    g, rest = layer.undecayed(sigmoid(logits)), sigmoid(-logits)
    s, z, outputs = layer.state(k.shape[-1], v.shape[-1]), layer.state(k.shape[-1]), []
    for i in range(layer.length):
        new = (rest[:, i] * layer.write(i)).unsqueeze(-1) * k[:, i]
        s = g[:, i, :, None, None] * s + outer(new, v[:, i])
        z = g[:, i, :, None] * z + new
        scale = 1 / math.sqrt(q.shape[-1])
        outputs.append(scale * read(q[:, i], s) / (scale * (q[:, i] * z).sum(-1, keepdim=True) + 1e-6))
    return layer.output(torch.stack(outputs, 1))


def lstm(layer):
    """mLSTM: C_t = f_t C_(t-1) + i_t v_t k_t^T, n_t = f_t n_(t-1) + i_t k_t, h_t = C_t q_t / max(|n_t q_t|, 1)."""
    q, k, v = layer.qkv()
    k = k / math.sqrt(k.shape[-1])

    def gate(name):
        logits = layer.linear(name, layer.input_of("decay"))
        return logits if layer.shape.cap is None else layer.shape.cap * torch.tanh(logits / layer.shape.cap)

    log_f, log_i = logsigmoid(gate("forget_gate")), gate("input_gate")
    log_f[:, : layer.shape.prefix] = 0
    c, n, outputs = layer.state(k.shape[-1], v.shape[-1]), layer.state(k.shape[-1]), []
    m = torch.full((layer.batch, layer.shape.heads), -1e9, dtype=torch.float64)
    for i in range(layer.length):
        log_write = torch.where(layer.mask[:, i, None], log_i[:, i], -1e9)
        new = torch.maximum(log_f[:, i] + m, log_write)
        keep, write = torch.exp(log_f[:, i] + m - new), torch.exp(log_write - new) * layer.write(i)
        m = new
        c = keep[..., None, None] * c + outer(write[..., None] * k[:, i], v[:, i])
        n = keep[..., None] * n + write[..., None] * k[:, i]
        below = torch.maximum((n * q[:, i]).sum(-1).abs(), torch.exp((-m).clamp(max=700)))
        outputs.append(read(q[:, i], c) / below[..., None])
    return layer.output(torch.stack(outputs, 1), "head_layer", "sigmoid")


def hgrn2(layer):
    """h_t = Diag(f_t) h_(t-1) + (1 - f_t) i_t, o_t read by silu(x W_q), f = b + (1 - b) sigmoid(x W_f), b by layer."""
    shape = layer.shape
    q = layer.of_heads(layer.projected("q", shape.key_heads))
    q = q * sigmoid(q)
    logits, v = layer.of_heads(layer.projected("k", shape.key_heads)), layer.projected("v", shape.heads)
    bound = shape.layer / shape.layers
    f, rest = layer.undecayed(bound + (1 - bound) * sigmoid(logits)), (1 - bound) * sigmoid(-logits)
    s, outputs = layer.state(rest.shape[-1], v.shape[-1]), []
    for i in range(layer.length):
        s = f[:, i, ..., None] * s + layer.write(i)[..., None, None] * outer(rest[:, i], v[:, i])
        outputs.append(read(q[:, i], s))
    return layer.output(torch.stack(outputs, 1), "head_rms")


def rwkv6(layer):
    """o_t = r_t (S_(t-1) + Diag(u) k_t^T v_t), S_t = Diag(w_t) S_(t-1) + k_t^T v_t, w = exp(-exp(w0 + tanh(x A) B))."""
    q, k, v = layer.qkv()
    low = torch.tanh(layer.linear("decay_down", layer.input_of("decay")))
    log_rate = layer.linear("decay_up", low).reshape(layer.batch, layer.length, layer.shape.heads, -1)
    w, u = layer.undecayed(torch.exp(-torch.exp(log_rate))), layer.w["bonus"]
    s, outputs = layer.state(k.shape[-1], v.shape[-1]), []
    for i in range(layer.length):
        new = layer.write(i)[..., None, None] * outer(k[:, i], v[:, i])
        outputs.append(read(q[:, i], s + u[..., None] * new))
        s = w[:, i, ..., None] * s + new
    return layer.output(torch.stack(outputs, 1), "head_layer", "silu")


def mamba2(layer):
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, y_t = C_t h_t + D x_t, dt = softplus(..), then norm(y * silu(z))."""
    c, b, x = layer.qkv()
    dt = softplus(layer.linear("dt_proj", layer.input_of("decay")) + layer.w["dt_bias"])
    decay = layer.undecayed(torch.exp(-dt * torch.exp(layer.w["A_log"])))
    h, outputs = layer.state(b.shape[-1], x.shape[-1]), []
    for i in range(layer.length):
        write = dt[:, i] * layer.write(i)
        h = decay[:, i, :, None, None] * h + outer(write.unsqueeze(-1) * b[:, i], x[:, i])
        outputs.append(read(c[:, i], h) + (layer.w["D"] * layer.write(i)).unsqueeze(-1) * x[:, i])
    return layer.output(torch.stack(outputs, 1), "group_rms", "silu", gate_first=True)


def lion(layer, decay):
    """y_i = q_i (S_i + k_i v_i) / q_i (z_i + k_i) with S_(i+1) = decay_i (S_i + k_i v_i): the token left decays."""
    q, k, v = layer.qkv()
    s, z, outputs = layer.state(k.shape[-1], v.shape[-1]), layer.state(k.shape[-1]), []
    for i in range(layer.length):
        new = layer.write(i).unsqueeze(-1) * k[:, i]
        s, z = s + outer(new, v[:, i]), z + new
        scale = 1 / math.sqrt(q.shape[-1])
        outputs.append(scale * read(q[:, i], s) / (scale * (q[:, i] * z).sum(-1, keepdim=True) + 1e-6))
        s, z = decay[:, i].unsqueeze(-1) * s, decay[:, i] * z
    return layer.output(torch.stack(outputs, 1))


def decay(layer):
    fixed = sigmoid(layer.w["decay_logit"]).reshape(1, 1, layer.shape.heads, -1)
    return lion(layer, fixed.expand(layer.batch, layer.length, -1, -1))


def selective(layer):
    logits = layer.linear("decay_proj", layer.input_of("decay"))
    if logits.shape[-1] == layer.shape.heads:
        logits = logits.unsqueeze(-1)
    else:
        logits = logits.reshape(layer.batch, layer.length, layer.shape.heads, -1)
    return lion(layer, layer.undecayed(sigmoid(-logits)))


LAYERS = {
    "retnet": retnet,
    "gla": gla,
    "grfa": grfa,
    "lstm": lstm,
    "hgrn2": hgrn2,
    "rwkv6": rwkv6,
    "mamba2": mamba2,
    "decay": decay,
    "selective": selective,
    "decay-channel": decay,
    "selective-channel": selective,
}


def causal_layer(variant, weights, x, mask, shape):
    """Return the output (batch, length, dim) of the causal layer of a paper, in float64."""
    return LAYERS[variant](Layer(weights, x, mask, shape))
