"""The chunk form: all chunks at once, O(L) time. Chunks are linked by states (D x V)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .decays import (
    Factors,
    Flow,
    Flows,
    clamped_gates,
    cumulative_sums,
    cut_exp,
    decay_factors,
    gate_gradient,
    split_sums,
    tile_weights,
)
from .tokens import Tokens


# Up to this many chunks, one (chunks x chunks) product links their states; beyond, a carry links groups of this size.
PROPAGATION_GROUP = 64


def _split(x: Tensor, chunks: int, size: int) -> Tensor:
    """(B, H, L, D) -> (B, H, chunks, size, D), zeros after the last token."""
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if padding else x
    return x.unflatten(2, (chunks, size))


def chunk_gates(log_decay: Tensor, length: int, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Gates as (b, H, n, K): (1, H, 1, K) for LION-D, (B, H, chunks, size) for LION-S, zeros after the last token."""
    if log_decay.dim() == 1:
        return clamped_gates(log_decay, size, dtype).unsqueeze(2)
    return F.pad(clamped_gates(log_decay, length, dtype), (0, chunks * size - length)).unflatten(2, (chunks, size))


def chunk_factors(
    x: Tokens, gates: Tensor, chunks: int, scale: float, dy: Tensor | None = None
) -> tuple[Factors, Flows]:
    """Factors of chunks with these gates (b, H, n, K), for backward with the gradients dy (B, H, L, V) of outputs."""

    def split(alive: Tensor) -> Tensor:
        size = gates.shape[-1]
        return F.pad(alive, (0, chunks * size - alive.shape[-1])).unflatten(-1, (chunks, size))

    keys = None if x.key_mask is None else split(x.key_mask[:, None].bool())
    queries = None if dy is None else split(dy.abs().amax(-1) != 0)
    return decay_factors(gates, keys, queries, scale, x.dtype)


