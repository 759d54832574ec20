"""The chunk form: all chunks at once, O(L) time. Chunks are linked by states (D x V)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import makes_graph
from .decays import Factors, clamped_gates, cumulative_sums, decay_factors, gate_gradient, split_sums
from .tokens import Tokens


# Up to this many chunks, one (chunks x chunks) product links their states; beyond, groups of this size are linked so.
PROPAGATION_GROUP = 64


def _split(x: Tensor, chunks: int, size: int) -> Tensor:
    """(B, H, L, D) -> (B, H, chunks, size, D), zeros after the last token."""
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if makes_graph() or padding else x
    return x.unflatten(2, (chunks, size))


def _chunk_gates(log_decay: Tensor, length: int, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Gates as (b, H, n, K): (1, H, 1, K) for LION-D, (B, H, chunks, size) for LION-S, zeros after the last token."""
    if log_decay.dim() == 1:
        return clamped_gates(log_decay, size, dtype).unsqueeze(2)
    return F.pad(clamped_gates(log_decay, length, dtype), (0, chunks * size - length)).unflatten(2, (chunks, size))


def equal_chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens in each): as few chunks as `chunk_size` allows, equally long."""
    chunks = -(-length // chunk_size)
    return chunks, -(-length // chunks)


def propagate(update: Tensor, total: Tensor, reverse: bool) -> Tensor:
    """State that reaches every chunk: out_c = sum over chunks m before c of exp(totals between m and c) update_m.

    "Before" means to the left, or to the right if `reverse`. update (B, H, n, D, V), total (b, H, n). It is the
    operator itself one level up: a small product with a decay mask. Many chunks are cut into groups, inside of which it
    is that product, and whose own states are propagated in the same way.
    """
    batch, _, chunks, *state_shape = update.shape
    update, total = update.flatten(-2), total.expand(-1, -1, chunks)
    groups, size = 1, chunks
    grouped = not torch.jit.is_tracing() and chunks > PROPAGATION_GROUP
    if grouped:
        groups, size = -(-chunks // PROPAGATION_GROUP), PROPAGATION_GROUP
        padding = groups * size - chunks
        update, total = F.pad(update, (0, 0, 0, padding)), F.pad(total, (0, padding))
    update, total = update.unflatten(2, (groups, size)), total.unflatten(2, (groups, size))
    exclusive, inclusive = cumulative_sums(total)
    # exp(sum of the totals strictly between two chunks), 0 where the other chunk is not before this one.
    exponent = exclusive.unsqueeze(-1) - inclusive.unsqueeze(-2)
    if reverse:
        exponent = exponent.transpose(-1, -2)
    before = torch.ones_like(exponent, dtype=torch.bool)
    before = before.triu(1) if reverse else before.tril(-1)
    weights = exponent.masked_fill(~before, -math.inf).to(update.dtype).exp()
    state = torch.matmul(weights.expand(batch, -1, -1, -1, -1), update)
    if grouped:
        last = inclusive[..., -1:]
        leave, reach = (exclusive, last - inclusive) if reverse else (last - inclusive, exclusive)
        leave, reach = (x.to(update.dtype).exp() for x in (leave, reach))
        sent = torch.matmul(leave.unsqueeze(-2).expand(batch, -1, -1, -1, -1), update)
        carried = propagate(sent.unflatten(-1, state_shape).squeeze(3), last.squeeze(-1), reverse).flatten(-2)
        state.addcmul_(reach.unsqueeze(-1), carried.unsqueeze(3))
    return state.flatten(2, 3)[:, :, :chunks].unflatten(-1, state_shape)


def chunk_forward(x: Tokens, log_decay, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    q, k, v = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values()))
    w = decay_factors(_chunk_gates(log_decay, length, chunks, size, q.dtype), scale, q.dtype)
    y = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(w.tile), v)
    if torch.jit.is_tracing() or chunks > 1:
        left = propagate(torch.matmul((k * w.write_right).transpose(-1, -2), v), w.total, reverse=False)
        _add_product(y, q * w.read_left, left)
        right = propagate(torch.matmul((k * w.write_left).transpose(-1, -2), v), w.total, reverse=True)
        _add_product(y, q * w.read_right, right)
    return x.split(y.flatten(2, 3)[:, :, :length])


def chunk_backward(x: Tokens, log_decay, dy, dc, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    q, k, v, dy = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values(), x.join(dy, dc)))
    w = decay_factors(_chunk_gates(log_decay, length, chunks, size, q.dtype), scale, q.dtype)
    left = right = dleft = dright = None
    if torch.jit.is_tracing() or chunks > 1:
        left = propagate(torch.matmul((k * w.write_right).transpose(-1, -2), v), w.total, reverse=False)
        right = propagate(torch.matmul((k * w.write_left).transpose(-1, -2), v), w.total, reverse=True)
        # The transposed mask: what a query read from the left flows back to keys that lie to its left.
        dleft = propagate(torch.matmul((q * w.read_left).transpose(-1, -2), dy), w.total, reverse=True)
        dright = propagate(torch.matmul((q * w.read_right).transpose(-1, -2), dy), w.total, reverse=False)
    shared = log_decay.dim() == 1
    dq, dk, dv, dgates = chunk_gradients(q, k, v, dy, w, shared, left, right, dleft, dright)
    dq, dk, dv = (gradient.flatten(2, 3)[:, :, :length] for gradient in (dq, dk, dv))
    return dq, dk, dv, dgates[0, :, 0] if shared else dgates.flatten(2, 3)[:, :, :length]


def chunk_gradients(q, k, v, dy, w: Factors, shared: bool, left, right, dleft, dright):
    """Gradients of chunks from the states that reach them (left, right) and the gradients of those they send on
    (dleft for the state sent to the right, dright for the one sent to the left); all (B, H, n, D, V) or None.

    The last result is d gates (B, H, n, K), or (1, H, 1, K), summed over batch and chunks, if `shared` (LION-D)."""

    def reduce(x: Tensor) -> Tensor:
        return x.sum((0, 2), keepdim=True) if shared else x

    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(w.tile)
    dscores = torch.matmul(dy, v.transpose(-1, -2))
    dv = torch.matmul(scores.transpose(-1, -2), dy)
    de, df = split_sums(reduce(scores.mul_(dscores)))
    dscores.mul_(w.tile)
    dq, dk = torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q)

    dtotal = 0
    if left is not None:
        crossing = w.cross[..., 0] * ((left * dleft).sum((-1, -2)) + (right * dright).sum((-1, -2))).unsqueeze(-1)
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
