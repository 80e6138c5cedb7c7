"""Run by test_kernels.py in its own process: a first call, compiled for sm_90 and launched nowhere."""

import json
import threading
from contextlib import nullcontext

import torch
import triton.compiler
import tune_without_gpu
from triton.runtime import driver

from glabench.kernels import gla_launch

compiled_in = []


def main():
    """Print how many kernels were compiled in this thread and in others, and how many launches there were."""
    driver.set_active(tune_without_gpu.NoGpu())
    gla_launch._on = lambda device: nullcontext()
    gla_launch.CARRY_PROGRAMS = 0
    own, compile_one = threading.get_ident(), triton.compiler.compile

    def compile_and_note(*args, **kwargs):
        compiled_in.append(threading.get_ident())
        return compile_one(*args, **kwargs)

    triton.compiler.compile = compile_and_note
    q, k, v = (torch.zeros(1, 70, 1, 16, dtype=torch.bfloat16) for _ in range(3))
    how = {"scale": 0.25, "gate": gla_launch.NONE}
    for _ in range(2):
        _, _, kept = gla_launch.forward(q, k, v, None, None, None, **how, output_final_state=False, keep=True)
        gla_launch.backward(v, None, q, k, v, None, kept, None, **how, wants_d_initial=False)
    found = {
        "here": compiled_in.count(own),
        "elsewhere": len(compiled_in) - compiled_in.count(own),
        "launches": len(tune_without_gpu.launched),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
