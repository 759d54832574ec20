"""Parts of the fused GPU kernels, in Triton: what kernels.py puts together, and explains in its head.

Pointers are those of one head of one row of the batch, where the kernels move them, unless a part takes a batch.
TILE is the number of tokens in a tile, BLOCK the power of two that holds WIDTH features. PRECISION says what factors
of products are rounded to: "bf16", "tf32", or "ieee" (float32). Arguments stand in the order of `mix_kernel`.

Triton before 3.3 takes no tuples as arguments, which is why the lists of arguments are long.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("they need Triton, which is not installed (pip install triton)") from error


# exp(floor) is 0 in float32.
FLOOR = tl.constexpr(-104.0)
# Up to 128 gates, as multiples of 1/512, add up exactly in the 24 bits of a float32.
_STEPS = tl.constexpr(512.0)


# ------------------------------------------------------------------------------------------------ reading tokens


@triton.jit
def span(chunk, table, length, chunks, chunk_size):
    """Row of the batch, first token and end of a chunk, and the first chunk of its sequence: four numbers."""
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
def of_head(pointer, batch, head, stride_b, stride_h):
    """Moves the pointer of a (batch, heads, ...) tensor to one head of one row of the batch."""
    return pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tokens(pointer, tokens, keep, stride_l, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Some tokens of a (length, WIDTH) tensor, (TILE, BLOCK); 0 where not `keep` and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    address = pointer + tokens.to(tl.int64)[:, None] * stride_l + column[None, :]
    return tl.load(address, mask=keep[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def load_numbers(pointer, index, stop):
    """One number for each index, (TILE,); 0 from `stop` on."""
    return tl.load(pointer + index, mask=index < stop, other=0.0)


@triton.jit
def unmasked(key_mask, tokens, keep):
    """`keep`, (TILE,), without padding."""
    if key_mask is not None:
        keep = keep & (tl.load(key_mask + tokens, mask=keep, other=0) != 0)
    return keep


@triton.jit
def load_rows(
    x, bias, weight, key_mask, x_l, rows, stop, WIDTH_X: tl.constexpr, BLOCK_X: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Tokens as rows: their x, (TILE, BLOCK_X), which of them are read, their scale and bias, (TILE,) each."""
    keep = rows < stop
    scale = keep.to(tl.float32)
    shift = tl.zeros_like(scale)
    if TRANSPOSED:
        keep = unmasked(key_mask, rows, keep)
        scale = keep.to(tl.float32)
    else:
        if weight is not None:
            scale = load_numbers(weight, rows, stop)
        if bias is not None:
            shift = load_numbers(bias, rows, stop)
    return load_tokens(x, rows, keep, x_l, WIDTH_X, BLOCK_X), keep, scale, shift


