"""The gradients of q, k and g of each chunk, from the states before it and the state gradients after it."""

import triton
import triton.language as tl

from glabench.kernels.gla_tiles import (
    CHANNEL,
    HEAD,
    LEVELS,
    LIMIT,
    NONE,
    after,
    any_hard,
    before,
    centred,
    chunk_bounds,
    decayed,
    head_decays,
    kept_share,
    level_decays,
    level_pairs,
    load_channels,
    load_state,
    load_tile,
    power2,
    store_tile,
)


@triton.jit
def sums_to_end(x, C: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of x [C, BK] from each token to the chunk's end; 16-bit operands go in two parts."""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    later = tl.where(s >= i, 1.0, 0.0).to(OPERAND)
    high = x.to(OPERAND)
    found = tl.dot(later, high, input_precision=PRECISION)
    if tl.float32 != OPERAND:
        found = tl.dot(later, (x - high.to(tl.float32)).to(OPERAND), found)
    return found


@triton.jit
def hard_gradients(x, y, g, dA, dq, dk, C: tl.constexpr, PRECISION: tl.constexpr):
    """Add a hard tile's part inside the chunk to dq and dk; also the terms of its gates' gradient."""
    terms = tl.zeros_like(dq)
    for level in range(LEVELS):
        p, e = level_decays(g, level, C, PRECISION)
        p, e = power2(p), power2(e)
        xp, ye = (x * p).to(x.dtype), (y * e).to(x.dtype)
        part = tl.where(level_pairs(level, C, False), dA, 0.0).to(x.dtype)
        to_q = tl.dot(part, ye, input_precision=PRECISION)
        to_k = tl.dot(tl.trans(part), xp, input_precision=PRECISION)
        dq += to_q * p
        dk += to_k * e
        terms += xp * to_q - ye * to_k
    return dq, dk, terms


@triton.jit
def gradient_tile(
    kb,
    head,
    chunk,
    q,
    k,
    v,
    g,
    do,
    total,
    reach,
    h,
    dh,
    dq_out,
    dk_out,
    dg_out,
    chunks,
    scale,
    T,
    N,
    tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HARD: tl.constexpr,
):
    """dq, dk and dg of one chunk and head, for BK of its key channels: see gradient_kernel."""
    TYPE: tl.constexpr = h.dtype.element_ty
    start, count = chunk_bounds(chunk, chunks, T, N, C, PACKED)
    rows = tl.arange(0, C)
    token = start * H + head
    v += token * V
    do += token * V
    at = chunk * H + head
    h += at * K * V
    dh += at * K * V
    col = kb * BK
    dA = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    crossed = tl.zeros([BK, BK], tl.float32)  # only its diagonal is wanted: a product costs no registers
    for vc in range(0, V, BV):
        value = load_tile(v, rows, count, H * V, vc, V, BV).to(TYPE)
        grad = load_tile(do, rows, count, H * V, vc, V, BV).to(TYPE)
        state = load_state(h, vc, col, V, K, BV, BK)
        dstate = load_state(dh, vc, col, V, K, BV, BK)
        dA = tl.dot(grad, tl.trans(value), dA, input_precision=PRECISION)
        dq = tl.dot(grad, state, dq, input_precision=PRECISION)
        dk = tl.dot(value, dstate, dk, input_precision=PRECISION)
        if GATE >= HEAD:
            crossed = tl.dot(tl.trans(state), dstate, crossed, input_precision=PRECISION)
    x = load_tile(q + token * K, rows, count, H * K, col, K, BK).to(TYPE)
    y = load_tile(k + token * K, rows, count, H * K, col, K, BK).to(TYPE)
    ks = tl.arange(0, BK)
    carried = tl.sum(tl.where(ks[:, None] == ks[None, :], crossed, 0.0), 0)
    dA = tl.where(rows[:, None] >= rows[None, :], dA, 0.0)
    if GATE != CHANNEL or HARD:  # else the scale is in q
        dA *= scale
        dq *= scale
    if GATE == CHANNEL:
        gates = load_tile(g + token * K, rows, count, H * K, col, K, BK)
        if not HARD:
            decay = centred(gates, C, PRECISION)
            carried += tl.sum(y * dk, 0)
            part = dA.to(x.dtype)
            dk = tl.dot(tl.trans(part), x, dk, input_precision=PRECISION)
            store_tile(dk_out + token * K, dk * power2(-decay), rows, count, H * K, col, K, BK)
            terms = y * dk
            dq = tl.dot(part, y, dq, input_precision=PRECISION)
            store_tile(dq_out + token * K, dq * (power2(decay) * scale), rows, count, H * K, col, K, BK)
            terms = x * dq - terms
        else:
            sums = load_channels(total + at * K, col, K, BK)
            r = kept_share(sums)
            carried *= power2(sums - 2 * r)
            up = power2(before(gates, C, PRECISION) - r[None, :])
            down = power2(after(gates, C, PRECISION) - r[None, :])
            dq *= up
            dk *= down
            gained = y * dk
            carried += tl.sum(gained, 0)
            terms = x * dq - gained
            dq, dk, inner = hard_gradients(x, y, gates, dA, dq, dk, C, PRECISION)
            terms += inner
            store_tile(dq_out + token * K, dq, rows, count, H * K, col, K, BK)
            store_tile(dk_out + token * K, dk, rows, count, H * K, col, K, BK)
        dg = sums_to_end(terms, C, x.dtype, PRECISION) + carried[None, :]
        store_tile(dg_out + token * K, dg, rows, count, H * K, col, K, BK)
    elif GATE == NONE:
        part = dA.to(x.dtype)
        dq = tl.dot(part, y, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(part), x, dk, input_precision=PRECISION)
    else:
        from_start, to_end, lost = head_decays(g, total, at, head, rows, count, GATE, C)
        dq *= power2(from_start)[:, None]
        dk *= power2(to_end)[:, None]
        part = decayed(dA, from_start, lost, reach, at, 1.0, GATE, False, C).to(x.dtype)
        if GATE == HEAD:
            passed = power2(lost) * tl.sum(carried, 0) + tl.sum(tl.sum(y * dk, 1), 0)
        dq = tl.dot(part, y, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(part), x, dk, input_precision=PRECISION)
        if GATE == HEAD:
            terms = tl.sum(x * dq - y * dk, 1)
            later = rows[:, None] <= rows[None, :]
            dg = tl.sum(tl.where(later, terms[None, :], 0.0), 1) + passed
            tl.store(dg_out + kb * tokens * H + token + rows * H, dg, mask=rows < count)
    if GATE != CHANNEL:
        store_tile(dq_out + token * K, dq, rows, count, H * K, col, K, BK)
        store_tile(dk_out + token * K, dk, rows, count, H * K, col, K, BK)


@triton.jit(do_not_specialize=["T", "N", "tokens", "pairs", "scale"])
def gradient_kernel(
    q,
    k,
    v,
    g,
    do,
    total,
    reach,
    h,
    dh,
    dq_out,
    dk_out,
    dg_out,
    chunks,
    scale,
    T,
    N,
    tokens,
    pairs,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HARD: tl.constexpr,
):
    """dq, dk and dg of one chunk, for BK of its key channels; gates of heads get one part a K block.

    Math:   dA_ij = do_i . v_j; dq = P (do S^T) + dA k~; dk = X (v dS^T) + dA^T q~;
            dg_t = sum_{i >= t} (q dq - k dk)_i, k dk without its state part for j >= t, + rowsum(S' dS).
    Grid:   K / BK, H, chunks, the first fastest: programs that share v and do run together. HARD: any number
            of programs, which look for hard tiles among the `pairs` of chunk and head.
    HBM:    reads v, do K / BK times, q, k, g and both states once; writes dq, dk, dg once. With gates a
            channel q and k come scaled, but for HARD.
    Stable: q dq and k dk come from the rounded operands of the products, so that pairs cancel exactly.
    Source: GLA §4.4 and appendix; eq. 4 for the scores.
    """
    pid = tl.program_id(0)
    NK: tl.constexpr = (K + BK - 1) // BK
    if HARD:
        each = tl.cdiv(pairs, tl.num_programs(0))
        first = pid.to(tl.int64) * each
        count = tl.minimum(each, pairs - first)
        if any_hard(reach + first * NK, count * NK, 64):
            for i in range(count * NK):
                tile = first * NK + i
                if tl.load(reach + tile) < -2 * LIMIT:
                    pair = tile // NK
                    gradient_tile(
                        tile % NK, pair % H, pair // H, q, k, v, g, do, total, reach, h, dh,
                        dq_out, dk_out, dg_out, chunks, scale, T, N, tokens,
                        H, K, V, C, BK, BV, GATE, PACKED, PRECISION, True,
                    )  # fmt: skip
    else:
        kb, head, chunk = pid % NK, pid // NK % H, (pid // (NK * H)).to(tl.int64)
        if GATE == CHANNEL:
            lowest = tl.load(reach + (chunk * H + head) * NK + kb)
            if lowest < -2 * LIMIT:
                return
        gradient_tile(
            kb, head, chunk, q, k, v, g, do, total, reach, h, dh,
            dq_out, dk_out, dg_out, chunks, scale, T, N, tokens,
            H, K, V, C, BK, BV, GATE, PACKED, PRECISION, False,
        )  # fmt: skip
