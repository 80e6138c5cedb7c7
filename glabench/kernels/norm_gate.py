"""The RMSNorm of each head and its output gate in one (GLA §4.4), own Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from glabench.errors import ShapeError
from glabench.kernels.gla_chunks import multiprocessors
from glabench.kernels.launching import launch
from glabench.kernels.plan_files import Launch

BLOCK = 2048  # values that a program holds at once of each tensor: 16 a thread of four warps
WIDEST = 16384
BACK_PROGRAMS = 4  # a multiprocessor, that reside there at once: each leaves a row of the weight's gradient


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """swish(gate) * x / rms(x) * weight over the last dimension, float32 inside, rounded once; on a GPU.

    Shapes: x, gate and the result [..., V]; weight [V]. The result has x's type.
    Only the inputs are kept for the backward pass: the norm's output is made again there.
    Raises: ShapeError.
    Source: GLA §4.4.
    """
    V = x.shape[-1]
    if gate.shape != x.shape or weight.shape != (V,) or V > WIDEST:
        found = ", ".join(str(list(t.shape)) for t in (x, gate, weight))
        raise ShapeError(f"x, gate and weight {found} are not [..., V], [..., V] and [V], V <= {WIDEST}")
    return NormGateFunction.apply(x.contiguous(), gate.contiguous(), weight.contiguous(), float(eps))


class NormGateFunction(torch.autograd.Function):
    """See norm_gate."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps):
        y = x.new_empty(x.shape)
        rows, constants, tile = _sizes(x)
        programs = -(-rows // constants["BR"])
        launch(norm_gate_kernel, programs, (x, gate, weight, y), (eps, rows), constants, tile)
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        rows, constants, tile = _sizes(x)
        programs = min(-(-rows // constants["BR"]), BACK_PROGRAMS * multiprocessors(x.device))
        dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
        parts = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        tensors = (x, gate, weight, dy.contiguous(), dx, dgate, parts)
        launch(norm_gate_backward_kernel, programs, tensors, (ctx.eps, rows, programs), constants, tile)
        return dx, dgate, parts.sum(0).to(weight.dtype), None


def _sizes(x: Tensor) -> tuple[int, dict[str, int], Launch]:
    V = x.shape[-1]
    return x.numel() // V, *tile_of(V)


def tile_of(V: int) -> tuple[dict[str, int], Launch]:
    """The kernels' constants for rows of V values, and their launch."""
    BV = triton.next_power_of_2(V)
    warps = 4 if BV <= BLOCK else 16
    return {"V": V, "BV": BV, "BR": max(1, BLOCK // BV)}, Launch(BV=BV, warps=warps, stages=1)


@triton.jit
def load_rows(x, first, rows, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr):
    """Rows `first` and on of x, [BR, BV] in float32, and where they lie; zeros outside."""
    row, col = first + tl.arange(0, BR), tl.arange(0, BV)
    where = row[:, None].to(tl.int64) * V + col[None, :]
    mask = (row < rows)[:, None] & (col < V)[None, :]
    return tl.load(x + where, mask=mask, other=0.0).to(tl.float32), where, mask


@triton.jit(do_not_specialize=["eps", "rows"])
def norm_gate_kernel(x, gate, weight, y, eps, rows, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr):
    """y of BR rows.

    Math:   y = swish(z) * x * r * w, r = 1 / sqrt(mean(x^2) + eps).
    Grid:   rows / BR.
    HBM:    reads x and gate and writes y once.
    Source: GLA §4.4.
    """
    first = tl.program_id(0) * BR
    t, where, mask = load_rows(x, first, rows, V, BV, BR)
    z, _, _ = load_rows(gate, first, rows, V, BV, BR)
    col = tl.arange(0, BV)
    w = tl.load(weight + col, mask=col < V, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(t * t, 1) / V + eps)
    out = t * r[:, None] * w[None, :] * (z * tl.sigmoid(z))
    tl.store(y + where, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["eps", "rows", "programs"])
def norm_gate_backward_kernel(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    parts,
    eps,
    rows,
    programs,
    V: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
):
    """Gradients of every so many blocks of BR rows, and this program's part of the weight's.

    Math:   with n = x r and s = sigmoid(z): dz = dy n w s (1 + z (1 - s)), dn = dy w z s,
            dx = r (dn - n mean(dn n)), dw = sum over rows of dy z s n.
    Grid:   `programs`; the parts of dw are summed in their order.
    HBM:    reads x, gate and dy and writes dx and dgate once; parts are V floats a program.
    Source: GLA §4.4.
    """
    part = tl.program_id(0)
    col = tl.arange(0, BV)
    w = tl.load(weight + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BR, BV], tl.float32)
    for first in range(part * BR, rows, programs * BR):
        t, where, mask = load_rows(x, first, rows, V, BV, BR)
        z, _, _ = load_rows(gate, first, rows, V, BV, BR)
        d, _, _ = load_rows(dy, first, rows, V, BV, BR)
        r = tl.rsqrt(tl.sum(t * t, 1) / V + eps)[:, None]
        n, s = t * r, tl.sigmoid(z)
        dz = d * n * w * s * (1.0 + z * (1.0 - s))
        tl.store(dgate + where, dz.to(dgate.dtype.element_ty), mask=mask)
        passed = d * z * s
        dw += passed * n
        dn = passed * w
        inner = tl.sum(dn * n, 1)[:, None] / V
        tl.store(dx + where, (r * (dn - n * inner)).to(dx.dtype.element_ty), mask=mask)
    tl.store(parts + part * V + col, tl.sum(dw, 0), mask=col < V)
