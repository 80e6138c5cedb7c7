"""Runs in a process of its own, under Triton's interpreter: the operator as autograd and tracers see it.

Prints one JSON object, {"check": whether it held}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import functools

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

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


def alone(place):
    """Whether one input's gradient is the same where no other input wants one, if any does."""
    made = leaves()
    want = torch.autograd.grad(loss(*made), made)
    less = [x.detach().requires_grad_(i == place) for i, x in enumerate(made)]
    found = loss(*less)
    if place is None:
        return not found.requires_grad and torch.equal(found, loss(*made))
    return torch.equal(torch.autograd.grad(found, less[place])[0], want[place])


def inferred():
    """Whether inference mode gives the numbers that training gives."""
    made = leaves()
    with torch.inference_mode():
        found = loss(*made)
    return found.is_inference() and torch.allclose(found, loss(*made), rtol=1e-6, atol=0)


def refused(call, says):
    """Whether the call is refused, and how."""
    try:
        call()
    except RuntimeError as err:
        return says in str(err)
    return False


def twice():
    """A gradient of a gradient, which nothing here computes."""
    made = leaves()
    first = torch.autograd.grad(loss(*made), made, create_graph=True)
    sum(x.square().sum() for x in first).backward()


def batched():
    """A call over a batch of its own."""
    q, *rest = (x.detach() for x in leaves())
    torch.func.vmap(lambda x: kernels.gla_chunk(x, *rest[:3])[0])(torch.stack([q, q]))


def kept_once():
    """Whether a checkpoint that is to save the operator's outputs makes them once, with eager's gradients."""
    calls, forward = [], kernels._forward

    def counted(*args, **how):
        calls.append(args)
        return forward(*args, **how)

    saved = functools.partial(create_selective_checkpoint_contexts, [torch.ops.glabench.linear_chunk.default])
    want = torch.autograd.grad(loss(*(made := leaves())), made)
    kernels._forward = counted
    found = torch.autograd.grad(
        checkpoint(loss, *(made := leaves()), use_reentrant=False, context_fn=saved), made
    )
    kernels._forward = forward
    return len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def traced(*inputs):
    """Whether a tracer of real tensors sees the operator, and what it made runs on other tensors."""
    graph = make_fx(lambda *x: kernels.gla_chunk(*x)[0])(*inputs)
    seen = [node.target for node in graph.graph.nodes]
    q, *rest = inputs
    same_o = torch.equal(graph(2 * q, *rest), kernels.gla_chunk(2 * q, *rest)[0])
    return same_o and torch.ops.glabench.linear_chunk.default in seen


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
        "the gate alone": alone(3),
        "the state alone": alone(4),
        "no gradient": alone(None),
        "inference mode": inferred(),
        "a second derivative is refused": refused(twice, "once_differentiable"),
        "vmap is refused": refused(batched, "setup_context"),
        "saved by a checkpoint": kept_once(),
        "traced": traced(*inputs),
        "compiled, a gate a head": same(
            torch.compile(head_loss, backend="aot_eager", fullgraph=True), eager=head_loss, make=of_heads
        ),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
