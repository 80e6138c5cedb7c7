"""Runs in a process of its own, under Triton's interpreter: checks points of the chunk kernels.

Reads points as JSON from standard input, writes {"point", "errors"} lines: what the oracle found wrong.
"""

import dataclasses
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it decides what @triton.jit returns

import torch
from family_calls import call, case

from glabench import oracle
from glabench.inputs import make_state
from glabench.kernels import gla_chunk as kernels
from glabench.kernels import gla_chunks, gla_configs, gla_launch, plan_files

FUNCTIONS = {
    "gla": kernels.gla_chunk,
    "simple_gla": kernels.simple_gla_chunk,
    "retention": kernels.retention_chunk,
    "linear_attention": kernels.linear_attention_chunk,
}

GATES = {"linear_attention": 0, "retention": 1, "simple_gla": 2, "gla": 3}


def errors(family, T, d_k, d_v, regime="trained", batch=1, heads=2, bounds=None, states=True, **how):
    """Names of what differs from float64, each with the oracle's reason: output, state, gradients."""
    of = case(T, batch=batch, heads=heads, d_k=d_k, d_v=d_v)
    tensors, options = call(family, of, regime=regime)
    if bounds:
        rows = len(bounds) - 1
        options["initial_state"] = make_state(family, of, "cpu", 2, rows)
        options["d_state"] = make_state(family, of, "cpu", 3, rows)
        options["cu_seqlens"] = torch.tensor(bounds)
    if not states:
        del options["initial_state"], options["d_state"]
    if how.pop("gate_dtype", None) == "fp16":  # products of float16 gates are exact, in the interpreter too
        tensors["g"] = tensors["g"].half()
    gla_chunks.SEGMENT = 64 * how.pop("segment", 64)
    # one kernel for states and output, however few its programs; else never
    gla_launch.CARRY_PROGRAMS = 0 if how.pop("carried", False) else 1e9
    gla_configs.WIDEST_STATE[True] = 256 if how.pop("wide", False) else 0
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    given = {"cu_seqlens": options.get("cu_seqlens"), "output_final_state": states, **how}
    if how.pop("strided", False):
        given.pop("strided")
        leaves = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tensors.items()}
        leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    positional = list(leaves.values())
    point = plan_files.Point(d_k, d_v, GATES[family], wide=True)
    rule = gla_configs.rule(point)
    plan = dataclasses.replace(rule, chunk=how.pop("chunk", rule.chunk))
    given.pop("chunk", None)
    if given.pop("scans", False):  # as launches do whose warps have no 16 rows each
        many = {name: dataclasses.replace(getattr(plan, name), warps=16) for name in ("scale", "gradient")}
        plan = dataclasses.replace(plan, **many)
    if states:
        given["initial_state"] = leaves["initial_state"] = options["initial_state"].clone().requires_grad_()
    with oracle.poisoned_memory(), gla_configs.in_force(point, plan):
        out, final = FUNCTIONS[family](*positional, **given)
        derived = [(out, options["d_out"])] + ([(final, options["d_state"])] if states else [])
        outs, d_outs = zip(*derived, strict=True)
        found = torch.autograd.grad(outs, list(leaves.values()), d_outs)
    if "scale" in how:
        options["scale"] = how["scale"]
    want = oracle.reference(family, tensors, **options)
    got = {"out": out.detach(), **dict(zip(leaves, found, strict=True))}
    wanted = {"out": want.out, **want.gradients}
    if states:
        got["final_state"], wanted["final_state"] = final.detach(), want.final_state
    dtypes = {name: "fp16" if got[name].dtype == torch.float16 else "fp32" for name in wanted}
    judged = [oracle.compare(n, got[n], w, dtypes[n], want.floors.get(n, 0.0)) for n, w in wanted.items()]
    return [f"{e.name}: {e.reason}" for e in judged if not e.ok] + (
        ["a final state that nobody asked for"] if final is not None and not states else []
    )


def main():
    """Check every point; what a call raises is its error."""
    torch.set_num_threads(1)
    for point in json.load(sys.stdin):
        try:
            found = errors(**point)
        except Exception as err:  # noqa: BLE001  told to the test, which fails with it
            found = [f"{type(err).__name__}: {err}"]
        print(json.dumps({"point": point, "errors": found}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
