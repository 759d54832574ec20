"""Fused GPU kernels of LION's operator, in Triton: scores and masks live in registers only.

One family of kernels serves every length. Tokens are cut into chunks, chunks into tiles. A tile of rows reads the tiles
of its own chunk directly and all that lies beyond through two states, one from the left and one from the right:

    sums      cumulative sums of the decays inside each tile (LION-S only)
    states    the two states that each chunk sends on, from one reading of its keys and values
    scan      turns what the chunks send into what reaches each of them
    mix       the outputs of one tile of rows

A chunk as long as the text has no states, and the chunk form *is* the full form, in one launch (two for LION-S). LION-LIT
has no decay: beyond one chunk its states are one sum over the whole text, and `mix` reads nothing else.

Between a tile I of rows and a tile J of columns the mask is a row scale times a column scale, so that only tiles on the
diagonal take an exponential per element. With the sums a, b of a tile (a = e, b = f of lion_ops; a = f, b = e for the
transposed mask), its total G and "between", the totals of the tiles between both,

    J left of I    exp(a_i)       * exp(between + G_J - a_j)
    J = I          exp(min(a_i - a_j, b_j - b_i))
    J right of I   exp(G_I - b_i) * exp(between + b_j)

and every exponent is <= 0. The backward pass runs the same kernels, since the operator is closed under differentiation:
with dP_ij = r_i (dy_i . v_j + delta_i), where r = 1 / (s c + eps) and delta_i = -dy_i . y_i if normalised (else r = 1 and
delta the gradient of the denominator; y is rounded to its dtype, as in other fused kernels),

    dq = mix(dy, v, k; M)      dk = mix(v, dy, q; M^T)      dv = mix(k, q, dy; M^T)

and the gradient of the decays follows from q . dq and k . dk, split by the half of the mask they come from. Nothing
quadratic is kept, states are computed again, and no two programs add to one number: every run gives the same bits.

Sums of gates are kept in two float32 parts, multiples of 1/512 and the rest. The first is exact inside a tile and the
second tiny, so exponents are exact to their rounding; one float32 would lose what stands beside a saturated gate.

Tested in Triton's interpreter; not yet timed on a GPU.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
except ImportError as error:
    raise ImportError("they need Triton, which is not installed (pip install triton)") from error


NONE, HEAD, TOKEN = 0, 1, 2  # kinds of decay
NUMERATOR, NORMALIZED, BOTH = 0, 1, 2  # kinds of results

# Wider heads would need more registers than a program has.
MAX_WIDTH = 128

# Tokens in a chunk, where not the whole text is one: enough that few states reach memory. Tokens in a tile at most.
_CHUNK = 256
_TILE = 64
# The same in float32 without tensor cores, whose products need the registers that larger tiles would fill, and where
# operands in float32 are wide: larger tiles of them do not fit into shared memory.
_FLOAT32_TILE = 32

# Warps of a program whose heads have at most 64 features, half as many as of one with more; stages of its loads.
_WARPS = 4
_STAGES = 3

# exp(floor) is 0 in float32.
_FLOOR = tl.constexpr(-104.0)
# Up to 128 gates, as multiples of 1/512, add up exactly in the 24 bits of a float32.
_STEPS = tl.constexpr(512.0)


# ------------------------------------------------------------------------------------------------ parts of the kernels


@triton.jit
def _span(chunk, table, length, chunks, chunk_size):
    """Row of the batch, first token and end of a chunk, and the first chunk of its sequence."""
    if table is None:
        batch = chunk // chunks
        start = (chunk % chunks) * chunk_size
        stop = tl.minimum(start + chunk_size, length)
        first = batch * chunks
    else:  # packed
        batch = chunk * 0
        start = tl.load(table + 3 * chunk)
        stop = tl.load(table + 3 * chunk + 1)
        first = tl.load(table + 3 * chunk + 2)
    return batch, start, stop, first


@triton.jit
def _load(pointer, batch, head, tokens, keep, stride_b, stride_h, stride_l, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Some tokens of a (batch, heads, length, WIDTH) tensor; 0 where not `keep` and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    base = pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    address = base + tokens.to(tl.int64)[:, None] * stride_l + column[None, :]
    return tl.load(address, mask=keep[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _unmasked(key_mask, batch, tokens, keep, length):
    """`keep` without padding."""
    if key_mask is not None:
        keep = keep & (tl.load(key_mask + batch.to(tl.int64) * length + tokens, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _gates(decay, batch, head, tokens, keep, decay_b, decay_h, decay_l):
    """Clamped log-decays as (multiples of 1/512, the rest); 0 where not `keep`."""
    base = decay + batch.to(tl.int64) * decay_b + head.to(tl.int64) * decay_h
    gate = tl.load(base + tokens.to(tl.int64) * decay_l, mask=keep, other=0.0).to(tl.float32)
    gate = tl.maximum(gate, _FLOOR)
    high = tl.floor(gate * _STEPS + 0.5) / _STEPS
    return high, gate - high


@triton.jit
def _tile_sums(
    decay, sums, totals, tile, batch, head, begin, stop, length, heads, decay_b, decay_h, decay_l,
    TILE: tl.constexpr, DECAY: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The sums a and b of a tile and its total, each in two parts. Tokens beyond the end do not decay."""
    index = tl.arange(0, TILE)
    keep = begin + index < stop
    if DECAY == 1:
        high, low = _gates(decay, batch, head, index * 0, index >= 0, 0, decay_h, 0)
        count = tl.minimum(stop - begin, TILE).to(tl.float32)
        before = tl.minimum(index, stop - begin).to(tl.float32)
        after = tl.minimum(index + 1, stop - begin).to(tl.float32)
        e, e_rest, f, f_rest = before * high, before * low, after * high, after * low
        total, total_rest = tl.min(count * high), tl.max(count * low)  # the same in every lane
    else:
        row = sums + (batch * heads + head).to(tl.int64) * 2 * length + begin + index
        total = tl.load(totals + (tile.to(tl.int64) * heads + head) * 2)
        total_rest = tl.load(totals + (tile.to(tl.int64) * heads + head) * 2 + 1)
        e = tl.where(keep, tl.load(row, mask=keep, other=0.0), total)
        e_rest = tl.where(keep, tl.load(row + length, mask=keep, other=0.0), total_rest)
        high, low = _gates(decay, batch, head, begin + index, keep, decay_b, decay_h, decay_l)
        f, f_rest = e + high, e_rest + low
    if TRANSPOSED:
        return f, f_rest, e, e_rest, total, total_rest
    else:
        return e, e_rest, f, f_rest, total, total_rest