@triton.jit
def load_columns(
    y, z, bias, weight, key_mask, y_l, z_l, columns, stop, WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tokens as columns: their y, (TILE, BLOCK_Y), their z, (TILE, BLOCK_Z), their scale and bias, (TILE,) each.

    Queries, which are columns if TRANSPOSED, have scale and bias, keys the mask."""
    keep = columns < stop
    scale = keep.to(tl.float32)
    shift = tl.zeros_like(scale)
    if TRANSPOSED:
        if weight is not None:
            scale = load_numbers(weight, columns, stop)
        if bias is not None:
            shift = load_numbers(bias, columns, stop)
    else:
        keep = unmasked(key_mask, columns, keep)
    y_tile = load_tokens(y, columns, keep, y_l, WIDTH_Y, BLOCK_Y)
    z_tile = load_tokens(z, columns, keep, z_l, WIDTH_Z, BLOCK_Z)
    return y_tile, z_tile, scale, shift


# ------------------------------------------------------------------------------------------------ decays


@triton.jit
def load_gates(decay, tokens, keep, decay_l):
    """Clamped log-decays as (multiples of 1/512, the rest), (TILE,) each; 0 where not `keep`."""
    gate = tl.load(decay + tokens.to(tl.int64) * decay_l, mask=keep, other=0.0).to(tl.float32)
    gate = tl.maximum(gate, FLOOR)
    high = tl.floor(gate * _STEPS + 0.5) / _STEPS
    return high, gate - high


@triton.jit
def tile_sums(
    decay, sums, totals, decay_l, tile, begin, stop, length,
    TILE: tl.constexpr, DECAY: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The sums a and b of a tile, (TILE,), and its total, each in two parts. Tokens beyond the end do not decay."""
    index = tl.arange(0, TILE)
    keep = begin + index < stop
    if DECAY == 1:
        high, low = load_gates(decay, index * 0, index >= 0, 0)
        count = tl.minimum(stop - begin, TILE).to(tl.float32)
        before = tl.minimum(index, stop - begin).to(tl.float32)
        after = tl.minimum(index + 1, stop - begin).to(tl.float32)
        e, e_rest, f, f_rest = before * high, before * low, after * high, after * low
        total, total_rest = tl.min(count * high), tl.max(count * low)  # the same in every lane
    else:
        row = sums + begin + index
        total = tl.load(totals + tile.to(tl.int64) * 2)
        total_rest = tl.load(totals + tile.to(tl.int64) * 2 + 1)
        e = tl.where(keep, tl.load(row, mask=keep, other=0.0), total)
        e_rest = tl.where(keep, tl.load(row + length, mask=keep, other=0.0), total_rest)
        high, low = load_gates(decay, begin + index, keep, decay_l)
        f, f_rest = e + high, e_rest + low
    if TRANSPOSED:
        return f, f_rest, e, e_rest, total, total_rest
    else:
        return e, e_rest, f, f_rest, total, total_rest


# ------------------------------------------------------------------------------------------------ products


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def pair_scores(x_tile, y_tile, row_bias, column_bias, PRECISION: tl.constexpr):
    """x_i . y_j + bias, (TILE, TILE), of a tile of rows and a tile of columns."""
    return product(x_tile, tl.trans(y_tile), PRECISION) + row_bias[:, None] + column_bias[None, :]


@triton.jit
def diagonal_tile(
    x_tile, y, z, bias, weight, key_mask, decay, sums, totals, y_l, z_l, decay_l, tile, begin, stop, length,
    row_scale, row_bias, WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr,
    TILE: tl.constexpr, DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of a tile of rows with itself: masked scores, (TILE, TILE), z, (TILE, BLOCK_Z), and the log-decays from
    the left and from the right edge to each row, (TILE,) each."""
    a, a_rest, b, b_rest, total, total_rest = tile_sums(
        decay, sums, totals, decay_l, tile, begin, stop, length, TILE, DECAY, TRANSPOSED
    )
    y_tile, z_tile, column_scale, column_bias = load_columns(
        y, z, bias, weight, key_mask, y_l, z_l, begin + tl.arange(0, TILE), stop,
        WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TRANSPOSED,
    )  # fmt: skip
    down = (a[:, None] - a[None, :]) + (a_rest[:, None] - a_rest[None, :])
    up = (b[None, :] - b[:, None]) + (b_rest[None, :] - b_rest[:, None])
    scores = pair_scores(x_tile, y_tile, row_bias, column_bias, PRECISION)
    scores *= tl.exp(tl.minimum(tl.minimum(down, up), 0.0)) * row_scale[:, None] * column_scale[None, :]
    return scores, z_tile, a + a_rest, (total - b) + (total_rest - b_rest)


@triton.jit
def strict_half(scores, z_tile, SIDE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """What the rows of the diagonal tile get from its tokens on one SIDE: left (0) or right (1); (TILE, BLOCK_Z)."""
    index = tl.arange(0, TILE)
    if SIDE == 0:
        strict = index[:, None] > index[None, :]
    else:
        strict = index[:, None] < index[None, :]
    return product(tl.where(strict, scores, 0.0), z_tile, PRECISION)


@triton.jit
def diagonal_only(scores, z_tile, TILE: tl.constexpr):
    """What each token of the diagonal tile adds to its own row, (TILE, BLOCK_Z)."""
    index = tl.arange(0, TILE)
    itself = tl.sum(tl.where(index[:, None] == index[None, :], scores, 0.0), 1)
    return itself[:, None] * z_tile.to(tl.float32)


# ------------------------------------------------------------------------------------------------ states


@triton.jit
def add_to_state(state, vector, y_tile, z_tile, factor, bias, PRECISION: tl.constexpr):
    """Adds factor y z^T of some tokens to a state, (BLOCK_Y, BLOCK_Z), and factor bias y to its vector, (BLOCK_Y,)."""
    written = y_tile * factor[:, None]
    state += product(tl.trans(written), z_tile, PRECISION)
    vector += tl.sum(written * bias[:, None], 0)
    return state, vector


@triton.jit
def store_state(
    place, state, vector, WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr
):
    """Writes a state, (WIDTH_Y, WIDTH_Z), and its vector, (WIDTH_Y,), one behind the other."""
    row, column = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_Z)
    inside = (row < WIDTH_Y)[:, None] & (column < WIDTH_Z)[None, :]
    tl.store(place + row[:, None] * WIDTH_Z + column[None, :], state, mask=inside)
    tl.store(place + WIDTH_Y * WIDTH_Z + row, vector, mask=row < WIDTH_Y)


@triton.jit
def crossing_pairs(keys, queries, SIZE: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the pairs that cross a chunk, a number, from what reaches it on both sides, (2, SIZE): keys from the
    left with queries from the right, and the other way round."""
    total = 0.0
    for begin in range(0, USED, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        total += tl.sum(load_numbers(keys, entry, USED) * load_numbers(queries + SIZE, entry, USED), 0)
        total += tl.sum(load_numbers(keys + SIZE, entry, USED) * load_numbers(queries, entry, USED), 0)
    return total


@triton.jit
def read_state(
    x_tile, states, bias, sender, row_bias, between,
    WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr, DECAY: tl.constexpr,
    TRANSPOSED: tl.constexpr, FLIPPED: tl.constexpr, RESULT: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """What the state `sender` of one SIDE, (WIDTH_X, WIDTH_Z) or FLIPPED, adds beyond the log-decay `between`,
    (TILE, BLOCK_Z), and its part of the row sums, (TILE,), where RESULT needs them."""
    size = WIDTH_X * WIDTH_Z + (WIDTH_Z if FLIPPED else WIDTH_X)
    place = states + (sender if DECAY == 0 else sender * 2 + SIDE) * size
    row, column = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_Z)
    known = (row < WIDTH_X)[:, None] & (column < WIDTH_Z)[None, :]
    if FLIPPED:
        entry = row[:, None] + column[None, :] * WIDTH_X
    else:
        entry = row[:, None] * WIDTH_Z + column[None, :]
    read = product(x_tile, tl.load(place + entry, mask=known, other=0.0), PRECISION)
    if bias is not None:
        vector = tl.load(place + WIDTH_X * WIDTH_Z + column, mask=column < WIDTH_Z, other=0.0)
        read += vector[None, :] if TRANSPOSED else row_bias[:, None] * vector[None, :]
    read_sum = tl.zeros_like(row_bias)
    if RESULT != 0:
        vector = tl.load(place + WIDTH_X * WIDTH_Z + row, mask=row < WIDTH_X, other=0.0)
        read_sum += tl.exp(between) * tl.sum(x_tile.to(tl.float32) * vector[None, :], 1)
    return read * tl.exp(between), read_sum


# ------------------------------------------------------------------------------------------------ one side of a tile


@triton.jit
def walk_tiles(
    x_tile, y, z, states, bias, weight, key_mask, decay, sums, totals, y_l, z_l, decay_l, tile, own, start, stop,
    length, row_bias, WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr,
    TILE: tl.constexpr, DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """What the chunk's tiles on one SIDE (0 left, 1 right) send to that edge of a tile of rows, (TILE, BLOCK_Z), their
    row sums, (TILE,), and their log-decay, a number. Without decay all tiles send, or none where states hold them."""
    part = tl.zeros((TILE, BLOCK_Z), tl.float32)
    part_sum = tl.zeros_like(row_bias)
    between = 0.0
    used = tl.cdiv(stop - start, TILE)
    if DECAY == 0:
        nearest, steps, direction = 0, used if states is None else 0, 1
    elif SIDE == 0:
        nearest, steps, direction = own - 1, own, -1
    else:
        nearest, steps, direction = own + 1, used - 1 - own, 1
    for step in range(0, steps):
        other = nearest + direction * step
        other_begin = start + other * TILE
        y_tile, z_tile, column_scale, column_bias = load_columns(
            y, z, bias, weight, key_mask, y_l, z_l, other_begin + tl.arange(0, TILE), stop,
            WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TRANSPOSED,
        )  # fmt: skip
        if DECAY != 0:
            a, a_rest, b, b_rest, total, total_rest = tile_sums(
                decay, sums, totals, decay_l, tile - own + other, other_begin, stop, length, TILE, DECAY, TRANSPOSED
            )
            if SIDE == 0:
                column_scale *= tl.exp(between + ((total - a) + (total_rest - a_rest)))
            else:
                column_scale *= tl.exp(between + (b + b_rest))
            between += total + total_rest
        scores = pair_scores(x_tile, y_tile, row_bias, column_bias, PRECISION)
        scores *= column_scale[None, :]
        part_sum += tl.sum(scores, 1)
        part += product(scores, z_tile, PRECISION)
    return part, part_sum, between


@triton.jit
def from_side(
    x_tile, y, z, states, bias, weight, key_mask, decay, sums, totals, y_l, z_l, decay_l, tile, own, start, stop,
    length, sender, row_bias,
    WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, FLIPPED: tl.constexpr, RESULT: tl.constexpr, PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """What reaches the edge of a tile of rows from one SIDE, (TILE, BLOCK_Z), its row sums, (TILE,), and the part of
    the former that comes from beyond the chunk, (TILE, BLOCK_Z)."""
    part, part_sum, between = walk_tiles(
        x_tile, y, z, states, bias, weight, key_mask, decay, sums, totals, y_l, z_l, decay_l, tile, own, start, stop,
        length, row_bias, WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TILE, DECAY, TRANSPOSED, PRECISION, SIDE,
    )  # fmt: skip
    if states is None:
        return part, part_sum, part  # the last is not used
    else:
        read, read_sum = read_state(
            x_tile, states, bias, sender, row_bias, between, WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z,
            DECAY, TRANSPOSED, FLIPPED, RESULT, PRECISION, SIDE,
        )  # fmt: skip
        return part + read, part_sum + read_sum, read


# ------------------------------------------------------------------------------------------------ results


@triton.jit
def store_split(
    split, states, target, part, read, side_scale, scale, length, rows, stop, SIDE: tl.constexpr
):  # fmt: skip
    """Writes target_i . part_i, (TILE,), of one SIDE into (3, length), from the right also the states' part of it."""
    tl.store(split + SIDE * length + rows, scale * tl.sum(target * part, 1), mask=rows < stop)
    if SIDE == 1:
        crossing = tl.zeros_like(side_scale)
        if states is not None:
            crossing = scale * side_scale * tl.sum(target * read, 1)
        tl.store(split + 2 * length + rows, crossing, mask=rows < stop)


@triton.jit
def divide(mixed, row_sum, scale, eps, NORMALIZED: tl.constexpr):
    """The outputs, (TILE, BLOCK_Z), and row sums, (TILE,), times the scale; if NORMALIZED the outputs are divided by
    the row sums plus eps."""
    mixed *= scale
    row_sum = row_sum * scale
    if NORMALIZED:
        row_sum += eps
        mixed = mixed / row_sum[:, None]
    return mixed, row_sum


@triton.jit
def store_rows(out, mixed, batch, head, heads, length, rows, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a tile of rows, (TILE, BLOCK), into `out`: in memory (batch, length, heads, WIDTH)."""
    column = tl.arange(0, BLOCK)
    out += (batch.to(tl.int64) * length * heads + head) * WIDTH
    address = out + rows.to(tl.int64)[:, None] * (heads * WIDTH) + column[None, :]
    tl.store(address, mixed.to(out.dtype.element_ty), mask=(rows < stop)[:, None] & (column < WIDTH)[None, :])
