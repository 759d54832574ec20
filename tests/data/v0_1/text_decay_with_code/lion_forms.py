"""The forms of LION's operator, forward and backward, side by side; lion_ops.py says what they compute.

`_factors` turns log-decays into the few numbers the forms multiply with (only ever exponentials of numbers <= 0); each
form is a forward and a backward function; one autograd Function ties them together. The masks are closed under
transposition, so each backward has the shape of its forward.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


# exp(floor) is 0 in the dtype: clamping there changes no result and keeps every sum finite for log_decay = -inf.
_FLOOR = {torch.float32: -104.0, torch.float64: -746.0}

# What stays in the cache of a CPU, about 1 MiB in float32. The chunk form walks its chunks one after the other (the rnn
# functions) once a query has more elements, so that no buffer is paged in anew for every step; the attention form takes
# as many rows of a batch at a time as have no more scores, and the walk makes as many factors.
_CPU_CACHE_ELEMENTS = 2**18

# Chunk states are mixed by one (chunks x chunks) product up to this many chunks; beyond, a carry links such groups.
_SCAN_GROUP = 64


# ------------------------------------------------------------------------------------------------ reading tokens

ALL = slice(None)


class _Tokens(NamedTuple):
    """Query, key and value as the forms read them: contiguous, in the accumulation dtype, padding zeroed in key and
    value alike, and a column of ones beside the value where a denominator is wanted (c is n for v = 1).

    A form that reads a few tokens at a time copies no more than those. The attention form reads whole rows of the batch
    instead, and takes sums of its scores for c.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    denominator: bool
    dtype: torch.dtype

    def queries(self, part: slice = ALL) -> Tensor:
        return self.query[:, :, part].to(self.dtype).contiguous()

    def keys(self, part: slice = ALL) -> Tensor:
        return self._unmasked(self.key[:, :, part].to(self.dtype), part).contiguous()

    def values(self, part: slice = ALL) -> Tensor:
        value = self._unmasked(self.value[:, :, part].to(self.dtype), part)
        return F.pad(value, (0, 1), value=1.0) if self.denominator else value.contiguous()

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of some rows of the batch."""
        row = self._replace(key_mask=None if self.key_mask is None else self.key_mask[rows])
        key, value = (row._unmasked(t[rows].to(self.dtype), ALL) for t in (self.key, self.value))
        return tuple(_for_products(t) for t in (self.query[rows].to(self.dtype), key, value))

    def _unmasked(self, x: Tensor, part: slice) -> Tensor:
        return x if self.key_mask is None else torch.where(self.key_mask[:, None, part, None].bool(), x, 0)

    def empty_output(self, width: int | None = None) -> Tensor:
        """As wide as the values, in memory (batch, length, heads, width): joining the heads needs no copy then."""
        batch, heads, length, value_dim = self.value.shape
        width = value_dim + self.denominator if width is None else width
        return self.value.new_empty(batch, length, heads, width, dtype=self.dtype).transpose(1, 2)

    def empty_state(self) -> Tensor:
        shape = *self.query.shape[:2], 1, self.query.shape[-1], self.value.shape[-1] + self.denominator
        return self.query.new_zeros(shape, dtype=self.dtype)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """n and c of an output that is as wide as the values."""
        return (y[..., :-1], y[..., -1]) if self.denominator else (y, None)

    def join(self, dy: Tensor, dc: Tensor | None) -> Tensor:
        """The opposite of `split`, for gradients."""
        return (torch.cat([dy, dc.unsqueeze(-1)], -1) if self.denominator else dy).contiguous()


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


# ------------------------------------------------------------------------------------------------ decay factors


def _gates(log_decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Clamped log-decays in the dtype their sums need: (1, H, L) without memory for LION-D, (B, H, L) for LION-S."""
    gates = log_decay.to(_sum_dtype(log_decay.device)).clamp(min=_FLOOR[dtype])
    return gates[None, :, None].expand(1, -1, length) if gates.dim() == 1 else gates


