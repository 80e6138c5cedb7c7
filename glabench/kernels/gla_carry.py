"""State pass and output in one kernel: the state of a whole head stays in registers from chunk to chunk."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    FIXED,
    HEAD,
    NONE,
    decayed,
    head_decays,
    kept_share,
    load_tile,
    next_state,
    power2,
    row_bounds,
    store_state,
    store_tile,
)


@triton.jit
def carry_block(
    x,
    y,
    value,
    own,
    kept,
    S,
    sums,
    coming,
    lowest,
    A,
    out,
    scale,
    h,
    v,
    col,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of key channels: adds to scores and output; the state after the chunk."""
    if KEEP:
        store_state(h, S, v, col, V, K, BV, BK)
    out = tl.dot(x, tl.trans(S.to(x.dtype)), out, input_precision=PRECISION)
    A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
    if GATE == CHANNEL:
        S = next_state(S, value, y, sums, kept_share(coming), lowest, PRECISION)
    elif GATE == FIXED or GATE == HEAD:  # noqa: SIM109
        S = tl.dot(tl.trans(own), y, S * kept, input_precision=PRECISION)
    elif REVERSE:
        S += tl.dot(tl.trans(value), y, input_precision=PRECISION) * scale
    else:
        S = tl.dot(tl.trans(value), y, S, input_precision=PRECISION)
    return S, A, out


