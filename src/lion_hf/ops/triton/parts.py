"""Parts of the fused GPU kernels, in Triton. kernels.py assembles them, and its docstring explains the computation.

Pointers point to one head of one row of the batch, unless a part has an argument `batch`. TILE is the number of tokens
per tile, BLOCK the power of two that holds WIDTH features. PRECISION is the type to which the operands of matrix
products are rounded: "bf16", "tf32" or "ieee" (float32). Arguments are in the order of `forward_kernel`.

The lists of arguments are long because Triton before 3.3 accepts no tuples as arguments.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("they require Triton, which is not installed (pip install triton)") from error


# exp(FLOOR) is 0 in float32.
FLOOR = tl.constexpr(-104.0)
# Sums of up to 128 gates that are multiples of 1/512 are exact in the 24 bits of a float32.
_STEPS = tl.constexpr(512.0)


# ------------------------------------------------------------------------------------------------ reading tokens


@triton.jit
def span(chunk, table, length, chunks, chunk_size):
    """Return the row of the batch, the first token, the end and the first chunk of the sequence of a chunk."""
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
    """Move the pointer of a (batch, heads, ...) tensor to one head of one row of the batch."""
    return pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tokens(pointer, tokens, keep, stride_l, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load some tokens of a (length, WIDTH) tensor as (TILE, BLOCK); 0 where not `keep` and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    address = pointer + tokens.to(tl.int64)[:, None] * stride_l + column[None, :]
    return tl.load(address, mask=keep[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def places(path, tokens, keep):
    """Return the indices (TILE,) in memory of the tokens of a scan."""
    if path is None:
        return tokens
    else:
        return tl.load(path + tokens, mask=keep, other=0)


@triton.jit
def unmasked(key_mask, tokens, keep):
    """Return `keep` (TILE,), False for padding as well."""
    if key_mask is not None:
        keep = keep & (tl.load(key_mask + tokens, mask=keep, other=0) != 0)
    return keep


@triton.jit
def load_weights(bias, row_sums, tokens, keep):
    """Return the factor and the summand of the gradients of the scores of some queries, (TILE,) each.

    The factor is 1, or the inverse of the row sum; the summand is added first. Both are 0 where not `keep`.
    """
    weight = keep.to(tl.float32)
    shift = tl.zeros_like(weight)
    if row_sums is not None:
        weight /= tl.load(row_sums + tokens, mask=keep, other=1.0)
    if bias is not None:
        shift = tl.load(bias + tokens, mask=keep, other=0.0)
    return weight, shift


# ------------------------------------------------------------------------------------------------ decays


@triton.jit
def load_gates(decay, tokens, keep, decay_l):
    """Return clamped log-decays in two parts, multiples of 1/512 and the rest, (TILE,) each; 0 where not `keep`."""
    gate = tl.load(decay + tokens.to(tl.int64) * decay_l, mask=keep, other=0.0).to(tl.float32)
    gate = tl.where(gate < FLOOR, FLOOR, gate)
    high = tl.floor(gate * _STEPS + 0.5) / _STEPS
    return high, gate - high


@triton.jit
def tile_sums(decay, sums, path, decay_l, at, begin, stop, TILE: tl.constexpr, DECAY: tl.constexpr):
    """Return the exclusive sums e and the inclusive sums f of the gates of a tile, (TILE,), and their total.

    Each has two parts. Tokens beyond the end do not decay. The inclusive sums of gates of tokens are read from `sums`:
    kernels that compute them need more registers, and would rearrange masks, which are larger.
    """
    index = tl.arange(0, TILE)
    if DECAY == 1:
        high, low = load_gates(decay, index * 0, index >= 0, 0)
        count = tl.minimum(stop - begin, TILE).to(tl.float32)
        before = tl.minimum(index, stop - begin).to(tl.float32)
        after = tl.minimum(index + 1, stop - begin).to(tl.float32)
        e, e_rest, f, f_rest = before * high, before * low, after * high, after * low
        total, total_rest = tl.min(count * high), tl.max(count * low)  # all lanes hold the same value
    else:
        there = begin + index < stop
        high, low = load_gates(decay, at, there, decay_l)
        f = tl.load(sums + 2 * at, mask=there, other=0.0)
        f_rest = tl.load(sums + 2 * at + 1, mask=there, other=0.0)
        e, e_rest = f - high, f_rest - low
        last = tl.minimum(begin + TILE, stop) - 1
        if path is not None:
            last = tl.load(path + last, mask=begin < stop, other=0)
        total = tl.load(sums + 2 * last, mask=begin < stop, other=0.0)
        total_rest = tl.load(sums + 2 * last + 1, mask=begin < stop, other=0.0)
    return e, e_rest, f, f_rest, total, total_rest


@triton.jit
def tile_mask(e, e_rest, f, f_rest, PRECISION: tl.constexpr):
    """Return the decay mask of a tile, (TILE, TILE).

    Exponents are differences of e for keys on the left of a query, and of f for keys on its right.
    """
    if PRECISION == "ieee":
        down = (e[:, None] - e[None, :]) + (e_rest[:, None] - e_rest[None, :])
        up = (f[None, :] - f[:, None]) + (f_rest[None, :] - f_rest[:, None])
    else:  # products keep fewer digits than the second parts add
        e, f = e + e_rest, f + f_rest
        down, up = e[:, None] - e[None, :], f[None, :] - f[:, None]
    return tl.exp(tl.minimum(tl.minimum(down, up), 0.0))


# ------------------------------------------------------------------------------------------------ products


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """Round to the type to which `product` rounds, if that takes fewer registers."""
    return x.to(tl.bfloat16) if PRECISION == "bf16" else x


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a @ b in float32."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def column_sums(x, weight):
    """Return the sum over tokens of a tile (TILE, BLOCK) times weights (TILE,), in float32."""
    return tl.sum(x.to(tl.float32) * weight[:, None], 0)


# ------------------------------------------------------------------------------------------------ states


@triton.jit
def place_of(chunk, head, heads, side, DECAY: tl.constexpr):
    """Return the index of the state of a head of a chunk from one side. Without decay both sides share one state."""
    place = chunk.to(tl.int64) * heads + head
    return place if DECAY == 0 else place * 2 + side


@triton.jit
def state_entries(
    states, place, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Return the addresses of the entries of a state, (BLOCK_K, BLOCK_V), and which of them exist."""
    row, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    address = states + place * (WIDTH_K * WIDTH_V) + row[:, None] * WIDTH_V + column[None, :]
    return address, (row < WIDTH_K)[:, None] & (column < WIDTH_V)[None, :]


