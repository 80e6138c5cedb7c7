"""log alpha = log sigmoid(x) / tau of a gate's logits (GLA §4.4), own Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from glabench.kernels.launching import launch
from glabench.kernels.plan_files import Launch

TILE = Launch(BV=2048, warps=4, stages=1)  # 16 elements a thread: two 16-byte loads of bf16


def log_gate(x: Tensor, tau: float) -> Tensor:
    """log sigmoid(x) / tau in float32 of bf16, fp16 or fp32 logits of any shape, on a GPU.

    Only the result is kept for the backward pass, which a layer with this gate keeps anyway.
    Source: GLA §4.4.
    """
    return LogGateFunction.apply(x.contiguous(), float(tau))


class LogGateFunction(torch.autograd.Function):
    """See log_gate."""

    @staticmethod
    def forward(ctx, x, tau):
        g = x.new_empty(x.shape, dtype=torch.float32)
        _launch(log_gate_kernel, (x, g), tau)
        ctx.save_for_backward(g)
        ctx.tau, ctx.dtype = tau, x.dtype
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx, dg):
        (g,) = ctx.saved_tensors
        dx = g.new_empty(g.shape, dtype=ctx.dtype)
        _launch(log_gate_backward_kernel, (g, dg.contiguous(), dx), ctx.tau)
        return dx, None


def _launch(kernel, tensors: tuple, tau: float) -> None:
    count = tensors[0].numel()
    launch(kernel, -(-count // TILE.BV), tensors, (tau, count), {"BV": TILE.BV}, TILE)


@triton.jit(do_not_specialize=["tau", "count"])
def log_gate_kernel(x, g, tau, count: tl.int64, BV: tl.constexpr):
    """g of BV logits.

    Math:   log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|)).
    Grid:   count / BV.
    HBM:    reads x and writes g once.
    Stable: log(1 + e) is taken of the rounded 1 + e, and its rounding undone, so that a gate that hardly
            decays keeps its digits.
    """
    at = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV)
    logits = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(logits))
    grown = 1.0 + e
    added = grown - 1.0
    log1p = tl.where(added == 0.0, e, tl.log(grown) * (e / tl.where(added == 0.0, 1.0, added)))
    tl.store(g + at, (tl.minimum(logits, 0.0) - log1p) / tau, mask=at < count)


@triton.jit(do_not_specialize=["tau", "count"])
def log_gate_backward_kernel(g, dg, dx, tau, count: tl.int64, BV: tl.constexpr):
    """Gradient of BV logits, from g.

    Math:   sigmoid(-x) / tau = (1 - exp(tau g)) / tau.
    Grid:   count / BV.
    HBM:    reads g and dg and writes dx once.
    Stable: near tau g = 0, where the difference would cancel, nine terms of its series; a tenth is < 2^-30.
    """
    at = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV)
    y = tl.load(g + at, mask=at < count, other=0.0) * tau
    near = tl.maximum(y, -0.5)
    series = 1.0 + near / 9.0
    for i in tl.static_range(7):
        series = 1.0 + series * near / (8.0 - i)
    closed = tl.where(y < -0.5, 1.0 - tl.exp(y), -near * series)
    grad = tl.load(dg + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(dx + at, (grad * closed / tau).to(dx.dtype.element_ty), mask=at < count)
