"""The chunk form: all chunks at once, O(L) time. Chunks exchange states of shape D x V."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import is_exporting, makes_graph, values_can_be_read
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


# Up to this many chunks, one (chunks x chunks) product propagates the states. More chunks are split into groups of at
# most this size.
PROPAGATION_GROUP = 64


def _split(x: Tensor, chunks: int, size: int) -> Tensor:
    """Split (B, H, L, D) into (B, H, chunks, size, D), with zeros after the last token."""
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if makes_graph() or padding else x
    return x.reshape(*x.shape[:2], chunks, size, x.shape[-1])


def chunk_gates(log_decay: Tensor, length: int, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return the gates of chunks, (b, H, n, K): (1, H, 1, K) for LION-D, (B, H, chunks, size) for LION-S.

    Gates after the last token of LION-S are 0.
    """
    if log_decay.dim() == 1:
        return clamped_gates(log_decay, size, dtype).unsqueeze(2)
    gates = F.pad(clamped_gates(log_decay, length, dtype), (0, chunks * size - length))
    return gates.view(*gates.shape[:2], chunks, size)


def chunk_factors(
    x: Tokens, gates: Tensor, chunks: int, scale: float, dy: Tensor | None = None
) -> tuple[Factors, Flows]:
    """Return the factors of chunks with gates (b, H, n, K). The backward pass gives `dy` (B, H, L, V) as well."""

    def split(alive: Tensor) -> Tensor:
        size = gates.shape[-1]
        return F.pad(alive, (0, chunks * size - alive.shape[-1])).unflatten(-1, (chunks, size))

    # Runtimes of exported graphs treat denormal numbers in their own way, and lack the operators that avoid them.
    if torch.jit.is_tracing() or is_exporting():
        return decay_factors(gates, None, None, scale, x.dtype, all_large=True)
    keys = None if x.key_mask is None else split(x.key_mask[:, None].bool())
    queries = None
    if dy is not None:
        queries = dy.abs().amax(-1) != 0
        every = values_can_be_read(dy) and bool(queries.all())  # the usual case; LION-D then shares factors across rows
        queries = queries.new_ones(1, 1, 1, 1) if every else split(queries)
    return decay_factors(gates, keys, queries, scale, x.dtype)


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


def chunk_forward(x: Tokens, log_decay, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    q, k, v = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values()))
    gates = chunk_gates(log_decay, length, chunks, size, q.dtype)
    y = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(tile_weights(gates, scale, q.dtype)), v)
    if torch.jit.is_tracing() or chunks > 1:
        (w, flows), total = chunk_factors(x, gates, chunks, scale), gates.sum(-1)
        left = propagate(torch.matmul((k * w.write_right).transpose(-1, -2), v), total, flows.left, reverse=False)
        y = _add_product(y, q * w.read_left, left)
        right = propagate(torch.matmul((k * w.write_left).transpose(-1, -2), v), total, flows.right, reverse=True)
        y = _add_product(y, q * w.read_right, right)
    return x.split(y.flatten(2, 3).narrow(2, 0, length))


def chunk_backward(x: Tokens, log_decay, dy, dc, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = equal_chunks(length, chunk_size)
    dy = x.join(dy, dc)
    gates = chunk_gates(log_decay, length, chunks, size, dy.dtype)
    whole = dy
    q, k, v, dy = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values(), dy))
    tile = tile_weights(gates, scale, q.dtype)
    w = left = right = dleft = dright = None
    if torch.jit.is_tracing() or chunks > 1:
        (w, flows), total = chunk_factors(x, gates, chunks, scale, whole), gates.sum(-1)
        left = propagate(torch.matmul((k * w.write_right).transpose(-1, -2), v), total, flows.left, reverse=False)
        right = propagate(torch.matmul((k * w.write_left).transpose(-1, -2), v), total, flows.right, reverse=True)
        # With the transposed mask: the gradient of what a query reads from the left goes to the keys on its left.
        dleft = propagate(torch.matmul((q * w.read_left).transpose(-1, -2), dy), total, flows.dleft, reverse=True)
        dright = propagate(torch.matmul((q * w.read_right).transpose(-1, -2), dy), total, flows.dright, reverse=False)
    shared = log_decay.dim() == 1
    dq, dk, dv, dgates = chunk_gradients(q, k, v, dy, w, tile, shared, left, right, dleft, dright)
    dq, dk, dv = (gradient.flatten(2, 3).narrow(2, 0, length) for gradient in (dq, dk, dv))
    if shared:
        return dq, dk, dv, dgates[0, :, 0]
    # F.pad cuts by a copy. A view would be contiguous at some lengths only, which costs a second graph.
    return dq, dk, dv, F.pad(dgates.flatten(2, 3), (0, length - chunks * size))


def chunk_gradients(q, k, v, dy, w: Factors | None, tile: Tensor, shared: bool, left, right, dleft, dright):
    """Return the gradients of q, k, v and the gates of chunks.

    `left` and `right` are the states that reach the chunks, `dleft` and `dright` the gradients of the states that they
    send to the right and to the left. All are (B, H, n, D, V), or None like `w` for a single chunk. The gradient of the
    gates is (B, H, n, K), or (1, H, 1, K), summed over batch and chunks, if `shared` (LION-D).
    """

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
        dv = _add_product(dv, k * w.write_right, dleft)
        dv = _add_product(dv, k * w.write_left, dright)
        to_right, to_left = reduce((write_right * k).sum(-1)), reduce((write_left * k).sum(-1))
        from_left, from_right = reduce((read_left * q).sum(-1)), reduce((read_right * q).sum(-1))
        dq += read_left.add_(read_right)
        dk += write_right.add_(write_left)
        de, df = de + from_left - to_right, df + to_left - from_right
        dtotal = reduce(crossing) + to_right.sum(-1, keepdim=True) + from_right.sum(-1, keepdim=True)
    return dq, dk, dv, gate_gradient(de, df, dtotal)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out += a @ b over the last two dimensions, without a temporary of the size of out.

    Use the returned tensor: in ONNX, which has no views, `out` itself does not change.
    """
    return out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3)).view_as(out)
