"""Runs in a process of its own, under Triton's interpreter: checks points of the token-by-token kernel.

Reads points as JSON from standard input, writes {"point", "errors"} lines: what the oracle found wrong.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it decides what @triton.jit returns

import torch
from family_calls import case

from glabench import oracle
from glabench.inputs import make_inputs, make_state
from glabench.kernels import gla_chunk, gla_chunks, gla_step

STEPS = {
    "gla": gla_step.gla_recurrent_step,
    "simple_gla": gla_step.gla_recurrent_step,
    "retention": gla_step.retention_recurrent_step,
    "linear_attention": gla_step.linear_attention_recurrent_step,
}
FUSED = {
    "gla": gla_step.gla_recurrent_fused,
    "simple_gla": gla_step.gla_recurrent_fused,
    "retention": gla_step.retention_recurrent_fused,
    "linear_attention": gla_step.linear_attention_recurrent_fused,
}
CHUNKED = {
    "gla": gla_chunk.gla_chunk,
    "simple_gla": gla_chunk.simple_gla_chunk,
    "retention": gla_chunk.retention_chunk,
    "linear_attention": gla_chunk.linear_attention_chunk,
}


def compared(got, want, dtype):
    """What is not within the product's tolerance, in words."""
    judged = [oracle.compare(name, x, want[name], dtype) for name, x in got.items()]
    return [f"{e.name}: {e.reason}" for e in judged if not e.ok]


def steps(family, tensors, state, scale, kind):
    """Outputs [B, T, H, V] and the state after T calls of one token each."""
    work = {
        "plain": state.clone,
        "rows": lambda: torch.stack([state] * 3, 1)[:, 1],  # one layer's of a model's states
        "transposed": lambda: state.mT.contiguous().mT,
    }[kind]()
    outs = []
    for t in range(tensors["q"].shape[1]):
        token = [x[:, t : t + 1] if kind == "rows" else x[:, t] for x in tensors.values()]
        outs.append(STEPS[family](*token, work, scale))
    return torch.cat(outs, 1) if kind == "rows" else torch.stack(outs, 1), work


def errors(family, T, d_k, d_v, call="step", regime="trained", dtype="fp32", state="plain", **how):
    """Names of what differs from float64, each with the oracle's reason."""
    of = case(T, batch=how.get("batch", 1), heads=how.get("heads", 2), d_k=d_k, d_v=d_v, dtype=dtype)
    tensors, bounds = make_inputs(family, of, "cpu", how.get("seed", 0), regime=regime), how.get("bounds")
    first = make_state(family, of, "cpu", 2, len(bounds) - 1 if bounds else None)
    given, scale = tensors, how.get("scale")
    gla_chunks.multiprocessors = lambda device: how.get("multiprocessors", 1)  # few programs: they cost most
    gla_step._plan.cache_clear()
    if how.get("strided"):  # heads before tokens, and every second row of a tensor that is twice as long
        twice = {n: x.transpose(1, 2).repeat_interleave(2, 0) for n, x in tensors.items()}
        given = {n: x[::2].transpose(1, 2) for n, x in twice.items()}
    if how.get("projected"):  # q, k and v cut from one projection
        whole = torch.cat([x.flatten(2) for n, x in tensors.items() if n != "g"], -1)
        parts = whole.split([d_k * of.heads, d_k * of.heads, d_v * of.heads], -1)
        cut = dict(zip("qkv", (x.unflatten(-1, (of.heads, -1)) for x in parts), strict=True))
        given = tensors | cut
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    begun = None if state == "none" else first
    with oracle.poisoned_memory(), torch.no_grad():
        if call == "step":
            o, final = steps(family, given, first, scale, state)
        else:
            kept = first.clone()
            given_state = first.mT.contiguous().mT if state == "transposed" else begun
            options |= {"initial_state": given_state, "output_final_state": True}
            o, final = FUSED[family](*given.values(), scale, **options)
            if not torch.equal(kept, first):
                return ["the initial state was changed"]
    want = oracle.reference(
        family, tensors, scale=scale, initial_state=begun, cu_seqlens=options.get("cu_seqlens")
    )
    got = {"out": o, "final_state": final}
    found = compared(got, {"out": want.out, "final_state": want.final_state}, dtype)
    if how.get("chunked"):
        with torch.no_grad():
            chunked, last = CHUNKED[family](*tensors.values(), initial_state=first, output_final_state=True)
        by_steps = {name: x.double() for name, x in got.items()}
        found += compared({"out": chunked, "final_state": last}, by_steps, dtype)
    return found


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
