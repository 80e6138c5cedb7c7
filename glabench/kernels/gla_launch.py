"""Memory and launches of the chunk kernels: forward and backward of one call, for every kind of gate."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glabench.kernels import ahead, gla_configs, gla_tiles, plan_files
from glabench.kernels.gla_carry import carry_kernel
from glabench.kernels.gla_chunks import (
    WIDE_BYTES,
    Chunks,
    chunks_of,
    multiprocessors,
    row_table,
    segments_in,
    segments_of,
    shared_memory,
)
from glabench.kernels.gla_configs import Launch, Plan, plan_for
from glabench.kernels.gla_exact import exact_kernel
from glabench.kernels.gla_gradient import gradient_kernel
from glabench.kernels.gla_output import output_kernel
from glabench.kernels.gla_scale import scale_kernel, scores_kernel, sums_kernel
from glabench.kernels.gla_state import state_kernel
from glabench.kernels.gla_wide import wide_kernel
from glabench.kernels.launching import do, launch, played, without_memory

NONE, FIXED, HEAD, CHANNEL = (getattr(gla_tiles, n).value for n in ("NONE", "FIXED", "HEAD", "CHANNEL"))
HARD_PROGRAMS = 2  # a multiprocessor: as many as reside there at once
CARRY_PROGRAMS = 0.75  # a multiprocessor, at least
FEW_PROGRAMS = 1.5  # a multiprocessor: below, narrower tiles that make more of them are faster
WIDE = gla_configs.WIDE


class Kept(NamedTuple):
    """What the backward pass takes from the forward.

    Chunk states [chunks, H, V, K]; for gates a channel also the chunks' log decays `totals` [chunks, H, K],
    their least in each tile, `reach` [chunks, H, K blocks], and q and k [B, T, H, K] times their decays; for
    gates a head, what sums_kernel makes of them, `totals` [chunks, H, 2, C] and `reach` [chunks, H, C].
    `scores` [chunks, H, C, C], with decays and scale, where keeps_scores.
    """

    states: Tensor | None
    totals: Tensor | None
    reach: Tensor | None
    q: Tensor
    k: Tensor
    scores: Tensor | None = None


NOTHING = Kept(*[None] * len(Kept._fields))  # of a forward pass that keeps nothing


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    gate: int,
    output_final_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """o [B, T, H, V], the final state [rows, H, K, V] or None, and, to `keep`, what backward needs."""
    inputs = (q, k, v, g, initial_state)
    how = {"scale": scale, "gate": gate, "output_final_state": output_final_state, "keep": keep}
    o, final, *kept = played(_forward, inputs, cu_seqlens, how, _whole)
    return o, final, Kept(*kept) if keep else None


def _whole(*tensors: Tensor | None, **how) -> None:
    """The launches of a call, and of its backward pass where it keeps what that needs, without memory.

    Memory is asked for by new_empty alone: other functions, for tensors without any, import symbolic algebra.
    """
    q, k, v, g, state = without_memory(tensors[:5])
    kept = _forward(q, k, v, g, state, tensors[5], **how)[2:]
    if how["keep"]:
        options = {"scale": how["scale"], "gate": how["gate"], "wants_d_initial": state is not None}
        _backward(v.new_empty(v.shape), None, q, k, v, g, *kept, tensors[5], **options)


def _forward(
    q, k, v, g, initial_state, cu_seqlens, *, scale, gate, output_final_state, keep
) -> tuple[Tensor | None, ...]:
    """o, the final state, and Kept, of Nones unless `keep`."""
    B, T, H, V = v.shape
    K = q.shape[-1]
    chunks = chunks_of(B, T, cu_seqlens, chunk_size(q, v, gate))
    final = q.new_empty(chunks.rows, H, K, V, dtype=torch.float32) if output_final_state else None
    o = v.new_empty(v.shape)
    carrier = carrier_of(q, v, gate, chunks, keep=keep)
    has_scores = carrier == WIDE or keeps_scores(q, v, gate)
    kept = scaled(q, k, v, g, chunks, scale=scale, gate=gate, has_scores=has_scores)
    if keep or carrier is None:
        kept = kept._replace(states=_empty_states(k, v, chunks))
    ends = (initial_state, final, cu_seqlens, chunks)
    how = {"scale": scale, "gate": gate, "reverse": False}
    run_pass(carrier, kept.q, kept.k, v, g, kept, kept.states, o, *ends, **how)
    if gate == CHANNEL:
        if kept.states is None:
            run_exact(q, k, v, g, kept, o, initial_state, cu_seqlens, chunks, scale=scale)
        else:
            run_output(q, k, v, g, kept, kept.states, o, chunks, **how, hard=True)
    return o, final, *(kept if keep else NOTHING)


def carrier_of(q: Tensor, v: Tensor, gate: int, chunks: Chunks, *, keep: bool) -> str | None:
    """Which kernel carries the state and makes the output: one that fits, and fills the device; or none.

    `keep`: the states are stored; so they are in a backward pass.
    """
    plan, least = _plan(q, v, gate), CARRY_PROGRAMS * multiprocessors(q.device)
    for carrier in carriers(q, v, gate, keep=keep):
        if carrier == WIDE:  # never in segments: it gains less than their first states cost
            programs = _programs(plan.wide, v, chunks.rows) * (shared_memory(q.device) >= WIDE_BYTES)
            fit = 2 if plan.wide.warps == 4 else 1  # on a multiprocessor, and both are needed
        else:
            programs, fit = _programs(plan.carry, v, chunks.rows), 1
            programs *= segments_of(programs, chunks, q.device)
        if programs >= fit * least:
            return carrier
    return None


def carriers(q: Tensor, v: Tensor, gate: int, *, keep: bool) -> tuple[str, ...]:
    """Kernels that hold a head's state of these widths, the faster first."""
    return gla_configs.carriers(_point(q, v, gate), _plan(q, v, gate).BK, keep)