def _sum_dtype(device: torch.device) -> torch.dtype:
    """float64: differences of float32 sums lose 5e-5 at 1025 tokens, more after a saturated gate. (MPS has none.)"""
    return torch.float32 if device.type == "mps" else torch.float64


def _sums(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Exclusive and inclusive cumulative sums over the last dimension."""
    inclusive = gates.cumsum(-1)
    return inclusive - gates, inclusive


def _pair_weights(exclusive: Tensor, inclusive: Tensor, dtype: torch.dtype) -> Tensor:
    """M of one tile, (..., K, K). Of the two exponents the right one is the one <= 0, hence the smaller."""
    return _exp_(_differences(exclusive, dtype).clamp_(max=_differences(-inclusive, dtype)))


def _exp_(x: Tensor) -> Tensor:
    """exp, and 0 for what comes near the dtype's smallest normal number: exponentials and products below it are slow."""
    smallest = math.log(torch.finfo(x.dtype).tiny) + 0.5
    y = x.clamp_(min=smallest).exp_()
    return F.threshold(y, 1.01 * math.exp(smallest), 0.0, inplace=not y.requires_grad)


def _differences(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums_i - sums_j (..., K, K), exact to the rounding of the difference and not of the sums.

    A float64 sum is split into two float32 parts, so that no K x K tensor in float64 is made.
    """
    high = sums.to(dtype)
    difference = high.unsqueeze(-1) - high.unsqueeze(-2)
    if dtype != sums.dtype:
        low = (sums - high).to(dtype)
        difference.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    return difference


class _Factors(NamedTuple):
    """What a chunk with K tokens and local sums e (exclusive), f (inclusive), G (total) multiplies with."""

    tile: Tensor | None  # (b, H, n, K, K)  M inside the chunk, times the scale
    read_left: Tensor  # (b, H, n, K, 1)  s exp(e)      a query reads the state that comes from the left
    write_right: Tensor  # (b, H, n, K, 1)  exp(G - e)    a key enters the state that goes on to the right
    read_right: Tensor  # (b, H, n, K, 1)  s exp(G - f)  a query reads the state that comes from the right
    write_left: Tensor  # (b, H, n, K, 1)  exp(f)        a key enters the state that goes on to the left
    cross: Tensor  # (b, H, n, 1, 1)  exp(G)        a state crosses the chunk
    total: Tensor  # (b, H, n)        G

    def of_chunk(self, i: int) -> "_Factors":
        return _Factors(*(None if t is None else t[:, :, i : i + 1] for t in self))


def _factors(gates: Tensor, scale: float, dtype: torch.dtype, tile: bool = True) -> _Factors:
    """Decay factors of chunks from gates (b, H, n, K); b is 1 for LION-D. Without the largest if not `tile`."""
    e, f = _sums(gates)
    total = f[..., -1:]
    return _Factors(
        # Every factor is exp of a number <= 0.
        tile=_pair_weights(e, f, dtype).mul_(scale) if tile else None,
        read_left=_exp_(e.to(dtype, copy=True)).mul_(scale).unsqueeze(-1),
        write_right=_exp_((total - e).to(dtype)).unsqueeze(-1),
        read_right=_exp_((total - f).to(dtype)).mul_(scale).unsqueeze(-1),
        write_left=_exp_(f.to(dtype, copy=True)).unsqueeze(-1),
        cross=_exp_(total.to(dtype, copy=True)).unsqueeze(-1),
        total=total.squeeze(-1),
    )


def _gate_gradient(de: Tensor, df: Tensor, dtotal: Tensor) -> Tensor:
    """d gates from d(exclusive sums), d(inclusive sums) and d(total): gate t enters e_i for i > t, f_i for i >= t."""
    both = (de + df).to(_sum_dtype(de.device))
    return both.flip(-1).cumsum(-1).flip(-1) - de + dtotal


def _split_sums(pairs: Tensor, rank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(de, df) of a tile from pairs_ij = dM_ij M_ij: e_i enters row i and leaves column i below the diagonal, f_i
    enters column i and leaves row i above it. `rank` tells which token comes first if not by index. `pairs` is
    overwritten."""
    rest = pairs.sum(-2) - pairs.sum(-1)
    lower = pairs.tril_() if rank is None else pairs.mul_(rank.unsqueeze(-1) > rank)
    de = lower.sum(-1) - lower.sum(-2)
    return de, de + rest


# ------------------------------------------------------------------------------------------- attention form, O(L^2)


def attention_weights(log_decay: Tensor, order, length: int, scale: float, dtype: torch.dtype) -> Tensor:
    """M along an order of the tokens, times the scale, with the tokens as they lie: only the sums need to follow it."""
    sums = _sums(_along(_gates(log_decay, length, dtype), order, 0))
    return _pair_weights(*(_along(x, order, 1) for x in sums), dtype).mul_(scale)


def _along(x: Tensor, order: tuple[Tensor, Tensor] | None, direction: int) -> Tensor:
    """Numbers of tokens (..., length) brought into an order (direction 0), or back from it (1)."""
    return x if order is None else x.index_select(-1, order[direction])


def _masks(scans, length: int, scale: float, dtype: torch.dtype) -> tuple[Tensor | float, list[Tensor]]:
    """The mean mask of some scans, times the scale, and the shares that it is the sum of; without decay the scale."""
    shares = [attention_weights(*scan, length, scale / len(scans), dtype) for scan in scans]
    return functools.reduce(torch.add, shares) if shares else scale, shares


def _row_blocks(x: _Tokens) -> list[slice]:
    """Rows of the batch that the attention form takes at a time: on a CPU as many as stay in cache."""
    batch, heads, length = x.query.shape[:3]
    if x.query.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return [ALL]
    return _parts(0, batch, max(1, _CPU_CACHE_ELEMENTS // max(1, heads * length**2)))


def _for_products(x: Tensor) -> Tensor:
    """Products read the heads of a single row where they lie, and copy those of several rows every time."""
    return x if x.shape[0] == 1 else x.contiguous()


def _masks_of_rows(x: _Tokens, scans, scale: float) -> Callable:
    """The masks of a block of rows; those that no row changes are built once."""
    length = x.query.shape[2]
    if all(log_decay.dim() == 1 for log_decay, _ in scans):
        masks = _masks(scans, length, scale, x.dtype)
        return lambda rows: masks
    return lambda rows: _masks(_scans_of_rows(scans, rows), length, scale, x.dtype)


def _scans_of_rows(scans, rows: slice):
    return [(log_decay if log_decay.dim() == 1 else log_decay[rows], order) for log_decay, order in scans]


def _attention_forward(x: _Tokens, scans, scale, chunk_size):
    """`scans` are pairs of log-decays and orders, none without decay; of several the mean mask is taken."""
    masks = _masks_of_rows(x, scans, scale)

    def attend(rows):
        q, k, v = x.rows(rows)
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(masks(rows)[0])
        return torch.matmul(scores, v), scores.sum(-1) if x.denominator else None

    blocks = _row_blocks(x)
    if len(blocks) == 1:
        return attend(ALL)
    numerator = x.empty_output(x.value.shape[-1])
    denominators = []
    for rows in blocks:
        numerator[rows], denominator = attend(rows)
        denominators.append(denominator)
    return numerator, torch.cat(denominators) if x.denominator else None


def _attention_backward(x: _Tokens, scans, dy, dc, scale, chunk_size):
    masks = _masks_of_rows(x, scans, scale)

    def gradients_of(rows):
        q, k, v = x.rows(rows)
        dn = _for_products(dy[rows])
        scores = torch.matmul(q, k.transpose(-1, -2))
        dscores = torch.matmul(dn, v.transpose(-1, -2))
        if dc is not None:
            dscores += dc[rows].unsqueeze(-1)
        mask, shares = masks(rows)
        masked = scores * mask if len(scans) > 1 else scores.mul_(mask)
        dv = torch.matmul(masked.transpose(-1, -2), dn)
        scores.mul_(dscores)  # dM_ij of several scans, dM_ij M_ij of the only one
        pairs = [scores] * len(scans) if len(scans) < 2 else [scores * share for share in shares]
        dgates = list(map(_decay_gradient, pairs, _scans_of_rows(scans, rows)))
        dscores.mul_(mask)
        return torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q), dv, dgates

    blocks = _row_blocks(x)
    if len(blocks) == 1:
        *gradients, dgates = gradients_of(ALL)
        return *gradients, *dgates
    gradients = [x.empty_output(t.shape[-1]) for t in (x.query, x.key, x.value)]
    dgates = []
    for rows in blocks:
        *parts, gates = gradients_of(rows)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[rows] = part
        dgates.append(gates)
    by_head = all(log_decay.dim() == 1 for log_decay, _ in scans)
    return *gradients, *(sum(parts) if by_head else torch.cat(parts) for parts in zip(*dgates, strict=True))


def _decay_gradient(pairs: Tensor, scan) -> Tensor:
    """Gradient of the log-decays of one scan from all pairs dM_ij M_ij, which are overwritten."""
    log_decay, order = scan
    rank = None if order is None else order[1]
    if log_decay.dim() == 1:  # every decay between i and j is the same one: |i - j| of it
        token = torch.arange(pairs.shape[-1], device=pairs.device) if rank is None else rank
        token = token.to(pairs.dtype)
        return (pairs.sum(0) * (token - token.unsqueeze(-1)).abs()).sum(-1)
    de, df = (_along(x, order, 0) for x in _split_sums(pairs, rank))
    return _along(_gate_gradient(de, df, 0), order, 1)


# ------------------------------------------------------------------------------------------- chunk form, O(L)


def _split(x: Tensor, chunks: int, size: int) -> Tensor:
    """(B, H, L, D) -> (B, H, chunks, size, D), zeros after the last token."""
    padding = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, padding)) if padding else x
    return x.unflatten(2, (chunks, size))


def _chunk_gates(log_decay: Tensor, length: int, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Gates as (b, H, n, K): (1, H, 1, K) for LION-D, (B, H, chunks, size) for LION-S, zeros after the last token."""
    if log_decay.dim() == 1:
        return _gates(log_decay, size, dtype).unsqueeze(2)
    return F.pad(_gates(log_decay, length, dtype), (0, chunks * size - length)).unflatten(2, (chunks, size))


def _layout(length: int, chunk_size: int) -> tuple[int, int]:
    """(number of chunks, tokens in each): as few chunks as `chunk_size` allows, equally long."""
    chunks = -(-length // chunk_size)
    return chunks, -(-length // chunks)


def _scan(update: Tensor, total: Tensor, reverse: bool) -> Tensor:
    """State that reaches every chunk: out_c = sum over chunks m before c of exp(totals between m and c) update_m.

    "Before" means to the left, or to the right if `reverse`. update (B, H, n, D, E), total (b, H, n). It is the
    operator itself one level up: a small product with a decay mask per group of chunks, and a carry between groups.
    """
    batch, _, chunks, d, e = update.shape
    total = total.expand(-1, -1, chunks)
    update, outputs, carry = update.flatten(-2), [], None
    bounds = [(i, min(i + _SCAN_GROUP, chunks)) for i in range(0, chunks, _SCAN_GROUP)]
    for start, stop in reversed(bounds) if reverse else bounds:
        part, gates = update[:, :, start:stop], total[:, :, start:stop]
        exclusive, inclusive = _sums(gates)
        # exp(sum of the totals strictly between two chunks), 0 where the other chunk is not before this one.
        exponent = exclusive.unsqueeze(-1) - inclusive.unsqueeze(-2)
        if reverse:
            exponent = exponent.transpose(-1, -2)
        before = torch.ones_like(exponent, dtype=torch.bool)
        before = before.triu(1) if reverse else before.tril(-1)
        weights = exponent.masked_fill(~before, -math.inf).to(part.dtype).exp()
        state = torch.matmul(weights.expand(batch, -1, -1, -1), part)
        last = inclusive[:, :, -1:]
        if carry is not None:
            reach = (last - inclusive if reverse else exclusive).to(part.dtype).exp()
            state = state.addcmul_(reach.unsqueeze(-1), carry)
        if len(bounds) > 1:
            leave = (exclusive if reverse else last - inclusive).to(part.dtype).exp()
            carried = torch.matmul(leave.unsqueeze(-2).expand(batch, -1, -1, -1), part)
            carry = carried if carry is None else carried.addcmul_(last.to(part.dtype).exp().unsqueeze(-1), carry)
        outputs.append(state)
    state = outputs[0] if len(outputs) == 1 else torch.cat(outputs[::-1] if reverse else outputs, 2)
    return state.unflatten(-1, (d, e))


def _chunk_forward(x: _Tokens, log_decay, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = _layout(length, chunk_size)
    q, k, v = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values()))
    w = _factors(_chunk_gates(log_decay, length, chunks, size, q.dtype), scale, q.dtype)
    y = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(w.tile), v)
    if chunks > 1:
        left = _scan(torch.matmul((k * w.write_right).transpose(-1, -2), v), w.total, reverse=False)
        _add_product(y, q * w.read_left, left)
        right = _scan(torch.matmul((k * w.write_left).transpose(-1, -2), v), w.total, reverse=True)
        _add_product(y, q * w.read_right, right)
    return x.split(y.flatten(2, 3)[:, :, :length])


def _chunk_backward(x: _Tokens, log_decay, dy, dc, scale, chunk_size):
    length = x.query.shape[2]
    chunks, size = _layout(length, chunk_size)
    q, k, v, dy = (_split(part, chunks, size) for part in (x.queries(), x.keys(), x.values(), x.join(dy, dc)))
    w = _factors(_chunk_gates(log_decay, length, chunks, size, q.dtype), scale, q.dtype)
    left = right = dleft = dright = None
    if chunks > 1:
        left = _scan(torch.matmul((k * w.write_right).transpose(-1, -2), v), w.total, reverse=False)
        right = _scan(torch.matmul((k * w.write_left).transpose(-1, -2), v), w.total, reverse=True)
        # The transposed mask: what a query read from the left flows back to keys that lie to its left.
        dleft = _scan(torch.matmul((q * w.read_left).transpose(-1, -2), dy), w.total, reverse=True)
        dright = _scan(torch.matmul((q * w.read_right).transpose(-1, -2), dy), w.total, reverse=False)
    shared = log_decay.dim() == 1
    dq, dk, dv, dgates = _chunk_gradients(q, k, v, dy, w, shared, left, right, dleft, dright)
    dq, dk, dv = (gradient.flatten(2, 3)[:, :, :length] for gradient in (dq, dk, dv))
    return dq, dk, dv, dgates[0, :, 0] if shared else dgates.flatten(2, 3)[:, :, :length]


def _chunk_gradients(q, k, v, dy, w: _Factors, shared: bool, left, right, dleft, dright):
    """Gradients of chunks from the states that reach them (left, right) and the gradients of those they send on
    (dleft for the state sent to the right, dright for the one sent to the left); all (B, H, n, D, E) or None.

    The last result is d gates (B, H, n, K), or (1, H, 1, K), summed over batch and chunks, if `shared` (LION-D)."""

    def reduce(x: Tensor) -> Tensor:
        return x.sum((0, 2), keepdim=True) if shared else x

    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(w.tile)
    dscores = torch.matmul(dy, v.transpose(-1, -2))
    dv = torch.matmul(scores.transpose(-1, -2), dy)
    de, df = _split_sums(reduce(scores.mul_(dscores)))
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
    return dq, dk, dv, _gate_gradient(de, df, dtotal)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b over the last two dimensions, without a temporary of the size of out."""
    out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))


# ------------------------------------------------------------------------------------------- rnn form, O(D E) memory


def _rnn_forward(x: _Tokens, log_decay, scale, chunk_size):
    size = _layout(x.query.shape[2], chunk_size)[1]
    y, state = x.empty_output(), x.empty_state()
    for part, q, k, v, w in _walk(x, log_decay, size, scale):  # the chunk itself and all that lies to its left
        out = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).mul_(w.tile), v)
        y[:, :, part] = out.add_(torch.matmul(q * w.read_left, state)).squeeze(2)
        state = _next(state, w, k * w.write_right, v)
    state = x.empty_state()
    for part, q, k, v, w in _walk(x, log_decay, size, scale, reverse=True, tile=False):  # all that lies to its right
        y[:, :, part] += torch.matmul(q * w.read_right, state).squeeze(2)
        state = _next(state, w, k * w.write_left, v)
    return x.split(y)


def _rnn_backward(x: _Tokens, log_decay, dy, dc, scale, chunk_size):
    dy = x.join(dy, dc)
    length, shared = x.query.shape[2], log_decay.dim() == 1
    size = _layout(length, max(chunk_size, math.isqrt(length)))[1]
    grads = [torch.empty_like(t, dtype=x.dtype) for t in (x.query, x.key)] + [x.empty_output()]
    dgates = log_decay.new_empty(x.query.shape[1 if shared else 0 : 3], dtype=_sum_dtype(log_decay.device))
    left = dright = x.empty_state()
    stored = []
    for part, q, k, v, w in _walk(x, log_decay, size, scale, tile=False):
        stored.append((left, dright))  # two states per chunk of at least sqrt(L) tokens
        left = _next(left, w, k * w.write_right, v)
        dright = _next(dright, w, q * w.read_right, dy[:, :, None, part])
    right = dleft = x.empty_state()
    for part, q, k, v, w in _walk(x, log_decay, size, scale, reverse=True):
        left, dright = stored.pop()
        dyc = dy[:, :, None, part]
        *steps, dgate = _chunk_gradients(q, k, v, dyc, w, shared, left, right, dleft, dright)
        for grad, step in zip(grads, steps, strict=True):
            grad[:, :, part] = step.squeeze(2)
        dgates[..., part] = dgate[0, :, 0] if shared else dgate.squeeze(2)
        right = _next(right, w, k * w.write_left, v)
        dleft = _next(dleft, w, q * w.read_left, dyc)
    return *grads, dgates


