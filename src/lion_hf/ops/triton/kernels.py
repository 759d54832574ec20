"""Fused GPU kernels of LION's operator, in Triton. Scores and masks exist in registers only.

One family of kernels serves every length. Tokens are divided into chunks of one tile each. A tile of rows reads its own
tokens directly and all others through two states, one from the left and one from the right:

    sums         computes the sums of gates of tokens inside each tile
    states       computes the two states that each chunk sends on, reading its keys and values once
    propagate    turns the states that chunks send into the states that reach each chunk
    walk         does the work of states and propagate, for many sequences: a program walks over the chunks of one
    forward      computes the outputs of one tile of rows
    backward     computes the gradients of one tile of tokens

A text of one tile has no states and takes one launch. LION-LIT has no decay: beyond one tile, its states are one sum
over the whole text, `forward` and `backward` read nothing else, and its chunks have several tiles.

With the exclusive sums e and the inclusive sums f of the gates of a tile, and their total G, the decay mask is

    exp(min(e_i - e_j, f_j - f_i))      inside the tile (of the two, the correct exponent is the one <= 0)
    exp(e_i)                            between the left edge of the tile and row i, for the state from the left
    exp(G - f_i)                        between row i and the right edge of the tile, for the state from the right

Every exponent is <= 0. A chunk sends its keys to the right with exp(G - e_j), and to the left with exp(f_j). For
queries, which the gradients of keys and values read, e and f change places. With the mask M, S = q k^T and

    dP_ij = r_i (dy_i . v_j + delta_i)
    normalised:  r_i = 1 / (s c_i + eps), delta_i = -dy_i . y_i, with y rounded to its dtype, as in other fused kernels
    otherwise:   r_i = 1, delta_i is the gradient of the denominator

the gradients are

    dq = s (M dP) k      dk = s (M dP)^T q      dv = s (M r S)^T dy      dM_ij M_ij = s M_ij dP_ij S_ij

Tokens outside the tile contribute through the states of keys (k v^T) and of queries (q dy^T). The gradient of a gate is
the sum of dM_ij M_ij over the pairs whose M_ij contains it. Nothing quadratic is stored, and states are recomputed. No
two programs add to the same number, so every run gives the same bits.

A kernel runs one program for each head (second dimension of the grid) of each chunk (states) or tile. parts.py holds
their building blocks. Arguments have the same order everywhere, and are None if absent:

    tensors     query, key, value, outputs; states, vectors; bias, row sums, key_mask; decay, sums; table, path
    strides     of batch, head and token, tensor by tensor; the last dimension is contiguous
    numbers     length, chunks (per text), tiles (per chunk), scale, eps
    constants   widths, the blocks that hold them, tile, then the kinds of mask, input and result

A scan along another order than that of memory (`path`) reads and writes each token at its place, without a copy.

Sums of gates have two float32 parts, multiples of 1/512 and the rest. The first is exact inside a tile and the second
is tiny, so only the exponent itself is rounded. A single float32 sum would lose small gates next to a saturated one.
"""

from triton.runtime.interpreter import InterpretedFunction

from .parts import (
    FLOOR,
    carry_over,
    column_sums,
    load_gates,
    load_state,
    load_tokens,
    load_vector,
    load_weights,
    meetings,
    of_head,
    place_of,
    places,
    product,
    rounded,
    span,
    store_rows,
    store_state,
    tile_mask,
    tile_sums,
    tl,
    triton,
    unmasked,
)


# These depend on the length of the text. Specialising on them would compile the kernels again for many lengths.
_any_length = triton.jit(do_not_specialize=["length", "chunks", "tiles", "decay_b"])


@_any_length
def sums_kernel(sums, decay, table, path, decay_b, decay_h, decay_l, length, chunks, TILE: tl.constexpr):
    """Compute the inclusive sums of the gates of each chunk of one tile, (B, H, L, 2), in two parts."""
    chunk, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, start, stop, _ = span(chunk, table, length, chunks, TILE)
    tokens = start + tl.arange(0, TILE)
    keep = tokens < stop
    at = places(path, tokens, keep)
    high, low = load_gates(of_head(decay, batch, head, decay_b, decay_h), at, keep, decay_l)
    place = sums + 2 * ((batch * heads + head).to(tl.int64) * length + at)
    tl.store(place, tl.cumsum(high, 0), mask=keep)
    tl.store(place + 1, tl.cumsum(low, 0), mask=keep)


