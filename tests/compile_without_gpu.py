"""Run by test_kernels.py in its own process: first calls, compiled for sm_90 and launched nowhere."""

import json
import sys
import threading
from contextlib import nullcontext

import torch
import triton.compiler
import tune_without_gpu
from triton.runtime import driver

from glabench.kernels import gla_launch, launching

GATES = (gla_launch.NONE, gla_launch.FIXED, gla_launch.HEAD, gla_launch.CHANNEL)
compiled_in, names = [], set()


def passes(gate, times=1, K=16, keep=True):
    """Forward and, to keep, backward passes of one head of Kx16 channels."""
    q, k, v = (torch.zeros(1, 70, 1, width, dtype=torch.bfloat16) for width in (K, K, 16))
    g = {gla_launch.NONE: None, gla_launch.FIXED: torch.zeros(1), gla_launch.HEAD: q[..., 0].clone()}.get(
        gate, q
    )
    how = {"scale": 0.25, "gate": gate}
    for _ in range(times):
        _, _, kept = gla_launch.forward(q, k, v, g, None, None, **how, output_final_state=False, keep=keep)
        if kept is None:
            continue
        gla_launch.backward(v, None, q, k, v, g, kept, None, **how, wants_d_initial=False)


def main():
    """Print how many kernels were compiled in this thread and in others, and how many launches there were.

    With "all", the names of the kernels that every kind of gate launches, carried, in wide states, and not.
    """
    driver.set_active(tune_without_gpu.NoGpu())
    launching._on = lambda device: nullcontext()
    gla_launch.CARRY_PROGRAMS = 0
    own, compile_one = threading.get_ident(), triton.compiler.compile

    def compile_and_note(*args, **kwargs):
        compiled_in.append(threading.get_ident())
        names.add(args[0].name)
        return compile_one(*args, **kwargs)

    triton.compiler.compile = compile_and_note
    if sys.argv[1:] == ["all"]:
        for gla_launch.CARRY_PROGRAMS in (0, 1e9):
            for gate in GATES:
                passes(gate)
                passes(gate, K=144, keep=gate == gla_launch.CHANNEL)
        gla_launch.CARRY_PROGRAMS = 0
        passes(gla_launch.CHANNEL, K=144, keep=False)
        found = {"kernels": sorted(names), "launches": len(tune_without_gpu.launched)}
        print(json.dumps(found | {"imports_sympy": "sympy" in sys.modules}))  # noqa: T201
        return
    passes(gla_launch.NONE, times=2)
    found = {
        "here": compiled_in.count(own),
        "elsewhere": len(compiled_in) - compiled_in.count(own),
        "launches": len(tune_without_gpu.launched),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
