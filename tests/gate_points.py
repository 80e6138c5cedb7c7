"""Runs in a process of its own, under Triton's interpreter: the gates' kernels beside float64.

Prints one JSON object, {point: the relative error of the output and of each gradient}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
import torch.nn.functional as F

from glabench import oracle
from glabench.kernels import norm_gate as norm_gates
from glabench.kernels.log_gate import log_gate
from glabench.kernels.norm_gate import norm_gate
from glabench.models import catalog, fused
from glabench.models.mixer import rotary_angles

EPS = 1e-6
NORMS = {  # shape, programs of the backward pass a multiprocessor
    "one row": ((1, 1, 1, 16), 4),
    "rows that fill no block": ((2, 5, 3, 48), 4),
    "many blocks a program": ((1, 70, 3, 2048), 1),
    "wider than a block": ((1, 3, 2, 2560), 4),
}
LOGITS = {  # of every size, among them those where log sigmoid(x) or its gradient could cancel
    "near zero": (-1, 1),
    "open": (0, 40),
    "shut": (-300, 0),
}


def errors(call, plain, leaves):
    """Worst relative error of each, by its largest value, NaN where memory was left as it was."""
    made = [x.clone().requires_grad_() for x in leaves]
    exact = [x.double().requires_grad_() for x in leaves]
    want = plain(*exact)
    d_out = torch.randn(want.shape)
    wanted = [want, *torch.autograd.grad(want, exact, d_out.double())]
    with oracle.poisoned_memory():
        out = call(*made)
        found = [out, *torch.autograd.grad(out, made, d_out)]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]


def plain_norm(x, gate, weight):
    """In the inputs' type."""
    return F.silu(gate) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def digits(low, high):
    """Worst relative error of single elements: a gate that hardly decays keeps its digits."""
    x = torch.linspace(low, high, 5001)
    made, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    with oracle.poisoned_memory():
        g = log_gate(made, 16.0)
        (dx,) = torch.autograd.grad(g.sum(), made)
    want = F.logsigmoid(exact) / 16
    (d_want,) = torch.autograd.grad(want.sum(), exact)
    return [((a - b) / b).abs().max().item() for a, b in ((g, want), (dx, d_want))]


def layer(name):
    """A mixer's output and gradients with the kernels, relative to its own plain form."""
    mixer = catalog.build(name, hidden_size=64, num_hidden_layers=1, num_heads=2).model.layers[0].attn
    x, d_out = torch.randn(2, 70, 64, requires_grad=True), torch.randn(2, 70, 64)
    rotary = rotary_angles(mixer.config, 0, 70, x)
    leaves = [x, *mixer.parameters()]

    def run():
        out = mixer(x, rotary=rotary)[0]
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    want = run()
    fused.fuse_gates(mixer)
    with oracle.poisoned_memory():
        found = run()
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, want, strict=True)]


def main():
    """Every point."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for name, (shape, programs) in NORMS.items():
        norm_gates.BACK_PROGRAMS = programs
        leaves = torch.randn(shape) * 3, torch.randn(shape) * 3, 1 + 0.3 * torch.randn(shape[-1])
        found[name] = errors(lambda *args: norm_gate(*args, EPS), plain_norm, leaves)
    for name, bounds in LOGITS.items():
        found[name] = digits(*bounds)
    for name in ("gla-tiny", "retnet-tiny"):
        found[name] = layer(name)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
