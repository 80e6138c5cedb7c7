"""What all later kernels share, made once: q and k times their decays (GLA §4.3), a head's decays, scores."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    FIXED,
    HEAD,
    LIMIT,
    LOG2E,
    UNITS,
    after,
    before,
    centred,
    chunk_bounds,
    decayed,
    head_decays,
    kept_share,
    load_gates,
    load_tile,
    power2,
    store_scores,
    store_tile,
)


@triton.jit
def scale_hard_channels(
    q,
    k,
    g,
    q_out,
    k_out,
    count,
    col,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Overwrite scaled q and k in the hard ones of BK channels, see scale_kernel."""
    rows, cols = tl.arange(0, C), col + tl.arange(0, BK)
    gates = load_gates(g, rows, count, H * K, col, K, BK)
    sums = tl.sum(gates.to(tl.float32), 0) * LOG2E
    kept = kept_share(sums)[None, :]
    where = rows[:, None] * H * K + cols[None, :]
    mask = (rows < count)[:, None] & (cols < K)[None, :] & (sums < -2 * LIMIT)[None, :]
    x = tl.load(q + where, mask=mask, other=0.0) * power2(before(gates, C, PRECISION) - kept) * scale
    tl.store(q_out + where, x.to(q_out.dtype.element_ty), mask=mask)
    y = tl.load(k + where, mask=mask, other=0.0) * power2(after(gates, C, PRECISION) - kept)
    tl.store(k_out + where, y.to(k_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "N", "scale"])
def scale_kernel(
    q,
    k,
    g,
    total,
    reach,
    q_out,
    k_out,
    scores,
    chunks,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    PACKED: tl.constexpr,
    SCORES: tl.constexpr,
    SCAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scaled q and k of one chunk and head, the chunk's log decays, base 2, and its SCORES.

    Math:   scale q e^(b_i - r), k e^(b_C - b_i - r), r = b_C / 2, but at least -LIMIT (base 2): states are
            stored times e^r; scores are their products. Those of channels that lose more than 2^(2 LIMIT),
            the hard ones, lack sense so and are taken elsewhere.
    Grid:   H, chunks, the first fastest.
    HBM:    reads q, k, g once, writes both products once, and C elements a token and head of scores.
    Stable: exponents are sums of gates, in 2^+-LIMIT; `reach` is the least total of each BK channels.
    Source: GLA §4.3, with one reference a chunk; eq. 4.
    """
    TYPE: tl.constexpr = q_out.dtype.element_ty
    NK: tl.constexpr = (K + BK - 1) // BK
    head, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows = tl.arange(0, C)
    token, at = (start * H + head) * K, chunk * H + head
    q += token
    k += token
    g += token
    q_out += token
    k_out += token
    least = 0.0
    A = tl.zeros([C, C], tl.float32)
    for kb in range(NK):
        col = kb * BK
        cols = col + tl.arange(0, BK)
        gates = load_tile(g, rows, count, H * K, col, K, BK)
        sums = tl.sum(gates.to(tl.float32), 0) * LOG2E
        lowest = tl.min(sums, 0)
        least = tl.minimum(least, lowest)
        tl.store(total + at * K + cols, sums, mask=cols < K)
        tl.store(reach + at * NK + kb, lowest)
        if SCAN:
            decay = tl.cumsum(gates.to(tl.float32), 0) * LOG2E - 0.5 * sums[None, :]
        else:
            decay = centred(gates, C, PRECISION)
        x = (load_tile(q, rows, count, H * K, col, K, BK) * power2(decay) * scale).to(TYPE)
        y = (load_tile(k, rows, count, H * K, col, K, BK) * power2(-decay)).to(TYPE)
        store_tile(q_out, x, rows, count, H * K, col, K, BK)
        store_tile(k_out, y, rows, count, H * K, col, K, BK)
        if SCORES:
            A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
    if SCORES:
        store_scores(scores, A, at, C)
    if least < -2 * LIMIT:
        tl.debug_barrier()  # what is overwritten may be another thread's
        for col in range(0, K, 16):  # few channels at a time: what is rare must not cost registers
            scale_hard_channels(q, k, g, q_out, k_out, count, col, scale, H, K, C, 16, PRECISION)


@triton.jit(do_not_specialize=["T", "N", "scale"])
def scores_kernel(
    q,
    k,
    g,
    total,
    reach,
    scores,
    chunks,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of one chunk and head without gates, or with one gate a head.

    Math:   A_ij = scale e^(b_i - b_j) q_i . k_j for j <= i, else 0.
    Grid:   H, chunks, the first fastest.
    HBM:    reads q and k once, writes C elements a token and head.
    Stable: see `decayed`.
    Source: GLA eq. 2; RetNet eq. 5.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16  # float16 could not hold what decays scale
    head, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows = tl.arange(0, C)
    token, at = (start * H + head) * K, chunk * H + head
    A = tl.zeros([C, C], tl.float32)
    for col in range(0, K, BK):
        x = load_tile(q + token, rows, count, H * K, col, K, BK).to(TYPE)
        y = load_tile(k + token, rows, count, H * K, col, K, BK).to(TYPE)
        A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
    A = tl.where(rows[:, None] >= rows[None, :], A, 0.0)  # before decays: they are infinite above it
    if GATE == FIXED or GATE == HEAD:  # noqa: SIM109
        from_start, _, lost = head_decays(g, total, at, head, rows, count, GATE, C)
        A = decayed(A, from_start, lost, reach, at, scale, GATE, False, C)
    else:
        A *= scale
    store_scores(scores, A, at, C)


@triton.jit(do_not_specialize=["T", "N"])
def sums_kernel(
    g,
    sums,
    units,
    chunks,
    T,
    N,
    H: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Running sums of one chunk's gates, for BH heads with one gate a token each, in base 2.

    Math:   sums [chunks, H, 2, C]: log decay through each token, and from after it to the chunk's end.
            units [chunks, H, C]: the former as integers of C / UNITS, whose differences are exact
            where those of float32 would lose a small gate beside a large one.
    Grid:   H / BH, chunks, the first fastest.
    HBM:    reads g once; writes 12 bytes a token and head.
    Stable: float64. Gates below 2^-256 are taken as that, which is 0 in float32, as is all beyond them.
    """
    pid = tl.program_id(0)
    NH: tl.constexpr = (H + BH - 1) // BH
    hb, chunk = pid % NH, (pid // NH).to(tl.int64)
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows, heads = tl.arange(0, C)[:, None], hb * BH + tl.arange(0, BH)[None, :]
    gates = tl.load(g + (start + rows) * H + heads, mask=(rows < count) & (heads < H), other=0.0)
    gates = gates.to(tl.float64) * LOG2E
    gates = tl.where(gates < -256.0, -256.0, gates)  # a maximum would take the NaN from a gate
    before = tl.cumsum(gates, 0)
    after = tl.sum(gates, 0)[None, :] - before
    at = (chunk * H + heads) * C
    tl.store(sums + 2 * at + rows, before.to(tl.float32), mask=heads < H)
    tl.store(sums + 2 * at + C + rows, after.to(tl.float32), mask=heads < H)
    tl.store(units + at + rows, tl.floor(before * (UNITS / C) + 0.5).to(tl.int32), mask=heads < H)
