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
def channel_block(x, y, gates, value, S, A, out, C: tl.constexpr, PRECISION: tl.constexpr):
    """One block of key channels: adds to the scores and the output, and carries its state [BV, BK]."""
    half = power2(tl.sum(gates.to(tl.float32), 0) * (0.5 * LOG2E))
    decay = centred(gates, C, PRECISION)
    x = (x * power2(decay)).to(value.dtype)
    y = (y * power2(-decay)).to(value.dtype)
    S = S * half[None, :]
    out = tl.dot(x, tl.trans(S.to(value.dtype)), out, input_precision=PRECISION)
    A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
    S = tl.dot(tl.trans(value), y, S, input_precision=PRECISION) * half[None, :]
    return S, A, out


@triton.jit
def token_block(q, k, g, at, v, S, col, K: tl.constexpr, BK: tl.constexpr):
    """One token of one block of key channels: the state after it, and its part of the output [BV]."""
    cols = col + tl.arange(0, BK)
    inside = cols < K
    gate = tl.load(g + at + cols, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(k + at + cols, mask=inside, other=0.0).to(tl.float32)
    query = tl.load(q + at + cols, mask=inside, other=0.0).to(tl.float32)
    S = S * power2(gate * LOG2E)[None, :] + v[:, None] * key[None, :]
    return S, tl.sum(S * query[None, :], 1)


@triton.jit
def finish(A, out, value, scale, C: tl.constexpr, PRECISION: tl.constexpr):
    """The chunk's output from its scores, and what `out` has of the state before it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    A = tl.where(i >= j, A * scale, 0.0).to(value.dtype)
    return tl.dot(A, value, out * scale, input_precision=PRECISION)


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
    S2,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One chunk with gates a channel: writes its output, returns the states after it."""
    TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16  # float16 could not hold what decays scale
    rows = tl.arange(0, C)
    value = load_tile(v, rows, count, H * V, vb * BV, V, BV).to(TYPE)
    gates = load_tile(g, rows, count, H * K, 0, K, BK)
    gates2 = gates
    lowest = tl.min(tl.sum(gates.to(tl.float32), 0), 0)
    if K > BK:
        gates2 = load_tile(g, rows, count, H * K, BK, K, BK)
        lowest = tl.minimum(lowest, tl.min(tl.sum(gates2.to(tl.float32), 0), 0))
    if lowest * LOG2E >= -2 * LIMIT:
        A = tl.zeros([C, C], tl.float32)
        out = tl.zeros([C, BV], tl.float32)
        x = load_tile(q, rows, count, H * K, 0, K, BK).to(TYPE)
        y = load_tile(k, rows, count, H * K, 0, K, BK).to(TYPE)
        S, A, out = channel_block(x, y, gates, value, S, A, out, C, PRECISION)
        if K > BK:
            x = load_tile(q, rows, count, H * K, BK, K, BK).to(TYPE)
            y = load_tile(k, rows, count, H * K, BK, K, BK).to(TYPE)
            S2, A, out = channel_block(x, y, gates2, value, S2, A, out, C, PRECISION)
        out = finish(A, out, value, scale, C, PRECISION)
        store_tile(o, out, rows, count, H * V, vb * BV, V, BV)
    else:
        vs = vb * BV + tl.arange(0, BV)
        for t in range(count):
            one = tl.load(v + t * H * V + vs, mask=vs < V, other=0.0).to(tl.float32)
            S, told = token_block(q, k, g, t * H * K, one, S, 0, K, BK)
            if K > BK:
                S2, more = token_block(q, k, g, t * H * K, one, S2, BK, K, BK)
                told += more
            tl.store(o + t * H * V + vs, (told * scale).to(o.dtype.element_ty), mask=vs < V)
    return S, S2


@triton.jit
def row_is_hard(reach, head, chunk0, chunks, H: tl.constexpr, NK: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a head has a hard tile in one of a row's chunks."""
    lowest = 0.0
    for i in range(0, chunks, BLOCK):
        n = i + tl.arange(0, BLOCK)
        for kb in range(NK):
            found = tl.load(reach + ((chunk0 + n) * H + head) * NK + kb, mask=n < chunks, other=0.0)
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
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """o of one head of one row, for BV of its value channels, where one of its tiles is hard.

    Math:   chunk by chunk o = scale ((q P) S + A v), S' = e^(b_C) S + sum_j e^(b_C - b_j) k_j v_j^T.
    Grid:   V / BV, H, rows, the first fastest; the state stays in registers, in one or two blocks of BK.
    HBM:    reads q, k, g V / BV times, v once; writes o once. Nothing but `reach` where no tile is hard.
    Stable: centred decays, fp32 carry; a chunk with a hard tile is taken token by token.
    Source: GLA §4.1; eq. 1 in hard chunks, eq. 3 and 4 in the others.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    vb, head, row = pid % NV, pid // NV % H, (pid // (NV * H)).to(tl.int64)
    low, high, chunk0, chunks = row_bounds(row, bounds, offsets, T, N, PACKED)
    if row_is_hard(reach, head, chunk0, chunks, H, NK, 64):
        ks, vs = tl.arange(0, BK), vb * BV + tl.arange(0, BV)
        whole = (row * H + head) * K * V + ks[None, :] * V + vs[:, None]  # of [K, V], as states come
        S = tl.zeros([BV, BK], tl.float32)
        S2 = tl.zeros([BV, BK], tl.float32)
        if HAS_FIRST:
            S = tl.load(first + whole, mask=(ks < K)[None, :] & (vs < V)[:, None], other=0.0)
            if K > BK:
                inside = (BK + ks < K)[None, :] & (vs < V)[:, None]
                S2 = tl.load(first + whole + BK * V, mask=inside, other=0.0)
        for n in range(chunks):
            start = low + n * C
            count = tl.minimum(high - start, C).to(tl.int32)
            token = start * H + head
            S, S2 = channel_chunk(
                q + token * K, k + token * K, v + token * V, g + token * K, o + token * V,
                count, vb, scale, S, S2, H, K, V, C, BK, BV, PRECISION, WIDE,
            )  # fmt: skip
