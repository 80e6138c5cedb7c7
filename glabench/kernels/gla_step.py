"""One token after the other, own Triton kernel: decoding with the state in place, and short sequences.

One kernel for gates a channel, a head, fixed, or none. It has no backward pass: a gradient that is asked
for is refused, never given by another form.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glabench.errors import ShapeError, UsageError
from glabench.kernels import gla_chunks, gla_launch
from glabench.kernels.gla_chunk import as_number, as_state, check_call, is_traced
from glabench.kernels.gla_configs import CHUNK, Launch, recurrent_tile
from glabench.kernels.gla_tiles import CHANNEL, FIXED, HEAD, LOG2E, power2
from glabench.kernels.launching import launch

STRIDES = [f"{x}_{axis}" for x in "qkvg" for axis in "bth"] + ["first_b", "first_h", "last_b", "last_h"]


@triton.jit
def load_token(q, k, v, g, live, ks, vs, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr):
    """One token's query, key and decay [KP], value [BV], in float32; zeros unless `live`."""
    inside = (ks < K) & live
    t_q = tl.load(q + ks, mask=inside, other=0.0).to(tl.float32)
    t_k = tl.load(k + ks, mask=inside, other=0.0).to(tl.float32)
    t_v = tl.load(v + vs, mask=(vs < V) & live, other=0.0).to(tl.float32)
    t_a = t_k  # stands in where no gate is read
    if GATE == CHANNEL:
        t_a = power2(tl.load(g + ks, mask=inside, other=0.0).to(tl.float32) * LOG2E)
    if GATE == HEAD:
        t_a = power2(tl.load(g + tl.zeros_like(ks), mask=inside, other=0.0).to(tl.float32) * LOG2E)
    return t_q, t_k, t_v, t_a