@_any_length
def states_kernel(
    y, z, states, vectors, chunk_totals, bias, row_sums, key_mask, decay, sums, table, path,
    y_b, y_h, y_l, z_b, z_h, z_l, decay_b, decay_h, decay_l, length, chunks, tiles,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what each chunk sends to the right and to the left.

    States are sum_p w_p r_p y_p z_p^T for keys y and values z, or with QUERIES for queries y and output gradients z.
    Vectors are sum_p w_p y_p (times r_p bias_p for queries). Without decay both sides are the same sum, stored once.
    """
    chunk, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, start, stop, _ = span(chunk, table, length, chunks, tiles * TILE)
    plane = (batch * heads + head).to(tl.int64) * length
    y, z = of_head(y, batch, head, y_b, y_h), of_head(z, batch, head, z_b, z_h)
    bias = None if bias is None else bias + plane
    row_sums = None if row_sums is None else row_sums + plane
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    decay = None if decay is None else of_head(decay, batch, head, decay_b, decay_h)
    sums = None if sums is None else sums + 2 * plane
    state, vector = tl.zeros((BLOCK_K, BLOCK_V), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for step in range(0, tl.cdiv(stop - start, TILE) if DECAY == 0 else 1):
        begin = start + step * TILE
        tokens = begin + tl.arange(0, TILE)
        keep = tokens < stop
        at = places(path, tokens, keep)
        if QUERIES:
            weight, shift = load_weights(bias, row_sums, at, keep)
        else:
            keep = unmasked(key_mask, at, keep)
            weight = keep.to(tl.float32)
            shift = weight
        y_tile = load_tokens(y, at, keep, y_l, WIDTH_K, BLOCK_K)
        z_tile = load_tokens(z, at, keep, z_l, WIDTH_V, BLOCK_V)
        if DECAY == 0:
            state += product(tl.trans(y_tile), z_tile.to(tl.float32) * weight[:, None], PRECISION)
            if vectors is not None:
                vector += column_sums(y_tile, weight * shift)
        else:
            e, e_rest, f, f_rest, total, total_rest = tile_sums(
                decay, sums, path, decay_l, at, begin, stop, TILE, DECAY
            )
            tl.store(chunk_totals + chunk * heads + head, total + total_rest)
            for side in tl.static_range(2):  # of the receiver: what is sent to the right comes from its left, side 0
                inner, rest = (e, e_rest) if (side == 0) != QUERIES else (f, f_rest)
                to_edge = (total - inner) + (total_rest - rest) if side == 0 else inner + rest
                sent = weight * tl.exp(to_edge)
                state = product(tl.trans(y_tile), z_tile.to(tl.float32) * sent[:, None], PRECISION)
                if vectors is not None:
                    vector = column_sums(y_tile, sent * shift)
                place = place_of(chunk, head, heads, side, DECAY)
                store_state(states, vectors, place, state, vector, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
    if DECAY == 0:
        place = place_of(chunk, head, heads, 0, DECAY)
        store_state(states, vectors, place, state, vector, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)


@_any_length
def walk_kernel(
    y, z, states, vectors, bias, row_sums, key_mask, decay, sums, table, path, borders,
    y_b, y_h, y_l, z_b, z_h, z_l, decay_b, decay_h, decay_l, length, chunks,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what reaches each chunk of a sequence from one side.

    This is `states_kernel` and `propagate_kernel` in one, for many sequences: a program walks over the chunks of one.
    Programs of both sides are neighbours, so that they share reads.
    """
    sequence, side = tl.program_id(0) // 2, tl.program_id(0) % 2
    head, heads = tl.program_id(1), tl.num_programs(1)
    if borders is None:
        first, last = sequence * chunks, (sequence + 1) * chunks
    else:
        first, last = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    batch = sequence if table is None else 0 * sequence
    plane = (batch * heads + head).to(tl.int64) * length
    y, z = of_head(y, batch, head, y_b, y_h), of_head(z, batch, head, z_b, z_h)
    bias = None if bias is None else bias + plane
    row_sums = None if row_sums is None else row_sums + plane
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    decay = of_head(decay, batch, head, decay_b, decay_h)
    sums = None if sums is None else sums + 2 * plane
    state, vector = tl.zeros((BLOCK_K, BLOCK_V), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for step in range(0, last - first):
        chunk = first + step + side * (last - first - 1 - 2 * step)
        store_state(
            states, vectors, place_of(chunk, head, heads, side, DECAY), state, vector,
            WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        _, start, stop, _ = span(chunk, table, length, chunks, TILE)
        tokens = start + tl.arange(0, TILE)
        keep = tokens < stop
        at = places(path, tokens, keep)
        e, e_rest, f, f_rest, total, total_rest = tile_sums(decay, sums, path, decay_l, at, start, stop, TILE, DECAY)
        if QUERIES:
            weight, shift = load_weights(bias, row_sums, at, keep)
            e, e_rest, f, f_rest = f, f_rest, e, e_rest
        else:
            keep = unmasked(key_mask, at, keep)
            weight = keep.to(tl.float32)
            shift = weight
        sent = weight * tl.exp(tl.where(side == 0, (total - e) + (total_rest - e_rest), f + f_rest))
        through = tl.exp(total + total_rest)
        y_tile = load_tokens(y, at, keep, y_l, WIDTH_K, BLOCK_K)
        z_tile = load_tokens(z, at, keep, z_l, WIDTH_V, BLOCK_V)
        state = state * through + product(tl.trans(y_tile), z_tile.to(tl.float32) * sent[:, None], PRECISION)
        if vectors is not None:
            vector = vector * through + column_sums(y_tile, sent * shift)


@_any_length
def propagate_kernel(
    states, vectors, chunk_totals, borders, heads, chunks,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Compute what reaches each chunk from the left (side 0) and from the right (side 1), in place.

    States are (chunks, H, sides, SIZE), vectors (chunks, H, sides, WIDTH). The last program of the second dimension of
    the grid computes the vectors, if there are any.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block, side = tl.program_id(1), tl.program_id(2)
    if borders is None:
        first, last = sequence * chunks, (sequence + 1) * chunks
    else:
        first, last = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    if block * BLOCK < SIZE:
        carry_over(states, chunk_totals, first, last, head, heads, block, side, SIZE, BLOCK, GROUP, DECAY)
    elif vectors is not None:
        carry_over(vectors, chunk_totals, first, last, head, heads, 0, side, WIDTH, BLOCK, GROUP, DECAY)


@_any_length
def forward_kernel(
    query, key, value, out, row_sums, states, vectors, key_mask, decay, sums, table, path,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, decay_b, decay_h, decay_l, length, chunks, tiles, scale, eps,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, RESULT: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute one tile of rows of s sum_j M_ij (q_i . k_j) v_j, and its row sums if RESULT needs them."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    chunk = tile // tiles
    batch, start, stop, first = span(chunk, table, length, chunks, tiles * TILE)
    here = tile % tiles
    begin = start + here * TILE
    if begin >= stop:
        return
    rows = begin + tl.arange(0, TILE)
    keep = rows < stop
    at = places(path, rows, keep)
    plane = (batch * heads + head).to(tl.int64) * length
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    kept = unmasked(key_mask, at, keep)
    # Everything is read before anything is computed: there are few programs, and each would wait for one read after
    # another.
    k_head, v_head = of_head(key, batch, head, k_b, k_h), of_head(value, batch, head, v_b, v_h)
    q_tile = load_tokens(of_head(query, batch, head, q_b, q_h), at, keep, q_l, WIDTH_K, BLOCK_K)
    if DECAY != 0 or states is None:
        k_tile = load_tokens(k_head, at, kept, k_l, WIDTH_K, BLOCK_K)
        v_tile = load_tokens(v_head, at, kept, v_l, WIDTH_V, BLOCK_V)
    place = place_of(first if DECAY == 0 else chunk, head, heads, 0, DECAY)
    if states is not None and EARLY:
        left_state = load_state(states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        if DECAY != 0:
            right_state = load_state(states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
    mixed, row_sum = tl.zeros((TILE, BLOCK_V), tl.float32), tl.zeros((TILE,), tl.float32)
    if DECAY != 0:
        decay = of_head(decay, batch, head, decay_b, decay_h)
        sums = None if sums is None else sums + 2 * plane
        e, e_rest, f, f_rest, total, total_rest = tile_sums(decay, sums, path, decay_l, at, begin, stop, TILE, DECAY)
        left_reading, right_reading = tl.exp(e + e_rest), tl.exp((total - f) + (total_rest - f_rest))
    if DECAY != 0 or states is None:
        scores = product(q_tile, tl.trans(k_tile), PRECISION)
        if DECAY != 0:
            scores *= tile_mask(e, e_rest, f, f_rest, PRECISION)
        row_sum += tl.sum(scores, 1)
        mixed += product(scores, v_tile, PRECISION)
    if states is not None:
        if not EARLY:
            left_state = load_state(states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        if RESULT != 0:
            left_vector = load_vector(vectors, place, WIDTH_K, BLOCK_K)
        read = product(q_tile, left_state, PRECISION)
        mixed += read if DECAY == 0 else read * left_reading[:, None]
        if RESULT != 0:
            read_sum = tl.sum(q_tile.to(tl.float32) * left_vector[None, :], 1)
            row_sum += read_sum if DECAY == 0 else read_sum * left_reading
    if states is not None and DECAY != 0:
        if not EARLY:
            right_state = load_state(states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        if RESULT != 0:
            right_vector = load_vector(vectors, place + 1, WIDTH_K, BLOCK_K)
        mixed += product(q_tile, right_state, PRECISION) * right_reading[:, None]
        if RESULT != 0:
            row_sum += tl.sum(q_tile.to(tl.float32) * right_vector[None, :], 1) * right_reading
    mixed *= scale
    row_sum *= scale
    if RESULT == 1:
        row_sum += eps
        mixed = mixed / row_sum[:, None]
    if RESULT != 0:
        tl.store(row_sums + plane + at, row_sum, mask=keep)
    store_rows(out, mixed, batch, head, heads, length, at, keep, WIDTH_V, BLOCK_V)


@_any_length
def delta_kernel(
    out, d_out, delta, out_b, out_h, out_l, d_out_b, d_out_h, d_out_l, length, tiles,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute delta_i = -dy_i . y_i, (B, H, L)."""
    batch, head, heads = tl.program_id(0) // tiles, tl.program_id(1), tl.num_programs(1)
    tokens = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    keep = tokens < length
    y = load_tokens(of_head(out, batch, head, out_b, out_h), tokens, keep, out_l, WIDTH, BLOCK)
    dy = load_tokens(of_head(d_out, batch, head, d_out_b, d_out_h), tokens, keep, d_out_l, WIDTH, BLOCK)
    place = delta + (batch * heads + head).to(tl.int64) * length + tokens
    tl.store(place, -tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1), mask=keep)


@_any_length
def backward_kernel(
    query, key, value, d_out, d_query, d_key, d_value, d_decay, key_states, key_vectors, query_states, query_vectors,
    bias, row_sums, key_mask, decay, sums, table, path,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, d_out_b, d_out_h, d_out_l, decay_b, decay_h, decay_l,
    length, chunks, tiles, scale,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of queries, keys and values, and of the gates.

    The gradient of the gates is (B, H, L), or for one gate per head the summand of this tile, (tiles, H). With EARLY,
    states are small enough to be read ahead and kept in registers.
    """
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    chunk = tile // tiles
    batch, start, stop, first = span(chunk, table, length, chunks, tiles * TILE)
    here = tile % tiles
    begin = start + here * TILE
    if begin >= stop:
        if DECAY == 1:
            tl.store(d_decay + tile * heads + head, 0.0)
        return
    tokens = begin + tl.arange(0, TILE)
    keep = tokens < stop
    at = places(path, tokens, keep)
    plane = (batch * heads + head).to(tl.int64) * length
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    bias = None if bias is None else bias + plane
    row_sums = None if row_sums is None else row_sums + plane
    kept = unmasked(key_mask, at, keep)
    q_head, k_head = of_head(query, batch, head, q_b, q_h), of_head(key, batch, head, k_b, k_h)
    v_head, dy_head = of_head(value, batch, head, v_b, v_h), of_head(d_out, batch, head, d_out_b, d_out_h)
    place = place_of(first if DECAY == 0 else chunk, head, heads, 0, DECAY)
    place = place_of(first if DECAY == 0 else chunk, head, heads, 0, DECAY)
    weight, shift = load_weights(bias, row_sums, at, keep)
    q_tile = load_tokens(q_head, at, keep, q_l, WIDTH_K, BLOCK_K)
    k_tile = load_tokens(k_head, at, kept, k_l, WIDTH_K, BLOCK_K)
    v_tile = load_tokens(v_head, at, kept, v_l, WIDTH_V, BLOCK_V)
    dy_tile = load_tokens(dy_head, at, keep, d_out_l, WIDTH_V, BLOCK_V)
    if key_states is not None and EARLY:
        left_queries = load_state(query_states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        if DECAY != 0:
            right_queries = load_state(query_states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
    # Factors of the gradients of queries (reading), and of keys and values (writing). For tokens on the left and on the
    # right of the tile they include the gates up to that edge.
    reading, writing = weight * scale, kept.to(tl.float32) * scale
    if DECAY != 0:
        decay = of_head(decay, batch, head, decay_b, decay_h)
        sums = None if sums is None else sums + 2 * plane
        e, e_rest, f, f_rest, total, total_rest = tile_sums(decay, sums, path, decay_l, at, begin, stop, TILE, DECAY)
        left_reading = reading * tl.exp(e + e_rest)
        right_reading = reading * tl.exp((total - f) + (total_rest - f_rest))
        left_writing = writing * tl.exp(f + f_rest)
        right_writing = writing * tl.exp((total - e) + (total_rest - e_rest))
    else:
        left_reading, left_writing = reading, writing

    # The gradient of gate t is a sum over the pairs whose M_ij contains it: all pairs that `cross` the tile, and of
    # those that end in the tile `begun` up to t, `to_come` from t on, and `own` at t.
    cross, to_come, own = 0.0, tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    if DECAY != 0 or key_states is None:
        scores = product(q_tile, tl.trans(k_tile), PRECISION)
        d_scores = product(dy_tile, tl.trans(v_tile), PRECISION) + shift[:, None]
        factor = reading[:, None] * kept.to(tl.float32)[None, :]
        if DECAY != 0:
            factor *= tile_mask(e, e_rest, f, f_rest, PRECISION)
        scores *= factor
        if DECAY != 0:
            pairs = scores * d_scores
            index = tl.arange(0, TILE)
            from_right = tl.where(index[:, None] < index[None, :], pairs, 0.0)
            right = tl.sum(from_right, 1) - tl.sum(from_right, 0)
            own -= right
            # Column sums minus row sums for pairs with the key on the left, the reverse for the key on the right.
            begun = tl.sum(pairs, 0) - tl.sum(pairs, 1) + 2 * right
        scores, d_scores = rounded(scores, PRECISION), rounded(d_scores * factor, PRECISION)

    # Each gradient is stored before the next is computed: together they need more registers than there are.
    dv = tl.zeros((TILE, BLOCK_V), tl.float32)
    if DECAY != 0 or key_states is None:
        dv += product(tl.trans(scores), dy_tile, PRECISION)
    if key_states is not None:
        if not EARLY:
            left_queries = load_state(query_states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        dv += product(k_tile, left_queries, PRECISION) * left_writing[:, None]
        if DECAY != 0:
            if not EARLY:
                right_queries = load_state(query_states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
            dv += product(k_tile, right_queries, PRECISION) * right_writing[:, None]
        if EARLY:
            left_keys = load_state(key_states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
            if DECAY != 0:
                right_keys = load_state(key_states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
    store_rows(d_value, dv, batch, head, heads, length, at, keep, WIDTH_V, BLOCK_V)

    dk = tl.zeros((TILE, BLOCK_K), tl.float32)
    if DECAY != 0 or key_states is None:
        dk += product(tl.trans(d_scores), q_tile, PRECISION)
    if key_states is not None:
        if not EARLY:
            left_queries = load_state(query_states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        part = product(v_tile, tl.trans(left_queries), PRECISION)
        if bias is not None:
            left_query_vector = load_vector(query_vectors, place, WIDTH_K, BLOCK_K)
            part += left_query_vector[None, :]
        dk += part * left_writing[:, None]
        if DECAY != 0:
            to_come += tl.sum(k_tile.to(tl.float32) * part, 1) * left_writing
            if not EARLY:
                right_queries = load_state(query_states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
            part = product(v_tile, tl.trans(right_queries), PRECISION)
            if bias is not None:
                right_query_vector = load_vector(query_vectors, place + 1, WIDTH_K, BLOCK_K)
                part += right_query_vector[None, :]
            dk += part * right_writing[:, None]
            begun += tl.sum(k_tile.to(tl.float32) * part, 1) * right_writing
    store_rows(d_key, dk, batch, head, heads, length, at, keep, WIDTH_K, BLOCK_K)

    dq = tl.zeros((TILE, BLOCK_K), tl.float32)
    if DECAY != 0 or key_states is None:
        dq += product(d_scores, k_tile, PRECISION)
    if key_states is not None:
        if bias is not None:
            left_key_vector = load_vector(key_vectors, place, WIDTH_K, BLOCK_K)
        if not EARLY:
            left_keys = load_state(key_states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
        part = product(dy_tile, tl.trans(left_keys), PRECISION)
        if bias is not None:
            part += shift[:, None] * left_key_vector[None, :]
        dq += part * left_reading[:, None]
        if DECAY != 0:
            rows = tl.sum(q_tile.to(tl.float32) * part, 1) * left_reading
            to_come += rows
            own -= rows
            if EARLY:
                met = left_keys.to(tl.float32) * right_queries.to(tl.float32)
            if bias is not None:
                right_key_vector = load_vector(key_vectors, place + 1, WIDTH_K, BLOCK_K)
            if EARLY:
                met += right_keys.to(tl.float32) * left_queries.to(tl.float32)
                cross += tl.sum(tl.sum(met, 1), 0)
            else:
                right_keys = load_state(key_states, place + 1, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
                cross += meetings(key_states, query_states, place, place + 1, WIDTH_K * WIDTH_V)
                cross += meetings(key_states, query_states, place + 1, place, WIDTH_K * WIDTH_V)
            part = product(dy_tile, tl.trans(right_keys), PRECISION)
            if bias is not None:
                part += shift[:, None] * right_key_vector[None, :]
                cross += tl.sum(left_key_vector * right_query_vector + right_key_vector * left_query_vector, 0)
            dq += part * right_reading[:, None]
            rows = tl.sum(q_tile.to(tl.float32) * part, 1) * right_reading
            begun += rows
            own -= rows
    store_rows(d_query, dq, batch, head, heads, length, at, keep, WIDTH_K, BLOCK_K)

    if DECAY != 0:
        gradient = cross * scale * tl.exp(total + total_rest)
        gradient += tl.cumsum(begun, 0) + tl.cumsum(to_come, 0, reverse=True) + own
        if DECAY == 1:
            share = tl.sum(tl.where(keep, gradient, 0.0), 0)
            tl.store(d_decay + tile * heads + head, tl.where(tl.load(decay) < FLOOR, 0.0, share))
        else:
            gate = tl.load(decay + at.to(tl.int64) * decay_l, mask=keep, other=0.0)
            tl.store(d_decay + plane + at, tl.where(gate < FLOOR, 0.0, gradient), mask=keep)


# True if TRITON_INTERPRET=1 was set at import; the kernels then also run on a CPU.
INTERPRETED = isinstance(forward_kernel, InterpretedFunction)
