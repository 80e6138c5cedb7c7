"""Check the timing rules of docs/METHOD.md on a GPU: `python tools/check_timing.py > check_timing.json`.

Blocked events against plain events, CUDA graph replay and wall time, from calls the host cannot keep up
with to calls it can; how many launches fit behind a blocked stream; whether a synchronising call is found.
"""

import json
import statistics
import sys
import time

import torch

from glabench import inputs, measure, registry
from glabench.cases import SHAPES, make_cases

PLAN = measure.Plan(min_samples=20, max_samples=200, min_busy_s=0.1, max_busy_s=1.0, interval_frac=0.02)
IMPLS = ("attention_fa2", "gla_chunk_fla", "mamba_ssm")
FLUSH_BYTES = 2 * 50 * 2**20


def plain_events_ms(call, flush):
    times = []
    for _ in range(30):
        flush.zero_()
        torch.cuda.synchronize()  # nothing hides the launches: this is what an unblocked timer sees
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_ms(call, flush):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return plain_events_ms(graph.replay, flush)


def compare(impl_id, seqlen, batch, passes, flush):
    impl = registry.implementations()[impl_id]
    fn = impl.load()
    case = make_cases(
        shapes=(SHAPES["340m"],),
        seqlens=(seqlen,),
        passes=(passes,),
        dtypes=("bf16",),
        tokens=None,
        batch=batch,
        where="check",
    )[0]
    made = inputs.make_inputs(impl.family, case, "cuda", 0)
    d_out = inputs.make_grad_out(impl.family, case, "cuda", 1)
    leaves = list(made.values())

    def call():
        if passes == "fwd":
            with torch.no_grad():
                return fn(*leaves)
        out = fn(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaves, d_out)

    if passes != "fwd":
        for leaf in leaves:
            leaf.requires_grad_()
    call()
    taken = measure.time_calls(lambda _: call, 0, PLAN, "cuda")
    row = {"impl": impl_id, "passes": passes, "batch": batch, "seqlen": seqlen}
    row |= {k: taken[k] for k in ("timer", "host_ms", "wall_ms", "syncs_inside", "async_outside")}
    row["blocked_ms"] = statistics.median(taken["samples_ms"])
    row["plain_ms"] = plain_events_ms(call, flush)
    try:
        row["graph_ms"] = graph_ms(call, flush)
    except RuntimeError as err:
        row["graph_ms"], row["graph_error"] = None, str(err).splitlines()[0]
        torch.cuda.synchronize()
    return row


def queue_depth():
    """Host milliseconds to enqueue n tiny kernels behind a 300 ms spin: a jump means the queue is full."""
    small = torch.ones(8, device="cuda")
    spent = {}
    for n in (256, 512, 768, 1000, 1024, 1500, 2000, 4000):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(0.3 * 1.7e9))
        begun = time.perf_counter()
        for _ in range(n):
            small.add_(1)
        spent[n] = (time.perf_counter() - begun) * 1e3
    torch.cuda.synchronize()
    return spent


def synchronising():
    x = torch.randn(4096, 4096, device="cuda")

    def call():
        y = x @ x
        return y if y.sum().item() > 0 else x

    taken = measure.time_calls(lambda _: call, 0, PLAN, "cuda")
    return {k: taken[k] for k in ("timer", "syncs_inside", "host_ms", "wall_ms")}


def main():
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    for impl_id in IMPLS:
        for passes in ("fwd", "fwd_bwd"):
            for batch in (1, 4, 32):
                found["rows"].append(compare(impl_id, 1024, batch, passes, flush))
                sys.stderr.write(json.dumps(found["rows"][-1]) + "\n")
    found["queue_ms"] = queue_depth()
    found["synchronising"] = synchronising()
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
