"""The rnn form: one chunk after another, O(L) time.

Beyond the output, the forward pass needs O(D V) memory for the state and a few numbers per token and head.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .chunk import chunk_factors, chunk_gates, chunk_gradients, equal_chunks
from .decays import Factors, sum_dtype, tile_weights
from .tokens import Tokens, fitting_cache, slices


def rnn_forward(x: Tokens, log_decay, scale, chunk_size):
    chunks, size = equal_chunks(x.query.shape[2], chunk_size)
    gates = chunk_gates(log_decay, x.query.shape[2], chunks, size, x.dtype)
    factors, _ = chunk_factors(x, gates, chunks, scale)
    y, state = x.empty_output(), x.empty_state()
    for part, q, k, v, w, tile in _walk(x, gates, factors, scale):  # the chunk itself and all tokens to its left
        out = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(tile), v)
        y[:, :, part] = out.add_(torch.matmul(q * w.read_left, state)).squeeze(2)
        state = next_state(state, w.cross_right, k * w.write_right, v)
    state = x.empty_state()
    for part, q, k, v, w, _ in _walk(x, gates, factors, reverse=True):  # all tokens to its right
        y[:, :, part] += torch.matmul(q * w.read_right, state).squeeze(2)
        state = next_state(state, w.cross_left, k * w.write_left, v)
    return x.split(y)


def rnn_backward(x: Tokens, log_decay, dy, dc, scale, chunk_size):
    dy = x.join(dy, dc)
    length, shared = x.query.shape[2], log_decay.dim() == 1
    chunks, size = equal_chunks(length, max(chunk_size, math.isqrt(length)))
    gates = chunk_gates(log_decay, length, chunks, size, x.dtype)
    factors, _ = chunk_factors(x, gates, chunks, scale, dy)
    grads = [torch.empty_like(t, dtype=x.dtype) for t in (x.query, x.key)] + [x.empty_output()]
    dgates = log_decay.new_empty(x.query.shape[1 if shared else 0 : 3], dtype=sum_dtype(log_decay.device))
    left = dright = x.empty_state()
    stored = []
    for part, q, k, v, w, _ in _walk(x, gates, factors):
        stored.append((left, dright))  # two states per chunk of at least sqrt(L) tokens
        left = next_state(left, w.cross_right, k * w.write_right, v)
        dright = next_state(dright, w.cross_left, q * w.read_right, dy[:, :, None, part])
    right = dleft = x.empty_state()
    for part, q, k, v, w, tile in _walk(x, gates, factors, scale, reverse=True):
        left, dright = stored.pop()
        dyc = dy[:, :, None, part]
        *steps, dgate = chunk_gradients(q, k, v, dyc, w, tile, shared, left, right, dleft, dright)
        for grad, step in zip(grads, steps, strict=True):
            grad[:, :, part] = step.squeeze(2)
        dgates[..., part] = dgate[0, :, 0] if shared else dgate.squeeze(2)
        right = next_state(right, w.cross_left, k * w.write_left, v)
        dleft = next_state(dleft, w.cross_right, q * w.read_left, dyc)
    return *grads, dgates


def _walk(x: Tokens, gates: Tensor, factors: Factors, scale: float | None = None, reverse: bool = False) -> Iterator:
    """Yield (part, q, k, v, factors, tile) of one chunk after another; q, k and v are (B, H, 1, K, D).

    The last chunk may be shorter than the K of the gates, (b, H, n, K). Tiles are built only if a scale is given: once
    for LION-D, otherwise for as many chunks at a time as fit into the cache.
    """
    size, shared = gates.shape[-1], gates.shape[2] == 1
    parts = slices(0, x.query.shape[2], size)
    most = len(parts) if shared else fitting_cache(gates[:, :, 0].numel() * size)
    groups = [range(len(parts))[group] for group in slices(0, len(parts), most)]
    for group in reversed(groups) if reverse else groups:
        tiles = None if scale is None else tile_weights(gates[:, :, group.start : group.stop], scale, x.dtype)
        for i in reversed(group) if reverse else group:
            part = parts[i]
            tokens = part.stop - part.start
            q, k, v = (t.unsqueeze(2) for t in (x.queries(part), x.keys(part), x.values(part)))
            tile = tiles if tiles is None or shared else tiles[:, :, i - group.start, None]
            tile = tile if tile is None else tile[..., :tokens, :tokens]
            yield part, q, k, v, factors.of_chunk(i, tokens), tile


def next_state(state: Tensor, cross: Tensor, write: Tensor, v: Tensor) -> Tensor:
    """Return the state after one more chunk: exp(G) state + write^T v."""
    return torch.matmul(write.transpose(-1, -2), v).addcmul_(cross, state)