@triton.jit(do_not_specialize=["T", "N", "scale"])
def carry_kernel(  # noqa: C901  most branches are constants: one kernel with gates and without, both ways
    q,
    k,
    v,
    g,
    total,
    reach,
    h,
    o,
    first,
    last,
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
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o of one head of one row, for BV of its value channels and all key channels; the states if KEEP.

    Math:   o = q S + (q k^T, j <= i) v, S' = e^(b_C) S + k^T v; with gates a channel q and k come from
            scale_kernel with decays and scale, and S is as it is stored; a head's gates are taken here.
            REVERSE, from q = k, k = q, v = do, gives dv and the states' gradients, back to front.
    Grid:   V / BV, H, rows, the first fastest; a row's segments are rows, `first` has a state for each.
    HBM:    reads q, k V / BV times and v once; writes o and, if KEEP, K V / C elements a token and head.
    Stable: fp32 carry. The output of chunks with a hard tile is left to other kernels.
    Source: GLA §4.1, the form without materialisation; eq. 2 and 3.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16  # float16 could not hold what decays scale
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    vb, head, row = pid % NV, pid // NV % H, (pid // (NV * H)).to(tl.int64)
    low, high, chunk0, chunks = row_bounds(row, bounds, offsets, T, N, PACKED)
    rows = tl.arange(0, C)
    ks, vs = tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    whole = (row * H + head) * K * V + ks[None, :] * V + vs[:, None]  # of [K, V], as states come and go
    inside = (ks < K)[None, :] & (vs < V)[:, None]
    inside2 = (BK + ks < K)[None, :] & (vs < V)[:, None]
    S = tl.zeros([BV, BK], tl.float32)
    S2 = tl.zeros([BV, BK], tl.float32)
    if HAS_FIRST:
        S = tl.load(first + whole, mask=inside, other=0.0)
        if K > BK:
            S2 = tl.load(first + whole + BK * V, mask=inside2, other=0.0)
    sums = tl.zeros([BK], tl.float32)
    sums2, coming, coming2 = sums, sums, sums
    lowest, lowest2 = 0.0, 0.0
    if GATE == CHANNEL:
        at = (chunk0 + (chunks - 1 if REVERSE else 0)) * H + head
        sums = tl.load(total + at * K + ks, mask=(ks < K) & (chunks > 0), other=0.0)
        lowest = tl.load(reach + at * NK, mask=chunks > 0, other=0.0)
        S = S * power2(kept_share(sums))[None, :]
        if K > BK:
            sums2 = tl.load(total + at * K + BK + ks, mask=(BK + ks < K) & (chunks > 0), other=0.0)
            lowest2 = tl.load(reach + at * NK + 1, mask=chunks > 0, other=0.0)
            S2 = S2 * power2(kept_share(sums2))[None, :]
    i, j = rows[:, None], rows[None, :]
    allowed = i <= j if REVERSE else i >= j
    for n in range(chunks):
        m = chunks - 1 - n if REVERSE else n
        start = low + m * C
        count = tl.minimum(high - start, C).to(tl.int32)
        at = (chunk0 + m) * H + head
        token = start * H + head
        value = load_tile(v + token * V, rows, count, H * V, vb * BV, V, BV).to(TYPE)
        x = load_tile(q + token * K, rows, count, H * K, 0, K, BK).to(TYPE)
        y = load_tile(k + token * K, rows, count, H * K, 0, K, BK).to(TYPE)
        own, kept = value, 1.0
        if GATE == FIXED or GATE == HEAD:  # noqa: SIM109
            from_start, to_end, lost = head_decays(g, total, at, head, rows, count, GATE, C)
            to_here, from_here = (to_end, from_start) if REVERSE else (from_start, to_end)
            share = power2(from_here) * (scale if REVERSE else 1.0)
            own, kept = (value * share[:, None]).to(TYPE), power2(lost)
        A = tl.zeros([C, C], tl.float32)
        out = tl.zeros([C, BV], tl.float32)
        states = h + at * K * V if KEEP else h
        more = chunks - 1 - n > 0  # what comes is loaded a chunk ahead: nothing waits for it
        ahead = (chunk0 + (m - 1 if REVERSE else m + 1)) * H + head
        if GATE == CHANNEL:
            coming = tl.load(total + ahead * K + ks, mask=(ks < K) & more, other=0.0)
        S, A, out = carry_block(
            x, y, value, own, kept, S, sums, coming, lowest, A, out, scale, states, vb * BV, 0,
            K, V, BK, BV, GATE, REVERSE, KEEP, PRECISION,
        )  # fmt: skip
        if GATE == CHANNEL:
            sums, lowest = coming, tl.load(reach + ahead * NK, mask=more, other=0.0)
        if K > BK:
            x = load_tile(q + token * K, rows, count, H * K, BK, K, BK).to(TYPE)
            y = load_tile(k + token * K, rows, count, H * K, BK, K, BK).to(TYPE)
            if GATE == CHANNEL:
                coming2 = tl.load(total + ahead * K + BK + ks, mask=(BK + ks < K) & more, other=0.0)
            S2, A, out = carry_block(
                x, y, value, own, kept, S2, sums2, coming2, lowest2, A, out, scale, states, vb * BV, BK,
                K, V, BK, BV, GATE, REVERSE, KEEP, PRECISION,
            )  # fmt: skip
            if GATE == CHANNEL:
                sums2, lowest2 = coming2, tl.load(reach + ahead * NK + 1, mask=more, other=0.0)
        A = tl.where(allowed, A, 0.0)  # before decays: Triton cannot wait for a product in a branch
        to_out = 1.0 if REVERSE or GATE == CHANNEL else scale  # else states and scaled q bring it
        if GATE == FIXED or GATE == HEAD:  # noqa: SIM109
            out *= (power2(to_here) * to_out)[:, None]
            A = decayed(A, to_here, lost, reach, at, scale, GATE, REVERSE, C)
        elif GATE == NONE:
            out *= to_out
            A *= scale
        out = tl.dot(A.to(TYPE), value, out, input_precision=PRECISION)
        store_tile(o + token * V, out, rows, count, H * V, vb * BV, V, BV)
    if HAS_LAST:
        final = row % SEGMENTS == (0 if REVERSE else SEGMENTS - 1)
        ends = last + (row // SEGMENTS * H + head) * K * V + ks[None, :] * V + vs[:, None]
        tl.store(ends, S, mask=inside & final)
        if K > BK:
            tl.store(ends + BK * V, S2, mask=inside2 & final)
