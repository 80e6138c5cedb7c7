"""Linear attention in chunks, own Triton kernels: gates per channel, per head, fixed, or none (GLA §4).

Two forms: the materialised one keeps the state of each chunk from the forward pass for the backward
pass; the recomputing one keeps none, makes its output in one sequential kernel where that fits, and
forms the states in the backward pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from glabench.errors import ShapeError, UnavailableError, UsageError, nearest
from glabench.kernels import gla_launch
from glabench.kernels.arguments import check_qkv
from glabench.kernels.gla_chunks import packed_chunks
from glabench.kernels.gla_launch import CHANNEL, FIXED, HEAD, NONE, NOTHING, Kept
from glabench.kernels.launching import INTERPRETED

FORMS = ("auto", "materialised", "recompute")
WIDEST = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 does not say


def gla_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    *,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention, one gate a key channel. Returns (o, final state or None).

    Shapes: q, k, g [B, T, H, K]; v, o [B, T, H, V]; states [rows, H, K, V], fp32; cu_seqlens [rows + 1].
    Units:  g in nats per step, <= 0, -inf as well; scale is K ** -0.5 unless given.
    Other:  state_v_first: states are [rows, H, V, K]. cu_seqlens_cpu, the same bounds, saves waiting for
            the device, which else is asked for them.
    Raises: ShapeError; UsageError for an unknown form.
    Source: GLA eq. 3 and §4.
    """
    options = (scale, initial_state, output_final_state, cu_seqlens, form, state_v_first, cu_seqlens_cpu)
    return _run(CHANNEL, q, k, v, g, *options)


def gla_chunk_materialised(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **layout
):
    """gla_chunk that keeps the chunk states for the backward pass (GLA §4.1, "materialization")."""
    options = (scale, initial_state, output_final_state, cu_seqlens, "materialised")
    return gla_chunk(q, k, v, g, *options, **layout)


def gla_chunk_recompute(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **layout
):
    """gla_chunk that keeps no chunk states, and forms them again in the backward pass (GLA §4.1)."""
    options = (scale, initial_state, output_final_state, cu_seqlens, "recompute")
    return gla_chunk(q, k, v, g, *options, **layout)


def simple_gla_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    *,
    g_gamma: Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one gate a head, g [B, T, H], or g_gamma [H] for every token, or none.

    The initial state may have 16 bits. The rest as gla_chunk.
    """
    if g_gamma is not None:
        if g is not None:
            raise UsageError("both g and g_gamma", where="arguments", fix="give one of them")
        if g_gamma.shape != q.shape[2:3]:
            raise ShapeError(f"g_gamma {_of(g_gamma)} does not fit q {_of(q)}")
        g = g_gamma.expand(q.shape[:3])
    options = (scale, initial_state, output_final_state, cu_seqlens, form, state_v_first, cu_seqlens_cpu)
    return _run(NONE if g is None else HEAD, q, k, v, g, *options)


def retention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    *,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention: head h decays by 1 - 2 ** (-5 - h) a token (RetNet §2.1); the rest as simple_gla_chunk."""
    options = (scale, initial_state, output_final_state, cu_seqlens, form, state_v_first, cu_seqlens_cpu)
    return _run(FIXED, q, k, v, None, *options)


