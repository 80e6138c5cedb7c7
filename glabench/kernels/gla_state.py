"""The state pass: the states between chunks, forwards, and their gradients, backwards (GLA §4.1, eq. 2)."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    NONE,
    head_decays,
    kept_share,
    load_tile,
    next_state,
    power2,
    row_bounds,
    store_state,
)


@triton.jit(do_not_specialize=["T", "N", "scale"])
def state_kernel(  # noqa: C901  most branches are constants: one kernel for all gates, both ways
    k,
    v,
    g,
    total,
    reach,
    h,
    first,
    last,
    lost,
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
    """Carry the state of one head of one row over its chunks, and KEEP it for each.

    Rows in SEGMENTS: without KEEP, a segment's own state goes to `last` and its decay to `lost`, but for
    the segment that no other follows; with KEEP, `first` has a state for each segment.

    Math:   S' = e^(b_C) S + sum_j e^(b_C - b_j) k_j v_j^T; REVERSE takes q, do, e^(b_j) and runs back.
            With gates a channel, k and q come from scale_kernel, and S is carried as it is stored.
    Grid:   K / BK, V / BV, rows * H, the first fastest; a program owns [BV, BK] of a state transposed.
    HBM:    reads k V / BV and v K / BK times; writes K V / C elements a token and head.
    Stable: fp32 carry; exponents are sums of gates.
    Source: GLA eq. 2, §4.2.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    kb, vb, rh = pid % NK, pid // NK % NV, (pid // (NK * NV)).to(tl.int64)
    row, head = rh // H, rh % H
    low, high, chunk0, chunks = row_bounds(row, bounds, offsets, T, N, PACKED)
    end = 0 if REVERSE else SEGMENTS - 1  # the segment that no other follows
    if not KEEP:
        chunks = tl.where(row % SEGMENTS == end, 0, chunks)
    rows = tl.arange(0, C)
    ks, vs = kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    whole = ks[None, :] * V + vs[:, None]  # of [K, V], as states come and go
    inside = (ks < K)[None, :] & (vs < V)[:, None]
    S = (
        tl.load(first + rh * K * V + whole, mask=inside, other=0.0)
        if HAS_FIRST
        else tl.zeros([BV, BK], tl.float32)
    )
    decayed = tl.zeros([BK], tl.float32)
    TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16  # float16 could not hold what decays scale
    sums, lowest = tl.zeros([BK], tl.float32), 0.0
    if GATE == CHANNEL:
        at = (chunk0 + (chunks - 1 if REVERSE else 0)) * H + head
        sums = tl.load(total + at * K + ks, mask=(ks < K) & (chunks > 0), other=0.0)
        lowest = tl.load(reach + at * NK + kb, mask=chunks > 0, other=0.0)
        S = S * power2(kept_share(sums))[None, :]
    for n in range(chunks):
        m = chunks - 1 - n if REVERSE else n
        start = low + m * C
        count = tl.minimum(high - start, C).to(tl.int32)
        at = (chunk0 + m) * H + head  # of this chunk and head
        token = start * H + head
        tile = load_tile(k + token * K, rows, count, H * K, kb * BK, K, BK).to(TYPE)
        value = load_tile(v + token * V, rows, count, H * V, vb * BV, V, BV).to(TYPE)
        if GATE == CHANNEL:
            if KEEP:
                store_state(h + at * K * V, S, vb * BV, kb * BK, V, K, BV, BK)
            decayed += sums
            more = chunks - 1 - n > 0  # what comes is loaded a chunk ahead: nothing waits for it
            ahead = (chunk0 + (m - 1 if REVERSE else m + 1)) * H + head
            coming = tl.load(total + ahead * K + ks, mask=(ks < K) & more, other=0.0)
            S = next_state(S, value, tile, sums, kept_share(coming), lowest, PRECISION)
            sums, lowest = coming, tl.load(reach + ahead * NK + kb, mask=more, other=0.0)
        else:
            if KEEP:
                store_state(h + at * K * V, S, vb * BV, kb * BK, V, K, BV, BK)
            if GATE != NONE:
                from_start, to_end, lost_here = head_decays(g, total, at, head, rows, count, GATE, C)
                S = S * power2(lost_here)
                decayed += lost_here
                tile = (tile * power2(from_start if REVERSE else to_end)[:, None]).to(tile.dtype)
            if REVERSE:
                S += scale * tl.dot(tl.trans(value), tile, input_precision=PRECISION)
            else:
                S = tl.dot(tl.trans(value), tile, S, input_precision=PRECISION)
    if not KEEP:
        tl.store(last + rh * K * V + whole, S, mask=inside)
        if vb == 0:
            tl.store(lost + rh * K + ks, power2(decayed), mask=ks < K)
    elif HAS_LAST:
        inside = inside & (row % SEGMENTS == end)
        tl.store(last + (row // SEGMENTS * H + head) * K * V + whole, S, mask=inside)
