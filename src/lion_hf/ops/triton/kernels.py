"""Fused GPU kernels of LION's operator, in Triton: scores and masks live in registers only.

One family of kernels serves every length. Tokens are cut into chunks, chunks into tiles. A tile of rows reads the tiles
of its own chunk directly and all that lies beyond through two states, one from the left and one from the right:

    sums         cumulative sums of the decays inside each tile (LION-S only)
    states       the two states that each chunk sends on, from one reading of its keys and values
    propagate    turns what the chunks send into what reaches each of them
    mix          the outputs of one tile of rows

A chunk as long as the text has no states, and the chunk form *is* the full form, in one launch (two for LION-S).
LION-LIT has no decay: beyond one chunk its states are one sum over the whole text, and `mix` reads nothing else.

Between a tile I of rows and a tile J of columns the mask is a row scale times a column scale, so that only tiles on the
diagonal take an exponential per element. With the sums a, b of a tile (of its gates e exclusive and f inclusive: a = e,
b = f, and a = f, b = e for the transposed mask), its total G and "between", the totals of the tiles between both,

    J left of I    exp(a_i)       * exp(between + G_J - a_j)
    J = I          exp(min(a_i - a_j, b_j - b_i))
    J right of I   exp(G_I - b_i) * exp(between + b_j)

and every exponent is <= 0. The backward pass runs the same kernels, since the operator is closed under differentiation:
with dP_ij = r_i (dy_i . v_j + delta_i), where r = 1 / (s c + eps) and delta_i = -dy_i . y_i if normalised (else r = 1
and delta the gradient of the denominator; y is rounded to its dtype, as in other fused kernels),

    dq = mix(dy, v, k; M)      dk = mix(v, dy, q; M^T)      dv = mix(k, q, dy; M^T)

and the gradient of the decays follows from q . dq and k . dk, split by the half of the mask they come from. Nothing
quadratic is kept, states are computed again, and no two programs add to one number: every run gives the same bits.

A kernel runs one program for each head (the grid's second dimension) of each tile (sums, mix, delta) or chunk (states,
gate_gradient); parts.py has the parts they are made of. Arguments stand in this order everywhere, None where absent:

    tensors     x, y, z, then what is written; states; bias, weight, key_mask; decay, sums, totals; table
    strides     of batch, head and token, tensor by tensor; the last dimension is contiguous
    numbers     length, chunks (of a text), tiles (of a chunk), scale, eps
    constants   widths, blocks that hold them, tile, then what kind of mask, input and result

Sums of gates are kept in two float32 parts, multiples of 1/512 and the rest. The first is exact inside a tile and the
second tiny, so exponents are exact to their rounding; one float32 would lose what stands beside a saturated gate.
"""

from triton.runtime.interpreter import InterpretedFunction

from .parts import (
    add_to_state,
    crossing_pairs,
    diagonal_only,
    diagonal_tile,
    divide,
    from_side,
    load_columns,
    load_gates,
    load_numbers,
    load_rows,
    load_tokens,
    of_head,
    product,
    span,
    store_rows,
    store_split,
    store_state,
    strict_half,
    tile_sums,
    tl,
    triton,
)


# What changes with the length of the text: specialising on it would compile anew for many lengths.
_any_length = triton.jit(do_not_specialize=["length", "chunks", "tiles", "decay_b"])


