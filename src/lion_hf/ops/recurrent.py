"""The rnn form: one chunk after the other, O(L) time. Forward needs O(D V) memory, whatever the length."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .chunk import chunk_flows, chunk_gates, chunk_gradients, equal_chunks
from .decays import Flows, clamped_gates, decay_factors, sum_dtype
from .tokens import Tokens, fitting_cache, slices


def rnn_forward(x: Tokens, log_decay, scale, chunk_size):
    size = equal_chunks(x.query.shape[2], chunk_size)[1]
    flows = _flows(x, log_decay, size)
    y, state = x.empty_output(), x.empty_state()
    for part, q, k, v, w in _walk(x, log_decay, flows, size, scale):  # the chunk itself and all that lies to its left
        out = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(w.tile), v)
        y[:, :, part] = out.add_(torch.matmul(q * w.read_left, state)).squeeze(2)
        state = next_state(state, w.cross_right, k * w.write_right, v)
    state = x.empty_state()
    for part, q, k, v, w in _walk(
        x, log_decay, flows, size, scale, reverse=True, tile=False
    ):  # all that lies to its right
        y[:, :, part] += torch.matmul(q * w.read_right, state).squeeze(2)
        state = next_state(state, w.cross_left, k * w.write_left, v)
    return x.split(y)


def rnn_backward(x: Tokens, log_decay, dy, dc, scale, chunk_size):
    dy = x.join(dy, dc)
    length, shared = x.query.shape[2], log_decay.dim() == 1
    size = equal_chunks(length, max(chunk_size, math.isqrt(length)))[1]
    flows = _flows(x, log_decay, size, dy)
    grads = [torch.empty_like(t, dtype=x.dtype) for t in (x.query, x.key)] + [x.empty_output()]
    dgates = log_decay.new_empty(x.query.shape[1 if shared else 0 : 3], dtype=sum_dtype(log_decay.device))
    left = dright = x.empty_state()
    stored = []
    for part, q, k, v, w in _walk(x, log_decay, flows, size, scale, tile=False):
        stored.append((left, dright))  # two states per chunk of at least sqrt(L) tokens
        left = next_state(left, w.cross_right, k * w.write_right, v)
        dright = next_state(dright, w.cross_left, q * w.read_right, dy[:, :, None, part])
    right = dleft = x.empty_state()
    for part, q, k, v, w in _walk(x, log_decay, flows, size, scale, reverse=True):
        left, dright = stored.pop()
        dyc = dy[:, :, None, part]
        *steps, dgate = chunk_gradients(q, k, v, dyc, w, shared, left, right, dleft, dright)
        for grad, step in zip(grads, steps, strict=True):
            grad[:, :, part] = step.squeeze(2)
        dgates[..., part] = dgate[0, :, 0] if shared else dgate.squeeze(2)
        right = next_state(right, w.cross_left, k * w.write_left, v)
        dleft = next_state(dleft, w.cross_right, q * w.read_left, dyc)
    return *grads, dgates


def _flows(x: Tokens, log_decay, size: int, dy: Tensor | None = None) -> Flows:
    length = x.query.shape[2]
    chunks = -(-length // size)
    return chunk_flows(x, chunk_gates(log_decay, length, chunks, size, x.dtype), chunks, dy)


def _walk(x: Tokens, log_decay, flows: Flows, size: int, scale: float, reverse=False, tile=True) -> Iterator:
    """One chunk of `size` tokens after the other, as (part, q, k, v, factors): q, k and v are (B, H, 1, K, D).

    Factors are made for several chunks at a time, as many as fit a cache, and once for all of one size in LION-D."""
    length, shared = x.query.shape[2], log_decay.dim() == 1
    whole = length - length % size  # the last chunk may be shorter
    most = whole if shared else size
    if not shared:
        most *= fitting_cache(log_decay[:, :, 0].numel() * size**2)
    groups = [(start, min(start + most, whole), size) for start in range(0, whole, most)]
    groups += [(whole, length, length - whole)] if whole < length else []
    for start, stop, tokens in reversed(groups) if reverse else groups:
        chunks = slice(start // size, start // size + (stop - start) // tokens)
        gates = clamped_gates(log_decay if shared else log_decay[:, :, start:stop], tokens, x.dtype)
        factors = decay_factors(gates.unflatten(-1, (-1, tokens)), flows, chunks, scale, x.dtype, tile)
        parts = slices(start, stop, tokens)
        for i, part in reversed(list(enumerate(parts))) if reverse else enumerate(parts):
            q, k, v = (t.unsqueeze(2) for t in (x.queries(part), x.keys(part), x.values(part)))
            yield part, q, k, v, factors.of_chunk(i)


def next_state(state: Tensor, cross: Tensor, write: Tensor, v: Tensor) -> Tensor:
    """The state after one more chunk: exp(G) state + write^T v."""
    return torch.matmul(write.transpose(-1, -2), v).addcmul_(cross, state)
