"""The output of heads with hard tiles where no states are kept: sequential, exact (GLA §4.1, eq. 1)."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    LIMIT,
    LOG2E,
    centred,
    load_tile,
    power2,
    row_bounds,
    store_tile,
)


@triton.jit
def channel_chunk(
    q,
    k,
    v,
    g,
    o,
    count,
    vb,
    scale,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One chunk with gates a channel: writes its output, returns the state [BV, BK] after it."""
    TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16  # float16 could not hold what decays scale
    rows = tl.arange(0, C)
    gates = load_tile(g, rows, count, H * K, 0, K, BK)
    total = tl.sum(gates.to(tl.float32), 0) * LOG2E
    if tl.min(total, 0) >= -2 * LIMIT:
        half = power2(total * 0.5)[None, :]
        decay = centred(gates, C, PRECISION)
        value = load_tile(v, rows, count, H * V, vb * BV, V, BV).to(TYPE)
        x = (load_tile(q, rows, count, H * K, 0, K, BK) * power2(decay)).to(TYPE)
        y = (load_tile(k, rows, count, H * K, 0, K, BK) * power2(-decay)).to(TYPE)
        S = S * half
        out = tl.dot(x, tl.trans(S.to(TYPE)), input_precision=PRECISION)
        A = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        S = tl.dot(tl.trans(value), y, S, input_precision=PRECISION) * half
        A = tl.where(rows[:, None] >= rows[None, :], A * scale, 0.0).to(TYPE)
        out = tl.dot(A, value, out * scale, input_precision=PRECISION)
        store_tile(o, out, rows, count, H * V, vb * BV, V, BV)
    else:
        ks, vs = tl.arange(0, BK), vb * BV + tl.arange(0, BV)
        for t in range(count):
            at = t * H * K + ks
            gate = tl.load(g + at, mask=ks < K, other=0.0).to(tl.float32)
            key = tl.load(k + at, mask=ks < K, other=0.0).to(tl.float32)
            query = tl.load(q + at, mask=ks < K, other=0.0).to(tl.float32)
            one = tl.load(v + t * H * V + vs, mask=vs < V, other=0.0).to(tl.float32)
            S = S * power2(gate * LOG2E)[None, :] + one[:, None] * key[None, :]
            told = tl.sum(S * query[None, :], 1) * scale
            tl.store(o + t * H * V + vs, told.to(o.dtype.element_ty), mask=vs < V)
    return S


@triton.jit
def row_is_hard(reach, head, chunk0, chunks, H: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a head has a hard tile in one of a row's chunks."""
    lowest = 0.0
    for i in range(0, chunks, BLOCK):
        n = i + tl.arange(0, BLOCK)
        for tile in range(TILES):
            found = tl.load(reach + ((chunk0 + n) * H + head) * TILES + tile, mask=n < chunks, other=0.0)
            lowest = tl.minimum(lowest, tl.min(found, 0))
    return lowest < -2 * LIMIT


@triton.jit(do_not_specialize=["T", "N", "scale"])
def exact_kernel(
    q,
    k,
    v,
    g,
    reach,
    o,
    first,
    bounds,
    offsets,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """o of one head of one row, for BV of its value channels, where one of its tiles is hard.

    Math:   chunk by chunk o = scale ((q P) S + A v), S' = e^(b_C) S + sum_j e^(b_C - b_j) k_j v_j^T.
    Grid:   V / BV, H, rows, the first fastest; the state of all BK >= K channels stays in registers.
    HBM:    reads q, k, g V / BV times, v once; writes o once. Nothing but `reach` where no tile is hard.
    Stable: centred decays, fp32 carry; a chunk with a hard tile is taken token by token.
    Source: GLA §4.1; eq. 1 in hard chunks, eq. 3 and 4 in the others.
    """
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    vb, head, row = pid % NV, pid // NV % H, (pid // (NV * H)).to(tl.int64)
    low, high, chunk0, chunks = row_bounds(row, bounds, offsets, T, N, PACKED)
    if row_is_hard(reach, head, chunk0, chunks, H, TILES, 64):
        ks, vs = tl.arange(0, BK), vb * BV + tl.arange(0, BV)
        S = tl.zeros([BV, BK], tl.float32)
        if HAS_FIRST:
            whole = (row * H + head) * K * V + ks[None, :] * V + vs[:, None]  # of [K, V], as states come
            S = tl.load(first + whole, mask=(ks < K)[None, :] & (vs < V)[:, None], other=0.0)
        for n in range(chunks):
            start = low + n * C
            count = tl.minimum(high - start, C).to(tl.int32)
            token = start * H + head
            S = channel_chunk(
                q + token * K, k + token * K, v + token * V, g + token * K, o + token * V,
                count, vb, scale, S, H, K, V, C, BK, BV, PRECISION, WIDE,
            )  # fmt: skip
