"""Compile every kernel of the layers for Hopper, without a GPU, and print what the assembler made of it.

One line a kernel: registers, spilled bytes, shared memory, tensor-core instructions, seconds. With
TRITON_PTXAS_PATH set, that assembler is used. Usage: compile_sm90.py [340m|1.3b|fig2 ...] [--dtype bf16]

--chunk 128 compiles every launch that `glabench tune` tries in such chunks in place of the plan's.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glabench.kernels import gla_configs, gla_launch
from glabench.kernels.gla_carry import carry_kernel
from glabench.kernels.gla_exact import exact_kernel
from glabench.kernels.gla_gradient import gradient_kernel
from glabench.kernels.gla_output import output_kernel
from glabench.kernels.gla_scale import scale_kernel, scores_kernel, sums_kernel
from glabench.kernels.gla_state import state_kernel
from glabench.kernels.gla_step import STRIDES, recurrent_kernel
from glabench.kernels.gla_wide import wide_kernel
from glabench.kernels.log_gate import TILE, log_gate_backward_kernel, log_gate_kernel
from glabench.kernels.norm_gate import norm_gate_backward_kernel, norm_gate_kernel, tile_of
from glabench.kernels.plan_files import Point
from glabench.runners.tune_variants import VARIANTS

SHAPES = {"340m": (4, 128, 256), "1.3b": (4, 256, 512), "fig2": (16, 64, 64)}  # H, K, V
GATES = {"none": 0, "fixed": 1, "head": 2, "channel": 3}
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    "scale": scale_kernel,
    "sums": sums_kernel,
    "carry": carry_kernel,
    "wide": wide_kernel,
    "state": state_kernel,
    "output": output_kernel,
    "gradient": gradient_kernel,
    "exact": exact_kernel,
    "scores": scores_kernel,
    "recurrent": recurrent_kernel,
}
GATE_KERNELS = {  # of a model's layer, around the chunks
    "log_gate": (log_gate_kernel, log_gate_backward_kernel),
    "norm_gate": (norm_gate_kernel, norm_gate_backward_kernel),
}
APART = ("recurrent", *GATE_KERNELS)  # kernels that take no chunks
PLANNED = {"sums": "scale", "scores": "scale"}  # kernels that share a launch
REVERSIBLE, HARDENED = ("carry", "state", "output"), ("output", "gradient")
DEVICE = "h100_sxm"  # whose plan file is taken
BATCHES, MULTIPROCESSORS = (1, 64), 132  # of the recurrent kernel, whose tile follows them


def exists(name, gate, K, BK, reverse, hard, wide):
    """Whether a call may launch this."""
    if (hard and (gate != "channel" or name not in HARDENED)) or (reverse and name not in REVERSIBLE):
        return False
    if name in ("carry", "wide", "scores"):
        point = Point(K, 0, GATES[gate], wide)
        kinds = [gla_configs.carriers(point, BK, keep) for keep in ((True,) if reverse else (True, False))]
        if name == "scores":
            return gate != "channel" and any(gla_configs.WIDE in kind for kind in kinds)
        return any(name in kind for kind in kinds)
    return {"scale": "channel", "exact": "channel", "sums": "head"}.get(name, gate) == gate


def sources(name, H, K, V, gate, dtype, reverse, hard, launch, plan):
    """The kernel's signature and constants as the launch gives them, pointers and widths aligned to 16."""
    kernel, x = KERNELS[name], POINTERS[dtype]
    state = "*bf16" if dtype == "bf16" else "*fp32"
    types = {
        **dict.fromkeys(("q", "k", "v", "do", "o", "dq_out", "dk_out"), x),
        "g": x if gate != GATES["fixed"] else "*fp32",
        "dg_out": x if gate == GATES["channel"] else "*fp32",
        **dict.fromkeys(("total", "first", "last", "sums"), "*fp32"),
        **dict.fromkeys(("reach", "fixed"), "*fp32" if gate == GATES["channel"] else "*i32"),
        **dict.fromkeys(("h", "dh", "q_out", "k_out", "scores"), state),
        **dict.fromkeys(("bounds", "offsets", "chunks"), "*i64"),
        "units": "*i32",
        "scale": "fp32",
        **dict.fromkeys(("T", "N", "tokens", "pairs"), "i32"),
        **dict.fromkeys(STRIDES, "i64"),
    }
    constants = {"H": H, "K": K, "V": V, "C": plan.chunk, "BK": plan.BK, "BV": launch.BV, "GATE": gate}
    constants |= {"REVERSE": reverse, "PACKED": False, "HAS_FIRST": False, "HAS_LAST": False}
    constants |= {"SEGMENTS": 1, "KEEP": True, "BH": gla_launch.heads_together(H)}
    constants |= {"HARD": hard, "WIDE": dtype != "bf16", "PRECISION": gla_launch.precision(TORCH[dtype])}
    absent = ["bounds", "offsets", "chunks", "lost"]
    has_scores = name in ("wide", "scores") or (gate == GATES["channel"] and K > 2 * plan.BK and not hard)
    constants |= {"SCORES": has_scores, "APART": launch.warps > 4}
    constants |= {"SCAN": gla_launch.sums_by_scans(launch, plan.chunk)}
    if name in ("wide", "exact"):
        constants |= {"BK": triton.next_power_of_2(K), "TILES": -(-K // plan.BK)}
    absent += [] if has_scores else ["scores"]
    if name == "recurrent":
        constants |= {"KP": plan.BK, "HAS_FIRST": True, "HAS_LAST": True, "UNIT": 16}
    else:
        absent += ["first", "last"]
    absent += ["g"] if gate == GATES["none"] else []
    absent += ["dg_out"] if gate in (GATES["none"], GATES["fixed"]) else []
    if gate in (GATES["none"], GATES["fixed"]):
        absent += ["total", "reach"]
    constants |= dict.fromkeys(absent)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    return ASTSource(kernel, signature, {n: constants[n] for n in names if n in constants}, aligned)


def report(label, source, launch):
    """Compile and print one line."""
    begin = time.perf_counter()
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options())
    except Exception as err:  # noqa: BLE001  one kernel that does not compile must not hide the others
        print(f"{label:44} FAILED {type(err).__name__}: {str(err)[:200]}", flush=True)  # noqa: T201
        return
    ptx = made.asm["ptx"]
    registers, spills = assembled(ptx)
    limit = "" if launch.registers is None else f"of {launch.registers} "
    line = f"{label:44} BV {launch.BV:3} warps {launch.warps:2} stages {launch.stages} "
    line += f"registers {registers:3} {limit}spills {spills:4} shared {made.metadata.shared:6} "
    line += f"wgmma {len(re.findall('wgmma.mma_async', ptx)):4} "
    line += f"mma {len(re.findall('mma.sync', ptx)):4} {time.perf_counter() - begin:5.1f} s"
    print(line, flush=True)  # noqa: T201


def assembled(ptx):
    """Registers and spilled bytes, by the assembler's own count."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        ptxas = os.environ.get("TRITON_PTXAS_PATH", "ptxas")
        command = [ptxas, "-v", "--gpu-name", "sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", text))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))


def recurrent(shape, gate, dtype):
    """Compile the token-by-token kernel at the tile of each batch."""
    H, K, V = SHAPES[shape]
    for batch in BATCHES:
        launch, KP = gla_configs.recurrent_tile(K, V, batch * H, MULTIPROCESSORS)
        plan = dataclasses.replace(gla_configs.rule(Point(K, V, GATES[gate], False)), BK=KP)
        made = sources("recurrent", H, K, V, GATES[gate], dtype, False, False, launch, plan)
        report(f"{shape} {dtype} {gate} recurrent, batch {batch}", made, launch)


def around(shape, name, dtype):
    """Compile a gate's kernels, forward and backward, at a model's widths."""
    V, x = SHAPES[shape][2], POINTERS[dtype]
    constants, tile = ({"BV": TILE.BV}, TILE) if name == "log_gate" else tile_of(V)
    types = {
        **dict.fromkeys(("x", "y", "gate", "dy", "dx", "dgate"), x),
        **dict.fromkeys(("g", "dg", "weight", "parts"), "*fp32"),
        **dict.fromkeys(("tau", "eps"), "fp32"),
        **dict.fromkeys(("rows", "programs"), "i32"),
        "count": "i64",
    }
    for kernel, label in zip(GATE_KERNELS[name], ("", " backward"), strict=True):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types[n] for n in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
        }
        report(f"{shape} {dtype} {name}{label}", ASTSource(kernel, signature, constants, aligned), tile)


def main():
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--dtype", choices=list(POINTERS), default="bf16")
    parser.add_argument("--gates", nargs="+", default=list(GATES))
    parser.add_argument("--kernels", nargs="+", default=[*KERNELS, *GATE_KERNELS])
    parser.add_argument("--chunk", type=int, choices=sorted(VARIANTS))
    args = parser.parse_args()
    for shape in args.shapes:
        H, K, V = SHAPES[shape]
        for name in GATE_KERNELS.keys() & set(args.kernels):
            around(shape, name, args.dtype)
        for gate in args.gates:
            point = Point(K, V, GATES[gate], args.dtype != "bf16")
            plan = gla_configs.rule(point, args.chunk) if args.chunk else gla_configs.plan_on(DEVICE, point)
            names = [n for n in args.kernels if n not in APART]
            kinds = [(n, r, h) for n in names for r in (False, True) for h in (False, True)]
            if "recurrent" in args.kernels:
                recurrent(shape, gate, args.dtype)
            for name, reverse, hard in kinds:
                if not exists(name, gate, K, plan.BK, reverse, hard, args.dtype != "bf16"):
                    continue
                planned = "carry_back" if name == "carry" and reverse else PLANNED.get(name, name)
                label = f"{shape} {args.dtype} {gate} {name}{' reverse' * reverse}{' hard' * hard}"
                tried = VARIANTS[args.chunk].get(planned, ()) if args.chunk else ()
                for launch in dict.fromkeys((getattr(plan, planned), *(x for x in tried if x.BV <= V))):
                    made = sources(name, H, K, V, GATES[gate], args.dtype, reverse, hard, launch, plan)
                    report(label, made, launch)


if __name__ == "__main__":
    sys.exit(main())
