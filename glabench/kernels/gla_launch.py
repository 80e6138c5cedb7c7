"""Memory and launches of the chunk kernels: forward and backward of one call, for every kind of gate."""

import functools
import itertools
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glabench.kernels import ahead, gla_tiles
from glabench.kernels.arguments import check_bounds
from glabench.kernels.gla_carry import carry_kernel
from glabench.kernels.gla_configs import Launch, Plan, plan_for
from glabench.kernels.gla_exact import exact_kernel
from glabench.kernels.gla_gradient import gradient_kernel
from glabench.kernels.gla_output import output_kernel
from glabench.kernels.gla_scale import scale_kernel, sums_kernel
from glabench.kernels.gla_state import state_kernel

NONE, FIXED, HEAD, CHANNEL = (getattr(gla_tiles, n).value for n in ("NONE", "FIXED", "HEAD", "CHANNEL"))
HARD_PROGRAMS = 4  # a multiprocessor
CARRY_PROGRAMS = 0.75  # a multiprocessor, at least
SEGMENT = 4096  # tokens: shorter segments cost more than they save
INTERPRETED = triton.knobs.runtime.interpret  # read once: the compiler cannot trace the look-up


class Kept(NamedTuple):
    """What the backward pass takes from the forward.

    Chunk states [chunks, H, V, K]; for gates a channel also the chunks' log decays `totals` [chunks, H, K],
    their least in each tile, `reach` [chunks, H, K blocks], and q and k [B, T, H, K] times their decays; for
    gates a head, what sums_kernel makes of them, `totals` [chunks, H, 2, C] and `reach` [chunks, H, C].
    """

    states: Tensor | None
    totals: Tensor | None
    reach: Tensor | None
    q: Tensor
    k: Tensor


class Chunks(NamedTuple):
    """Where chunks of `size` lie: `table` [total, 2] of start and length, `offsets` [rows + 1], if packed."""

    size: int
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
    tensors = (q, k, v, g, initial_state, cu_seqlens)
    how = {"scale": scale, "gate": gate, "output_final_state": output_final_state, "keep": keep}
    with ahead.during(functools.partial(_whole, tensors, how)):
        return _forward(*tensors, **how)


def _whole(tensors: tuple[Tensor | None, ...], how: dict) -> None:
    """The launches of a call, and of its backward pass where it keeps what that needs, without memory."""
    q, k, v, g, state = (None if x is None else torch.empty_like(x, device="meta") for x in tensors[:5])
    kept = _forward(q, k, v, g, state, tensors[5], **how)[2]
    if kept is not None:
        options = {"scale": how["scale"], "gate": how["gate"], "wants_d_initial": state is not None}
        backward(torch.empty_like(v), None, q, k, v, g, kept, tensors[5], **options)


def _forward(
    q, k, v, g, initial_state, cu_seqlens, *, scale, gate, output_final_state, keep
) -> tuple[Tensor, Tensor | None, Kept | None]:
    B, T, H, V = v.shape
    K = q.shape[-1]
    chunks = chunks_of(B, T, cu_seqlens, chunk_size(q, v, gate))
    final = q.new_empty(chunks.rows, H, K, V, dtype=torch.float32) if output_final_state else None
    o = torch.empty_like(v)
    kept = scaled(q, k, v, g, chunks, scale=scale, gate=gate)
    carried = carries(q, v, gate, chunks)
    if keep or not carried:
        kept = kept._replace(states=_empty_states(k, v, chunks))
    ends = (initial_state, final, cu_seqlens, chunks)
    how = {"scale": scale, "gate": gate, "reverse": False}
    if carried:
        run_carry(kept.q, kept.k, v, g, kept, kept.states, o, *ends, **how)
    else:
        run_state(kept.k, v, g, kept, kept.states, *ends, **how)
        run_output(kept.q, kept.k, v, g, kept, kept.states, o, chunks, **how)
    if gate == CHANNEL:
        if kept.states is None:
            run_exact(q, k, v, g, kept, o, initial_state, cu_seqlens, chunks, scale=scale)
        else:
            run_output(q, k, v, g, kept, kept.states, o, chunks, **how, hard=True)
    return o, final, kept if keep else None


