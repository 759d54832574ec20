"""The rnn form: one chunk after another, O(L) time.

Beyond the output, the forward pass needs O(D V) memory for the state and a few numbers per token and head.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .chunk import chunk_gradients, equal_chunks
from .decays import Factors
from .masks import Sums
from .tokens import Tokens, fitting_cache, slices, summed_over_groups


def rnn_forward(x: Tokens, make_mask: Callable, chunk_size: int):
    """Return n and c. `make_mask(x, chunks, size)` returns the mask of chunks (masks.py)."""
    mask = make_mask(x, *equal_chunks(x.query.shape[2], chunk_size))
    factors, _ = mask.factors()
    y, inside = x.empty_output(), True
    if factors.read_left is not None:  # the chunk itself and all tokens to its left
        state, inside = x.empty_state(), False
        for part, w, tile in _walk(x, mask, factors, tiles=True):
            q, k, v = _chunk(x, part)
            out = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(tile), v)
            y[:, :, part] = out.add_(torch.matmul(q * w.read_left, state)).squeeze(2)
            state = next_state(state, w.cross_right, k * w.write_right, v)
    if factors.read_right is not None:  # all tokens to its right, and the chunk itself if it is still to come
        state = x.empty_state()
        for part, w, tile in _walk(x, mask, factors, tiles=inside, reverse=True):
            q, k, v = _chunk(x, part)
            out = torch.matmul(q * w.read_right, state)
            if inside:
                scores = torch.matmul(q, k.transpose(-1, -2)).mul_(tile)
                y[:, :, part] = out.add_(torch.matmul(scores, v)).squeeze(2)
            else:
                y[:, :, part] += out.squeeze(2)
            state = next_state(state, w.cross_left, k * w.write_left, v)
    return x.split(y)


def rnn_backward(x: Tokens, make_mask: Callable, dy, dc, chunk_size: int, sides: int = 2):
    length = x.query.shape[2]
    # One or two states are stored per chunk, in all at most 2 sqrt(L).
    mask = make_mask(x, *equal_chunks(length, max(chunk_size, math.isqrt(length) * sides // 2)))
    factors, _ = mask.factors(dy, dc)
    grads = [torch.empty_like(t, dtype=x.dtype) for t in (x.query, x.key)] + [x.empty_output()]
    # None for a direction from which nothing is read.
    left = dright = right = dleft = None
    if factors.read_left is not None:
        left = dleft = x.empty_state()
    if factors.read_right is not None:
        right = dright = x.empty_state()
    stored, found = [], []
    for part, w, _ in _walk(x, mask, factors):
        stored.append((left, dright))
        if left is not None:
            keys, values = x.keys(part).unsqueeze(2), x.values(part).unsqueeze(2)
            left = next_state(left, w.cross_right, keys * w.write_right, values)
        if dright is not None:
            queries = x.queries(part).unsqueeze(2)
            dright = next_state(dright, w.cross_left, queries * w.read_right, x.join(dy, dc, part).unsqueeze(2))
    for part, w, tile in _walk(x, mask, factors, tiles=True, reverse=True):
        left, dright = stored.pop()
        q, k, v = _chunk(x, part)
        dyc = x.join(dy, dc, part).unsqueeze(2)
        *steps, sums = chunk_gradients(q, k, v, dyc, w, tile, mask, left, right, dleft, dright)
        for grad, step in zip(grads, steps, strict=True):
            grad[:, :, part] = summed_over_groups(step.squeeze(2), grad.shape[1])
        found.append(sums)
        if right is not None:
            right = next_state(right, w.cross_left, k * w.write_left, v)
        if dleft is not None:
            dleft = next_state(dleft, w.cross_right, q * w.read_left, dyc)
    exponents = [t.flatten(2)[..., :length] for t in mask.gradients(Sums.joined(found[::-1], mask.size))]
    return *grads, *(t[0] if mask.shared else t for t in exponents)


def _chunk(x: Tokens, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of a chunk, (B, H, 1, K, D)."""
    return tuple(t.unsqueeze(2) for t in (x.queries(part), x.keys(part), x.values(part)))


def _walk(x: Tokens, mask, factors: Factors, tiles: bool = False, reverse: bool = False) -> Iterator:
    """Yield (part, factors, tile) of one chunk after another.

    The last chunk may be shorter than `mask.size`. Tiles are built on demand: once for LION-D, otherwise for as many
    chunks at a time as fit into the cache.
    """
    size, shared = mask.size, mask.shared
    parts = slices(0, x.query.shape[2], size)
    most = len(parts) if shared else fitting_cache(2 * x.value.shape[0] * x.value.shape[1] * size**2)
    groups = [range(len(parts))[group] for group in slices(0, len(parts), most)]
    of_chunks = factors.of_chunks(parts)
    for group in reversed(groups) if reverse else groups:
        built = mask.tiles(slice(group.start, group.stop)) if tiles else None
        for i in reversed(group) if reverse else group:
            part = parts[i]
            tokens = part.stop - part.start
            tile = built if built is None or shared else built[:, :, i - group.start, None]
            tile = tile if tile is None or tokens == size else tile[..., :tokens, :tokens]
            yield part, of_chunks[i], tile


def next_state(state: Tensor, cross: Tensor, write: Tensor, v: Tensor) -> Tensor:
    """Return the state after one more chunk: exp(G) state + write^T v."""
    return torch.matmul(write.transpose(-1, -2), v).addcmul_(cross, state)