def _programs(tile: Launch, v: Tensor, rows: int) -> int:
    """Programs of a kernel that carries a whole head's state, for so many rows."""
    return -(-v.shape[3] // tile.BV) * v.shape[2] * rows


def scaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    chunks: Chunks,
    *,
    scale: float,
    gate: int,
    has_scores: bool,
) -> Kept:
    """q and k, for gates a channel times their decays; what other kernels need to know of gates; scores."""
    plan, dtype = _plan(q, v, gate), state_dtype(q.dtype)
    T, H, K = q.shape[1:]
    scores = None
    if has_scores:
        scores = q.new_empty(chunks.total, H, plan.chunk, plan.chunk, dtype=dtype)
    constants = {"H": H, "K": K, "C": plan.chunk, "BK": plan.BK}
    if gate != CHANNEL:
        sums = _head_sums(g, chunks, plan) if gate == HEAD else (None, None)
        if scores is not None:
            constants |= {"GATE": gate, "PACKED": chunks.table is not None}
            constants |= {"WIDE": dtype != torch.bfloat16, "PRECISION": precision(q.dtype)}
            tensors, numbers = (q, k, g, *sums, scores, chunks.table), (scale, T, chunks.each)
            launch(scores_kernel, H * chunks.total, tensors, numbers, constants, plan.scale)
        return Kept(None, *sums, q, k, scores)
    blocks = key_blocks(q, v, gate)
    totals = k.new_empty(chunks.total, H, K, dtype=torch.float32)
    reach = k.new_empty(chunks.total, H, blocks, dtype=torch.float32)
    scaled_q, scaled_k = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)
    constants |= {"PACKED": chunks.table is not None, "SCORES": scores is not None}
    constants |= {"SCAN": sums_by_scans(plan.scale, plan.chunk), "PRECISION": precision(q.dtype)}
    tensors = (q, k, g, totals, reach, scaled_q, scaled_k, scores, chunks.table)
    launch(scale_kernel, H * chunks.total, tensors, (scale, T, chunks.each), constants, plan.scale)
    return Kept(None, totals, reach, scaled_q, scaled_k, scores)