@triton.jit(do_not_specialize=["T", "scale", *STRIDES])
def recurrent_kernel(
    q,
    k,
    v,
    g,
    o,
    first,
    last,
    bounds,
    scale,
    T,
    q_b: tl.int64,
    q_t: tl.int64,
    q_h: tl.int64,
    k_b: tl.int64,
    k_t: tl.int64,
    k_h: tl.int64,
    v_b: tl.int64,
    v_t: tl.int64,
    v_h: tl.int64,
    g_b: tl.int64,
    g_t: tl.int64,
    g_h: tl.int64,
    first_b: tl.int64,
    first_h: tl.int64,
    last_b: tl.int64,
    last_h: tl.int64,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """o and the final state of one head of one row, for BV of its value channels and all key channels.

    Math:   S_t = diag(a_t) S_t-1 + k_t v_t^T, o_t = scale S_t^T q_t, a_t = exp(g_t), or given where FIXED.
    Grid:   V / BV, H, rows, the first fastest; the state [KP, BV] stays in registers.
    HBM:    reads and writes the state once, fp32; reads q, k, g V / BV times, v once; writes o once.
    Stable: fp32; a decay is one exponential of a gate <= 0, below 2^-126 it is 0.
    Source: GLA eq. 3.
    """
    pid = tl.program_id(0)
    G_UNIT: tl.constexpr = 1 if GATE == HEAD else UNIT  # a gate a head is read by itself, wherever it lies
    NV: tl.constexpr = (V + BV - 1) // BV
    vb, head, row = pid % NV, (pid // NV % H).to(tl.int64), (pid // (NV * H)).to(tl.int64)
    count, token = T, row * T
    if PACKED:
        token = tl.load(bounds + row).to(tl.int64)
        count = (tl.load(bounds + row + 1).to(tl.int64) - token).to(tl.int32)
        at_q, at_k, at_v, at_g = token * q_t, token * k_t, token * v_t, token * g_t
    else:
        at_q, at_k, at_v, at_g = row * q_b, row * k_b, row * v_b, row * g_b
    # strides come in units, so that a compiler sees what divides them: 16-byte loads need it
    q, k, v = q + (at_q + head * q_h) * UNIT, k + (at_k + head * k_h) * UNIT, v + (at_v + head * v_h) * UNIT
    if GATE >= HEAD:
        g += (at_g + head * g_h) * G_UNIT
    o += (token * H + head) * V
    ks, vs = tl.arange(0, KP), vb * BV + tl.arange(0, BV)
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    S = tl.zeros([KP, BV], tl.float32)
    if HAS_FIRST:
        whole = first + (row * first_b + head * first_h) * UNIT + ks[:, None] * V + vs[None, :]
        S = tl.load(whole, mask=inside, other=0.0)
    fixed = 1.0
    if GATE == FIXED:
        fixed = tl.load(g + head)
    t_q, t_k, t_v, t_a = load_token(q, k, v, g, count > 0, ks, vs, K, V, GATE)
    for t in range(count):
        q, k, v = q + q_t * UNIT, k + k_t * UNIT, v + v_t * UNIT
        if GATE >= HEAD:
            g += g_t * G_UNIT
        # the next token is on its way while this one is taken
        n_q, n_k, n_v, n_a = load_token(q, k, v, g, t + 1 < count, ks, vs, K, V, GATE)
        if GATE >= HEAD:
            S = S * t_a[:, None]
        if GATE == FIXED:
            S = S * fixed
        S += t_k[:, None] * t_v[None, :]
        told = tl.sum(S * t_q[:, None], 0) * scale
        tl.store(o + vs, told.to(o.dtype.element_ty), mask=vs < V)
        o += H * V
        t_q, t_k, t_v, t_a = n_q, n_k, n_v, n_a
    if HAS_LAST:
        whole = last + (row * last_b + head * last_h) * UNIT + ks[:, None] * V + vs[None, :]
        tl.store(whole, S, mask=inside)


# --- one token, the state in place ------------------------------------------------------------------------


def gla_recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float | None = None
) -> Tensor:
    """Take one token: the state is changed in place, the output returned. For inference.

    Shapes: q, k [B, H, K]; v, o [B, H, V]; g [B, H, K], [B, H] for one gate a head, or None; state
    [B, H, K, V], fp32, of any strides but expanded ones. A time axis of 1 after B is taken as well.
    Units:  g in nats, <= 0; scale is K ** -0.5 unless given.
    Raises: ShapeError; UsageError where a gradient is asked for.
    Source: GLA eq. 3.
    """
    return _step(gate_of(q, g), q, k, v, g, state, scale)


def retention_recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """gla_recurrent_step where head h decays by 1 - 2 ** (-5 - h) a token (RetNet §2.1)."""
    return _step(gla_launch.FIXED, q, k, v, None, state, scale)


def linear_attention_recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """gla_recurrent_step without a gate."""
    return _step(gla_launch.NONE, q, k, v, None, state, scale)


# --- short sequences --------------------------------------------------------------------------------------


def gla_recurrent_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """gla_chunk's forward pass in one kernel, token by token: for short sequences, at inference.

    Shapes: q, k [B, T, H, K]; v, o [B, T, H, V]; g [B, T, H, K], [B, T, H] for one gate a head, or None;
    states [rows, H, K, V], fp32; cu_seqlens [rows + 1]. The initial state, 16 bits or fp32, is left as is.
    Units:  g in nats per step, <= 0; scale is K ** -0.5 unless given.
    Raises: ShapeError; UsageError where a gradient is asked for.
    Source: GLA eq. 3.
    """
    return _fused(gate_of(q, g), q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def retention_recurrent_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """gla_recurrent_fused where head h decays by 1 - 2 ** (-5 - h) a token (RetNet §2.1)."""
    return _fused(gla_launch.FIXED, q, k, v, None, scale, initial_state, output_final_state, cu_seqlens)


def linear_attention_recurrent_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """gla_recurrent_fused without a gate."""
    return _fused(gla_launch.NONE, q, k, v, None, scale, initial_state, output_final_state, cu_seqlens)


# --- checks and launches ----------------------------------------------------------------------------------


def gate_of(q: Tensor, g: Tensor | None) -> int:
    """The kind of gate, by its shape."""
    if g is None:
        return gla_launch.NONE
    return gla_launch.HEAD if g.dim() == q.dim() - 1 else gla_launch.CHANNEL


def _step(gate, q, k, v, g, state, scale) -> Tensor:
    is_flat = q.dim() == 3
    if is_flat:
        if v.dim() != 3 or k.dim() != 3:
            raise ShapeError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit")
        q, k, v, g = (None if x is None else x.unsqueeze(1) for x in (q, k, v, g))
    if q.dim() == 4 and q.shape[1] != 1:
        raise ShapeError(f"a step takes one token, not {q.shape[1]}: use gla_recurrent_fused")
    if not isinstance(state, Tensor):
        raise ShapeError("the state is not a tensor: it is changed in place")
    if any(step == 0 and size > 1 for step, size in zip(state.stride(), state.shape, strict=True)):
        raise ShapeError("the state is expanded: its rows share memory and cannot be changed in place")
    _refuse_gradients("gla_recurrent_step", q, k, v, g, state)
    check_call(gate, q, k, v, g, state, None, "state")
    scale = q.shape[-1] ** -0.5 if scale is None else as_number(scale)
    run = step_op if is_traced(q) else _take_one
    o = run(q, k, v, g, state, scale, gate)
    return o.squeeze(1) if is_flat else o


def _fused(gate, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    _refuse_gradients("gla_recurrent_fused", q, k, v, g, initial_state)
    if initial_state is not None:
        initial_state = as_state(initial_state, v_first=False, from_16_bits=True)
    check_call(gate, q, k, v, g, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else as_number(scale)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    run = fused_op if is_traced(q) else _take_all
    o, final = run(q, k, v, g, initial_state, cu_seqlens, scale, gate, output_final_state)
    return o, final if output_final_state else None


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UsageError(
            f"{name} has no backward pass",
            where="an input requires a gradient",
            fix="call it under torch.no_grad(), or use gla_chunk",
        )


def _take_one(q, k, v, g, state, scale, gate) -> Tensor:
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    work = state if _has_plain_matrices(state) else state.contiguous()
    _run(q, k, v, g, o, work, work, None, scale=scale, gate=gate)
    if work is not state:
        state.copy_(work)
    return o


def _take_all(q, k, v, g, initial_state, cu_seqlens, scale, gate, output_final_state):
    rows = gla_chunks.chunks_of(*q.shape[:2], cu_seqlens, CHUNK).rows  # with the bounds checked
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), None
    if output_final_state:
        final = q.new_empty(rows, *q.shape[2:], v.shape[3], dtype=torch.float32)
    if initial_state is not None and not _has_plain_matrices(initial_state):
        initial_state = initial_state.contiguous()
    _run(q, k, v, g, o, initial_state, final, cu_seqlens, scale=scale, gate=gate)
    return o, final


def _has_plain_matrices(state: Tensor) -> bool:
    return state.stride(3) == 1 and state.stride(2) == state.shape[3]


@functools.cache
def retention_decays(H: int, device: torch.device) -> Tensor:
    """[H] decays of retention's heads: exact in float32, where their logs would be rounded."""
    return (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).to(device, torch.float32)


def _run(q, k, v, g, o, first, last, bounds, *, scale, gate) -> None:
    """Launch recurrent_kernel: fills `o` and, where given, `last`, which may be `first`."""
    T, H, K, V = *q.shape[1:], v.shape[3]
    rows = q.shape[0] if bounds is None else bounds.shape[0] - 1
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if gate == gla_launch.FIXED:
        g = retention_decays(H, q.device)
    if gate == gla_launch.CHANNEL and g.stride(3) != 1:
        g = g.contiguous()
    layouts = tuple(None if x is None else x.stride() for x in (q, k, v, g, first, last))
    plan = _plan(gate, rows, H, K, V, bounds is not None, layouts, q.device)
    if plan.programs:
        tensors = (q, k, v, g, o, first, last, bounds)
        numbers = (scale, T, *plan.strides)
        launch(recurrent_kernel, plan.programs, tensors, numbers, plan.constants, plan.tile)


class Plan(NamedTuple):
    """What a launch takes beside its tensors; `strides` are the kernel's STRIDES, in units."""

    programs: int
    constants: dict[str, int]
    strides: tuple[int, ...]
    tile: Launch


@functools.lru_cache(maxsize=1024)
def _plan(gate, rows, H, K, V, is_packed, layouts, device) -> Plan:
    """The plan for tensors of these strides: a decoder asks again and again, and launches are short."""
    *tokens, gates, first, last = layouts
    gates = gates[:3] if gate in (gla_launch.HEAD, gla_launch.CHANNEL) else (0, 0, 0)
    around = [s for x in tokens for s in x[:3]]
    states = [s for x in (first, last) for s in (x or (0, 0))[:2]]
    seen = (*around, *states, *(gates if gate == gla_launch.CHANNEL else ()))
    unit = 16 if all(s % 16 == 0 for s in seen) else 1
    g_unit = 1 if gate == gla_launch.HEAD else unit  # gates a head are read one by one, wherever they lie
    tile, KP = recurrent_tile(K, V, rows * H, gla_chunks.multiprocessors(device))
    constants = {"H": H, "K": K, "V": V, "KP": KP, "BV": tile.BV, "GATE": gate, "PACKED": is_packed}
    constants |= {"HAS_FIRST": first is not None, "HAS_LAST": last is not None, "UNIT": unit}
    strides = *(s // unit for s in around), *(s // g_unit for s in gates), *(s // unit for s in states)
    return Plan(-(-V // tile.BV) * H * rows, constants, strides, tile)


# --- the same as operators, for what traces a program -----------------------------------------------------


@torch.library.custom_op("glabench::recurrent_step", mutates_args=("state",))
def step_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float, gate: int
) -> Tensor:
    """o [B, 1, H, V]; the state is changed."""
    return _take_one(q, k, v, g, state, scale, gate)


@step_op.register_fake
def _(q, k, v, g, state, scale, gate):
    return v.new_empty(v.shape)


@torch.library.custom_op("glabench::recurrent_fused", mutates_args=())
def fused_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    gate: int,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state, which has no elements where it is not asked for."""
    o, final = _take_all(q, k, v, g, initial_state, cu_seqlens, scale, gate, output_final_state)
    return o, q.new_empty(0, dtype=torch.float32) if final is None else final


@fused_op.register_fake
def _(q, k, v, g, initial_state, cu_seqlens, scale, gate, output_final_state):
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, *q.shape[2:], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)
