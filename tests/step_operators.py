"""Runs in a process of its own, under Triton's interpreter: the step as compilers see it.

Prints one JSON object, {"check": whether it held}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from glabench.errors import UsageError
from glabench.kernels import gla_step


def made():
    """q, k, v, g of one token, and a state."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 3, 16) for _ in range(3))
    return q, k, v, -torch.rand(2, 1, 3, 16), torch.randn(2, 3, 16, 16)


def two_steps(q, k, v, g, state):
    """Two tokens; the state is changed in place."""
    first = gla_step.gla_recurrent_step(q, k, v, g, state)
    return first + gla_step.gla_recurrent_step(k, q, v, g, state)


def fused(q, k, v, g, state):
    """The same tensors, out of place."""
    o, final = gla_step.gla_recurrent_fused(q, k, v, g, initial_state=state, output_final_state=True)
    return o, final, gla_step.gla_recurrent_fused(q, k, v, None)[0]


def refused(call):
    """Whether the call says that it has no backward pass."""
    try:
        call()
    except UsageError as err:
        return "no backward pass" in str(err)
    return False


def main():
    """Every check, by name."""
    torch.set_num_threads(1)
    compiled = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    *tensors, state = made()
    *_, other = made()
    same = torch.equal(compiled(*tensors, state), two_steps(*tensors, other)) and torch.equal(state, other)
    outs = torch.compile(fused, backend="aot_eager", fullgraph=True)(*made())
    torch.library.opcheck(gla_step.step_op, (*made(), 0.25, 3))
    torch.library.opcheck(gla_step.fused_op, (*made(), None, 0.25, 3, True))
    wanting = [x.requires_grad_() for x in made()]
    with torch.no_grad():
        quiet = gla_step.gla_recurrent_step(*wanting)
    found = {
        "compiled step": same,
        "compiled sequence": all(torch.equal(a, b) for a, b in zip(outs, fused(*made()), strict=True)),
        "a gradient is refused": refused(lambda: gla_step.gla_recurrent_step(*wanting))
        and refused(lambda: fused(*wanting)),
        "none is asked for": not quiet.requires_grad,
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
