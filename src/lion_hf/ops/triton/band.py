"""Fused GPU kernels of softmax attention in a band, in Triton. Scores and weights exist in registers only.

A program computes one tile of tokens and walks over the tokens that they read, or are read by, a step at a time:

    forward    computes the outputs of one tile of queries, with a running maximum and sum of the weights
    queries    computes the gradients of one tile of queries, and delta_i = dy_i . y_i
    keys       computes the gradients of one tile of keys and values, from the queries that read them

The forward pass stores one number for each query, lse_i, the logarithm of the sum of its weights to base 2. Both
backward kernels compute the weights from it once more. With S = q k^T and the scale s,

    P_ij = 2^(s log2(e) S_ij - lse_i)      dS_ij = P_ij (dy_i . v_j - delta_i)
    dq = s dS k                            dk = s dS^T q                            dv = P^T dy

A token reads one interval of its row: the tokens within `reach`, which are in the row and in its packed sequence.
Whether i reads j is therefore two comparisons, and i reads j exactly if j reads i. Masked keys are read by nobody, and
are loaded as 0. A query that reads no key has lse = inf, so that its weights are 0 in the backward pass too.

No two programs add to the same number, so every run gives the same bits. Programs of one tile and all heads run
together, and read memory that is contiguous in the layers: (batch, length, heads, width).

Arguments are in the order of kernels.py: tensors, strides of batch, head and token, numbers, constants. They are None
if absent. `bounds` (2, length) holds the first token and the end of the sequence of each token of a packed row.
"""

from .parts import load_tokens, of_head, store_rows, tl, triton, unmasked


# The sum of the weights is accumulated relative to the largest score so far, which is finite from the start.
_LEAST = tl.constexpr(-3.0e38)

# These depend on the length of the text. Specialising on them would compile the kernels again for many lengths.
_any_length = triton.jit(do_not_specialize=["length", "tiles", "reach"])


@triton.jit
def interval(bounds, tokens, length, reach):
    """Return the first and the last token that tokens read, in the shape of `tokens`, one number or (TILE,)."""
    first, last = tokens - reach, tokens + reach
    if bounds is None:
        first, last = tl.maximum(first, 0), tl.minimum(last, length - 1)
    else:
        first = tl.maximum(first, tl.load(bounds + tokens, mask=tokens < length, other=0))
        last = tl.minimum(last, tl.load(bounds + length + tokens, mask=tokens < length, other=0) - 1)
    return first, last


@triton.jit
def tile_of(bounds, tiles, heads, length, reach, TILE: tl.constexpr):
    """Return the row of the batch, the head, the tokens (TILE,) of this program, and the first and last they read."""
    head, place = tl.program_id(0) % heads, tl.program_id(0) // heads
    begin = (place % tiles) * TILE
    first, _ = interval(bounds, begin, length, reach)
    _, last = interval(bounds, tl.minimum(begin + TILE, length) - 1, length, reach)
    return place // tiles, head, begin + tl.arange(0, TILE), first, last


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """Return total + a @ b in float32. Operands are rounded to PRECISION: "bf16", "fp16", "tf32" or "ieee"."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a @ b in float32."""
    return add_product(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b, PRECISION)


