"""The chunk form: all chunks at once, O(L) time. Chunks exchange states of shape D x V."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import makes_graph
from .decays import Factors, Flow, cumulative_sums, cut_exp
from .masks import Sums
from .tokens import Tokens


# Up to this many chunks, one (chunks x chunks) product propagates the states. More chunks are split into groups of at
# most this size.
PROPAGATION_GROUP = 64


def _split(x: Tensor, chunks: int, size: int) -> Tensor:
    """Split (B, H, L, D) into (B, H, chunks, size, D), with zeros after the last token."""
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if makes_graph() or padding else x
    return x.reshape(*x.shape[:2], chunks, size, x.shape[-1])


def equal_chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """Return (number of chunks, tokens per chunk): as few chunks as `chunk_size` allows, equally long."""
    chunks = (length + chunk_size - 1) // chunk_size  # not -(-a // b): ONNX divides integers towards 0
    return chunks, (length + chunks - 1) // chunks


def propagate(update: Tensor, total: Tensor, flow: Flow, reverse: bool) -> Tensor:
    """Return the state that reaches each chunk: out_c = sum of exp(totals between m and c) update_m over m before c.

    "Before" means to the left, or to the right if `reverse`. update is (B, H, n, D, V), total (b, H, n). This is the
    operator itself at the level of chunks: a small product with a decay mask. Many chunks are split into groups. Inside
    a group that product is used, and the states of the groups are propagated recursively.
    """
    batch, _, chunks, *state_shape = update.shape
    groups, size = 1, chunks
    total, sent, arriving = (t.expand(-1, -1, chunks) for t in (total, *flow))
    update = update.flatten(-2)
    grouped = not torch.jit.is_tracing() and chunks > PROPAGATION_GROUP
    if grouped:
        groups = -(-chunks // PROPAGATION_GROUP)
        size = -(-chunks // groups)
        padding = groups * size - chunks
        update, total = F.pad(update, (0, 0, 0, padding)), F.pad(total, (0, padding))
        sent, arriving = (F.pad(t, (0, padding), value=-math.inf) for t in (sent, arriving))
    update = update.reshape(*update.shape[:2], groups, size, update.shape[-1])
    total, sent, arriving = (t.reshape(*t.shape[:2], groups, size) for t in (total, sent, arriving))
    exclusive, inclusive = cumulative_sums(total)
    # The weight is exp(sum of the totals strictly between two chunks), or 0 if the other chunk is not before this one.
    exponent = exclusive.unsqueeze(-1) - inclusive.unsqueeze(-2)
    if reverse:
        exponent = exponent.transpose(-1, -2)
    before = torch.ones_like(exponent, dtype=torch.bool)
    before = before.triu(1) if reverse else before.tril(-1)
    weights = cut_exp(exponent.masked_fill(~before, -math.inf), sent.unsqueeze(-2), update.dtype)
    state = torch.matmul(weights.expand(batch, -1, -1, -1, -1), update)
    if grouped:
        last = inclusive[..., -1:]
        leave, reach = (exclusive, last - inclusive) if reverse else (last - inclusive, exclusive)
        left = torch.matmul(cut_exp(leave, sent, update.dtype).unsqueeze(-2).expand(batch, -1, -1, -1, -1), update)
        entering = arriving[..., -1:] if reverse else arriving[..., :1]
        outer = Flow((leave + sent).amax(-1), entering.squeeze(-1))
        carry = propagate(left.unflatten(-1, state_shape).squeeze(3), last.squeeze(-1), outer, reverse).flatten(-2)
        state.addcmul_(cut_exp(reach, entering, update.dtype).unsqueeze(-1), carry.unsqueeze(3))
    return state.flatten(2, 3).narrow(2, 0, chunks).unflatten(-1, state_shape)


def chunk_forward(x: Tokens, make_mask: Callable, chunk_size: int):
    """Return n and c. `make_mask(x, chunks, size)` returns the mask of chunks (masks.py)."""
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    q, k, v = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values()))
    mask = make_mask(x, chunks, size)
    y = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(mask.tiles()), v)
    if torch.jit.is_tracing() or chunks > 1:
        w, flows = mask.factors()
        to_right, to_left = mask.totals()
        if w.read_left is not None:
            left = propagate(_written(k, w.write_right, v), to_right, flows.left, reverse=False)
            y = _add_product(y, q * w.read_left, left)
        if w.read_right is not None:
            right = propagate(_written(k, w.write_left, v), to_left, flows.right, reverse=True)
            y = _add_product(y, q * w.read_right, right)
    return x.split(y.flatten(2, 3).narrow(2, 0, length))


def _written(keys: Tensor, factor: Tensor, values: Tensor) -> Tensor:
    """Return the state that the tokens of each chunk write, (B, H, n, D, V)."""
    return torch.matmul((keys * factor).transpose(-1, -2), values)


def chunk_backward(x: Tokens, make_mask: Callable, dy, dc, chunk_size: int):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    dy = x.join(dy, dc)
    mask, whole = make_mask(x, chunks, size), dy
    q, k, v, dy = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values(), dy))
    tile = mask.tiles()
    w = left = right = dleft = dright = None
    if torch.jit.is_tracing() or chunks > 1:
        w, flows = mask.factors(whole)
        to_right, to_left = mask.totals()
        # With the transposed mask: the gradient of what a query reads from the left goes to the keys on its left.
        if w.read_left is not None:
            left = propagate(_written(k, w.write_right, v), to_right, flows.left, reverse=False)
            dleft = propagate(_written(q, w.read_left, dy), to_right, flows.dleft, reverse=True)
        if w.read_right is not None:
            right = propagate(_written(k, w.write_left, v), to_left, flows.right, reverse=True)
            dright = propagate(_written(q, w.read_right, dy), to_left, flows.dright, reverse=False)
    dq, dk, dv, sums = chunk_gradients(q, k, v, dy, w, tile, mask, left, right, dleft, dright)
    exponents = mask.gradients(sums)
    dq, dk, dv = (gradient.flatten(2, 3).narrow(2, 0, length) for gradient in (dq, dk, dv))
    if mask.shared:
        return dq, dk, dv, *(x[0, :, 0] for x in exponents)
    # F.pad cuts by a copy. A view would be contiguous at some lengths only, which costs a second graph.
    return dq, dk, dv, *(F.pad(x.flatten(2, 3), (0, length - chunks * size)) for x in exponents)


def chunk_gradients(q, k, v, dy, w: Factors | None, tile: Tensor, mask, left, right, dleft, dright):
    """Return the gradients of q, k and v, and the sums from which follow those of the mask (`mask.gradients`).

    `left` and `right` are the states that reach the chunks, `dleft` and `dright` the gradients of the states that they
    send to the right and to the left. All are (B, H, n, D, V), or None if nothing is read from there.
    """
    scores = torch.matmul(q, k.transpose(-1, -2))
    dscores = torch.matmul(dy, v.transpose(-1, -2))
    own = mask.own_weights(scores, dscores)  # None if the diagonal is 1
    scores.mul_(tile)
    dv = torch.matmul(scores.transpose(-1, -2), dy)
    pairs = mask.pair_sums(scores.mul_(dscores))
    dscores.mul_(tile)
    dq, dk = torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q)
    to_right = to_left = (None, None, None)
    if left is not None:
        to_right = _cross(q, k, v, dy, w.read_left, w.write_right, w.cross_right, left, dleft, dq, dk, dv)
    if right is not None:
        to_left = _cross(q, k, v, dy, w.read_right, w.write_left, w.cross_left, right, dright, dq, dk, dv)
    crossings = *to_right, *to_left
    return dq, dk, dv, Sums(*pairs, own, *map(mask.reduced, crossings))


def _cross(q, k, v, dy, read, write, cross, state, dstate, dq, dk, dv) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradients of what goes through the states of one direction to dq, dk and dv.

    Returns the gradients of the exponents of reads and writes (B, H, n, K), and of the totals (B, H, n, 1).
    """
    through = (state * cross).mul_(dstate).sum((-1, -2)).unsqueeze(-1)
    reading = torch.matmul(dy, state.transpose(-1, -2)).mul_(read)
    writing = torch.matmul(v, dstate.transpose(-1, -2)).mul_(write)
    _add_product(dv, k * write, dstate)
    dq += reading
    dk += writing
    return reading.mul_(q).sum(-1), writing.mul_(k).sum(-1), through


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out += a @ b over the last two dimensions, without a temporary of the size of out.

    Use the returned tensor: in ONNX, which has no views, `out` itself does not change.
    """
    return out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3)).view_as(out)
