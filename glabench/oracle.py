"""What each family computes, in float64: the one definition that implementations are checked against.

The functions named after families are the definitions, token by token. Long sequences are evaluated by
`oracle_long`, which tests hold to these. Symbols: `glabench.kernels`.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glabench import oracle_long
from glabench.errors import ShapeError, UsageError, nearest

LITERAL_LIMIT = 256  # tokens; longer sequences take minutes and gigabytes one token at a time


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp g_t) S_t-1 + k_t v_t^T, o_t = scale S_t^T q_t (GLA eq. 3). Returns (o, S_T).

    Shapes: q, k, g [B, T, H, K]; v, o [B, T, H, V]; states [B, H, K, V].
    """
    S, outs = state, []
    for q_t, k_t, v_t, g_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.unbind(1), strict=True):
        S = g_t.exp().unsqueeze(-1) * S + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append(scale * (q_t.unsqueeze(-1) * S).sum(-2))
    return torch.stack(outs, 1) if outs else v, S


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """GLA whose gate g [B, T, H] is the same for every key channel of a head."""
    return gla(q, k, v, g.unsqueeze(-1), scale=scale, state=state)


def retention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """GLA whose gate is fixed: head h decays by 1 - 2 ** (-5 - h) a token (RetNet §2.1, without rotary)."""
    return gla(q, k, v, oracle_long.retention_gates(q), scale=scale, state=state)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """GLA without gates, and without a normaliser (GLA eq. 1)."""
    return gla(q, k, v, torch.zeros_like(q[..., :1]), scale=scale, state=state)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, None]:
    """Causal softmax attention: o_t = sum over s <= t of softmax_s(scale q_t . k_s) v_s; [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (scale * (q @ k.mT)).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def mamba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t, y_t = h_t C_t + D x_t (Mamba eq. 2). Returns (y, h_T).

    Shapes: x, dt, y [B, T, E]; A, states [.., E, N]; B, C [B, T, N]; D [E].
    """
    h, outs = state, []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = (dt_t.unsqueeze(-1) * A).exp() * h + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        outs.append((h * C_t.unsqueeze(-2)).sum(-1) + D * x_t)
    return torch.stack(outs, 1) if outs else x, h