@triton.jit
def _columns(
    y, z, bias, weight, key_mask, batch, head, columns, stop, length, heads, y_b, y_h, y_l, z_b, z_h, z_l,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tokens as columns: their y and z, scale and bias. Queries have scale and bias, keys the mask."""
    keep = columns < stop
    scale = keep.to(tl.float32)
    shift = tl.zeros_like(scale)
    if TRANSPOSED:
        scalars = (batch * heads + head).to(tl.int64) * length + columns
        if weight is not None:
            scale = tl.load(weight + scalars, mask=keep, other=0.0)
        if bias is not None:
            shift = tl.load(bias + scalars, mask=keep, other=0.0)
    else:
        keep = _unmasked(key_mask, batch, columns, keep, length)
    y_tile = _load(y, batch, head, columns, keep, y_b, y_h, y_l, WIDTH_Y, BLOCK_Y)
    z_tile = _load(z, batch, head, columns, keep, z_b, z_h, z_l, WIDTH_Z, BLOCK_Z)
    return y_tile, z_tile, scale, shift


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


# ------------------------------------------------------------------------------------------------ kernels

# What changes with the length of the text: specialising on it would compile anew for many lengths.
_any_length = triton.jit(do_not_specialize=["length", "chunks", "tiles", "all_chunks", "decay_b"])


@_any_length
def _sums_kernel(
    decay, sums, totals, table, decay_b, decay_h, decay_l, length, heads, chunks, tiles, TILE: tl.constexpr
):
    """Exclusive sums of the gates inside each tile, (B, H, 2, L), and their totals, (tiles, H, 2)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch, start, stop, _ = _span(tile // tiles, table, length, chunks, tiles * TILE)
    tokens = start + (tile % tiles) * TILE + tl.arange(0, TILE)
    keep = tokens < stop
    high, low = _gates(decay, batch, head, tokens, keep, decay_b, decay_h, decay_l)
    row = sums + (batch * heads + head).to(tl.int64) * 2 * length + tokens
    tl.store(row, tl.cumsum(high, 0) - high, mask=keep)
    tl.store(row + length, tl.cumsum(low, 0) - low, mask=keep)
    total = totals + (tile.to(tl.int64) * heads + head) * 2
    tl.store(total, tl.sum(high, 0))
    tl.store(total + 1, tl.sum(low, 0))


@_any_length
def _states_kernel(
    y, z, states, chunk_totals, bias, weight, key_mask, decay, sums, totals, table,
    y_b, y_h, y_l, z_b, z_h, z_l, decay_b, decay_h, decay_l, length, heads, chunks, tiles, all_chunks,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk sends to the right and to the left: sum_p w_p r_p y_p z_p^T, and beside it the vector
    sum_p w_p r_p bias_p y_p. Without decay both are the same sum, and only the first is written."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    batch, start, stop, _ = _span(chunk, table, length, chunks, tiles * TILE)
    to_right = tl.zeros((BLOCK_Y, BLOCK_Z), tl.float32)
    to_left = tl.zeros((BLOCK_Y, BLOCK_Z), tl.float32)
    vector_right = tl.zeros((BLOCK_Y,), tl.float32)
    vector_left = tl.zeros((BLOCK_Y,), tl.float32)
    before = 0.0
    for step in range(0, tl.cdiv(stop - start, TILE)):
        begin = start + step * TILE
        tokens = begin + tl.arange(0, TILE)
        keep = tokens < stop
        scalars = (batch * heads + head).to(tl.int64) * length + tokens
        factor = keep.to(tl.float32)
        if weight is not None:
            factor = tl.load(weight + scalars, mask=keep, other=0.0)
        bias_of_token = factor * 0 + 1
        if bias is not None:
            bias_of_token = tl.load(bias + scalars, mask=keep, other=0.0)
        if not TRANSPOSED:
            keep = _unmasked(key_mask, batch, tokens, keep, length)
        y_tile = _load(y, batch, head, tokens, keep, y_b, y_h, y_l, WIDTH_Y, BLOCK_Y).to(tl.float32)
        z_tile = _load(z, batch, head, tokens, keep, z_b, z_h, z_l, WIDTH_Z, BLOCK_Z)
        if DECAY == 0:
            written = y_tile * factor[:, None]
            to_right += _dot(tl.trans(written), z_tile, OPERAND, PRECISION)
            vector_right += tl.sum(written * bias_of_token[:, None], 0)
        else:
            a, a_rest, b, b_rest, total, total_rest = _tile_sums(
                decay, sums, totals, chunk * tiles + step, batch, head, begin, stop, length, heads,
                decay_b, decay_h, decay_l, TILE, DECAY, TRANSPOSED,
            )  # fmt: skip
            through = tl.exp(total + total_rest)
            written = y_tile * (factor * tl.exp((total - a) + (total_rest - a_rest)))[:, None]
            to_right = to_right * through + _dot(tl.trans(written), z_tile, OPERAND, PRECISION)
            vector_right = vector_right * through + tl.sum(written * bias_of_token[:, None], 0)
            written = y_tile * (factor * tl.exp(before + (b + b_rest)))[:, None]
            to_left += _dot(tl.trans(written), z_tile, OPERAND, PRECISION)
            vector_left += tl.sum(written * bias_of_token[:, None], 0)
            before += total + total_rest
    row, column = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_Z)
    inside = (row < WIDTH_Y)[:, None] & (column < WIDTH_Z)[None, :]
    size = WIDTH_Y * WIDTH_Z + WIDTH_Y
    place = states + (chunk.to(tl.int64) * heads + head) * size
    tl.store(place + row[:, None] * WIDTH_Z + column[None, :], to_right, mask=inside)
    tl.store(place + WIDTH_Y * WIDTH_Z + row, vector_right, mask=row < WIDTH_Y)
    if DECAY != 0:
        place += all_chunks.to(tl.int64) * heads * size
        tl.store(place + row[:, None] * WIDTH_Z + column[None, :], to_left, mask=inside)
        tl.store(place + WIDTH_Y * WIDTH_Z + row, vector_left, mask=row < WIDTH_Y)
        tl.store(chunk_totals + chunk * heads + head, before)


@_any_length
def _scan_kernel(
    states, chunk_totals, borders, heads, chunks, all_chunks, SIZE: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr
):  # fmt: skip
    """In place: what reaches each chunk from the left (side 0) and from the right (side 1). Without decay the sum over a
    sequence, in the place of its first chunk."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    side = tl.program_id(2)
    if borders is None:
        first, last = sequence * chunks, (sequence + 1) * chunks
    else:
        first, last = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < SIZE
    base = states + side.to(tl.int64) * all_chunks * heads * SIZE + head.to(tl.int64) * SIZE + entry
    carry = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, last - first):
        chunk = first + step if DECAY == 0 else first + step + side * (last - first - 1 - 2 * step)
        place = base + chunk.to(tl.int64) * heads * SIZE
        sent = tl.load(place, mask=inside, other=0.0)
        if DECAY == 0:
            carry += sent
        else:
            tl.store(place, carry, mask=inside)
            carry = carry * tl.exp(tl.load(chunk_totals + chunk * heads + head)) + sent
    if DECAY == 0:  # an empty sequence has no chunk to write to
        tl.store(base + first.to(tl.int64) * heads * SIZE, carry, mask=inside & (last - first > 0 * entry))


@_any_length
def _mix_kernel(
    x, y, z, out, row_sums, states, bias, weight, key_mask, decay, sums, totals, table, reference, split,
    x_b, x_h, x_l, y_b, y_h, y_l, z_b, z_h, z_l, out_b, out_h, out_l, reference_b, reference_h, reference_l,
    decay_b, decay_h, decay_l, state_x, state_z, length, heads, chunks, tiles, all_chunks, scale, eps,
    WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr, WIDTH_VECTOR: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, RESULT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows of out_i = s sum_j M_ij r (x_i . y_j + bias) z_j, with its row sums where RESULT needs them.

    Rows are queries, or keys if TRANSPOSED; bias and weight (r) belong to queries, the mask to keys. `split`,
    (B, H, 3, L), takes reference_i . out_i from the left, from the right, and of the latter the state's part."""
    tile, head = tl.program_id(0), tl.program_id(1)
    chunk, own = tile // tiles, tile % tiles
    batch, start, stop, first = _span(chunk, table, length, chunks, tiles * TILE)
    begin = start + own * TILE
    if begin >= stop:
        return
    index = tl.arange(0, TILE)
    rows = begin + index
    inside = rows < stop
    kept = inside
    row_scale = inside.to(tl.float32)
    row_bias = tl.zeros_like(row_scale)
    scalars = (batch * heads + head).to(tl.int64) * length + rows
    if TRANSPOSED:
        kept = _unmasked(key_mask, batch, rows, inside, length)
        row_scale = kept.to(tl.float32)
    else:
        if weight is not None:
            row_scale = tl.load(weight + scalars, mask=inside, other=0.0)
        if bias is not None:
            row_bias = tl.load(bias + scalars, mask=inside, other=0.0)
    x_tile = _load(x, batch, head, rows, kept, x_b, x_h, x_l, WIDTH_X, BLOCK_X)
    mixed = tl.zeros((TILE, BLOCK_Z), tl.float32)
    row_sum = tl.zeros_like(row_scale)

    if DECAY != 0:  # the tile on the diagonal
        a, a_rest, b, b_rest, total, total_rest = _tile_sums(
            decay, sums, totals, tile, batch, head, begin, stop, length, heads, decay_b, decay_h, decay_l,
            TILE, DECAY, TRANSPOSED,
        )  # fmt: skip
        y_tile, z_own, column_scale, column_bias = _columns(
            y, z, bias, weight, key_mask, batch, head, rows, stop, length, heads, y_b, y_h, y_l, z_b, z_h, z_l,
            WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TRANSPOSED,
        )  # fmt: skip
        down = (a[:, None] - a[None, :]) + (a_rest[:, None] - a_rest[None, :])
        up = (b[None, :] - b[:, None]) + (b_rest[None, :] - b_rest[:, None])
        own_scores = _dot(x_tile, tl.trans(y_tile), OPERAND, PRECISION) + row_bias[:, None] + column_bias[None, :]
        own_scores *= tl.exp(tl.minimum(tl.minimum(down, up), 0.0)) * row_scale[:, None] * column_scale[None, :]
        row_sum += tl.sum(own_scores, 1)
        if split is None:
            mixed += _dot(own_scores, z_own, OPERAND, PRECISION)
        else:  # the diagonal belongs to neither half
            itself = tl.sum(tl.where(index[:, None] == index[None, :], own_scores, 0.0), 1)
            mixed += itself[:, None] * z_own.to(tl.float32)

    # From the left, then from the right; without decay from everywhere at once.
    for side in tl.static_range(0, 1 if DECAY == 0 else 2):
        part = tl.zeros((TILE, BLOCK_Z), tl.float32)
        part_sum = tl.zeros_like(row_scale)
        between = 0.0
        used = tl.cdiv(stop - start, TILE)
        if DECAY == 0:
            first_other, steps, direction = 0, used, 1
            if states is not None:
                steps = 0
        elif side == 0:
            first_other, steps, direction = own - 1, own, -1
        else:
            first_other, steps, direction = own + 1, used - 1 - own, 1
        for step in range(0, steps):
            other = first_other + direction * step
            other_begin = start + other * TILE
            y_tile, z_tile, column_scale, column_bias = _columns(
                y, z, bias, weight, key_mask, batch, head, other_begin + index, stop, length, heads,
                y_b, y_h, y_l, z_b, z_h, z_l, WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TRANSPOSED,
            )  # fmt: skip
            if DECAY != 0:
                c, c_rest, d, d_rest, other_total, other_rest = _tile_sums(
                    decay, sums, totals, tile - own + other, batch, head, other_begin, stop, length, heads,
                    decay_b, decay_h, decay_l, TILE, DECAY, TRANSPOSED,
                )  # fmt: skip
                if side == 0:
                    column_scale *= tl.exp(between + ((other_total - c) + (other_rest - c_rest)))
                else:
                    column_scale *= tl.exp(between + (d + d_rest))
                between += other_total + other_rest
            scores = _dot(x_tile, tl.trans(y_tile), OPERAND, PRECISION) + row_bias[:, None] + column_bias[None, :]
            scores *= column_scale[None, :]
            part_sum += tl.sum(scores, 1)
            part += _dot(scores, z_tile, OPERAND, PRECISION)

        side_scale = row_scale
        if DECAY != 0:
            if side == 0:
                side_scale *= tl.exp(a + a_rest)
            else:
                side_scale *= tl.exp((total - b) + (total_rest - b_rest))
        if states is not None:
            sender = first if DECAY == 0 else chunk
            size = WIDTH_X * WIDTH_Z + WIDTH_VECTOR
            place = states + ((side * all_chunks + sender).to(tl.int64) * heads + head) * size
            i, j = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_Z)
            known = (i < WIDTH_X)[:, None] & (j < WIDTH_Z)[None, :]
            state = tl.load(place + i[:, None] * state_x + j[None, :] * state_z, mask=known, other=0.0)
            read = _dot(x_tile, state, OPERAND, PRECISION)
            if bias is not None:
                vector = tl.load(place + WIDTH_X * WIDTH_Z + j, mask=j < WIDTH_Z, other=0.0)
                read += vector[None, :] if TRANSPOSED else row_bias[:, None] * vector[None, :]
            if RESULT != 0:
                vector = tl.load(place + WIDTH_X * WIDTH_Z + i, mask=i < WIDTH_X, other=0.0)
                part_sum += tl.exp(between) * tl.sum(x_tile.to(tl.float32) * vector[None, :], 1)
            read *= tl.exp(between)
            part += read
        part *= side_scale[:, None]
        row_sum += part_sum * side_scale
        if split is not None:
            if side == 0:
                strict = index[:, None] > index[None, :]
            else:
                strict = index[:, None] < index[None, :]
            part += _dot(tl.where(strict, own_scores, 0.0), z_own, OPERAND, PRECISION)
            target = _load(
                reference, batch, head, rows, kept, reference_b, reference_h, reference_l, WIDTH_Z, BLOCK_Z
            ).to(tl.float32)
            place = split + (batch * heads + head).to(tl.int64) * 3 * length + rows
            tl.store(place + side * length, scale * tl.sum(target * part, 1), mask=inside)
            if side == 1:
                crossing = tl.zeros_like(row_scale)
                if states is not None:
                    crossing = scale * side_scale * tl.sum(target * read, 1)
                tl.store(place + 2 * length, crossing, mask=inside)
        mixed += part

    mixed *= scale
    row_sum = row_sum * scale
    if RESULT == 1:
        row_sum += eps
        mixed = mixed / row_sum[:, None]
    if RESULT != 0:
        tl.store(row_sums + scalars, row_sum, mask=inside)
    column = tl.arange(0, BLOCK_Z)
    address = out + batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    address += rows.to(tl.int64)[:, None] * out_l + column[None, :]
    tl.store(address, mixed.to(out.dtype.element_ty), mask=inside[:, None] & (column < WIDTH_Z)[None, :])


@_any_length
def _delta_kernel(
    y,
    dy,
    delta,
    y_b,
    y_h,
    y_l,
    dy_b,
    dy_h,
    dy_l,
    length,
    heads,
    tiles,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """delta_i = -dy_i . y_i."""
    batch, head = tl.program_id(0) // tiles, tl.program_id(1)
    tokens = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    keep = tokens < length
    left = _load(y, batch, head, tokens, keep, y_b, y_h, y_l, WIDTH, BLOCK).to(tl.float32)
    right = _load(dy, batch, head, tokens, keep, dy_b, dy_h, dy_l, WIDTH, BLOCK).to(tl.float32)
    place = delta + (batch * heads + head).to(tl.int64) * length + tokens
    tl.store(place, -tl.sum(left * right, 1), mask=keep)


@_any_length
def _gate_gradient_kernel(
    query_split, key_split, states, query_states, chunk_totals, out, table, length, heads, chunks, tiles, all_chunks,
    scale, SIZE: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of the log-decays of one chunk, (B, H, L): from pairs that begin or end in it, and pairs that cross it.
    USED entries of a state belong to the score: the vector does where there is a bias."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    batch, start, stop, _ = _span(chunk, table, length, chunks, tiles * TILE)
    used = tl.cdiv(stop - start, TILE)
    index = tl.arange(0, TILE)
    plane = (batch * heads + head).to(tl.int64) * length
    query_split += 3 * plane
    key_split += 3 * plane
    carry = 0.0
    if states is not None:
        # Keys to the left and queries to the right of the chunk, and the other way round.
        left = (chunk.to(tl.int64) * heads + head) * SIZE
        right = left + all_chunks.to(tl.int64) * heads * SIZE
        for begin in range(0, USED, BLOCK):
            entry = begin + tl.arange(0, BLOCK)
            inside = entry < USED
            keys = tl.load(states + left + entry, mask=inside, other=0.0)
            queries = tl.load(query_states + right + entry, mask=inside, other=0.0)
            carry += tl.sum(keys * queries, 0)
            keys = tl.load(states + right + entry, mask=inside, other=0.0)
            queries = tl.load(query_states + left + entry, mask=inside, other=0.0)
            carry += tl.sum(keys * queries, 0)
        carry *= scale * tl.exp(tl.load(chunk_totals + chunk * heads + head))
        for step in range(0, used):
            tokens = start + step * TILE + index
            keep = tokens < stop
            carry += tl.sum(tl.load(query_split + 2 * length + tokens, mask=keep, other=0.0), 0)
            carry += tl.sum(tl.load(key_split + 2 * length + tokens, mask=keep, other=0.0), 0)
    for step in range(0, used):
        tokens = start + (used - 1 - step) * TILE + index
        keep = tokens < stop
        # Row i of the left half and column i of the left half: e_i enters the one and leaves the other.
        de = tl.load(query_split + tokens, mask=keep, other=0.0)
        de -= tl.load(key_split + length + tokens, mask=keep, other=0.0)
        df = tl.load(key_split + tokens, mask=keep, other=0.0)
        df -= tl.load(query_split + length + tokens, mask=keep, other=0.0)
        both = de + df
        suffix = tl.cumsum(both, 0, reverse=True)
        tl.store(out + plane + tokens, carry + suffix - de, mask=keep)
        carry += tl.sum(both, 0)


# ------------------------------------------------------------------------------------------------ launches


class _Layout(NamedTuple):
    """How tokens are cut."""

    tile: int  # tokens in a tile
    tiles: int  # tiles in a chunk
    chunks: int  # chunks of a text; unused for packed ones
    all_chunks: int  # chunks of the batch; for packed sequences as many as there can be at most
    sequences: int
    table: Tensor | None  # (all_chunks, 3) int32: start, stop, first chunk of the sequence; packed sequences only
    borders: Tensor | None  # (sequences + 1,) int32: the sequences' first chunks


def _layout(batch: int, length: int, cu_seqlens: Tensor | None, full: bool, largest: int) -> _Layout:
    tile = min(largest, max(16, triton.next_power_of_2(length)))
    tiles = triton.cdiv(length if full else min(_CHUNK, length), tile)
    size = tiles * tile
    if cu_seqlens is None:
        chunks = triton.cdiv(length, size)
        return _Layout(tile, tiles, chunks, batch * chunks, batch, None, None)
    # No length is read back: the number of chunks is bounded by what the whole row needs and one more per sequence.
    sequences = cu_seqlens.numel() - 1
    all_chunks = length // size + sequences
    counts = (cu_seqlens.diff() + size - 1) // size
    borders = F.pad(counts.cumsum(0), (1, 0))
    chunk = torch.arange(all_chunks, device=cu_seqlens.device)
    sequence = torch.searchsorted(borders[1:], chunk, right=True).clamp(max=sequences - 1)
    start = cu_seqlens[sequence] + (chunk - borders[sequence]) * size
    stop = torch.minimum(start + size, cu_seqlens[sequence + 1])
    table = torch.stack([start, torch.maximum(start, stop), borders[sequence]], 1)
    return _Layout(tile, tiles, 0, all_chunks, sequences, table.int(), borders.int())


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _heads_last(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised (batch, heads, length, width), in memory (batch, length, heads, width): what follows is a view."""
    batch, heads, length = x.shape[:3]
    return x.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _tf32_is_allowed() -> bool:
    """Whether products of float32 may round to tf32, by the setting of PyTorch 2.9 where there is one: once it has been
    used, reading the older one raises."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"


class _Operator:
    """The launches for one set of inputs; see the head of this module."""

    def __init__(self, query, key, value, log_decay, key_mask, cu_seqlens, scale, full):
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.value_dim = value.shape[-1]
        self.kind = NONE if log_decay is None else HEAD if log_decay.dim() == 1 else TOKEN
        self.decay = log_decay
        self.decay_strides = (0, log_decay.stride(0), 0) if self.kind == HEAD else _strides(log_decay)
        self.key_mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
        self.scale = scale
        dtypes = {query.dtype, key.dtype, value.dtype}
        # float16 fits into the mantissa of tf32, whose range holds the factors that its own does not.
        self.operand = tl.bfloat16 if dtypes == {torch.bfloat16} else tl.float32
        exact = torch.float32 in dtypes and not _tf32_is_allowed()
        self.precision = "ieee" if exact else "tf32"
        wide = max(self.head_dim, self.value_dim) > 64
        small = exact or (wide and self.operand == tl.float32)
        largest = min(_TILE, _FLOAT32_TILE) if small else _TILE
        self.layout = _layout(self.batch, self.length, cu_seqlens, full, largest)
        self.resources = {"num_warps": 2 * _WARPS if exact or wide else _WARPS, "num_stages": _STAGES}
        self.has_states = self.layout.table is not None or self.layout.chunks > 1
        self.sums = self.totals = self.chunk_totals = None
        if self.kind == TOKEN:
            self._sum()

    def _grid(self, programs_per_chunk: int) -> tuple[int, int]:
        return self.layout.all_chunks * programs_per_chunk, self.heads

    def _sum(self) -> None:
        layout = self.layout
        self.sums = self.decay.new_empty(self.batch, self.heads, 2, self.length, dtype=torch.float32)
        self.totals = self.decay.new_empty(layout.all_chunks * layout.tiles, self.heads, 2, dtype=torch.float32)
        _sums_kernel[self._grid(layout.tiles)](
            self.decay, self.sums, self.totals, layout.table, *self.decay_strides,
            self.length, self.heads, layout.chunks, layout.tiles, TILE=layout.tile,
        )  # fmt: skip

    def states(self, y, z, bias=None, weight=None, transposed=False) -> Tensor | None:
        """What reaches each chunk, (sides, chunks, heads, D * E + D); None in the full form."""
        if not self.has_states:
            return None
        layout = self.layout
        size = self.head_dim * (self.value_dim + 1)
        states = y.new_empty(1 if self.kind == NONE else 2, layout.all_chunks, self.heads, size, dtype=torch.float32)
        if self.kind != NONE:
            self.chunk_totals = y.new_empty(layout.all_chunks, self.heads, dtype=torch.float32)
        blocks = _block(y.shape[-1]), _block(z.shape[-1])
        _states_kernel[self._grid(1)](
            y, z, states, self.chunk_totals, bias, weight, self.key_mask, self.decay, self.sums, self.totals, layout.table,
            *_strides(y), *_strides(z), *self.decay_strides,
            self.length, self.heads, layout.chunks, layout.tiles, layout.all_chunks,
            WIDTH_Y=y.shape[-1], WIDTH_Z=z.shape[-1], BLOCK_Y=blocks[0], BLOCK_Z=blocks[1], TILE=layout.tile,
            DECAY=self.kind, TRANSPOSED=transposed, OPERAND=self.operand, PRECISION=self.precision,
            **self.resources,
        )  # fmt: skip
        block = 256
        _scan_kernel[(layout.sequences * self.heads, triton.cdiv(size, block), states.shape[0])](
            states, self.chunk_totals, layout.borders, self.heads, layout.chunks, layout.all_chunks,
            SIZE=size, BLOCK=block, DECAY=self.kind,
        )  # fmt: skip
        return states

    def mix(
        self, x, y, z, out, states, *, flipped=False, transposed=False, bias=None, weight=None,
        result=NUMERATOR, eps=0.0, row_sums=None, reference=None, split=None,
    ) -> None:  # fmt: skip
        """Fills `out`, and `row_sums` and `split` where given. `flipped`: x has the width of values, not of queries."""
        layout, width_x, width_z = self.layout, x.shape[-1], z.shape[-1]
        blocks = _block(width_x), _block(width_z)
        _mix_kernel[self._grid(layout.tiles)](
            x, y, z, out, row_sums, states, bias, weight, self.key_mask, self.decay, self.sums, self.totals, layout.table,
            reference, split, *_strides(x), *_strides(y), *_strides(z), *_strides(out), *_strides(reference),
            *self.decay_strides, *((1, self.value_dim) if flipped else (self.value_dim, 1)),
            self.length, self.heads, layout.chunks, layout.tiles, layout.all_chunks, self.scale, eps,
            WIDTH_X=width_x, WIDTH_Z=width_z, WIDTH_VECTOR=self.head_dim, BLOCK_X=blocks[0], BLOCK_Z=blocks[1],
            TILE=layout.tile, DECAY=self.kind, TRANSPOSED=transposed, RESULT=result, OPERAND=self.operand,
            PRECISION=self.precision, **self.resources,
        )  # fmt: skip

    def delta(self, out: Tensor, d_out: Tensor) -> Tensor:
        delta = out.new_empty(self.batch, self.heads, self.length, dtype=torch.float32)
        width, tile = self.value_dim, self.layout.tile
        tiles = triton.cdiv(self.length, tile)
        _delta_kernel[self.batch * tiles, self.heads](
            out, d_out, delta, *_strides(out), *_strides(d_out), self.length, self.heads, tiles,
            WIDTH=width, BLOCK=_block(width), TILE=tile,
        )  # fmt: skip
        return delta

    def gate_gradient(self, query_split, key_split, states, query_states, biased: bool) -> Tensor:
        layout, size = self.layout, self.head_dim * self.value_dim
        out = query_split.new_empty(self.batch, self.heads, self.length)
        _gate_gradient_kernel[self._grid(1)](
            query_split, key_split, states, query_states, self.chunk_totals, out, layout.table,
            self.length, self.heads, layout.chunks, layout.tiles, layout.all_chunks, self.scale,
            SIZE=size + self.head_dim, USED=size + biased * self.head_dim, BLOCK=1024, TILE=layout.tile,
        )  # fmt: skip
        return out


# ------------------------------------------------------------------------------------------------ operators of PyTorch


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device, which may be another one."""

    @functools.wraps(launch)
    def on_device(query, *arguments):
        with torch.cuda.device_of(query):
            return launch(query, *arguments)

    return on_device


@torch.library.custom_op("lion_hf::mix", mutates_args=())
@_on_its_device
def _mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    eps: float,
    result: int,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """The output (numerator, or normalised) and the row sums: c for BOTH, c + eps for NORMALIZED, else empty."""
    query, key, value = (_last_contiguous(x) for x in (query, key, value))
    out, row_sums = _outputs(query, value, result)
    if out.numel() or row_sums.numel():
        operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, scale, full)
        states = operator.states(key, value)
        operator.mix(query, key, value, out, states, result=result, eps=eps, row_sums=row_sums if result else None)
    return out, row_sums


@_mix.register_fake
def _(query, key, value, log_decay, key_mask, cu_seqlens, scale, eps, result, full):
    return _outputs(query, value, result)


def _outputs(query: Tensor, value: Tensor, result: int) -> tuple[Tensor, Tensor]:
    out = _heads_last(value, value.shape[-1], torch.float32 if result == BOTH else value.dtype)
    return out, query.new_empty(query.shape[:3] if result else (0,), dtype=torch.float32)


@torch.library.custom_op("lion_hf::mix_backward", mutates_args=())
@_on_its_device
def _mix_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    row_sums: Tensor | None,
    d_out: Tensor,
    d_row_sums: Tensor | None,
    scale: float,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and log_decay (empty where there is none). `out` and `row_sums` are those of a
    normalised result, `d_row_sums` is that of BOTH."""
    grads = _gradients(query, key, value, log_decay)
    dq, dk, dv, d_decay = grads
    if not query.numel():
        return tuple(g.zero_() for g in grads)
    query, key, value, d_out = (_last_contiguous(x) for x in (query, key, value, d_out))
    operator = _Operator(query, key, value, log_decay, key_mask, cu_seqlens, scale, full)
    bias, weight = d_row_sums, None
    if row_sums is not None:
        bias, weight = operator.delta(out, d_out), row_sums.reciprocal()
    elif bias is not None:
        bias = bias.float().contiguous()
    split = {}
    if log_decay is not None:
        split = {
            name: query.new_empty(*query.shape[:2], 3, query.shape[2], dtype=torch.float32) for name in ("dq", "dk")
        }
    options = {"bias": bias, "weight": weight}
    states = operator.states(key, value)
    query_states = operator.states(query, d_out, transposed=True, **options)
    operator.mix(d_out, value, key, dq, states, flipped=True, reference=query, split=split.get("dq"), **options)
    operator.mix(
        value,
        d_out,
        query,
        dk,
        query_states,
        flipped=True,
        transposed=True,
        reference=key,
        split=split.get("dk"),
        **options,
    )
    operator.mix(key, query, d_out, dv, query_states, transposed=True, weight=weight)
    if log_decay is not None:
        gradient = operator.gate_gradient(split["dq"], split["dk"], states, query_states, biased=bias is not None)
        gradient = gradient.sum((0, 2)) if log_decay.dim() == 1 else gradient
        d_decay = torch.where(log_decay >= _FLOOR.value, gradient, 0).to(log_decay.dtype)
    return dq, dk, dv, d_decay


@_mix_backward.register_fake
def _(query, key, value, log_decay, key_mask, cu_seqlens, out, row_sums, d_out, d_row_sums, scale, full):
    return _gradients(query, key, value, log_decay)


def _gradients(query, key, value, log_decay) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (_heads_last(x, x.shape[-1], x.dtype) for x in (query, key, value))
    return *like, query.new_empty(0) if log_decay is None else torch.empty_like(log_decay)


def _save(ctx, inputs, output) -> None:
    *tensors, scale, _, result, full = inputs
    normalized = output if result == NORMALIZED else (None, None)
    ctx.save_for_backward(*tensors, *normalized)
    ctx.options = result, scale, full


def _differentiate(ctx, d_out, d_row_sums):
    result, scale, full = ctx.options
    d_row_sums = d_row_sums if result == BOTH else None
    *grads, d_decay = _mix_backward(*ctx.saved_tensors, d_out, d_row_sums, scale, full)
    return *grads, None if ctx.saved_tensors[3] is None else d_decay, *[None] * 6


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "LION's fused kernels have no second derivative. Leave create_graph out, or build the output from "
        "lion_hf.lion_ops.attention_scores, which has one."
    )


_mix.register_autograd(_differentiate, setup_context=_save)
_mix_backward.register_autograd(_refuse)


def fused_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    eps: float,
    result: str,
    full: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator on a GPU, in the full form or in chunks. Other arguments as in `bidirectional_linear_attention`, which
    has checked them; `result` is "numerator", "normalized" or "both"."""
    kind = ("numerator", "normalized", "both").index(result)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(query.device)
    out, row_sums = _mix(query, key, value, log_decay, key_mask, cu_seqlens, scale, float(eps), kind, full)
    return (out, row_sums) if kind == BOTH else out


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    dtypes = {x.dtype for x in (query, key, value)}
    if not query.is_cuda and not isinstance(_mix_kernel, InterpretedFunction):
        return f"they run on a GPU (or, with TRITON_INTERPRET=1, in Triton's interpreter), not on {query.device.type}"
    if not query.is_cuda and torch.bfloat16 in dtypes:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"they need compute capability 8.0, and {torch.cuda.get_device_name(query.device)} has less"
    if dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        return f"they take float32, bfloat16 and float16, not {', '.join(map(str, dtypes))}"
    if max(query.shape[-1], value.shape[-1]) > MAX_WIDTH:
        return f"they take heads of at most {MAX_WIDTH} features, not {max(query.shape[-1], value.shape[-1])}"
    return None
