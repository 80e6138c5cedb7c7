"""Runs in a process of its own, under Triton's interpreter: the chunk operator as compilers see it.

Prints one JSON object, {"check": whether it held}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch.utils.checkpoint import checkpoint

from glabench.kernels import gla_chunk as kernels


def leaves(rows=1):
    """q, k, v, g and a state that want gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16) for _ in range(3))
    made = q, k, v, -torch.rand(1, 70, 2, 16), torch.randn(rows, 2, 16, 16)
    return [x.requires_grad_() for x in made]


def loss(q, k, v, g, state, cu_seqlens=None):
    """A number that depends on the output and the final state."""
    o, final = kernels.gla_chunk(
        q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return o.sin().sum() + final.cos().sum()


def head_loss(q, k, v, g, state, cu_seqlens=None):
    """As loss, with one gate a head."""
    o, final = kernels.simple_gla_chunk(
        q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return o.sin().sum() + final.cos().sum()


def of_heads(made):
    """The same leaves, with one gate a head."""
    return [*made[:3], made[3][..., 0].detach().clone().requires_grad_(), made[4]]


def same(run, cu_seqlens=None, eager=loss, make=list):
    """Whether run(...) has eager's gradients, bit for bit."""
    made = make(leaves(1 if cu_seqlens is None else len(cu_seqlens) - 1))
    want = torch.autograd.grad(eager(*made, cu_seqlens), made)
    got = torch.autograd.grad(run(*made, cu_seqlens), made)
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Layer(torch.nn.Module):
    """The least that can be exported."""

    def forward(self, q, k, v, g):
        return kernels.gla_chunk(q, k, v, g)[0]


def main():
    """Every check, by name."""
    torch.set_num_threads(1)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    inputs = [x.detach() for x in leaves()[:4]]
    graph = torch.export.export(Layer(), tuple(inputs)).module()
    for recompute in (False, True):
        torch.library.opcheck(kernels.chunk_op, (*leaves(), None, 0.25, 3, True, recompute))
        torch.library.opcheck(kernels.chunk_op, (*of_heads(leaves()), None, 0.25, 2, True, recompute))
    found = {
        "compiled": same(compiled),
        "compiled, packed": same(compiled, torch.tensor([0, 10, 40, 70])),
        "checkpointed": same(lambda *args: checkpoint(loss, *args, use_reentrant=False)),
        "exported": torch.equal(graph(*inputs), kernels.gla_chunk(*inputs)[0]),
        "repeated": same(loss),
        "compiled, a gate a head": same(
            torch.compile(head_loss, backend="aot_eager", fullgraph=True), eager=head_loss, make=of_heads
        ),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