def equal_chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens in each): as few chunks as `chunk_size` allows, equally long."""
    chunks = -(-length // chunk_size)
    return chunks, -(-length // chunks)


def propagate(update: Tensor, total: Tensor, flow: Flow, reverse: bool) -> Tensor:
    """State that reaches every chunk: out_c = sum over chunks m before c of exp(totals between m and c) update_m.

    "Before" means to the left, or to the right if `reverse`. update (B, H, n, D, V), total (b, H, n). It is the
    operator itself one level up: a small product with a decay mask per group of chunks, and a carry between groups.
    """
    batch, _, chunks, *state_shape = update.shape
    total, sent, arriving = (t.expand(-1, -1, chunks) for t in (total, *flow))
    dtype = update.dtype
    update, outputs, carry = update.flatten(-2), [], None
    bounds = [(i, min(i + PROPAGATION_GROUP, chunks)) for i in range(0, chunks, PROPAGATION_GROUP)]
    for start, stop in reversed(bounds) if reverse else bounds:
        part, gates, sends = update[:, :, start:stop], total[:, :, start:stop], sent[:, :, start:stop]
        exclusive, inclusive = cumulative_sums(gates)
        # exp(sum of the totals strictly between two chunks), 0 where the other chunk is not before this one.
        exponent = exclusive.unsqueeze(-1) - inclusive.unsqueeze(-2)
        if reverse:
            exponent = exponent.transpose(-1, -2)
        before = torch.ones_like(exponent, dtype=torch.bool)
        before = before.triu(1) if reverse else before.tril(-1)
        weights = cut_exp(exponent.masked_fill(~before, -math.inf), sends.unsqueeze(-2), dtype)
        state = torch.matmul(weights.expand(batch, -1, -1, -1), part)
        last = inclusive[:, :, -1:]
        carried = arriving[:, :, stop - 1 : stop] if reverse else arriving[:, :, start : start + 1]
        if carry is not None:
            reach = cut_exp(last - inclusive if reverse else exclusive, carried, dtype)
            state = state.addcmul_(reach.unsqueeze(-1), carry)
        if len(bounds) > 1:
            leave = cut_exp(exclusive if reverse else last - inclusive, sends, dtype)
            left = torch.matmul(leave.unsqueeze(-2).expand(batch, -1, -1, -1), part)
            carry = left if carry is None else left.addcmul_(cut_exp(last, carried, dtype).unsqueeze(-1), carry)
        outputs.append(state)
    state = outputs[0] if len(outputs) == 1 else torch.cat(outputs[::-1] if reverse else outputs, 2)
    return state.unflatten(-1, state_shape)


def chunk_forward(x: Tokens, log_decay, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    q, k, v = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values()))
    gates = chunk_gates(log_decay, length, chunks, size, q.dtype)
    (w, flows), total = chunk_factors(x, gates, chunks, scale), gates.sum(-1)
    y = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(tile_weights(gates, scale, q.dtype)), v)
    if chunks > 1:
        left = propagate(torch.matmul((k * w.write_right).transpose(-1, -2), v), total, flows.left, reverse=False)
        _add_product(y, q * w.read_left, left)
        right = propagate(torch.matmul((k * w.write_left).transpose(-1, -2), v), total, flows.right, reverse=True)
        _add_product(y, q * w.read_right, right)
    return x.split(y.flatten(2, 3)[:, :, :length])


def chunk_backward(x: Tokens, log_decay, dy, dc, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    dy = x.join(dy, dc)
    gates = chunk_gates(log_decay, length, chunks, size, dy.dtype)
    (w, flows), total = chunk_factors(x, gates, chunks, scale, dy), gates.sum(-1)
    q, k, v, dy = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values(), dy))
    tile = tile_weights(gates, scale, q.dtype)
    left = right = dleft = dright = None
    if chunks > 1:
        left = propagate(torch.matmul((k * w.write_right).transpose(-1, -2), v), total, flows.left, reverse=False)
        right = propagate(torch.matmul((k * w.write_left).transpose(-1, -2), v), total, flows.right, reverse=True)
        # The transposed mask: what a query read from the left flows back to keys that lie to its left.
        dleft = propagate(torch.matmul((q * w.read_left).transpose(-1, -2), dy), total, flows.dleft, reverse=True)
        dright = propagate(torch.matmul((q * w.read_right).transpose(-1, -2), dy), total, flows.dright, reverse=False)
    shared = log_decay.dim() == 1
    dq, dk, dv, dgates = chunk_gradients(q, k, v, dy, w, tile, shared, left, right, dleft, dright)
    dq, dk, dv = (gradient.flatten(2, 3)[:, :, :length] for gradient in (dq, dk, dv))
    return dq, dk, dv, dgates[0, :, 0] if shared else dgates.flatten(2, 3)[:, :, :length]


def chunk_gradients(q, k, v, dy, w: Factors, tile: Tensor, shared: bool, left, right, dleft, dright):
    """Gradients of chunks from the states that reach them (left, right) and the gradients of those they send on
    (dleft for the state sent to the right, dright for the one sent to the left); all (B, H, n, D, V) or None.

    The last result is d gates (B, H, n, K), or (1, H, 1, K), summed over batch and chunks, if `shared` (LION-D)."""

    def reduce(x: Tensor) -> Tensor:
        return x.sum((0, 2), keepdim=True) if shared else x

    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(tile)
    dscores = torch.matmul(dy, v.transpose(-1, -2))
    dv = torch.matmul(scores.transpose(-1, -2), dy)
    de, df = split_sums(reduce(scores.mul_(dscores)))
    dscores.mul_(tile)
    dq, dk = torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q)

    dtotal = 0
    if left is not None:
        crossing = (left * w.cross_right).mul_(dleft).sum((-1, -2)) + (right * w.cross_left).mul_(dright).sum((-1, -2))
        crossing = crossing.unsqueeze(-1)
        read_left = torch.matmul(dy, left.transpose(-1, -2)).mul_(w.read_left)
        read_right = torch.matmul(dy, right.transpose(-1, -2)).mul_(w.read_right)
        write_right = torch.matmul(v, dleft.transpose(-1, -2)).mul_(w.write_right)
        write_left = torch.matmul(v, dright.transpose(-1, -2)).mul_(w.write_left)
        _add_product(dv, k * w.write_right, dleft)
        _add_product(dv, k * w.write_left, dright)
        to_right, to_left = reduce((write_right * k).sum(-1)), reduce((write_left * k).sum(-1))
        from_left, from_right = reduce((read_left * q).sum(-1)), reduce((read_right * q).sum(-1))
        dq += read_left.add_(read_right)
        dk += write_right.add_(write_left)
        de, df = de + from_left - to_right, df + to_left - from_right
        dtotal = reduce(crossing) + to_right.sum(-1, keepdim=True) + from_right.sum(-1, keepdim=True)
    return dq, dk, dv, gate_gradient(de, df, dtotal)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b over the last two dimensions, without a temporary of the size of out."""
    out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
