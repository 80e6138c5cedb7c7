"""The state pass: the states between chunks, forwards, and their gradients, backwards (GLA §4.1, eq. 2)."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    LIMIT,
    LOG2E,
    NONE,
    after,
    before,
    head_after,
    head_before,
    head_gates,
    load_channels,
    load_tile,
    power2,
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
    PRECISION: tl.constexpr,
):
    """Carry the state of one head of one row over its chunks, and KEEP it for each.

    Rows in SEGMENTS: without KEEP, a segment's own state goes to `last` and its decay to `lost`, but for
    the segment that no other follows; with KEEP, `first` has a state for each segment.

    Math:   S' = e^(b_C) S + sum_j e^(b_C - b_j) k_j v_j^T; REVERSE takes q, do, e^(b_j) and runs back.
    Grid:   K / BK, V / BV, rows * H, the first fastest; a program owns [BV, BK] of a state transposed.
    HBM:    reads k, v, g V / BV and K / BK times; writes K V / C elements a token and head.
    Stable: fp32 carry; exponents are sums of gates. Stored times 2^r, r = max(total / 2, -LIMIT).
    Source: GLA eq. 2, §4.2.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    kb, vb, rh = pid % NK, pid // NK % NV, (pid // (NK * NV)).to(tl.int64)
    row, head = rh // H, rh % H
    if PACKED:
        low, high = tl.load(bounds + row).to(tl.int64), tl.load(bounds + row + 1).to(tl.int64)
        chunk0 = tl.load(offsets + row)
        chunks = (tl.load(offsets + row + 1) - chunk0).to(tl.int32)
    else:
        low, high, chunk0, chunks = row * T, row * T + T, row * N, N
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
    TYPE: tl.constexpr = h.dtype.element_ty
    for n in range(chunks):
        m = chunks - 1 - n if REVERSE else n
        start = low + m * C
        count = tl.minimum(high - start, C).to(tl.int32)
        at = (chunk0 + m) * H + head  # of this chunk and head
        token = start * H + head
        tile = load_tile(k + token * K, rows, count, H * K, kb * BK, K, BK).to(TYPE)
        value = load_tile(v + token * V, rows, count, H * V, vb * BV, V, BV).to(TYPE)
        if GATE == CHANNEL:
            gates = load_tile(g + token * K, rows, count, H * K, kb * BK, K, BK)
            if REVERSE:
                sums = load_channels(total + at * K, kb * BK, K, BK)
                decay = before(gates, C, PRECISION)
            else:
                sums = tl.sum(gates.to(tl.float32), 0) * LOG2E
                decay = after(gates, C, PRECISION)
                if KEEP and vb == 0:
                    tl.store(total + at * K + ks, sums, mask=ks < K)
                    tl.store(reach + at * NK + kb, tl.min(sums, 0))
            if KEEP:
                kept = S * power2(tl.maximum(sums * 0.5, -LIMIT))[None, :]
                store_state(h + at * K * V, kept, vb * BV, kb * BK, V, K, BV, BK)
            decayed += sums
            S = S * power2(sums)[None, :]
            tile = (tile * power2(decay)).to(tile.dtype)
        else:
            if KEEP:
                store_state(h + at * K * V, S, vb * BV, kb * BK, V, K, BV, BK)
            if GATE != NONE:
                gates = head_gates(g, start, head, rows, count, H, GATE, C)
                sums = tl.sum(gates.to(tl.float32), 0) * LOG2E
                S = S * power2(sums)
                decayed += sums
                decay = head_before(gates, C) if REVERSE else head_after(gates, C)
                tile = (tile * power2(decay)[:, None]).to(tile.dtype)
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