def carries(q: Tensor, v: Tensor, gate: int, chunks: Chunks) -> bool:
    """Whether one kernel carries the state and makes the output: it fits, and fills the device."""
    if key_blocks(q, v, gate) > 2:
        return False
    programs = carry_programs(q, v, gate, chunks, reverse=False)
    programs *= segments_of(programs, chunks, q.device)
    return programs >= CARRY_PROGRAMS * multiprocessors(q.device)


def carry_programs(q: Tensor, v: Tensor, gate: int, chunks: Chunks, *, reverse: bool) -> int:
    """Programs of carry_kernel where rows are whole."""
    return -(-v.shape[3] // _carry_tile(q, v, gate, reverse=reverse).BV) * v.shape[2] * chunks.rows


def _carry_tile(q: Tensor, v: Tensor, gate: int, *, reverse: bool) -> Launch:
    plan = _plan(q, v, gate)
    return plan.carry_back if reverse else plan.carry


def scaled(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunks: Chunks, *, scale: float, gate: int
) -> Kept:
    """q and k, for gates a channel times their decays; and what the other kernels need to know of gates."""
    if gate != CHANNEL:
        sums = _head_sums(g, chunks, _plan(q, v, gate)) if gate == HEAD else (None, None)
        return Kept(None, *sums, q, k)
    T, H, K = q.shape[1:]
    blocks, dtype = key_blocks(q, v, gate), state_dtype(q.dtype)
    totals = k.new_empty(chunks.total, H, K, dtype=torch.float32)
    reach = k.new_empty(chunks.total, H, blocks, dtype=torch.float32)
    kept = Kept(None, totals, reach, torch.empty_like(q, dtype=dtype), torch.empty_like(k, dtype=dtype))
    if chunks.total:
        plan = _plan(q, v, gate)
        constants = {"H": H, "K": K, "C": plan.chunk, "BK": plan.BK, "PACKED": chunks.table is not None}
        constants["PRECISION"] = precision(q.dtype)
        tensors = (q, k, g, totals, reach, kept.q, kept.k, chunks.table)
        launch(
            scale_kernel, blocks * H * chunks.total, tensors, (scale, T, chunks.each), constants, plan.scale
        )
    return kept


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
    return min(16, triton.next_power_of_2(H))


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
    chunks = chunks_of(*q.shape[:2], cu_seqlens, chunk_size(q, v, gate))
    kept = scaled(q, k, v, g, chunks, scale=scale, gate=gate)._replace(states=_empty_states(k, v, chunks))
    ends = (initial_state, None, cu_seqlens, chunks)
    run_state(kept.k, v, g, kept, kept.states, *ends, scale=scale, gate=gate, reverse=False)
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
    chunks = chunks_of(B, T, cu_seqlens, chunk_size(q, v, gate))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_initial = q.new_empty(chunks.rows, H, K, V, dtype=torch.float32) if wants_d_initial else None
    d_states = torch.empty_like(kept.states)
    ends = (d_final, d_initial, cu_seqlens, chunks)
    how = {"scale": scale, "gate": gate, "reverse": True}
    if carries(q, v, gate, chunks):
        run_carry(kept.k, kept.q, do, g, kept, d_states, dv, *ends, **how)
    else:
        run_state(kept.q, do, g, kept, d_states, *ends, **how)
        run_output(kept.k, kept.q, do, g, kept, d_states, dv, chunks, **how)
    dg = empty_dg(g, gate, q, v)
    grads = (dq, dk, dg, chunks)
    run_gradient(kept.q, kept.k, v, g, do, kept, d_states, *grads, scale=scale, gate=gate)
    if gate == CHANNEL:
        run_output(k, q, do, g, kept, d_states, dv, chunks, **how, hard=True)
        run_gradient(q, k, v, g, do, kept, d_states, *grads, scale=scale, gate=gate, hard=True)
    if gate == HEAD:
        dg = (dg[0] if dg.shape[0] == 1 else dg.sum(0)).to(g.dtype)
    return dq, dk, dv, dg, d_initial


def empty_dg(g: Tensor | None, gate: int, q: Tensor, v: Tensor) -> Tensor | None:
    """What run_gradient fills for the gates; None where they take no gradient."""
    if gate == CHANNEL:
        return torch.empty_like(g)
    if gate == HEAD:  # one part for each block of key channels
        blocks = key_blocks(q, v, gate)
        return q.new_empty(blocks, *g.shape, dtype=torch.float32)
    return None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 states for bf16 inputs; float16 could not hold them, and float32 keeps its precision."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunks_of(B: int, T: int, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """The chunks of equal rows by arithmetic, of packed ones by table. Raises ShapeError."""
    if cu_seqlens is None:
        each = -(-T // size)
        return Chunks(size, B, each, B * each)
    return _packed_chunks(cu_seqlens, T, size)


_last_packed: list[tuple[Tensor, int, int, Chunks]] = []


def _packed_chunks(cu_seqlens: Tensor, T: int, size: int) -> Chunks:
    """Reading the bounds waits for the device, so those of the last tensor, if unchanged, are kept."""
    for tensor, version, length, chunks in _last_packed:
        if tensor is cu_seqlens and (version, length, chunks.size) == (cu_seqlens._version, T, size):
            return chunks
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, T)
    table, offsets = [], [0]
    for low, high in itertools.pairwise(bounds):
        table += [(start, min(size, high - start)) for start in range(low, high, size)]
        offsets.append(len(table))
    like = {"dtype": torch.int64, "device": cu_seqlens.device}
    chunks = Chunks(
        size,
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
    index = q.get_device()  # on the path of every launch, and cheaper than q.device
    if index < 0:  # no GPU, or tensors without memory
        device = ahead.device_of(q.device)
        index = (device.index or 0) if device.type == "cuda" else None
    # int: where a tracer makes widths symbolic, they become constants of the graph
    return plan_for(int(q.shape[-1]), int(v.shape[-1]), gate, v.dtype != torch.bfloat16, index)


def chunk_size(q: Tensor, v: Tensor, gate: int) -> int:
    """Tokens a chunk."""
    return _plan(q, v, gate).chunk


def key_blocks(q: Tensor, v: Tensor, gate: int) -> int:
    """How many tiles of key channels a head has."""
    return -(-q.shape[-1] // _plan(q, v, gate).BK)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 operands are taken; 16-bit ones are not affected."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def run_state(k, v, g, kept, states, first, last, cu_seqlens, chunks, *, scale, gate, reverse) -> None:
    """Fill `states` and `last` from `first`, in one pass or, where rows are few and long, in segments."""
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    G = segments_of(state_programs(k, v, gate, chunks.rows), chunks, k.device)
    if G == 1:
        state_pass(k, v, g, kept, states, first, last, cu_seqlens, chunks, **how)
        return
    table, firsts = _firsts(k, v, g, kept, first, chunks, G, **how)
    state_pass(k, v, g, kept, states, firsts, last, None, chunks, **how, segments=table)


def run_carry(q, k, v, g, kept, states, o, first, last, cu_seqlens, chunks, *, scale, gate, reverse) -> None:
    """Fill `o`, `last` and, unless None, `states`, from `first`; in segments, as run_state."""
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    G = segments_of(carry_programs(q, v, gate, chunks, reverse=reverse), chunks, q.device)
    table = None
    if G > 1:
        table, first = _firsts(k, v, g, kept, first, chunks, G, **how)
    (T, H), V = k.shape[1:3], v.shape[3]
    tile = _carry_tile(k, v, gate, reverse=reverse)
    bounds, offsets, rows, G = _rows(cu_seqlens, chunks, table)
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
    programs = -(-V // tile.BV) * H * rows
    launch(carry_kernel, programs, tensors, (scale, T, chunks.each), constants, tile)


def _firsts(k, v, g, kept, first, chunks, G, *, scale, gate, reverse) -> tuple[Chunks, Tensor]:
    """G segments of each row, and the state before each, from their own states and decays."""
    B, T, H, K, V = *k.shape, v.shape[3]
    table = _segments(B, T, G, chunks.size, k.device)
    own = k.new_empty(B, G, H, K, V, dtype=torch.float32)
    lost = k.new_empty(B, G, H, K, 1, dtype=torch.float32)
    how = {"scale": scale, "gate": gate, "reverse": reverse}
    state_pass(k, v, g, kept, None, None, own, None, chunks, **how, lost=lost, segments=table)
    firsts = torch.empty_like(own)
    order = list(reversed(range(G))) if reverse else list(range(G))
    if first is None:
        firsts[:, order[0]].zero_()
    else:
        firsts[:, order[0]].copy_(first)
    for this, later in itertools.pairwise(order):
        torch.addcmul(own[:, this], lost[:, this], firsts[:, this], out=firsts[:, later])
    return table, firsts


def _rows(cu_seqlens, chunks, segments) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Bounds, chunk offsets, number of rows and segments a row, as the sequential kernels take them."""
    if segments is None:
        return cu_seqlens, chunks.offsets, chunks.rows, 1
    return segments.table, segments.offsets, segments.rows, segments.each


def segments_of(programs: int, chunks: Chunks, device: torch.device) -> int:
    """How many segments of a row are carried over side by side: two programs a multiprocessor, or so."""
    if chunks.table is not None or chunks.each * chunks.size < 2 * SEGMENT:
        return 1
    return max(1, min(chunks.each * chunks.size // SEGMENT, 2 * multiprocessors(device) // programs))


def state_programs(k: Tensor, v: Tensor, gate: int, rows: int) -> int:
    """Programs of state_kernel for so many rows."""
    plan = _plan(k, v, gate)
    return -(-k.shape[3] // plan.BK) * -(-v.shape[3] // plan.state.BV) * rows * k.shape[2]


def multiprocessors(device: torch.device) -> int:
    """Of the device that launches are for."""
    return _multiprocessors(ahead.device_of(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64


@functools.cache
def _segments(B: int, T: int, G: int, size: int, device: torch.device) -> Chunks:
    """G segments of whole chunks in each of B rows, as if they were packed: bounds and chunk offsets."""
    each = -(-T // size)
    firsts = [each * i // G for i in range(G)]
    offsets = [row * each + first for row in range(B) for first in firsts] + [B * each]
    bounds = [row * T + first * size for row in range(B) for first in firsts] + [B * T]
    like = {"dtype": torch.int64, "device": device}
    return Chunks(size, B * G, G, 0, torch.tensor(bounds, **like), torch.tensor(offsets, **like))


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
    tile = _plan(k, v, gate).state
    bounds, offsets, rows, G = _rows(cu_seqlens, chunks, segments)
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
    programs = state_programs(k, v, gate, rows)
    launch(state_kernel, programs, tensors, (scale, T, chunks.each), constants, tile)


def run_exact(q, k, v, g, kept, o, first, cu_seqlens, chunks, *, scale) -> None:
    """Launch exact_kernel: fills `o` of the heads that have hard tiles."""
    (T, H), V = k.shape[1:3], v.shape[3]
    tile = _plan(k, v, CHANNEL).exact
    sizes = _sizes(k, v, CHANNEL, tile)
    del sizes["GATE"]
    constants = {
        **sizes,
        "PACKED": cu_seqlens is not None,
        "HAS_FIRST": first is not None,
        "PRECISION": precision(k.dtype),
        "WIDE": k.dtype != torch.bfloat16,
    }
    programs = -(-V // tile.BV) * H * chunks.rows
    tensors = (q, k, v, g, kept.reach, o, first, cu_seqlens, chunks.offsets)
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
    }
    tensors = (q, k, v, g, kept.totals, kept.reach, states, o, chunks.table)
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


_compiled: dict[tuple, object] = {}


def launch(kernel, programs, tensors, numbers, constants, tile) -> None:
    """Launch on the tensors' device; Triton's own look-up, 15 us, is taken once for each kind of call.

    The key holds all that Triton specialises on: types, absence and alignment, but no value of `numbers`.
    """
    if not programs:
        return
    asked = ahead.asked()
    if asked is not None:
        asked.append(ahead.Asked(kernel, tensors, numbers, constants, tile.options()))
        return
    if INTERPRETED:
        kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        return
    device = tensors[0].device.index
    kinds = tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    key = (kernel, device, tile, kinds, *constants.values())
    compiled = _compiled.get(key)
    with _on(device):
        if compiled is None:
            ahead.compile_rest(tensors[0].device)
            _compiled[key] = kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        else:
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants.values())


def _on(device: int):
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)