def mamba2(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T, y_t = h_t C_t + D x_t (Mamba-2 eq. 1). Returns (y, h_T).

    Shapes: x, y [B, T, H, P]; dt [B, T, H]; A, D [H]; B, C [B, T, G, N]; states [B, H, P, N].
    """
    B, C = (z.repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (B, C))
    h, outs = state, []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        added = (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        h = (dt_t * A).exp()[..., None, None] * h + added
        outs.append((h * C_t.unsqueeze(-2)).sum(-1) + D.unsqueeze(-1) * x_t)
    return torch.stack(outs, 1) if outs else x, h


DEFINITIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    f.__name__: f for f in (gla, simple_gla, retention, linear_attention, attention, mamba, mamba2)
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call must give, in float64.

    `floors` holds, for gradients that are small differences of large terms (a gate's, where nothing is
    carried on; a query's, where one key has all the weight), the RMS of those terms, of the tensor or of
    each row [..., 1]: errors are measured against it where the gradient is smaller.
    """

    out: Tensor
    final_state: Tensor | None
    gradients: dict[str, Tensor]
    floors: dict[str, float | Tensor] = field(default_factory=dict)


def reference(
    family: str,
    tensors: dict[str, Tensor],
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    d_out: Tensor | None = None,
    d_state: Tensor | None = None,
    positions: Tensor | None = None,
    literal: bool | None = None,
) -> Answer:
    """The float64 answer to a call of `family`, with every gradient where d_out is given.

    Shapes: `tensors` as the family takes them; states [rows, H, K, V], mamba [B, E, N], mamba2 [rows,
    H, P, N].
    `positions` (attention): only these query rows are computed; d_out counts as zero elsewhere.
    `literal` asks for the definition at any length, or never; by default up to LITERAL_LIMIT tokens.
    Raises: UsageError, ShapeError.
    """
    if family not in DEFINITIONS:
        raise UsageError(f"no family {family!r}", where="oracle", fix=nearest(family, tuple(DEFINITIONS)))
    if family == "attention" and (initial_state is not None or cu_seqlens is not None):
        raise ShapeError("attention takes neither states nor packed sequences")
    if family != "attention" and positions is not None:
        raise ShapeError(f"positions are for attention, not {family}")
    exact = {name: x.detach().double() for name, x in tensors.items()}
    if d_out is not None:
        d_out = d_out.double()
    options = {"literal": literal}
    if "q" in exact:
        options["scale"] = exact["q"].shape[-1] ** -0.5 if scale is None else scale
    if family == "attention":
        return _attention(exact, d_out, positions, **options)
    state = _zero_state(exact, cu_seqlens) if initial_state is None else initial_state.detach().double()
    if cu_seqlens is None:
        answer = _evaluate(family, exact, state, d_out, d_state, **options)
    else:
        answer = _packed(family, exact, state, cu_seqlens.tolist(), d_out, d_state, **options)
    if initial_state is None:
        answer.gradients.pop("initial_state", None)
    answer.floors.update(_floors(family, exact, answer.gradients))
    return answer


def _attention(exact, d_out, positions, *, scale, literal) -> Answer:
    q, k, v = leaves = list(exact.values())
    if literal is None:
        literal = positions is None and q.shape[1] <= LITERAL_LIMIT
    out, gradients, floors = oracle_long.attention(q, k, v, scale=scale, d_out=d_out, positions=positions)
    if literal:
        leaves = [x.requires_grad_() for x in leaves]
        out, _ = attention(q, k, v, scale=scale)
        gradients = () if d_out is None else torch.autograd.grad(out, leaves, d_out)
    named = dict(zip(exact, gradients, strict=False))
    return Answer(out.detach(), None, named, dict(zip(("q", "k"), floors, strict=False)))


def _evaluate(family, exact, state, d_out, d_state, *, literal, **options) -> Answer:
    """One batch of equal lengths, in pieces that bound memory; gradients by autograd."""
    if literal is None:  # autograd keeps about four float64 states a token
        kept_bytes = 4 * 8 * oracle_long.tokens(exact) * state.numel()
        is_short = oracle_long.tokens(exact) <= LITERAL_LIMIT
        literal = is_short and kept_bytes <= oracle_long.budget_bytes(state.device)
    form = DEFINITIONS[family] if literal else oracle_long.FORMS[family]
    constants = oracle_long.constants(family, exact) if not literal else {}
    wholes = {**exact, "initial_state": state}
    out = torch.empty_like(exact["v" if "v" in exact else "x"])
    last = torch.empty_like(state)
    gradients = {} if d_out is None else {name: torch.zeros_like(x) for name, x in wholes.items()}
    d_state = torch.zeros_like(state) if d_state is None else d_state.double()
    wanted = d_out is not None
    for piece in [(slice(None), slice(None))] if literal else oracle_long.pieces(exact, state):
        with torch.set_grad_enabled(wanted):
            parts = {n: x[_at(n, piece)].detach().requires_grad_(wanted) for n, x in wholes.items()}
            fixed = {n: x[_at(n, piece)] for n, x in constants.items()}
            given = {("state" if n == "initial_state" else n): x for n, x in parts.items()}
            y, h = form(**given, **fixed, **options)
        out[_at("v", piece)], last[_at("initial_state", piece)] = y.detach(), h.detach()
        if wanted:
            given = (d_out[_at("v", piece)], d_state[_at("initial_state", piece)])
            parts_of = torch.autograd.grad((y, h), list(parts.values()), given, materialize_grads=True)
            for name, gradient in zip(parts, parts_of, strict=True):
                gradients[name][_at(name, piece)] += gradient
    return Answer(out, last, gradients)


def _at(name: str, piece: tuple[slice, slice]) -> tuple[slice, ...]:
    """Where a piece (slices of rows and of heads or channels) lies in a tensor."""
    rows, heads = piece
    if name in ("A", "D"):
        return (heads,)
    if name in ("B", "C"):
        return (rows,)
    return (rows, heads) if name == "initial_state" else (rows, slice(None), heads)


def _packed(family, exact, state, bounds, d_out, d_state, **options) -> Answer:
    """Packed sequences, one at a time."""
    answers = []
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        part = {n: x if n in ("A", "D") else x[:, lo:hi] for n, x in exact.items()}
        one = slice(i, i + 1)
        d_part = None if d_out is None else d_out[:, lo:hi]
        d_last = None if d_state is None else d_state[one]
        answers.append(_evaluate(family, part, state[one], d_part, d_last, **options))
    gradients = {}
    for name in answers[0].gradients:
        found = [a.gradients[name] for a in answers]
        if name in ("A", "D"):
            gradients[name] = torch.stack(found).sum(0)
        else:
            gradients[name] = torch.cat(found, 0 if name == "initial_state" else 1)
    return Answer(
        torch.cat([a.out for a in answers], 1), torch.cat([a.final_state for a in answers]), gradients
    )


def _zero_state(exact: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
    first = exact["q" if "q" in exact else "x"]
    rows = first.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if "q" in exact:
        shape = (first.shape[2], first.shape[3], exact["v"].shape[3])
    else:
        shape = (*first.shape[2:], exact["B"].shape[-1])
    return first.new_zeros(rows, *shape)


def _floors(family: str, exact: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, float]:
    """RMS of the terms whose difference a gate's gradient is: q dq for g, dt x dx for A."""
    if "g" in gradients:
        terms = exact["q"] * gradients["q"]  # of a head, independent signs: one token's sum may be near 0
        return {"g": rms(terms.norm(dim=-1) if family == "simple_gla" else terms)}
    if "A" in gradients:
        terms = exact["x"] * gradients["x"]
        terms = exact["dt"] * (terms.sum(-1) if family == "mamba2" else terms)
        return {"A": rms(terms) * math.sqrt(terms[..., 0].numel())}  # of a sum over tokens
    return {}


def rms(x: Tensor) -> float:
    """Root mean square, 0 for no elements."""
    return (x.norm() / math.sqrt(max(1, x.numel()))).item()


# Relative RMS error by (quantity, dtype) and the worst element's, set at about 3x what right
# implementations show. A gate's gradient is a difference of large sums: 16-bit products blur both.
USUAL = {"fp32": 2e-5, "fp16": 3e-3, "bf16": 1e-2}
GATE = {"fp32": 5e-5, "fp16": 8e-3, "bf16": 2e-2}
TOLERANCES: dict[tuple[str, str], float] = {
    (name, dtype): (GATE if name in ("g", "dt", "A") else USUAL)[dtype]
    for name in ("out", "final_state", "initial_state", *"qkvgxABCD", "dt")
    for dtype in USUAL
}
WORST = {"fp32": 2e-4, "fp16": 3e-2, "bf16": 1e-1}  # of the element and its row's RMS together
WIDE = ("A", "D", "initial_state", "final_state")  # float32 whatever the inputs are
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Error:
    """How far a tensor is from the oracle's. Ratios are None where there is no number to give."""

    name: str
    rms_ratio: float | None
    worst_ratio: float | None
    tol_ratio: float
    ok: bool
    reason: str = ""


def compare(name: str, got: Tensor | None, want: Tensor, dtype: str, floor: float | Tensor = 0.0) -> Error:
    """Judge `got` against float64 `want`: relative RMS error, and the worst element's.

    An element is set against itself plus the larger of its row's RMS and the tensor's (rows run along
    the last axis), so that one wrong token shows at any length. `floor` is Answer.floors[name].
    A missing tensor, another shape or dtype, NaN and infinity are not ok. `dtype` is the inputs'.
    """
    tol = TOLERANCES[name, dtype]
    fault = _misfit(got, want, TORCH_DTYPES["fp32" if name in WIDE else dtype])
    if fault:
        return Error(name, None, None, tol, False, fault)
    least = 2.0**-24 if got.dtype == torch.float16 else torch.finfo(got.dtype).tiny
    each = torch.as_tensor(floor, dtype=torch.float64, device=want.device)
    size = max(rms(want), rms(each), least / tol)  # below `least` a dtype has no relative precision
    off = got.double().sub_(want)
    ratio = rms(off) / size
    row = want.square().mean(-1, keepdim=True).sqrt_().clamp_min_(size)
    row = torch.maximum(row, each)
    worst = (off.abs_() / row.add(want.abs())).max().item() if off.numel() else 0.0
    if ratio > tol:
        reason = f"relative RMS error {ratio:.1e} is above {tol:.0e}"
    elif worst > WORST[dtype]:
        reason = f"the worst element's error {worst:.1e} is above {WORST[dtype]:.0e}"
    else:
        reason = ""
    return Error(name, ratio, worst, tol, not reason, reason)


def _misfit(got: Tensor | None, want: Tensor, dtype: torch.dtype) -> str:
    if not isinstance(got, Tensor):
        return f"no tensor but {type(got).__name__}"
    if got.shape != want.shape:
        return f"shape {list(got.shape)} is not {list(want.shape)}"
    if got.dtype != dtype:
        return f"dtype {got.dtype} is not {dtype}".replace("torch.", "")
    bad = got.numel() - int(got.isfinite().sum())
    return f"NaN or infinity in {bad} of {got.numel()} elements" if bad else ""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element left unwritten shows; never while timing."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deterministic")  # some operators only warn: that is enough here
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled
