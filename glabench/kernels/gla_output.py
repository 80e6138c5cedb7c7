"""The output of each chunk from its scores and the state before it; with roles swapped, v's gradient."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    LIMIT,
    NONE,
    after,
    before,
    centred,
    chunk_bounds,
    halved_scores,
    head_after,
    head_before,
    head_between,
    head_gates,
    load_channels,
    load_state,
    load_tile,
    power2,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "N", "scale"])
def output_kernel(
    q,
    k,
    v,
    g,
    total,
    reach,
    h,
    o,
    chunks,
    scale,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NK2: tl.constexpr,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o of one chunk, for BV of its value channels; REVERSE gives dv from q = k, k = q, v = do, h = dh.

    Math:   o = scale ((q P) S + A v), A_ij = q_i . k_j e^(b_i - b_j), j <= i; dv = (k X) dS + scale A^T do.
    Grid:   V / BV, H, chunks, the first fastest: programs that share q, k and g run together.
    HBM:    reads q, k, g V / BV times, v and the state once; writes o once.
    Stable: centred decays; a chunk with a hard tile takes its scores by halving.
    Source: GLA eq. 3-4, §4.3.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    vb, head, chunk = pid % NV, pid // NV % H, (pid // (NV * H)).to(tl.int64)
    TYPE: tl.constexpr = h.dtype.element_ty
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows = tl.arange(0, C)
    token = start * H + head
    q += token * K
    k += token * K
    at = chunk * H + head
    h += at * K * V
    A = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    i, j = rows[:, None], rows[None, :]
    allowed = i <= j if REVERSE else i >= j
    if GATE == CHANNEL:
        g += token * K
        blocks = tl.arange(0, NK2)
        lowest = tl.load(reach + at * NK + blocks, mask=blocks < NK, other=0.0)
        if tl.min(lowest, 0) >= -2 * LIMIT:
            for col in range(0, K, BK):
                x = load_tile(q, rows, count, H * K, col, K, BK).to(TYPE)
                y = load_tile(k, rows, count, H * K, col, K, BK).to(TYPE)
                gates = load_tile(g, rows, count, H * K, col, K, BK)
                state = load_state(h, vb * BV, col, V, K, BV, BK)
                decay = centred(gates, C, PRECISION)
                if REVERSE:
                    decay = -decay
                x = (x * power2(decay)).to(x.dtype)
                y = (y * power2(-decay)).to(x.dtype)
                out = tl.dot(x, tl.trans(state), out, input_precision=PRECISION)
                A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
        else:
            for col in range(0, K, BK):
                x = load_tile(q, rows, count, H * K, col, K, BK).to(TYPE)
                y = load_tile(k, rows, count, H * K, col, K, BK).to(TYPE)
                gates = load_tile(g, rows, count, H * K, col, K, BK)
                A += halved_scores(x, y, gates, C, REVERSE, PRECISION)
                state = load_state(h, vb * BV, col, V, K, BV, BK)
                sums = load_channels(total + at * K, col, K, BK)
                decay = after(gates, C, PRECISION) if REVERSE else before(gates, C, PRECISION)
                decay -= tl.maximum(sums * 0.5, -LIMIT)[None, :]
                x = (x * power2(decay)).to(x.dtype)
                out = tl.dot(x, tl.trans(state), out, input_precision=PRECISION)
    else:
        for col in range(0, K, BK):
            x = load_tile(q, rows, count, H * K, col, K, BK).to(TYPE)
            y = load_tile(k, rows, count, H * K, col, K, BK).to(TYPE)
            state = load_state(h, vb * BV, col, V, K, BV, BK)
            out = tl.dot(x, tl.trans(state), out, input_precision=PRECISION)
            A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
        if GATE != NONE:
            gates = head_gates(g, start, head, rows, count, H, GATE, C)
            decay = head_after(gates, C) if REVERSE else head_before(gates, C)
            out *= power2(decay)[:, None]
            A *= head_between(gates, GATE, REVERSE, C)
    A = tl.where(allowed, A * scale, 0.0)
    if not REVERSE:
        out *= scale
    value = load_tile(v + token * V, rows, count, H * V, vb * BV, V, BV).to(TYPE)
    out = tl.dot(A.to(value.dtype), value, out, input_precision=PRECISION)
    store_tile(o + token * V, out, rows, count, H * V, vb * BV, V, BV)
