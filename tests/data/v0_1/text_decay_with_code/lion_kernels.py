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
diagonal take an exponential per element. With the sums a, b of a tile (a = e, b = f of lion_forms; a = f, b = e for the
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
"""

try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
except ImportError as error:
    raise ImportError("they need Triton, which is not installed (pip install triton)") from error


# exp(floor) is 0 in float32.
FLOOR = tl.constexpr(-104.0)
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
    gate = tl.maximum(gate, FLOOR)
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
def sums_kernel(
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
def states_kernel(
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
def scan_kernel(
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
def mix_kernel(
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
def delta_kernel(
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
def gate_gradient_kernel(
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


# With TRITON_INTERPRET=1 at import: the kernels run on a CPU, too.
INTERPRETED = isinstance(mix_kernel, InterpretedFunction)
