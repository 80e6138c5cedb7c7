"""What the chunk kernels share inside a tile: products, decays in base 2, and the exact form of a hard tile.

A chunk's decays are centred on half of its total: with c_i = b_i - b_C / 2, q exp(c) and k exp(-c) serve
the scores, the state and every gradient (GLA §4.3, with one reference in place of many). Where a channel
loses more than 2 ** (2 LIMIT) in a chunk, its tile is *hard* and is halved until single tokens remain:
at each level the queries of a second half meet the keys of the first, both decaying towards the border
between them, so that every exponent is a sum of gates, and none is a difference. Hard tiles have kernels of
their own: beside the common case they would cost it registers.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LEVELS = tl.constexpr(8)  # halvings of a chunk of up to 128 tokens, and the diagonal
UNITS = tl.constexpr(2.0**23)  # to C: as integers of them, the sums of C limited gates fit in 32 bits
FLOOR = tl.constexpr(-32768.0)  # nats, in float16 as well: what is below decays to 0 as this does
LIMIT = tl.constexpr(60.0)  # operands stay in 2 ** +-60: far from float32's 2 ** +-126, in bf16 as well

NONE = tl.constexpr(0)  # no gate
FIXED = tl.constexpr(1)  # one gate a head, the same for every token: [H]
HEAD = tl.constexpr(2)  # one gate a head and token: [B, T, H]
CHANNEL = tl.constexpr(3)  # one gate a key channel: [B, T, H, K]

if triton.knobs.runtime.interpret:

    @triton.jit
    def power2(x):
        """2 ** x."""
        return tl.exp2(x)

else:

    @triton.jit
    def power2(x):
        """2 ** x; what is below 2 ** -126 becomes 0, which saves the two instructions of a denormal."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_tile(x, rows, count, stride, col, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[C, BLOCK] of a chunk from column `col`; zeros past the chunk's `count` tokens and the width."""
    cols = col + tl.arange(0, BLOCK)
    mask = (rows < count)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_gates(g, rows, count, stride, col, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """As load_tile, for sums by products, in which a gate of -inf would meet zeros of a mask: NaN."""
    gates = load_tile(g, rows, count, stride, col, WIDTH, BLOCK).to(tl.float32)
    return tl.where(gates < FLOOR, FLOOR, gates).to(g.dtype.element_ty)


@triton.jit
def store_tile(x, tile, rows, count, stride, col, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_tile."""
    cols = col + tl.arange(0, BLOCK)
    mask = (rows < count)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (cols < WIDTH)[None, :]
    tl.store(x + rows[:, None] * stride + cols[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_state(h, v, k, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """[BV, BK] of a stored state [V, K] from (v, k)."""
    vs, ks = v + tl.arange(0, BV), k + tl.arange(0, BK)
    x = h + vs[:, None] * K + ks[None, :]
    if V % BV != 0 or K % BK != 0:
        return tl.load(x, mask=(vs < V)[:, None] & (ks < K)[None, :], other=0.0)
    return tl.load(x)


@triton.jit
def store_state(h, tile, v, k, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """The reverse of load_state."""
    vs, ks = v + tl.arange(0, BV), k + tl.arange(0, BK)
    x = h + vs[:, None] * K + ks[None, :]
    if V % BV != 0 or K % BK != 0:
        tl.store(x, tile.to(h.dtype.element_ty), mask=(vs < V)[:, None] & (ks < K)[None, :])
    else:
        tl.store(x, tile.to(h.dtype.element_ty))


@triton.jit
def load_scores(scores, at, C: tl.constexpr, MIRROR: tl.constexpr):
    """Scores [C, C] of a chunk and head, rows queries and columns keys; the other way round if MIRROR."""
    rows = tl.arange(0, C)
    A = tl.load(scores + at * C * C + rows[:, None] * C + rows[None, :])
    return tl.trans(A) if MIRROR else A


@triton.jit
def store_scores(scores, A, at, C: tl.constexpr):
    """The reverse of load_scores, zero above the diagonal."""
    rows = tl.arange(0, C)
    A = tl.where(rows[:, None] >= rows[None, :], A, 0.0)
    tl.store(scores + at * C * C + rows[:, None] * C + rows[None, :], A.to(scores.dtype.element_ty))


@triton.jit
def load_channels(x, col, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] of a vector [WIDTH]."""
    cols = col + tl.arange(0, BLOCK)
    return tl.load(x + cols, mask=cols < WIDTH, other=0.0)


@triton.jit
def chunk_bounds(chunk, chunks, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """The chunk's first token, counted over all rows, and its number of tokens."""
    if PACKED:
        start = tl.load(chunks + 2 * chunk)
        count = tl.load(chunks + 2 * chunk + 1).to(tl.int32)
    else:
        first = (chunk % N) * C
        start = (chunk // N).to(tl.int64) * T + first
        count = tl.minimum(T - first, C)
    return start, count


@triton.jit
def row_bounds(row, bounds, offsets, T, N, PACKED: tl.constexpr):
    """A row's first token, the one after its last, its first chunk and its number of chunks."""
    if PACKED:
        low, high = tl.load(bounds + row).to(tl.int64), tl.load(bounds + row + 1).to(tl.int64)
        chunk0 = tl.load(offsets + row)
        chunks = (tl.load(offsets + row + 1) - chunk0).to(tl.int32)
    else:
        low, high, chunk0, chunks = row * T, row * T + T, row * N, N
    return low, high, chunk0, chunks


@triton.jit
def kept_share(sums):
    """Log factor of a state as it is stored, of a chunk's totals: what scaled q and k lack."""
    return tl.maximum(sums * 0.5, -LIMIT)


@triton.jit
def next_state(S, value, tile, sums, coming, lowest, PRECISION: tl.constexpr):
    """The state [BV, BK] before the next chunk, times its kept share, from this chunk's; see scale_kernel.

    In channels that are not hard, S and the chunk's own state lack the same factor.
    """
    kept = kept_share(sums)
    if lowest < -2 * LIMIT:
        S = S * power2(sums - 2 * kept)[None, :]
    S = tl.dot(tl.trans(value), tile, S, input_precision=PRECISION)
    return S * power2(kept + coming)[None, :]


@triton.jit
def any_hard(reach, count, BLOCK: tl.constexpr):
    """Whether one of `count` tiles, by their reaches, is hard."""
    lowest = 0.0
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        lowest = tl.minimum(lowest, tl.min(tl.load(reach + at, mask=at < count, other=0.0), 0))
    return lowest < -2 * LIMIT


@triton.jit
def summed(mask, g, PRECISION: tl.constexpr):
    """Sums of gates in base-2 units: the gates [C, BK] that each row of `mask` [C, C] weighs."""
    return tl.dot(mask.to(g.dtype), g, input_precision=PRECISION) * LOG2E


@triton.jit
def before(g, C: tl.constexpr, PRECISION: tl.constexpr):
    """Log decay from the chunk's start through each token."""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return summed(tl.where(s <= i, 1.0, 0.0), g, PRECISION)


@triton.jit
def after(g, C: tl.constexpr, PRECISION: tl.constexpr):
    """Log decay from after each token to the chunk's end."""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return summed(tl.where(s > i, 1.0, 0.0), g, PRECISION)


@triton.jit
def centred(g, C: tl.constexpr, PRECISION: tl.constexpr):
    """Log decay through each token, counted from half of the chunk's total."""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return summed(tl.where(s <= i, 0.5, -0.5), g, PRECISION)


@triton.jit
def level_decays(g, level, C: tl.constexpr, PRECISION: tl.constexpr):
    """Log decays of queries from, and of keys to, the borders of one level; 0 at level 0, the diagonal."""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    near = (i ^ s) < ((1 << level) >> 1)
    p = summed(tl.where(near & (s <= i), 1.0, 0.0), g, PRECISION)
    x = summed(tl.where(near & (s > i), 1.0, 0.0), g, PRECISION)
    return p, x


@triton.jit
def level_pairs(level, C: tl.constexpr, MIRROR: tl.constexpr):
    """[C, C]: whether a level joins query (row) and key (column); the other way round if MIRROR."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    apart = i ^ j
    joined = (apart >= ((1 << level) >> 1)) & (apart < (1 << level))
    if MIRROR:
        return joined & (i <= j)
    return joined & (i >= j)


@triton.jit
def halved_scores(rows, cols, g, C: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of a hard tile: rows are queries and columns keys, or the other way round if REVERSE."""
    A = tl.zeros([C, C], tl.float32)
    for level in range(LEVELS):
        p, x = level_decays(g, level, C, PRECISION)
        if REVERSE:
            p, x = x, p
        r = (rows * power2(p)).to(rows.dtype)
        c = (cols * power2(x)).to(rows.dtype)
        found = tl.dot(r, tl.trans(c), input_precision=PRECISION)
        A += tl.where(level_pairs(level, C, REVERSE), found, 0.0)
    return A


@triton.jit
def head_decays(g, sums, at, head, rows, count, GATE: tl.constexpr, C: tl.constexpr):
    """Log decays of a head's chunk `at`, base 2: through each token, from after it to the end [C], of all."""
    if GATE == HEAD:
        sums += at * 2 * C
        return tl.load(sums + rows), tl.load(sums + C + rows), tl.load(sums + C - 1)
    rate = tl.load(g + head) * LOG2E
    return (rows + 1) * rate, (count - 1 - rows) * rate, count * rate


@triton.jit
def by_row_and_column(A, to_row, factor):
    """A times the decay between row and column, as a factor for each, and times `factor`."""
    A *= (power2(to_row) * factor)[:, None]
    return A * power2(-to_row)[None, :]


@triton.jit
def decayed(A, to_row, lost, units, at, factor, GATE: tl.constexpr, MIRROR: tl.constexpr, C: tl.constexpr):
    """A [C, C], rows queries and columns keys, times the decay between them and `factor`.

    The other way round if MIRROR. `to_row` is what head_decays says of the row: from the chunk's start, or to
    its end if MIRROR. Rows and columns have a factor each, but where the chunk loses more than 2 ** LIMIT:
    there it is the power of each difference, taken in integers. Beyond the diagonal all is finite.
    """
    if GATE == HEAD:
        if lost < -LIMIT:
            rows = tl.arange(0, C)
            units += at * C
            here, there = tl.load(units + rows)[:, None], tl.load(units + rows)[None, :]
            apart = there - here if MIRROR else here - there
            A *= power2(tl.minimum(apart, 0).to(tl.float32) * (C / UNITS)) * factor
        else:
            A = by_row_and_column(A, to_row, factor)
    else:
        A = by_row_and_column(A, to_row, factor)
    return A