@_any_length
def sums_kernel(decay, sums, totals, table, decay_b, decay_h, decay_l, length, chunks, tiles, TILE: tl.constexpr):
    """Exclusive sums of the gates inside each tile, (B, H, 2, L), and their totals, (H, tiles, 2)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    all_tiles, heads = tl.num_programs(0), tl.num_programs(1)
    batch, start, stop, _ = span(tile // tiles, table, length, chunks, tiles * TILE)
    tokens = start + (tile % tiles) * TILE + tl.arange(0, TILE)
    keep = tokens < stop
    high, low = load_gates(of_head(decay, batch, head, decay_b, decay_h), tokens, keep, decay_l)
    row = sums + (batch * heads + head).to(tl.int64) * 2 * length + tokens
    tl.store(row, tl.cumsum(high, 0) - high, mask=keep)
    tl.store(row + length, tl.cumsum(low, 0) - low, mask=keep)
    total = totals + (head.to(tl.int64) * all_tiles + tile) * 2
    tl.store(total, tl.sum(high, 0))
    tl.store(total + 1, tl.sum(low, 0))


@_any_length
def states_kernel(
    y, z, states, chunk_totals, bias, weight, key_mask, decay, sums, totals, table,
    y_b, y_h, y_l, z_b, z_h, z_l, decay_b, decay_h, decay_l, length, chunks, tiles,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk sends to the right and to the left: sum_p w_p r_p y_p z_p^T, and behind it the vector
    sum_p w_p r_p bias_p y_p. Without decay both are the same sum, and it is written once."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    all_chunks, heads = tl.num_programs(0), tl.num_programs(1)
    batch, start, stop, _ = span(chunk, table, length, chunks, tiles * TILE)
    plane = (batch * heads + head).to(tl.int64) * length
    y, z = of_head(y, batch, head, y_b, y_h), of_head(z, batch, head, z_b, z_h)
    bias = None if bias is None else bias + plane
    weight = None if weight is None else weight + plane
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    decay = None if decay is None else of_head(decay, batch, head, decay_b, decay_h)
    sums = None if sums is None else sums + 2 * plane
    totals = None if totals is None else totals + head.to(tl.int64) * all_chunks * tiles * 2

    to_right, to_left = tl.zeros((BLOCK_Y, BLOCK_Z), tl.float32), tl.zeros((BLOCK_Y, BLOCK_Z), tl.float32)
    vector_right, vector_left = tl.zeros((BLOCK_Y,), tl.float32), tl.zeros((BLOCK_Y,), tl.float32)
    before = 0.0
    for step in range(0, tl.cdiv(stop - start, TILE)):
        begin = start + step * TILE
        y_tile, z_tile, factor, y_bias = load_columns(
            y, z, bias, weight, key_mask, y_l, z_l, begin + tl.arange(0, TILE), stop,
            WIDTH_Y, WIDTH_Z, BLOCK_Y, BLOCK_Z, TRANSPOSED,
        )  # fmt: skip
        y_tile = y_tile.to(tl.float32)
        if bias is None:  # the vector is the sum of y then, which row sums read
            y_bias += 1
        if DECAY == 0:
            to_right, vector_right = add_to_state(to_right, vector_right, y_tile, z_tile, factor, y_bias, PRECISION)
        else:
            a, a_rest, b, b_rest, total, total_rest = tile_sums(
                decay, sums, totals, decay_l, chunk * tiles + step, begin, stop, length, TILE, DECAY, TRANSPOSED
            )
            to_edge = factor * tl.exp((total - a) + (total_rest - a_rest))
            through = tl.exp(total + total_rest)
            to_right, vector_right = add_to_state(
                to_right * through, vector_right * through, y_tile, z_tile, to_edge, y_bias, PRECISION
            )
            to_edge = factor * tl.exp(before + (b + b_rest))
            to_left, vector_left = add_to_state(to_left, vector_left, y_tile, z_tile, to_edge, y_bias, PRECISION)
            before += total + total_rest

    size = WIDTH_Y * WIDTH_Z + WIDTH_Y
    if DECAY == 0:
        place = states + (chunk.to(tl.int64) * heads + head) * size
    else:
        place = states + (chunk.to(tl.int64) * heads + head) * 2 * size
        store_state(place + size, to_left, vector_left, WIDTH_Y, WIDTH_Z, BLOCK_Y, BLOCK_Z)
        tl.store(chunk_totals + chunk * heads + head, before)
    store_state(place, to_right, vector_right, WIDTH_Y, WIDTH_Z, BLOCK_Y, BLOCK_Z)


@_any_length
def propagate_kernel(
    states, chunk_totals, borders, heads, chunks, SIZE: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr
):
    """In place, on (chunks, H, sides, SIZE): what reaches each chunk from the left (side 0) and the right (side 1).
    Without decay the sum over a sequence, in the place of its first chunk."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    side, sides = tl.program_id(2), tl.num_programs(2)
    if borders is None:
        first, last = sequence * chunks, (sequence + 1) * chunks
    else:
        first, last = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < SIZE
    base = states + (head * sides + side).to(tl.int64) * SIZE + entry
    carry = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, last - first):
        chunk = first + step if DECAY == 0 else first + step + side * (last - first - 1 - 2 * step)
        place = base + chunk.to(tl.int64) * heads * sides * SIZE
        sent = tl.load(place, mask=inside, other=0.0)
        if DECAY == 0:
            carry += sent
        else:
            tl.store(place, carry, mask=inside)
            carry = carry * tl.exp(tl.load(chunk_totals + chunk * heads + head)) + sent
    if DECAY == 0:  # an empty sequence has no chunk to write to
        place = base + first.to(tl.int64) * heads * SIZE
        tl.store(place, carry, mask=inside & (last - first > 0 * entry))


