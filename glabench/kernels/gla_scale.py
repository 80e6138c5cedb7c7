"""q and k times their decays, once for all later kernels: those run as if there were no gates (GLA §4.3)."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    LIMIT,
    LOG2E,
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