def linear_attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    *,
    normalize: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with neither gate nor normaliser; the rest as simple_gla_chunk."""
    if normalize:
        raise UsageError("no normaliser", where="normalize", fix="give False, and divide the output")
    options = (scale, initial_state, output_final_state, cu_seqlens, form, state_v_first, cu_seqlens_cpu)
    return _run(NONE, q, k, v, None, *options)


def _run(
    gate, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, form, v_first, cu_seqlens_cpu
):
    if form not in FORMS:
        raise UsageError(f"no form {form!r}", where="form", fix=nearest(str(form), FORMS))
    if initial_state is not None:
        initial_state = as_state(initial_state, v_first=v_first, from_16_bits=gate != CHANNEL)
    check_call(gate, q, k, v, g, initial_state, cu_seqlens)
    if form == "auto" and (not torch.is_grad_enabled() or is_exporting()):
        form = "recompute"  # keeps nothing, which nobody would ask for
    scale = q.shape[-1] ** -0.5 if scale is None else as_number(scale)
    cu_seqlens = _packed(cu_seqlens)
    if is_traced(q):
        o, final, *_ = chunk_op(
            q, k, v, g, initial_state, cu_seqlens, scale, gate, output_final_state, form == "recompute"
        )
    else:
        if cu_seqlens is not None and cu_seqlens_cpu is not None:
            packed_chunks(cu_seqlens, q.shape[1], gla_launch.chunk_size(q, v, gate), cu_seqlens_cpu)
        how = (scale, gate, output_final_state, form)
        o, final = ChunkFunction.apply(q, k, v, g, initial_state, cu_seqlens, how)
    if not output_final_state:
        return o, None
    return o, final.mT.contiguous() if v_first else final


def as_state(state: Tensor, *, v_first: bool, from_16_bits: bool) -> Tensor:
    """The state [rows, H, K, V], in float32 if it has 16 bits and may; what is none is left to check_call."""
    if not isinstance(state, Tensor):
        return state
    state = state.mT if v_first else state
    return state.float() if from_16_bits and state.dtype in DTYPES else state


def as_number(scale: float | Tensor) -> float:
    """Raises UsageError for a tensor of more than a number, or one whose gradient would be lost."""
    if isinstance(scale, Tensor) and (scale.dim() or scale.requires_grad):
        what = "wants a gradient" if scale.requires_grad else f"is {_of(scale)}, not a number"
        raise UsageError(f"scale {what}", where="scale", fix="multiply q by it, and give a number")
    return float(scale)


def is_traced(q: Tensor) -> bool:
    """Whether a compiler, an exporter or a mode looks on: it sees an operator, which is slower to call."""
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return True
    return is_in_torch_dispatch_mode()


def check_call(gate, q, k, v, g, state, cu_seqlens, state_name="initial_state") -> None:
    """Raises ShapeError naming what does not fit, UnavailableError where there is no GPU."""
    try:
        _check_call(gate, q, k, v, g, state, cu_seqlens, state_name)
    except AttributeError:  # looking first would take the time of every call
        _check_tensors(q, k, v, g if gate in (HEAD, CHANNEL) else q, state, cu_seqlens, state_name)
        raise


def _check_call(gate, q, k, v, g, state, cu_seqlens, state_name) -> None:
    _check_inputs(q, k, v)
    if gate in (HEAD, CHANNEL):
        if g.shape != (q.shape if gate == CHANNEL else q.shape[:3]):
            raise ShapeError(f"g {_of(g)} does not fit q {_of(q)}")
        if g.dtype not in DTYPES:
            raise ShapeError(f"g {g.dtype} is not one of bf16, fp16 and fp32")
    rows = q.shape[0]
    if cu_seqlens is not None:
        if rows != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
            raise ShapeError(f"packed sequences need a batch of 1 and cu_seqlens [rows + 1], not {rows}")
        rows = cu_seqlens.shape[0] - 1
    if state is not None:
        if state.shape != (rows, *q.shape[2:], v.shape[3]):
            raise ShapeError(f"{state_name} {_of(state)} is not {[rows, *q.shape[2:], v.shape[3]]}")
        if state.dtype != torch.float32:
            raise ShapeError(f"{state_name} {state.dtype} is not float32")
    _check_devices(q, k, v, g, state, cu_seqlens)


def _check_tensors(q, k, v, g, state, cu_seqlens, state_name) -> None:
    for x in (q, k, v, g):
        if not isinstance(x, Tensor):
            raise ShapeError(f"one of q, k, v and g is {_kind(x)}, not a tensor")
    for name, x in ((state_name, state), ("cu_seqlens", cu_seqlens)):
        if x is not None and not isinstance(x, Tensor):
            raise ShapeError(f"{name} is {_kind(x)}, not a tensor", fix="give it by name")


def _kind(x: object) -> str:
    return "None" if x is None else f"of type {type(x).__name__}"


def _check_inputs(q, k, v) -> None:
    check_qkv(q, k, v)
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        types = f"q {q.dtype}, k {k.dtype} and v {v.dtype}"
        raise ShapeError(f"{types} are not one of bf16, fp16 and fp32, the same for all")
    for name, x in (("d_k", q), ("d_v", v)):
        if not 0 < x.shape[3] <= WIDEST or x.shape[3] % 16:
            raise ShapeError(f"{name} {x.shape[3]} is not a multiple of 16 up to {WIDEST}")


def _check_devices(q, *others) -> None:
    for x in others:
        if x is not None and x.device != q.device:
            raise ShapeError(f"tensors are on {q.device} and {x.device}")
    if not q.is_cuda and not INTERPRETED:
        raise UnavailableError(f"no kernels for {q.device}", where="device", fix="use gla_chunk_torch")


def _of(x: Tensor) -> str:
    return str(list(x.shape))


class ChunkFunction(torch.autograd.Function):
    """The operator without the dispatcher's cost: see chunk_op."""

    @staticmethod
    def forward(ctx, q, k, v, g, initial_state, cu_seqlens, how):
        scale, gate, output_final_state, form = how
        q, k, v, g, initial_state = (_packed(x) for x in (q, k, v, g, initial_state))
        keep = form == "materialised" or (form == "auto" and any(ctx.needs_input_grad))
        options = {"scale": scale, "gate": gate, "output_final_state": output_final_state, "keep": keep}
        o, final, kept = _forward(q, k, v, g, initial_state, cu_seqlens, **options)
        ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *(kept or NOTHING))
        ctx.scale, ctx.gate = scale, gate
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do, d_final):
        if not torch.is_grad_enabled():
            return _gradients(ctx, do, d_final)
        # a graph of the gradients is asked for: they depend on the inputs too, which the decorator must see
        return once_differentiable(_gradients)(ctx, do, d_final, *ctx.saved_tensors)


