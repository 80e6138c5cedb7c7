"""What all later kernels share, made once: q and k times their decays (GLA §4.3), or a head's decays."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    LIMIT,
    LOG2E,
    UNITS,
    after,
    before,
    centred,
    chunk_bounds,
    kept_share,
    load_tile,
    power2,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "N", "scale"])
def scale_kernel(
    q,
    k,
    g,
    total,
    reach,
    q_out,
    k_out,
    chunks,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scaled q and k of one chunk, for BK key channels, and the chunk's log decays, base 2.

    Math:   scale q e^(b_i - r), k e^(b_C - b_i - r), r = b_C / 2, but at least -LIMIT (base 2): states are
            stored times e^r. Scores of channels that lose more than 2^(2 LIMIT), the hard ones, lack sense
            so and are taken elsewhere.
    Grid:   K / BK, H, chunks, the first fastest.
    HBM:    reads q, k, g once, writes both products once.
    Stable: exponents are sums of gates, in 2^+-LIMIT; `reach` is the least total of the tile.
    Source: GLA §4.3, with one reference a chunk.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    kb, head, chunk = pid % NK, pid // NK % H, (pid // (NK * H)).to(tl.int64)
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows, cols = tl.arange(0, C), kb * BK + tl.arange(0, BK)
    token, at = (start * H + head) * K, chunk * H + head
    gates = load_tile(g + token, rows, count, H * K, kb * BK, K, BK)
    x = load_tile(q + token, rows, count, H * K, kb * BK, K, BK)
    y = load_tile(k + token, rows, count, H * K, kb * BK, K, BK)
    sums = tl.sum(gates.to(tl.float32), 0) * LOG2E
    lowest = tl.min(sums, 0)
    tl.store(total + at * K + cols, sums, mask=cols < K)
    tl.store(reach + at * NK + kb, lowest)
    up = centred(gates, C, PRECISION)
    down = -up
    if lowest < -2 * LIMIT:
        hard, kept = (sums < -2 * LIMIT)[None, :], kept_share(sums)[None, :]
        up = tl.where(hard, before(gates, C, PRECISION) - kept, up)
        down = tl.where(hard, after(gates, C, PRECISION) - kept, down)
    store_tile(q_out + token, x * power2(up) * scale, rows, count, H * K, kb * BK, K, BK)
    store_tile(k_out + token, y * power2(down), rows, count, H * K, kb * BK, K, BK)


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
    gates = tl.maximum(gates.to(tl.float64) * LOG2E, -256.0)
    before = tl.cumsum(gates, 0)
    after = tl.sum(gates, 0)[None, :] - before
    at = (chunk * H + heads) * C
    tl.store(sums + 2 * at + rows, before.to(tl.float32), mask=heads < H)
    tl.store(sums + 2 * at + C + rows, after.to(tl.float32), mask=heads < H)
    tl.store(units + at + rows, tl.floor(before * (UNITS / C) + 0.5).to(tl.int32), mask=heads < H)
