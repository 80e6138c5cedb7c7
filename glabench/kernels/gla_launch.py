"""Memory and launches of the chunk kernels: forward and backward of one call, for every kind of gate."""

import functools
import itertools
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glabench.kernels import gla_tiles
from glabench.kernels.arguments import check_bounds
from glabench.kernels.gla_configs import CHUNK, Launch, plan_for
from glabench.kernels.gla_fused import fused_kernel
from glabench.kernels.gla_gradient import gradient_kernel
from glabench.kernels.gla_output import output_kernel
from glabench.kernels.gla_state import state_kernel

NONE, FIXED, HEAD, CHANNEL = (getattr(gla_tiles, n).value for n in ("NONE", "FIXED", "HEAD", "CHANNEL"))
HARD_PROGRAMS = 4  # a multiprocessor
FUSED_PROGRAMS = 1  # a multiprocessor, at least
SEGMENT = 64  # chunks: shorter segments cost more than they save
INTERPRETED = triton.knobs.runtime.interpret  # read once: the compiler cannot trace the look-up


class Kept(NamedTuple):
    """What the backward pass takes from the forward: chunk states [chunks, H, V, K] and gate totals.

    `totals` [chunks, H, K] and `reach` [chunks, H, K blocks], their least, are for gates per channel.
    """

    states: Tensor
    totals: Tensor | None
    reach: Tensor | None


class Chunks(NamedTuple):
    """Where the chunks lie: `table` [total, 2] of start and length, `offsets` [rows + 1], where packed."""

    rows: int
    each: int
    total: int
    table: Tensor | None = None
    offsets: Tensor | None = None


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
    B, T, H, V = v.shape
    K = q.shape[-1]
    chunks = chunks_of(B, T, cu_seqlens)
    final = q.new_empty(chunks.rows, H, K, V, dtype=torch.float32) if output_final_state else None
    o = torch.empty_like(v)
    if not keep and fuses(q, v, gate, chunks):
        run_fused(q, k, v, g, o, initial_state, final, cu_seqlens, chunks, scale=scale, gate=gate)
        return o, final, None
    kept = states_before(k, v, g, initial_state, final, cu_seqlens, chunks, gate=gate)
    if chunks.total:
        run_output(q, k, v, g, kept, kept.states, o, chunks, scale=scale, gate=gate, reverse=False)
    return o, final, kept if keep else None