@_any_length
def mix_kernel(
    x, y, z, out, row_sums, states, bias, weight, key_mask, decay, sums, totals, table, reference, split,
    x_b, x_h, x_l, y_b, y_h, y_l, z_b, z_h, z_l, decay_b, decay_h, decay_l, reference_b, reference_h, reference_l,
    length, chunks, tiles, scale, eps,
    WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, FLIPPED: tl.constexpr, RESULT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows of out_i = s sum_j M_ij r (x_i . y_j + bias) z_j, with its row sums where RESULT needs them.

    Rows are queries, or keys if TRANSPOSED; bias and weight (r) belong to queries, the mask to keys. `split`,
    (B, H, 3, L), takes reference_i . out_i from the left, from the right, and of the latter the state's part."""
    tile, head = tl.program_id(0), tl.program_id(1)
    all_tiles, heads = tl.num_programs(0), tl.num_programs(1)
    chunk, own = tile // tiles, tile % tiles
    batch, start, stop, first = span(chunk, table, length, chunks, tiles * TILE)
    sender = (first if DECAY == 0 else chunk).to(tl.int64) * heads + head
    begin = start + own * TILE
    if begin >= stop:
        return
    plane = (batch * heads + head).to(tl.int64) * length
    x, y, z = of_head(x, batch, head, x_b, x_h), of_head(y, batch, head, y_b, y_h), of_head(z, batch, head, z_b, z_h)
    bias = None if bias is None else bias + plane
    weight = None if weight is None else weight + plane
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    decay = None if decay is None else of_head(decay, batch, head, decay_b, decay_h)
    sums = None if sums is None else sums + 2 * plane
    totals = None if totals is None else totals + head.to(tl.int64) * all_tiles * 2
    reference = None if reference is None else of_head(reference, batch, head, reference_b, reference_h)
    split = None if split is None else split + 3 * plane
    rows = begin + tl.arange(0, TILE)
    x_tile, kept, row_scale, row_bias = load_rows(
        x, bias, weight, key_mask, x_l, rows, stop, WIDTH_X, BLOCK_X, TRANSPOSED
    )
    mixed, row_sum = tl.zeros((TILE, BLOCK_Z), tl.float32), tl.zeros_like(row_scale)

    if DECAY != 0:
        own_scores, z_own, from_left, from_right = diagonal_tile(
            x_tile, y, z, bias, weight, key_mask, decay, sums, totals, y_l, z_l, decay_l, tile, begin, stop, length,
            row_scale, row_bias, WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TILE, DECAY, TRANSPOSED, PRECISION,
        )  # fmt: skip
        row_sum += tl.sum(own_scores, 1)
        mixed += product(own_scores, z_own, PRECISION) if split is None else diagonal_only(own_scores, z_own, TILE)

    for side in tl.static_range(0, 1 if DECAY == 0 else 2):  # left, right; without decay everything at once
        part, part_sum, read = from_side(
            x_tile, y, z, states, bias, weight, key_mask, decay, sums, totals, y_l, z_l, decay_l, tile, own, start,
            stop, length, sender, row_bias, WIDTH_X, WIDTH_Z, BLOCK_X, BLOCK_Z, TILE, DECAY, TRANSPOSED, FLIPPED,
            RESULT, PRECISION, side,
        )  # fmt: skip
        side_scale = row_scale if DECAY == 0 else row_scale * tl.exp(from_left if side == 0 else from_right)
        part *= side_scale[:, None]
        row_sum += part_sum * side_scale
        if split is not None:
            part += strict_half(own_scores, z_own, side, TILE, PRECISION)
            target = load_tokens(reference, rows, kept, reference_l, WIDTH_Z, BLOCK_Z).to(tl.float32)
            store_split(split, states, target, part, read, side_scale, scale, length, rows, stop, side)
        mixed += part

    mixed, row_sum = divide(mixed, row_sum, scale, eps, RESULT == 1)
    if RESULT != 0:
        tl.store(row_sums + plane + rows, row_sum, mask=rows < stop)
    store_rows(out, mixed, batch, head, heads, length, rows, stop, WIDTH_Z, BLOCK_Z)


@_any_length
def delta_kernel(
    y, dy, delta, y_b, y_h, y_l, dy_b, dy_h, dy_l, length, tiles,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta_i = -dy_i . y_i, (B, H, L)."""
    batch, head, heads = tl.program_id(0) // tiles, tl.program_id(1), tl.num_programs(1)
    tokens = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    keep = tokens < length
    left = load_tokens(of_head(y, batch, head, y_b, y_h), tokens, keep, y_l, WIDTH, BLOCK).to(tl.float32)
    right = load_tokens(of_head(dy, batch, head, dy_b, dy_h), tokens, keep, dy_l, WIDTH, BLOCK).to(tl.float32)
    place = delta + (batch * heads + head).to(tl.int64) * length + tokens
    tl.store(place, -tl.sum(left * right, 1), mask=keep)


@_any_length
def gate_gradient_kernel(
    query_split, key_split, states, query_states, chunk_totals, out, table, length, chunks, tiles, scale,
    SIZE: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of the log-decays of one chunk, (B, H, L): from pairs that begin or end in it, and pairs that cross it.
    USED entries of a state belong to the score: the vector does where there is a bias."""
    chunk, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, start, stop, _ = span(chunk, table, length, chunks, tiles * TILE)
    plane = (batch * heads + head).to(tl.int64) * length
    query_split, key_split, out = query_split + 3 * plane, key_split + 3 * plane, out + plane
    used = tl.cdiv(stop - start, TILE)
    carry = 0.0
    if states is not None:
        place = (chunk.to(tl.int64) * heads + head) * 2 * SIZE
        carry = crossing_pairs(states + place, query_states + place, SIZE, USED, BLOCK)
        carry *= scale * tl.exp(tl.load(chunk_totals + chunk * heads + head))
        for step in range(0, used):
            tokens = start + step * TILE + tl.arange(0, TILE)
            carry += tl.sum(load_numbers(query_split + 2 * length, tokens, stop), 0)
            carry += tl.sum(load_numbers(key_split + 2 * length, tokens, stop), 0)
    for step in range(0, used):
        tokens = start + (used - 1 - step) * TILE + tl.arange(0, TILE)
        # Row i of the left half and column i of the left half: e_i enters the one and leaves the other.
        de = load_numbers(query_split, tokens, stop) - load_numbers(key_split + length, tokens, stop)
        df = load_numbers(key_split, tokens, stop) - load_numbers(query_split + length, tokens, stop)
        both = de + df
        suffix = tl.cumsum(both, 0, reverse=True)
        tl.store(out + tokens, carry + suffix - de, mask=tokens < stop)
        carry += tl.sum(both, 0)


# With TRITON_INTERPRET=1 at import: the kernels run on a CPU, too.
INTERPRETED = isinstance(mix_kernel, InterpretedFunction)