def _gradients(ctx, do, d_final, *_):
    q, k, v, g, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    kept = None if kept[0] is None else Kept(*kept)
    wants = initial_state is not None and ctx.needs_input_grad[4]
    found = _backward(do, d_final, q, k, v, g, initial_state, cu_seqlens, kept, ctx.scale, ctx.gate, wants)
    return *found, None, None


def _packed(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _forward(q, k, v, g, initial_state, cu_seqlens, **options):
    if options["gate"] == FIXED:
        g = gla_launch.retention_gates(q.shape[2], q.device)
    return gla_launch.forward(q, k, v, g, initial_state, cu_seqlens, **options)


def _backward(do, d_final, q, k, v, g, initial_state, cu_seqlens, kept, scale, gate, wants_d_initial):
    if gate == FIXED:
        g = gla_launch.retention_gates(q.shape[2], q.device)
    do = torch.zeros_like(v) if do is None else _packed(do)
    d_final = _packed(d_final)
    if kept is None:
        kept = gla_launch.states_before(q, k, v, g, initial_state, cu_seqlens, scale=scale, gate=gate)
    return gla_launch.backward(
        do,
        d_final,
        q,
        k,
        v,
        g,
        kept,
        cu_seqlens,
        scale=scale,
        gate=gate,
        wants_d_initial=wants_d_initial,
    )


# --- the same as operators, for what traces a program: an operator gives tensors, so "none" has no elements


@torch.library.custom_op("glabench::linear_chunk", mutates_args=())
def chunk_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    gate: int,
    output_final_state: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and what the backward pass needs: Kept, its q and k only where they are scaled."""
    q, k, v, g, initial_state = (_packed(x) for x in (q, k, v, g, initial_state))
    options = {"scale": scale, "gate": gate, "output_final_state": output_final_state, "keep": not recompute}
    o, final, kept = _forward(q, k, v, g, initial_state, cu_seqlens, **options)
    made = kept or NOTHING
    if gate != CHANNEL:
        made = made._replace(q=None, k=None)
    return o, *(_or_nothing(q, x) for x in (final, *made))


def _or_nothing(q: Tensor, x: Tensor | None) -> Tensor:
    return q.new_empty(0, dtype=torch.float32) if x is None else x


@chunk_op.register_fake
def _(q, k, v, g, initial_state, cu_seqlens, scale, gate, output_final_state, recompute):
    B, T, H, V = v.shape
    K, wide = q.shape[3], torch.float32
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = gla_launch.chunk_size(q, v, gate)
    chunks = 0 if recompute else _chunk_count(B, T, cu_seqlens, size)  # a size that no output has is refused
    blocks = gla_launch.key_blocks(q, v, gate)
    totals = {HEAD: (chunks, H, 2, size), CHANNEL: (chunks, H, K)}.get(gate, 0)
    reach = {HEAD: (chunks, H, size), CHANNEL: (chunks, H, blocks)}.get(gate, 0)
    has_scores = not recompute and gla_launch.keeps_scores(q, v, gate)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty((rows, H, K, V) if output_final_state else 0, dtype=wide),
        q.new_empty(0, dtype=wide)
        if recompute
        else q.new_empty(chunks, H, V, K, dtype=gla_launch.state_dtype(q.dtype)),
        q.new_empty(0 if recompute else totals, dtype=wide),
        q.new_empty(0 if recompute else reach, dtype=torch.int32 if gate == HEAD and not recompute else wide),
        *(
            torch.empty_like(x, dtype=gla_launch.state_dtype(q.dtype), memory_format=torch.contiguous_format)
            if gate == CHANNEL and not recompute
            else q.new_empty(0, dtype=wide)
            for x in (q, k)
        ),
        q.new_empty(chunks, H, size, size, dtype=gla_launch.state_dtype(q.dtype))
        if has_scores
        else q.new_empty(0, dtype=wide),
    )


def _chunk_count(B, T, cu_seqlens, size):
    if cu_seqlens is None:
        return B * (-(-T // size))
    return torch.library.get_ctx().new_dynamic_size()  # only the bounds say how many


@torch.library.custom_op("glabench::linear_chunk_backward", mutates_args=())
def chunk_backward_op(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    totals: Tensor,
    reach: Tensor,
    scaled_q: Tensor,
    scaled_k: Tensor,
    scores: Tensor,
    scale: float,
    gate: int,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial state."""
    q, k, v, g, initial_state = (_packed(x) for x in (q, k, v, g, initial_state))
    scaled = (scaled_q, scaled_k) if gate == CHANNEL else (q, k)
    kept = None if recompute else Kept(states, totals, reach, *scaled, scores if scores.numel() else None)
    wants = initial_state is not None
    found = _backward(do, d_final, q, k, v, g, initial_state, cu_seqlens, kept, scale, gate, wants)
    return tuple(_or_nothing(q, x) for x in found)


@chunk_backward_op.register_fake
def _(do, d_final, q, k, v, g, initial_state, cu_seqlens, *_):
    made = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, g, initial_state)
    )
    return tuple(_or_nothing(q, x) for x in made)


def _setup(ctx, inputs, output) -> None:
    q, k, v, g, initial_state, cu_seqlens, scale, gate, _, recompute = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *output[2:])
    ctx.scale, ctx.gate, ctx.recompute = scale, gate, recompute
    ctx.has_final = inputs[8]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, d_final, *_):
    q, k, v, g, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    d_final = d_final if ctx.has_final else None
    dq, dk, dv, dg, d_initial = chunk_backward_op(
        do, d_final, q, k, v, g, initial_state, cu_seqlens, *kept, ctx.scale, ctx.gate, ctx.recompute
    )
    dg = None if g is None else dg
    d_initial = None if initial_state is None else d_initial
    return dq, dk, dv, dg, d_initial, None, None, None, None, None


chunk_op.register_autograd(_differentiate, setup_context=_setup)
