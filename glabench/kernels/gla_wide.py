"""A pass that stores no states, in one kernel: scores come from memory, and keys come first.

As gla_carry, for up to 256 key channels: without scores to make, and with a state [K, V] whose products all
have 64 rows or more, a program's registers hold four times the state.
"""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    FIXED,
    HEAD,
    LIMIT,
    NONE,
    head_decays,
    kept_share,
    load_scores,
    load_tile,
    power2,
    row_bounds,
    store_tile,
)


@triton.jit
def least(reach, at, exists, TILES: tl.constexpr):
    """The least total decay of a chunk and head, if it exists."""
    found = 0.0
    for tile in tl.static_range(TILES):
        found = tl.minimum(found, tl.load(reach + at * TILES + tile, mask=exists, other=0.0))
    return found


@triton.jit(do_not_specialize=["T", "N", "scale"])
def wide_kernel(  # noqa: C901  most branches are constants: one kernel with gates and without, both ways
    q,
    k,
    v,
    g,
    total,
    reach,
    scores,
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
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    APART: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o of one head of one row, for BV of its value channels and all BK >= K keys'.

    Math:   o = q S + A v, S' = e^(b_C) S + k^T v; with gates a channel q and k come from scale_kernel with
            decays and scale, and S is as it is stored; a head's gates are taken here, but for A, the scores.
    Grid:   V / BV, H, rows, the first fastest.
    HBM:    reads q, k and scores V / BV times and v once; writes o.
    Stable: fp32 carry. The output of chunks with a hard tile is left to other kernels.
    Source: GLA §4.1, the form without materialisation; eq. 2 and 3.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16  # float16 could not hold what decays scale
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    vb, head, row = pid % NV, pid // NV % H, (pid // (NV * H)).to(tl.int64)
    low, high, chunk0, chunks = row_bounds(row, bounds, offsets, T, N, PACKED)
    rows = tl.arange(0, C)
    ks, vs = tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    whole = ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        S = tl.load(first + (row * H + head) * K * V + whole, mask=inside, other=0.0)
    sums, lowest = tl.zeros([BK], tl.float32), 0.0
    if GATE == CHANNEL:
        at = chunk0 * H + head
        sums = tl.load(total + at * K + ks, mask=(ks < K) & (chunks > 0), other=0.0)
        lowest = least(reach, at, chunks > 0, TILES)
    factor = power2(kept_share(sums))  # the state's, when its chunk comes
    for n in range(chunks):
        start = low + n * C
        count = tl.minimum(high - start, C).to(tl.int32)
        at = (chunk0 + n) * H + head
        token = start * H + head
        value = load_tile(v + token * V, rows, count, H * V, vb * BV, V, BV).to(TYPE)
        x = load_tile(q + token * K, rows, count, H * K, 0, K, BK).to(TYPE)
        y = load_tile(k + token * K, rows, count, H * K, 0, K, BK).to(TYPE)
        A = load_scores(scores, at, C, False)
        own = value
        if GATE == FIXED or GATE == HEAD:  # noqa: SIM109
            from_start, to_end, lost = head_decays(g, total, at, head, rows, count, GATE, C)
            own = (value * power2(to_end)[:, None]).to(TYPE)
        if GATE == CHANNEL:
            S = S * factor[:, None]
        out = tl.dot(x, S.to(TYPE), input_precision=PRECISION)
        if GATE == CHANNEL:
            more = chunks - 1 - n > 0  # what comes is loaded a chunk ahead: nothing waits for it
            ahead = at + H
            coming = tl.load(total + ahead * K + ks, mask=(ks < K) & more, other=0.0)
            kept = kept_share(sums)
            if lowest < -2 * LIMIT:
                S = S * power2(sums - 2 * kept)[:, None]
            factor = power2(kept + kept_share(coming))
            sums, lowest = coming, least(reach, ahead, more, TILES)
        elif GATE == FIXED or GATE == HEAD:  # noqa: SIM109
            S = S * power2(lost)
        S = tl.dot(tl.trans(y), own, S, input_precision=PRECISION)
        if GATE == FIXED or GATE == HEAD:  # noqa: SIM109
            out *= (power2(from_start) * scale)[:, None]
        elif GATE == NONE:
            out *= scale
        if APART:  # a product that adds to another is not shared out among eight warps, but done twice
            inner = tl.dot(A.to(TYPE), value, input_precision=PRECISION)
            out += tl.where((rows < count)[:, None], inner, 0.0)
        else:
            out = tl.dot(A.to(TYPE), value, out, input_precision=PRECISION)
        store_tile(o + token * V, out, rows, count, H * V, vb * BV, V, BV)
    if HAS_LAST:
        S = S * factor[:, None] if GATE == CHANNEL else S
        tl.store(last + (row * H + head) * K * V + whole, S, mask=inside)