@_any_length
def forward_kernel(
    query, key, value, out, lse, key_mask, bounds,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, length, tiles, heads, reach, scale,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of one tile of queries, and lse. `scale` is s log2(e)."""
    batch, head, rows, first, last = tile_of(bounds, tiles, heads, length, reach, TILE)
    keep = rows < length
    low, high = interval(bounds, rows, length, reach)
    key, value = of_head(key, batch, head, k_b, k_h), of_head(value, batch, head, v_b, v_h)
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    q_tile = load_tokens(of_head(query, batch, head, q_b, q_h), rows, keep, q_l, WIDTH_K, BLOCK_K)
    mixed, total = tl.zeros((TILE, BLOCK_V), tl.float32), tl.zeros((TILE,), tl.float32)
    largest = tl.full((TILE,), _LEAST, tl.float32)
    for begin in range(first, last + 1, STEP):
        columns = begin + tl.arange(0, STEP)
        there = unmasked(key_mask, columns, columns <= last)
        k_tile = load_tokens(key, columns, there, k_l, WIDTH_K, BLOCK_K)
        scores = product(q_tile, tl.trans(k_tile), PRECISION)
        v_tile = load_tokens(value, columns, there, v_l, WIDTH_V, BLOCK_V)
        reads = (columns[None, :] >= low[:, None]) & (columns[None, :] <= high[:, None])
        if key_mask is not None:
            reads = reads & there[None, :]
        scores = tl.where(reads, scores * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        mixed = add_product(mixed * shrink[:, None], weights, v_tile, PRECISION)
        largest = larger
    empty = total == 0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    store_rows(out, mixed, batch, head, heads, length, rows, keep, WIDTH_V, BLOCK_V)
    sums = tl.where(empty, float("inf"), largest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + (batch * heads + head).to(tl.int64) * length + rows, sums, mask=keep)


@_any_length
def queries_kernel(
    query, key, value, out, d_out, d_query, lse, delta, key_mask, bounds,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l, d_out_b, d_out_h, d_out_l,
    length, tiles, heads, reach, scale, s,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of queries, and delta."""
    batch, head, rows, first, last = tile_of(bounds, tiles, heads, length, reach, TILE)
    keep = rows < length
    low, high = interval(bounds, rows, length, reach)
    key, value = of_head(key, batch, head, k_b, k_h), of_head(value, batch, head, v_b, v_h)
    key_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * length
    plane = (batch * heads + head).to(tl.int64) * length
    q_tile = load_tokens(of_head(query, batch, head, q_b, q_h), rows, keep, q_l, WIDTH_K, BLOCK_K)
    dy_tile = load_tokens(of_head(d_out, batch, head, d_out_b, d_out_h), rows, keep, d_out_l, WIDTH_V, BLOCK_V)
    y_tile = load_tokens(of_head(out, batch, head, out_b, out_h), rows, keep, out_l, WIDTH_V, BLOCK_V)
    inner = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + plane + rows, inner, mask=keep)
    sums = tl.load(lse + plane + rows, mask=keep, other=float("inf"))
    dq = tl.zeros((TILE, BLOCK_K), tl.float32)
    for begin in range(first, last + 1, STEP):
        columns = begin + tl.arange(0, STEP)
        there = unmasked(key_mask, columns, columns <= last)
        k_tile = load_tokens(key, columns, there, k_l, WIDTH_K, BLOCK_K)
        v_tile = load_tokens(value, columns, there, v_l, WIDTH_V, BLOCK_V)
        scores = product(q_tile, tl.trans(k_tile), PRECISION)
        d_weights = product(dy_tile, tl.trans(v_tile), PRECISION)
        reads = (columns[None, :] >= low[:, None]) & (columns[None, :] <= high[:, None])
        if key_mask is not None:
            reads = reads & there[None, :]
        weights = tl.exp2(tl.where(reads, scores * scale - sums[:, None], float("-inf")))
        dq = add_product(dq, weights * (d_weights - inner[:, None]), k_tile, PRECISION)
    store_rows(d_query, dq * s, batch, head, heads, length, rows, keep, WIDTH_K, BLOCK_K)


@_any_length
def keys_kernel(
    query, key, value, d_out, d_key, d_value, lse, delta, key_mask, bounds,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, d_out_b, d_out_h, d_out_l, length, tiles, heads, reach, scale, s,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of keys and values. Scores are transposed, (keys, queries)."""
    batch, head, rows, first, last = tile_of(bounds, tiles, heads, length, reach, TILE)
    keep = rows < length
    low, high = interval(bounds, rows, length, reach)
    there = unmasked(None if key_mask is None else key_mask + batch.to(tl.int64) * length, rows, keep)
    if key_mask is not None:
        high = tl.where(there, high, -1)
    query, d_out = of_head(query, batch, head, q_b, q_h), of_head(d_out, batch, head, d_out_b, d_out_h)
    plane = (batch * heads + head).to(tl.int64) * length
    k_tile = load_tokens(of_head(key, batch, head, k_b, k_h), rows, there, k_l, WIDTH_K, BLOCK_K)
    v_tile = load_tokens(of_head(value, batch, head, v_b, v_h), rows, there, v_l, WIDTH_V, BLOCK_V)
    dk, dv = tl.zeros((TILE, BLOCK_K), tl.float32), tl.zeros((TILE, BLOCK_V), tl.float32)
    for begin in range(first, last + 1, STEP):
        columns = begin + tl.arange(0, STEP)
        inside = columns <= last
        q_tile = load_tokens(query, columns, inside, q_l, WIDTH_K, BLOCK_K)
        dy_tile = load_tokens(d_out, columns, inside, d_out_l, WIDTH_V, BLOCK_V)
        sums = tl.load(lse + plane + columns, mask=inside, other=0.0)
        inner = tl.load(delta + plane + columns, mask=inside, other=0.0)
        scores = product(k_tile, tl.trans(q_tile), PRECISION)
        reads = (columns[None, :] >= low[:, None]) & (columns[None, :] <= high[:, None])
        weights = tl.exp2(tl.where(reads, scores * scale - sums[None, :], float("-inf")))
        dv = add_product(dv, weights, dy_tile, PRECISION)
        d_weights = product(v_tile, tl.trans(dy_tile), PRECISION)
        dk = add_product(dk, weights * (d_weights - inner[None, :]), q_tile, PRECISION)
    store_rows(d_key, dk * s, batch, head, heads, length, rows, keep, WIDTH_K, BLOCK_K)
    store_rows(d_value, dv, batch, head, heads, length, rows, keep, WIDTH_V, BLOCK_V)