@triton.jit
def load_state(
    states, place, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Load a state, (BLOCK_K, BLOCK_V)."""
    address, known = state_entries(states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
    return tl.load(address, mask=known, other=0.0)


@triton.jit
def load_vector(vectors, place, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load the vector of a state, (BLOCK,)."""
    row = tl.arange(0, BLOCK)
    return tl.load(vectors + place * WIDTH + row, mask=row < WIDTH, other=0.0)


@triton.jit
def meetings(keys, queries, place, other, SIZE: tl.constexpr):
    """Return the sum of the elementwise product of a state of keys and a state of queries, a number."""
    total = 0.0
    for begin in range(0, SIZE, 1024):
        entry = begin + tl.arange(0, 1024)
        one = tl.load(keys + place * SIZE + entry, mask=entry < SIZE, other=0.0).to(tl.float32)
        total += tl.sum(one * tl.load(queries + other * SIZE + entry, mask=entry < SIZE, other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def store_state(
    states, vectors, place, state, vector,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a state, (BLOCK_K, BLOCK_V), and its vector, (BLOCK_K,), unless `vectors` is None."""
    address, known = state_entries(states, place, WIDTH_K, WIDTH_V, BLOCK_K, BLOCK_V)
    tl.store(address, state.to(states.dtype.element_ty), mask=known)
    if vectors is not None:
        row = tl.arange(0, BLOCK_K)
        tl.store(vectors + place * WIDTH_K + row, vector, mask=row < WIDTH_K)


@triton.jit
def carry_over(
    sent, chunk_totals, first, last, head, heads, block, side,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Replace what the chunks of a sequence send to one side by what reaches each of them, for one block of entries.

    `sent` is (chunks, heads, sides, SIZE). Without decay, the sum over all chunks is stored for the first chunk. GROUP
    chunks are read at a time, because waiting for each one separately is slow.
    """
    sides = 1 if DECAY == 0 else 2
    entry = block * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, GROUP)
    carry = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, last - first, GROUP):
        step = begin + member
        chunk = first + step + side * (last - first - 1 - 2 * step)
        there = step < last - first
        row = (chunk.to(tl.int64) * heads + head) * sides + side
        inside = there[:, None] & (entry < SIZE)[None, :]
        group = tl.load(sent + row[:, None] * SIZE + entry[None, :], mask=inside, other=0.0).to(tl.float32)
        if DECAY == 0:
            carry += tl.sum(group, 0)
        else:
            through = tl.exp(tl.load(chunk_totals + chunk * heads + head, mask=there, other=0.0))
            for index in tl.static_range(GROUP):
                this = member == index
                address = sent + tl.sum(tl.where(this, row, 0), 0) * SIZE + entry
                tl.store(
                    address,
                    carry.to(sent.dtype.element_ty),
                    mask=(entry < SIZE) & (begin + index + 0 * entry < last - first),
                )
                carry = carry * tl.sum(tl.where(this, through, 0.0), 0) + tl.sum(tl.where(this[:, None], group, 0.0), 0)
    if DECAY == 0:  # an empty sequence has no chunk to write to
        place = (first.to(tl.int64) * heads + head) * SIZE
        tl.store(sent + place + entry, carry, mask=(entry < SIZE) & (last - first > 0 * entry))


# ------------------------------------------------------------------------------------------------ results


@triton.jit
def store_rows(out, mixed, batch, head, heads, length, rows, keep, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile of rows, (TILE, BLOCK), in `out`, which is (batch, length, heads, WIDTH) in memory."""
    column = tl.arange(0, BLOCK)
    out += (batch.to(tl.int64) * length * heads + head) * WIDTH
    address = out + rows.to(tl.int64)[:, None] * (heads * WIDTH) + column[None, :]
    tl.store(address, mixed.to(out.dtype.element_ty), mask=keep[:, None] & (column < WIDTH)[None, :])