def sums_by_scans(tile: Launch, chunk: int) -> bool:
    """Whether a launch sums over a chunk's tokens by scans: of products, warps share 16 rows or more each."""
    return tile.warps > max(4, chunk // 16)


def keeps_scores(q: Tensor, v: Tensor, gate: int) -> bool:
    """Whether the forward pass makes the scores once, for every kernel that follows: they cost no pass."""
    return gate == CHANNEL and key_blocks(q, v, gate) > 2


def _head_sums(g: Tensor, chunks: Chunks, plan: Plan) -> tuple[Tensor, Tensor]:
    """Launch sums_kernel: running sums of g [B, T, H], as float32 and as integers."""
    T, H = g.shape[1:]
    sums = g.new_empty(chunks.total, H, 2, plan.chunk, dtype=torch.float32)
    units = g.new_empty(chunks.total, H, plan.chunk, dtype=torch.int32)
    constants = {"H": H, "C": plan.chunk, "BH": heads_together(H), "PACKED": chunks.table is not None}
    programs = -(-H // constants["BH"]) * chunks.total
    launch(sums_kernel, programs, (g, sums, units, chunks.table), (T, chunks.each), constants, plan.scale)
    return sums, units


def heads_together(H: int) -> int:
    """Heads a program of sums_kernel."""
    return min(16, triton.next_power_of_2(max(1, H)))


def _empty_states(k: Tensor, v: Tensor, chunks: Chunks) -> Tensor:
    return k.new_empty(chunks.total, k.shape[2], v.shape[3], k.shape[3], dtype=state_dtype(k.dtype))


def states_before(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    gate: int,
) -> Kept:
    """What backward needs, made again: the state before each chunk among it."""
    how = {"scale": scale, "gate": gate}
    return Kept(*played(_states_before, (q, k, v, g, initial_state), cu_seqlens, how))


def _states_before(q, k, v, g, initial_state, cu_seqlens, *, scale, gate) -> Kept:
    chunks = chunks_of(*q.shape[:2], cu_seqlens, chunk_size(q, v, gate))
    how = {"scale": scale, "gate": gate}
    kept = scaled(q, k, v, g, chunks, **how, has_scores=keeps_scores(q, v, gate))
    kept = kept._replace(states=_empty_states(k, v, chunks))
    ends = (initial_state, None, cu_seqlens, chunks)
    run_state(kept.k, v, g, kept, kept.states, *ends, **how, reverse=False)
    return kept


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    kept: Kept,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    gate: int,
    wants_d_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, g and the initial state; the last two None where there is none to give."""
    how = {"scale": scale, "gate": gate, "wants_d_initial": wants_d_initial}
    inputs = (do, d_final, q, k, v, g, *kept)
    dq, dk, dv, dg, d_initial = played(_backward, inputs, cu_seqlens, how)
    if gate == HEAD:
        dg = (dg[0] if dg.shape[0] == 1 else dg.sum(0)).to(g.dtype)
    return dq, dk, dv, dg, d_initial


def _backward(
    do,
    d_final,
    q,
    k,
    v,
    g,
    states,
    totals,
    reach,
    scaled_q,
    scaled_k,
    scores,
    cu_seqlens,
    *,
    scale,
    gate,
    wants_d_initial,
) -> tuple[Tensor | None, ...]:
    """As backward; of gates a head dg has a part for each block of key channels."""
    kept = Kept(states, totals, reach, scaled_q, scaled_k, scores)
    B, T, H, V = v.shape
    K = q.shape[-1]
    chunks = chunks_of(B, T, cu_seqlens, chunk_size(q, v, gate))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_initial = q.new_empty(chunks.rows, H, K, V, dtype=torch.float32) if wants_d_initial else None
    d_states = kept.states.new_empty(kept.states.shape)
    ends = (d_final, d_initial, cu_seqlens, chunks)
    how = {"scale": scale, "gate": gate, "reverse": True}
    carrier = carrier_of(q, v, gate, chunks, keep=True)
    run_pass(carrier, kept.k, kept.q, do, g, kept, d_states, dv, *ends, **how)
    dg = empty_dg(g, gate, q, v)
    grads = (dq, dk, dg, chunks)
    run_gradient(kept.q, kept.k, v, g, do, kept, d_states, *grads, scale=scale, gate=gate)
    if gate == CHANNEL:
        run_output(k, q, do, g, kept, d_states, dv, chunks, **how, hard=True)
        run_gradient(q, k, v, g, do, kept, d_states, *grads, scale=scale, gate=gate, hard=True)
    return dq, dk, dv, dg, d_initial


def empty_dg(g: Tensor | None, gate: int, q: Tensor, v: Tensor) -> Tensor | None:
    """What run_gradient fills for the gates; None where they take no gradient."""
    if gate == CHANNEL:
        return g.new_empty(g.shape)
    if gate == HEAD:  # one part for each block of key channels
        blocks = key_blocks(q, v, gate)
        return q.new_empty(blocks, *g.shape, dtype=torch.float32)
    return None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 states for bf16 inputs; float16 could not hold them, and float32 keeps its precision."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@functools.cache
def retention_gates(H: int, device: torch.device) -> Tensor:
    """[H] log decays of retention's heads, 1 - 2 ** (-5 - h) (RetNet §2.1)."""
    heads = torch.arange(H, dtype=torch.float64)
    return torch.log1p(-(2.0 ** (-5 - heads))).to(device, torch.float32)


def _plan(q: Tensor, v: Tensor, gate: int):
    index = q.get_device()  # on the path of every launch, and cheaper than q.device
    if index < 0:  # no GPU, or tensors without memory
        device = ahead.device_of(q.device)
        index = (device.index or 0) if device.type == "cuda" else None
    return plan_for(*_point(q, v, gate), index)


def _point(q: Tensor, v: Tensor, gate: int) -> plan_files.Point:
    # int: where a tracer makes widths symbolic, they become constants of the graph
    return plan_files.Point(int(q.shape[-1]), int(v.shape[-1]), gate, v.dtype != torch.bfloat16)


def chunk_size(q: Tensor, v: Tensor, gate: int) -> int:
    """Tokens a chunk."""
    return _plan(q, v, gate).chunk


def key_blocks(q: Tensor, v: Tensor, gate: int) -> int:
    """How many tiles of key channels a head has."""
    return -(-q.shape[-1] // _plan(q, v, gate).BK)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 operands are taken; 16-bit ones are not affected."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def run_pass(
    carrier, q, k, v, g, kept, states, o, first, last, cu_seqlens, chunks, *, scale, gate, reverse
) -> None:
    """Fill `states`, `o` and `last` from `first`, by the kernel of carrier_of or in two."""
    ends, how = (first, last, cu_seqlens, chunks), {"scale": scale, "gate": gate, "reverse": reverse}
    if carrier is None:
        run_state(k, v, g, kept, states, *ends, **how)
        run_output(q, k, v, g, kept, states, o, chunks, **how)
    elif carrier == WIDE:
        run_wide(q, k, v, g, kept, o, *ends, scale=scale, gate=gate)
    else:
        run_carry(q, k, v, g, kept, states, o, *ends, **how)


def run_state(k, v, g, kept, states, first, last, cu_seqlens, chunks, *, scale, gate, reverse) -> None:
    """Fill `states` and `last` from `first`, in one pass or, where rows are few and long, in segments."""
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    tile = state_tile(k, v, gate, chunks.rows)
    G = segments_of(_state_programs(tile, k, v, gate, chunks.rows), chunks, k.device)
    if G == 1:
        state_pass(k, v, g, kept, states, first, last, cu_seqlens, chunks, **how)
        return
    table, firsts = _firsts(k, v, g, kept, first, chunks, G, **how)
    state_pass(k, v, g, kept, states, firsts, last, None, chunks, **how, segments=table)


def run_carry(q, k, v, g, kept, states, o, first, last, cu_seqlens, chunks, *, scale, gate, reverse) -> None:
    """Fill `o`, `last` and, unless None, `states`, from `first`; in segments, as run_state."""
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    tile = _plan(k, v, gate).carry_back if reverse else _plan(k, v, gate).carry
    G = segments_of(_programs(tile, v, chunks.rows), chunks, q.device)
    table = None
    if G > 1:
        table, first = _firsts(k, v, g, kept, first, chunks, G, **how)
    T = k.shape[1]
    bounds, offsets, rows, G = row_table(cu_seqlens, chunks, table)
    constants = {
        **_sizes(k, v, gate, tile),
        "REVERSE": reverse,
        "PACKED": bounds is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": last is not None,
        "SEGMENTS": G,
        "KEEP": states is not None,
        "WIDE": state_dtype(k.dtype) != torch.bfloat16,
        "PRECISION": precision(v.dtype),
    }
    tensors = (q, k, v, g, kept.totals, kept.reach, states, o, first, last, bounds, offsets)
    launch(carry_kernel, _programs(tile, v, rows), tensors, (scale, T, chunks.each), constants, tile)


def run_wide(q, k, v, g, kept, o, first, last, cu_seqlens, chunks, *, scale, gate) -> None:
    """Fill `o` and `last` from `first` and kept scores."""
    tile = _plan(k, v, gate).wide
    constants = {
        **_whole_heads(k, v, gate, tile),
        "PACKED": cu_seqlens is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": last is not None,
        "APART": tile.warps > 4,
        "WIDE": state_dtype(k.dtype) != torch.bfloat16,
        "PRECISION": precision(v.dtype),
    }
    ends = (first, last, cu_seqlens, chunks.offsets)
    tensors = (q, k, v, g, kept.totals, kept.reach, kept.scores, o, *ends)
    programs = _programs(tile, v, chunks.rows)
    launch(wide_kernel, programs, tensors, (scale, k.shape[1], chunks.each), constants, tile)


def _firsts(k, v, g, kept, first, chunks, G, *, scale, gate, reverse) -> tuple[Chunks, Tensor]:
    """G segments of each row, and the state before each, from their own states and decays."""
    B, T, H, K, V = *k.shape, v.shape[3]
    table = segments_in(B, T, G, chunks.size, ahead.device_of(k.device))
    own = k.new_empty(B, G, H, K, V, dtype=torch.float32)
    lost = k.new_empty(B, G, H, K, 1, dtype=torch.float32)
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    state_pass(k, v, g, kept, None, None, own, None, chunks, **how, lost=lost, segments=table)
    firsts = own.new_empty(own.shape)
    do(_carry_over, (own, lost, first, firsts), (reverse,))
    return table, firsts


def _carry_over(own: Tensor, lost: Tensor, first: Tensor | None, firsts: Tensor, reverse: bool) -> None:
    """Fill the state before each segment, [B, G, H, K, V], the one before the first being `first` or zero."""
    order = range(own.shape[1])[:: -1 if reverse else 1]
    if first is None:
        firsts[:, order[0]].zero_()
    else:
        firsts[:, order[0]].copy_(first)
    for this, later in itertools.pairwise(order):
        torch.addcmul(own[:, this], lost[:, this], firsts[:, this], out=firsts[:, later])


def state_tile(k: Tensor, v: Tensor, gate: int, rows: int) -> Launch:
    """The plan's, or half of one wider than 64, in four warps, where that leaves few programs."""
    tile = _plan(k, v, gate).state
    few = FEW_PROGRAMS * multiprocessors(k.device)
    return _half(tile) if tile.BV > 64 and _state_programs(tile, k, v, gate, rows) < few else tile


@functools.cache
def _half(tile: Launch) -> Launch:
    return dataclasses.replace(tile, BV=tile.BV // 2, warps=4)


def _state_programs(tile: Launch, k: Tensor, v: Tensor, gate: int, rows: int) -> int:
    """Programs of state_kernel, each of which holds one block of a head's keys, for so many rows."""
    return key_blocks(k, v, gate) * _programs(tile, v, rows)


def state_pass(
    k,
    v,
    g,
    kept,
    states,
    first,
    last,
    cu_seqlens,
    chunks,
    *,
    scale,
    gate,
    reverse,
    lost=None,
    segments=None,
) -> None:
    """Launch state_kernel; with `lost`, for the segments' own states and decays."""
    T = k.shape[1]
    bounds, offsets, rows, G = row_table(cu_seqlens, chunks, segments)
    tile = state_tile(k, v, gate, rows)
    constants = {
        **_sizes(k, v, gate, tile),
        "REVERSE": reverse,
        "PACKED": bounds is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": last is not None,
        "SEGMENTS": G,
        "KEEP": lost is None,
        "WIDE": state_dtype(k.dtype) != torch.bfloat16,
        "PRECISION": precision(v.dtype),
    }
    tensors = (k, v, g, kept.totals, kept.reach, states, first, last, lost, bounds, offsets)
    programs = _state_programs(tile, k, v, gate, rows)
    launch(state_kernel, programs, tensors, (scale, T, chunks.each), constants, tile)


def run_exact(q, k, v, g, kept, o, first, cu_seqlens, chunks, *, scale) -> None:
    """Launch exact_kernel: fills `o` of the heads that have hard tiles."""
    T = k.shape[1]
    tile = _plan(k, v, CHANNEL).exact
    sizes = _whole_heads(k, v, CHANNEL, tile)
    del sizes["GATE"]
    constants = {
        **sizes,
        "PACKED": cu_seqlens is not None,
        "HAS_FIRST": first is not None,
        "PRECISION": precision(k.dtype),
        "WIDE": k.dtype != torch.bfloat16,
    }
    tensors = (q, k, v, g, kept.reach, o, first, cu_seqlens, chunks.offsets)
    programs = _programs(tile, v, chunks.rows)
    launch(exact_kernel, programs, tensors, (scale, T, chunks.each), constants, tile)


def run_output(q, k, v, g, kept, states, o, chunks, *, scale, gate, reverse, hard=False) -> None:
    """Launch output_kernel: fills `o`; with `hard`, of the chunks with hard tiles, from raw q and k."""
    (T, H), V = k.shape[1:3], v.shape[3]
    tile = _plan(k, v, gate).output
    constants = {
        **_sizes(k, v, gate, tile),
        "REVERSE": reverse,
        "PACKED": chunks.table is not None,
        "PRECISION": precision(v.dtype),
        "HARD": hard,
        "SCORES": kept.scores is not None and not hard,
    }
    tensors = (q, k, v, g, kept.totals, kept.reach, kept.scores, states, o, chunks.table)
    pairs = H * chunks.total
    programs = _hard_programs(pairs, q.device) if hard else -(-V // tile.BV) * pairs
    scale = 1.0 if gate == CHANNEL and not hard else scale  # scaled q has it
    launch(output_kernel, programs, tensors, (scale, T, chunks.each, pairs), constants, tile)


def run_gradient(q, k, v, g, do, kept, d_states, dq, dk, dg, chunks, *, scale, gate, hard=False) -> None:
    """Launch gradient_kernel: fills `dq`, `dk` and `dg`; with `hard`, of hard tiles, from raw q and k."""
    B, T, H, K = k.shape
    plan = _plan(k, v, gate)
    tile = plan.gradient
    constants = {
        **_sizes(k, v, gate, tile),
        "PACKED": chunks.table is not None,
        "PRECISION": precision(v.dtype),
        "HARD": hard,
        "SCAN": sums_by_scans(tile, plan.chunk),
    }
    tensors = (q, k, v, g, do, kept.totals, kept.reach, kept.states, d_states, dq, dk, dg, chunks.table)
    pairs = H * chunks.total
    programs = _hard_programs(pairs, q.device) if hard else -(-K // plan.BK) * pairs
    numbers = (scale, T, chunks.each, B * T, pairs)
    launch(gradient_kernel, programs, tensors, numbers, constants, tile)


def _hard_programs(pairs: int, device: torch.device) -> int:
    """Few, since most find no hard tile among theirs."""
    return min(pairs, HARD_PROGRAMS * multiprocessors(device))


def _sizes(k: Tensor, v: Tensor, gate: int, tile: Launch) -> dict[str, int]:
    """The constants that every kernel begins with, in its order."""
    H, K, V, plan = k.shape[2], k.shape[3], v.shape[3], _plan(k, v, gate)
    return {"H": H, "K": K, "V": V, "C": plan.chunk, "BK": plan.BK, "BV": tile.BV, "GATE": gate}


def _whole_heads(k: Tensor, v: Tensor, gate: int, tile: Launch) -> dict[str, int]:
    """As _sizes, of kernels that hold all key channels of a head, and the number of its tiles elsewhere."""
    BK = triton.next_power_of_2(int(k.shape[3]))
    return {**_sizes(k, v, gate, tile), "BK": BK, "TILES": key_blocks(k, v, gate)}
