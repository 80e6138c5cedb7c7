"""Run by test_kernels.py in its own process: first calls, compiled for sm_90 and launched nowhere."""

import json
import re
import sys
import threading
from contextlib import nullcontext

import torch
import triton.compiler
import tune_without_gpu
from triton.runtime import driver

from glabench.kernels import gla_launch, gla_step

GATES = (gla_launch.NONE, gla_launch.FIXED, gla_launch.HEAD, gla_launch.CHANNEL)
compiled_in, names, overlapping, hasty = [], set(), [], set()


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

    With "all", the names of the kernels that every kind of gate launches, carried, in wide states, and not;
    which of them touch memory before they wait for earlier launches; and how many launches may overlap.
    """
    driver.set_active(tune_without_gpu.NoGpu())
    gla_launch._on = lambda device: nullcontext()
    gla_launch.CARRY_PROGRAMS = 0
    own, compile_one = threading.get_ident(), triton.compiler.compile

    def compile_and_note(*args, **kwargs):
        compiled_in.append(threading.get_ident())
        compiled = compile_one(*args, **kwargs)
        names.add(args[0].name)
        before, waits, _ = compiled.asm["ptx"].partition("griddepcontrol.wait")
        if not waits or re.search(r"\b(ld|st|atom|cp)\.[\w.]*global", before):
            hasty.add(args[0].name)
        overlapping.append(compiled.metadata.launch_pdl)
        return compiled

    triton.compiler.compile = compile_and_note
    if sys.argv[1:] == ["all"]:
        gla_launch.overlaps = lambda device: True
        for gla_launch.CARRY_PROGRAMS in (0, 1e9):
            for gate in GATES:
                passes(gate)
                passes(gate, K=144, keep=gate == gla_launch.CHANNEL)
        gla_launch.CARRY_PROGRAMS = 0
        passes(gla_launch.CHANNEL, K=144, keep=False)
        token = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
        how = {"scale": 0.25, "gate": gla_launch.NONE, "output_final_state": False}
        gla_step._take_all(token, token, token, None, None, None, **how)
        found = {"kernels": sorted(names), "hasty": sorted(hasty), "overlapping": all(overlapping)}
        print(json.dumps(found | {"launches": len(tune_without_gpu.launched)}))  # noqa: T201
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
