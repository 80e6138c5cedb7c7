"""The output of each chunk from its scores and the state before it; with roles swapped, v's gradient."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    FIXED,
    HEAD,
    LIMIT,
    after,
    any_hard,
    before,
    chunk_bounds,
    decayed,
    halved_scores,
    head_decays,
    load_channels,
    load_gates,
    load_scores,
    load_state,
    load_tile,
    power2,
    store_tile,
)


@triton.jit
def output_tile(
    vb,
    head,
    chunk,
    q,
    k,
    v,
    g,
    total,
    reach,
    scores,
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
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HARD: tl.constexpr,
    SCORES: tl.constexpr,
):
    """o of one chunk and head, for BV of its value channels: see output_kernel."""
    TYPE: tl.constexpr = h.dtype.element_ty
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows = tl.arange(0, C)
    token = start * H + head
    q += token * K
    k += token * K
    at = chunk * H + head
    h += at * K * V
    i, j = rows[:, None], rows[None, :]
    allowed = i <= j if REVERSE else i >= j
    A = load_scores(scores, at, C, REVERSE) if SCORES else tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    if HARD:
        g += token * K
    for col in range(0, K, BK):
        x = load_tile(q, rows, count, H * K, col, K, BK).to(TYPE)
        if not SCORES:
            y = load_tile(k, rows, count, H * K, col, K, BK).to(TYPE)
        state = load_state(h, vb * BV, col, V, K, BV, BK)
        if HARD:
            gates = load_gates(g, rows, count, H * K, col, K, BK)
            A += halved_scores(x, y, gates, C, REVERSE, PRECISION)
            sums = load_channels(total + at * K, col, K, BK)
            decay = after(gates, C, PRECISION) if REVERSE else before(gates, C, PRECISION)
            decay -= tl.maximum(sums * 0.5, -LIMIT)[None, :]
            x = (x * power2(decay)).to(x.dtype)
        out = tl.dot(x, tl.trans(state), out, input_precision=PRECISION)
        if not HARD and not SCORES:
            A = tl.dot(x, tl.trans(y), A, input_precision=PRECISION)
    # scores of long chunks go to their product as they are stored, which halves its registers; those of short
    # ones by way of registers, since it is shared memory that bounds their programs
    AS_STORED: tl.constexpr = SCORES and C > 64
    if not AS_STORED:
        A = tl.where(allowed, A, 0.0)
    to_out = 1.0 if REVERSE else scale
    if GATE == FIXED or GATE == HEAD:  # noqa: SIM109
        from_start, to_end, lost = head_decays(g, total, at, head, rows, count, GATE, C)
        to_here = to_end if REVERSE else from_start
        out *= (power2(to_here) * to_out)[:, None]
        A = decayed(A, to_here, lost, reach, at, scale, GATE, REVERSE, C)
    elif not AS_STORED:
        out *= to_out
        A *= scale
    value = load_tile(v + token * V, rows, count, H * V, vb * BV, V, BV).to(TYPE)
    out = tl.dot(A.to(value.dtype), value, out, input_precision=PRECISION)
    store_tile(o + token * V, out, rows, count, H * V, vb * BV, V, BV)


@triton.jit(do_not_specialize=["T", "N", "pairs", "scale"])
def output_kernel(
    q,
    k,
    v,
    g,
    total,
    reach,
    scores,
    h,
    o,
    chunks,
    scale,
    T,
    N,
    pairs,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HARD: tl.constexpr,
    SCORES: tl.constexpr,
):
    """o of one chunk, for BV of its value channels; REVERSE gives dv from q = k, k = q, v = do, h = dh.

    Math:   o = scale ((q P) S + A v), A_ij = q_i . k_j e^(b_i - b_j), j <= i; dv = (k X) dS + scale A^T do.
    Grid:   V / BV, H, chunks, the first fastest: programs that share q, k and g run together. HARD: any
            number of programs, which look for hard tiles among the `pairs` of chunk and head.
    HBM:    reads q, k V / BV times, v and the state once; writes o once. SCORES are read in place of k.
    Stable: q and k come scaled where gates are a channel; HARD takes them raw, and the scores by halving.
    Source: GLA eq. 3-4, §4.3.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    if HARD:
        each = tl.cdiv(pairs, tl.num_programs(0))
        first = pid.to(tl.int64) * each
        count = tl.minimum(each, pairs - first)
        if any_hard(reach + first * NK, count * NK, 64):
            for i in range(count):
                pair = first + i
                if any_hard(reach + pair * NK, NK, 64):
                    for vb in range(NV):
                        output_tile(
                            vb, pair % H, pair // H, q, k, v, g, total, reach, scores, h, o, chunks, scale,
                            T, N, H, K, V, C, BK, BV, GATE, REVERSE, PACKED, PRECISION, True, False,
                        )  # fmt: skip
    else:
        vb, head, chunk = pid % NV, pid // NV % H, (pid // (NV * H)).to(tl.int64)
        if GATE == CHANNEL:
            hard = any_hard(reach + (chunk * H + head) * NK, NK, 16)
            if hard:
                return
        output_tile(
            vb, head, chunk, q, k, v, g, total, reach, scores, h, o, chunks, scale, T, N,
            H, K, V, C, BK, BV, GATE, REVERSE, PACKED, PRECISION, False, SCORES,
        )  # fmt: skip