def fuses(q: Tensor, v: Tensor, gate: int, chunks: Chunks) -> bool:
    """Whether one sequential kernel is to make the output: its states fit, its programs fill the device."""
    plan = _plan(q, v, gate)
    programs = -(-v.shape[3] // plan.state.BV) * v.shape[2] * chunks.rows
    return key_blocks(q, v, gate) <= 2 and programs >= FUSED_PROGRAMS * multiprocessors(q.device)


def states_before(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None,
    chunks: Chunks,
    *,
    gate: int,
) -> Kept:
    """The state before each chunk; `final` is filled where given."""
    H, K, V = k.shape[2], k.shape[3], v.shape[3]
    states = k.new_empty(chunks.total, H, V, K, dtype=state_dtype(k.dtype))
    if gate == CHANNEL:
        blocks = key_blocks(k, v, gate)
        totals = k.new_empty(chunks.total, H, K, dtype=torch.float32)
        reach = k.new_empty(chunks.total, H, blocks, dtype=torch.float32)
    else:
        totals = reach = None
    kept = Kept(states, totals, reach)
    run_state(
        k, v, g, kept, states, initial_state, final, cu_seqlens, chunks, scale=1.0, gate=gate, reverse=False
    )
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
    B, T, H, V = v.shape
    K = q.shape[-1]
    chunks = chunks_of(B, T, cu_seqlens)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_initial = q.new_empty(chunks.rows, H, K, V, dtype=torch.float32) if wants_d_initial else None
    d_states = torch.empty_like(kept.states) if chunks.total else kept.states
    run_state(
        q, do, g, kept, d_states, d_final, d_initial, cu_seqlens, chunks, scale=scale, gate=gate, reverse=True
    )
    dg = _empty_dg(g, gate, q, v)
    if chunks.total:
        run_output(k, q, do, g, kept, d_states, dv, chunks, scale=scale, gate=gate, reverse=True)
        run_gradient(q, k, v, g, do, kept, d_states, dq, dk, dg, chunks, scale=scale, gate=gate)
    if gate == HEAD:
        dg = (dg[0] if dg.shape[0] == 1 else dg.sum(0)).to(g.dtype)
    return dq, dk, dv, dg, d_initial


def _empty_dg(g: Tensor | None, gate: int, q: Tensor, v: Tensor) -> Tensor | None:
    if gate == CHANNEL:
        return torch.empty_like(g)
    if gate == HEAD:  # one part for each block of key channels
        blocks = key_blocks(q, v, gate)
        return q.new_empty(blocks, *g.shape, dtype=torch.float32)
    return None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 states for bf16 inputs; float16 could not hold them, and float32 keeps its precision."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunks_of(B: int, T: int, cu_seqlens: Tensor | None) -> Chunks:
    """The chunks of equal rows by arithmetic, of packed ones by table. Raises ShapeError."""
    if cu_seqlens is None:
        each = -(-T // CHUNK)
        return Chunks(B, each, B * each)
    return _packed_chunks(cu_seqlens, T)


_last_packed: list[tuple[Tensor, int, int, Chunks]] = []


def _packed_chunks(cu_seqlens: Tensor, T: int) -> Chunks:
    """Reading the bounds waits for the device, so those of the last tensor, if unchanged, are kept."""
    for tensor, version, length, chunks in _last_packed:
        if tensor is cu_seqlens and version == cu_seqlens._version and length == T:
            return chunks
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, T)
    table, offsets = [], [0]
    for low, high in itertools.pairwise(bounds):
        table += [(start, min(CHUNK, high - start)) for start in range(low, high, CHUNK)]
        offsets.append(len(table))
    like = {"dtype": torch.int64, "device": cu_seqlens.device}
    chunks = Chunks(
        len(bounds) - 1,
        0,
        len(table),
        torch.tensor(table, **like).reshape(-1, 2),
        torch.tensor(offsets, **like),
    )
    _last_packed[:] = [(cu_seqlens, cu_seqlens._version, T, chunks)]
    return chunks


@functools.cache
def retention_gates(H: int, device: torch.device) -> Tensor:
    """[H] log decays of retention's heads, 1 - 2 ** (-5 - h) (RetNet §2.1)."""
    heads = torch.arange(H, dtype=torch.float64)
    return torch.log1p(-(2.0 ** (-5 - heads))).to(device, torch.float32)


def _plan(q: Tensor, v: Tensor, gate: int):
    # int: where a tracer makes widths symbolic, they become constants of the graph
    return plan_for(int(q.shape[-1]), int(v.shape[-1]), gate, q.dtype != torch.bfloat16)


def key_blocks(q: Tensor, v: Tensor, gate: int) -> int:
    """How many tiles of key channels a head has."""
    return -(-q.shape[-1] // _plan(q, v, gate).BK)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 operands are taken; 16-bit ones are not affected."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def run_state(k, v, g, kept, states, first, last, cu_seqlens, chunks, *, scale, gate, reverse) -> None:
    """Fill `states` and `last` from `first`, in one pass or, where rows are few and long, in segments."""
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    G = segments_of(k, v, gate, chunks)
    if G == 1:
        state_pass(k, v, g, kept, states, first, last, cu_seqlens, chunks, **how)
        return
    B, T, H, K, V = *k.shape, v.shape[3]
    table = _segments(B, T, G, k.device)
    own = k.new_empty(B, G, H, K, V, dtype=torch.float32)
    lost = k.new_empty(B, G, H, K, 1, dtype=torch.float32)
    state_pass(k, v, g, kept, states, None, own, None, chunks, **how, lost=lost, segments=table)
    firsts = torch.empty_like(own)
    order = list(reversed(range(G))) if reverse else list(range(G))
    if first is None:
        firsts[:, order[0]].zero_()
    else:
        firsts[:, order[0]].copy_(first)
    for this, later in itertools.pairwise(order):
        torch.addcmul(own[:, this], lost[:, this], firsts[:, this], out=firsts[:, later])
    state_pass(k, v, g, kept, states, firsts, last, None, chunks, **how, segments=table)


def segments_of(k: Tensor, v: Tensor, gate: int, chunks: Chunks) -> int:
    """How many segments of a row are carried over side by side: two programs a multiprocessor, or so."""
    if chunks.table is not None or chunks.each < 2 * SEGMENT:
        return 1
    plan = _plan(k, v, gate)
    programs = -(-k.shape[3] // plan.BK) * -(-v.shape[3] // plan.state.BV) * chunks.rows * k.shape[2]
    return max(1, min(chunks.each // SEGMENT, 2 * multiprocessors(k.device) // programs))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64


@functools.cache
def _segments(B: int, T: int, G: int, device: torch.device) -> Chunks:
    """G segments of whole chunks in each of B rows, as if they were packed: bounds and chunk offsets."""
    each = -(-T // CHUNK)
    firsts = [each * i // G for i in range(G)]
    offsets = [row * each + first for row in range(B) for first in firsts] + [B * each]
    bounds = [row * T + first * CHUNK for row in range(B) for first in firsts] + [B * T]
    like = {"dtype": torch.int64, "device": device}
    return Chunks(B * G, G, 0, torch.tensor(bounds, **like), torch.tensor(offsets, **like))


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
    T, H, K, V = *k.shape[1:], v.shape[3]
    plan = _plan(k, v, gate)
    tile = plan.state
    if segments is None:
        bounds, offsets, rows, G = cu_seqlens, chunks.offsets, chunks.rows, 1
    else:
        bounds, offsets, rows, G = segments.table, segments.offsets, segments.rows, segments.each
    constants = {
        **_sizes(k, v, gate, tile),
        "REVERSE": reverse,
        "PACKED": bounds is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": last is not None,
        "SEGMENTS": G,
        "KEEP": lost is None,
        "PRECISION": precision(k.dtype),
    }
    tensors = (k, v, g, kept.totals, kept.reach, states, first, last, lost, bounds, offsets)
    programs = -(-K // plan.BK) * -(-V // tile.BV) * rows * H
    launch(state_kernel, programs, tensors, (scale, T, chunks.each), constants, tile)


def run_fused(q, k, v, g, o, first, last, cu_seqlens, chunks, *, scale, gate) -> None:
    """Launch fused_kernel: fills `o` and, where given, `last`."""
    (T, H), V = k.shape[1:3], v.shape[3]
    plan = _plan(k, v, gate)
    tile = plan.state
    constants = {
        **_sizes(k, v, gate, tile),
        "PACKED": cu_seqlens is not None,
        "HAS_FIRST": first is not None,
        "HAS_LAST": last is not None,
        "PRECISION": precision(k.dtype),
        "WIDE": k.dtype != torch.bfloat16,
    }
    programs = -(-V // tile.BV) * H * chunks.rows
    launch(fused_kernel, programs, (q, k, v, g, o, first, last, cu_seqlens), (scale, T), constants, tile)


def run_output(q, k, v, g, kept, states, o, chunks, *, scale, gate, reverse) -> None:
    """Launch output_kernel: fills `o`."""
    (T, H), V = k.shape[1:3], v.shape[3]
    plan = _plan(k, v, gate)
    tile = plan.output
    constants = {
        **_sizes(k, v, gate, tile),
        "REVERSE": reverse,
        "PACKED": chunks.table is not None,
        "PRECISION": precision(k.dtype),
    }
    tensors = (q, k, v, g, kept.totals, kept.reach, states, o, chunks.table)
    pairs = H * chunks.total
    _launch_both(
        output_kernel, -(-V // tile.BV), pairs, tensors, (scale, T, chunks.each, pairs), constants, tile
    )


def run_gradient(q, k, v, g, do, kept, d_states, dq, dk, dg, chunks, *, scale, gate) -> None:
    """Launch gradient_kernel: fills `dq`, `dk` and `dg`."""
    B, T, H, K = k.shape
    plan = _plan(k, v, gate)
    tile = plan.gradient
    constants = {
        **_sizes(k, v, gate, tile),
        "PACKED": chunks.table is not None,
        "PRECISION": precision(k.dtype),
    }
    tensors = (q, k, v, g, do, kept.totals, kept.reach, kept.states, d_states, dq, dk, dg, chunks.table)
    pairs = H * chunks.total
    numbers = (scale, T, chunks.each, B * T, pairs)
    _launch_both(gradient_kernel, -(-K // plan.BK), pairs, tensors, numbers, constants, tile)


def _sizes(k: Tensor, v: Tensor, gate: int, tile: Launch) -> dict[str, int]:
    """The constants that every kernel begins with, in its order."""
    H, K, V, BK = k.shape[2], k.shape[3], v.shape[3], _plan(k, v, gate).BK
    return {"H": H, "K": K, "V": V, "C": CHUNK, "BK": BK, "BV": tile.BV, "GATE": gate}


def _launch_both(kernel, blocks, pairs, tensors, numbers, constants, tile) -> None:
    """For the common tiles and, with gates a channel, for the hard ones: most programs there find none."""
    launch(kernel, blocks * pairs, tensors, numbers, constants | {"HARD": False}, tile)
    if constants["GATE"] == CHANNEL:
        programs = min(pairs, HARD_PROGRAMS * multiprocessors(tensors[0].device))
        launch(kernel, programs, tensors, numbers, constants | {"HARD": True}, tile)


_compiled: dict[tuple, object] = {}


def launch(kernel, programs, tensors, numbers, constants, tile) -> None:
    """Launch on the tensors' device; Triton's own look-up, 15 us, is taken once for each kind of call.

    The key holds all that Triton specialises on: types, absence and alignment, but no value of `numbers`.
    """
    if INTERPRETED:
        kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        return
    device = tensors[0].device.index
    kinds = tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    key = (kernel, device, tile, kinds, *constants.values())
    compiled = _compiled.get(key)
    with _on(device):
        if compiled is None:
            _compiled[key] = kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        else:
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants.values())


def _on(device: int):
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)