def _walk(x: _Tokens, log_decay, size: int, scale: float, reverse: bool = False, tile: bool = True) -> Iterator:
    """One chunk of `size` tokens after the other, as (part, q, k, v, factors): q, k and v are (B, H, 1, K, D).

    Factors are made for several chunks at a time, as many as fit a cache, and once for all of one size in LION-D."""
    length, shared = x.query.shape[2], log_decay.dim() == 1
    whole = length - length % size  # the last chunk may be shorter
    most = whole if shared else size
    if not shared and not torch.compiler.is_compiling():  # a graph must not depend on the batch
        most *= max(1, _CPU_CACHE_ELEMENTS // max(1, log_decay[:, :, 0].numel() * size**2))
    groups = [(start, min(start + most, whole), size) for start in range(0, whole, most)]
    groups += [(whole, length, length - whole)] if whole < length else []
    for start, stop, size in reversed(groups) if reverse else groups:
        gates = _gates(log_decay if shared else log_decay[:, :, start:stop], size, x.dtype)
        factors = _factors(gates.unflatten(-1, (-1, size)), scale, x.dtype, tile)
        parts = _parts(start, stop, size)
        for i, part in reversed(list(enumerate(parts))) if reverse else enumerate(parts):
            q, k, v = (t.unsqueeze(2) for t in (x.queries(part), x.keys(part), x.values(part)))
            yield part, q, k, v, factors.of_chunk(0 if shared else i)


def _next(state: Tensor, w: _Factors, write: Tensor, v: Tensor) -> Tensor:
    """The state after one more chunk: exp(G) state + write^T v."""
    return torch.matmul(write.transpose(-1, -2), v).addcmul_(w.cross, state)


# ------------------------------------------------------------------------------------------- no decay: one global state


def _global_forward(x: _Tokens, log_decay, scale, block):
    parts = _parts(0, x.query.shape[2], block)
    state = x.empty_state().squeeze(2)
    for part in parts:
        state += torch.matmul(x.keys(part).transpose(-1, -2), x.values(part))
    state *= scale
    if len(parts) == 1:
        return x.split(torch.matmul(x.queries(), state))
    y = x.empty_output()
    for part in parts:
        y[:, :, part] = torch.matmul(x.queries(part), state)
    return x.split(y)


def _global_backward(x: _Tokens, log_decay, dy, dc, scale, block):
    dy = x.join(dy, dc)
    parts = _parts(0, x.query.shape[2], block)
    state = x.empty_state().squeeze(2)
    dstate = torch.zeros_like(state)
    for part in parts:
        state += torch.matmul(x.keys(part).transpose(-1, -2), x.values(part))
        dstate += torch.matmul(x.queries(part).transpose(-1, -2), dy[:, :, part])
    dq = torch.matmul(dy, state.mul_(scale).transpose(-1, -2))
    dstate *= scale
    dk = torch.matmul(x.values(), dstate.transpose(-1, -2))
    return dq, dk, torch.matmul(x.keys(), dstate)


# ------------------------------------------------------------------------------------------- autograd

_FORMS = {
    "attention": (_attention_forward, _attention_backward),
    "chunk": (_chunk_forward, _chunk_backward),
    "rnn": (_rnn_forward, _rnn_backward),
    "global": (_global_forward, _global_backward),
}


class LionFunction(torch.autograd.Function):
    """Keeps its inputs as they came, and a normalised output; every form recomputes the rest."""

    @staticmethod
    def forward(ctx, query, key, value, key_mask, options, *log_decays):
        form, chunk_size, scale, result, eps, orders = options
        ctx.options = options
        x = _tokens(query, key, value, key_mask, result)
        out, row_sums = _FORMS[form][0](x, _decays(form, log_decays, orders), scale, chunk_size)
        normalized = None, None
        if result == "normalized":
            row_sums.add_(eps)
            out.div_(row_sums.unsqueeze(-1))
            normalized = out, row_sums
        ctx.save_for_backward(query, key, value, key_mask, *normalized, *log_decays)
        return (out, row_sums) if result == "both" else out

    @staticmethod
    def backward(ctx, dy, dc=None):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "LION's operator has no second derivative, and backward was called with create_graph=True. Leave "
                "create_graph out, or build the output from lion_hf.lion_ops.attention_scores, which has one."
            )
        query, key, value, key_mask, out, row_sums, *log_decays = ctx.saved_tensors
        form, chunk_size, scale, result, _, orders = ctx.options
        x = _tokens(query, key, value, key_mask, result)
        with torch.autocast(query.device.type, enabled=False):
            dy = dy.to(x.dtype)
            if result == "normalized":  # y = n / m, m = c + eps
                dy = dy / row_sums.unsqueeze(-1)
                dc = (dy * out).sum(-1).neg_()
            decays = _decays(form, log_decays, orders)
            dq, dk, dv, *dgates = _FORMS[form][1](x, decays, dy, dc, scale, chunk_size)
        if dv.shape[-1] > value.shape[-1]:  # the column of ones
            dv = dv[..., :-1]
        if key_mask is not None:
            keep = key_mask[:, None, :, None].bool()
            dk, dv = torch.where(keep, dk, 0), torch.where(keep, dv, 0)
        dgates = (_unclamped(gradient, g, x.dtype) for gradient, g in zip(dgates, log_decays, strict=True))
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, *dgates


def _decays(form: str, log_decays: Sequence[Tensor], orders: Sequence | None):
    """What a form takes: attention takes scans, pairs of log-decays and orders, the others the one log-decay."""
    if form == "attention":
        return list(zip(log_decays, orders or [None] * len(log_decays), strict=True))
    return log_decays[0] if log_decays else None


def _unclamped(gradient: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of log-decays from that of the clamped ones, token by token."""
    gradient = gradient.sum(-1) if log_decay.dim() == 1 else gradient
    return torch.where(log_decay >= _FLOOR[dtype], gradient, 0).to(log_decay.dtype)


def walks_chunks(query: Tensor) -> bool:
    return query.device.type == "cpu" and not torch.compiler.is_compiling() and query.numel() > _CPU_CACHE_ELEMENTS


def _tokens(query, key, value, key_mask, result) -> _Tokens:
    return _Tokens(query, key, value, key_mask, result != "numerator", accumulation_dtype(query, key, value))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
