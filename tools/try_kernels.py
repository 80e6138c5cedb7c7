"""Check and time the chunk kernels on a GPU, quickly: JSON lines, one a point, failures included.

Usage: try_kernels.py [--limit 90] [--parts check time profile host sweep cold counted] [--shapes 340m fig2]

host      microseconds until a call is enqueued, the first after a wait, with cold caches, and later ones:
          forward, forward and backward, and a function that does nothing, which is autograd's part
cold      a process's first forward and backward pass; with an empty TRITON_CACHE_DIR, one shape a process
counted   one pass forward and backward and one forward alone, for `ncu --profile-from-start off`
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import traceback
from pathlib import Path

import torch

from glabench import oracle
from glabench.cases import SHAPES, Case
from glabench.inputs import make_grad_out, make_inputs, make_state
from glabench.kernels import gla_chunk as ours
from glabench.runners import tune

FUNCTIONS = {
    "gla": ours.gla_chunk,
    "simple_gla": ours.simple_gla_chunk,
    "retention": ours.retention_chunk,
    "linear_attention": ours.linear_attention_chunk,
}
TOKENS = 32768
PACKED = (0, 1, 1, 64, 129, 200, 332)
# T, batch, heads, d_k, d_v, dtype, regime, packed, form; the model shapes in the dtype that counts come first
POINTS = [
    (256, 1, 4, 128, 256, "bf16", "trained", False, "auto"),
    (200, 1, 16, 64, 64, "bf16", "trained", False, "auto"),
    (200, 1, 4, 256, 512, "bf16", "trained", False, "auto"),
    (200, 1, 2, 128, 256, "bf16", "mixed", False, "auto"),
    (200, 1, 2, 64, 64, "bf16", "mixed", False, "auto"),
    # heads enough that a kernel carries the whole state of each
    (130, 16, 4, 256, 512, "bf16", "trained", False, "auto"),
    (130, 16, 4, 128, 256, "bf16", "trained", False, "auto"),
    (130, 16, 4, 256, 512, "bf16", "mixed", False, "auto"),
    (130, 16, 4, 128, 256, "bf16", "mixed", False, "auto"),
    (332, 1, 8, 192, 512, "bf16", "mixed", True, "auto"),
    (70, 16, 8, 128, 64, "bf16", "extreme", False, "auto"),
    (70, 16, 8, 240, 80, "bf16", "trained", False, "recompute"),
    (130, 1, 2, 64, 64, "fp32", "trained", False, "auto"),
    (130, 1, 2, 128, 128, "fp32", "mixed", False, "auto"),
    (130, 2, 3, 48, 96, "fp16", "trained", False, "auto"),
    (65, 2, 3, 96, 48, "fp16", "mixed", False, "auto"),
    (332, 1, 3, 48, 96, "bf16", "mixed", True, "auto"),
    (332, 1, 3, 80, 16, "fp32", "trained", True, "auto"),
    (1, 1, 1, 64, 64, "bf16", "trained", False, "auto"),
    (63, 2, 3, 16, 80, "fp32", "zero", False, "auto"),
    (130, 1, 2, 64, 64, "fp32", "strong", False, "auto"),
    (130, 1, 2, 64, 64, "fp32", "extreme", False, "auto"),
    (130, 1, 2, 128, 64, "bf16", "extreme", False, "auto"),
    (200, 2, 2, 512, 512, "bf16", "trained", False, "auto"),
    (130, 1, 2, 64, 64, "bf16", "mixed", False, "recompute"),
]


def emit(**fields):
    """Print one JSON line."""
    print(json.dumps(fields), flush=True)  # noqa: T201


def guarded(what, deadline, run, *args):
    """Run one point; what it raises becomes its line, and past the deadline it is left out by name."""
    if time.monotonic() > deadline:
        emit(**what, status="skipped", reason="time limit")
        return
    begin = time.perf_counter()
    try:
        emit(**what, **run(*args), seconds=round(time.perf_counter() - begin, 2))
    except Exception as err:  # noqa: BLE001  the points after a failure are wanted as well
        where = traceback.extract_tb(err.__traceback__)[-1]
        emit(
            **what,
            status="error",
            reason=f"{type(err).__name__}: {err}"[:300],
            where=f"{where.name}:{where.lineno}",
        )


def call(family, T, batch, heads, d_k, d_v, dtype, regime, rows=None):
    """Inputs by name, the output's gradient, a state and the final state's gradient."""
    sizes = {"batch": batch, "seqlen": T, "heads": heads, "d_k": d_k, "d_v": d_v, "head_dim": d_v}
    case = Case(shape="try", passes="fwd_bwd", dtype=dtype, **sizes)
    tensors = make_inputs(family, case, "cuda", 0, regime=regime)
    d_out = make_grad_out(family, case, "cuda", 1)
    return (
        tensors,
        d_out,
        make_state(family, case, "cuda", 2, rows),
        make_state(family, case, "cuda", 3, rows),
    )


def check(family, point):
    """Every output and gradient against float64, memory poisoned."""
    T, batch, heads, d_k, d_v, dtype, regime, packed, form = point
    rows = len(PACKED) - 1 if packed else None
    tensors, d_out, state, d_state = call(family, T, batch, heads, d_k, d_v, dtype, regime, rows)
    bounds = torch.tensor(PACKED, device="cuda") if packed else None
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    leaves["initial_state"] = state.clone().requires_grad_()
    options = {"initial_state": leaves["initial_state"], "output_final_state": True, "cu_seqlens": bounds}
    with oracle.poisoned_memory():
        args = [x for n, x in leaves.items() if n != "initial_state"]
        out, final = FUNCTIONS[family](*args, **options, form=form)
        found = torch.autograd.grad((out, final), list(leaves.values()), (d_out, d_state))
        with torch.no_grad():  # other launches: nothing is kept
            alone, final_alone = FUNCTIONS[family](*tensors.values(), **options, form=form)
        torch.cuda.synchronize()
    want = oracle.reference(
        family, tensors, initial_state=state, cu_seqlens=bounds, d_out=d_out, d_state=d_state
    )
    got = {"out": out.detach(), "final_state": final.detach(), **dict(zip(leaves, found, strict=True))}
    got |= {"out alone": alone, "final_state alone": final_alone}
    wants = {"out": want.out, "final_state": want.final_state, **want.gradients}
    wants |= {"out alone": want.out, "final_state alone": want.final_state}
    errors = {}
    for n, w in wants.items():
        tensor = n.split()[0]
        errors[n] = oracle.compare(tensor, got[n], w, dtype, want.floors.get(tensor, 0.0))
    ratios = {n: None if e.rms_ratio is None else float(f"{e.rms_ratio:.2e}") for n, e in errors.items()}
    bad = {n: e.reason for n, e in errors.items() if not e.ok}
    return {"status": "wrong" if bad else "ok", "rms": ratios, **({"bad": bad} if bad else {})}


FLUSH = None


def median_ms(run, reps=20):
    """Median of event times; each call finds L2 cold and is queued behind a spin."""
    global FLUSH
    if FLUSH is None:
        FLUSH = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(reps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        FLUSH.zero_()
        torch.cuda._sleep(1_500_000)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times), 4)


def prepared(family, shape, T):
    """(forward, forward and backward) of 32k tokens in bf16."""
    of = SHAPES[shape]
    tensors, d_out, *_ = call(family, T, TOKENS // T, of.heads, of.d_k, of.d_v, "bf16", "trained")
    leaves = [x.requires_grad_() for x in tensors.values()]
    function = FUNCTIONS[family]

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        return torch.autograd.grad(function(*leaves)[0], leaves, d_out)

    return forward, both


def timed(family, shape, T):
    """Milliseconds on the device."""
    forward, both = prepared(family, shape, T)
    return {"status": "ok", "fwd_ms": median_ms(forward), "fwd_bwd_ms": median_ms(both)}


def host(family, shape, T):
    """Microseconds the host takes to enqueue: the device is kept busy, and not waited for."""
    forward, both = prepared(family, shape, T)
    leaves = [torch.zeros(1, device="cuda", requires_grad=True) for _ in range(4)]
    grad = torch.zeros(1, device="cuda")

    def nothing():
        return torch.autograd.grad(Nothing.apply(*leaves), leaves, grad)

    found = {}
    for name, run in {"forward": forward, "enqueue": both, "autograd": nothing}.items():
        for _ in range(4):  # played back from the third on
            run()
        times = [enqueued(run) for _ in range(20)]
        found[f"{name}_us"] = round(statistics.median(first for first, *_ in times), 1)
        found[f"{name}_again_us"] = round(statistics.median(t for _, *later in times for t in later), 1)
    return {"status": "ok", **found}


def enqueued(run, calls=4):
    """Microseconds of each of some calls, one after the other, behind a spin."""
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


class Nothing(torch.autograd.Function):
    """What autograd costs with four inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        """The first input."""
        ctx.save_for_backward(*inputs)
        return inputs[0].detach()

    @staticmethod
    def backward(ctx, grad):
        """What came, four times."""
        return (grad,) * len(ctx.saved_tensors)


def profiled(family, shape, T):
    """Mean microseconds of each kernel of a forward and backward pass."""
    _, both = prepared(family, shape, T)
    both()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            both()
        torch.cuda.synchronize()
    names = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            names.setdefault(event.name[:40], []).append(event.device_time)
    # a kernel used both ways runs twice a pass: the order tells which
    kernels = {
        n: [round(statistics.median(t[i :: max(1, len(t) // 5)]), 1) for i in range(max(1, len(t) // 5))]
        for n, t in names.items()
    }
    return {"status": "ok", "kernel_us": kernels}


def cold(family, shape, T):
    """Seconds until the first result and gradients of a process, compilation included, imports not."""
    _, both = prepared(family, shape, T)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    both()
    torch.cuda.synchronize()
    return {"status": "ok", "first_s": round(time.perf_counter() - begin, 2)}


def counted(family, shape, T):
    """The kernels that a profiler is to count, compiled before it looks."""
    forward, both = prepared(family, shape, T)
    forward(), both()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    forward(), both()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return {"status": "ok"}


def sweep(shapes, families, deadline):
    """Tune in worker processes; each launch and each whole call that was tried, and no plan file kept."""
    with tempfile.TemporaryDirectory() as folder:
        request = tune.Request(
            impls=tuple(f"{family}_chunk" for family in families),
            shapes=tuple(SHAPES[name] for name in shapes),
            out=Path(folder) / "plans.toml",
            limit_s=max(1.0, deadline - time.monotonic()),
        )
        found = tune.run(request, lambda text: emit(part="sweep", says=text))
    for point in found["points"]:
        emit(part="sweep", **point)


def ptxas():
    """Version of the assembler in use."""
    path = os.environ.get("TRITON_PTXAS_PATH", "")
    if not path:
        return "triton's own"
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return text.strip().splitlines()[-1]


def main():
    """Parse and run the parts in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=90)
    parser.add_argument("--parts", nargs="+", default=["check", "time", "profile", "host"])
    parser.add_argument("--shapes", nargs="+", default=["340m", "1.3b", "fig2"])
    parser.add_argument("--families", nargs="+", default=list(FUNCTIONS))
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), help="part i of n, of checks")
    args = parser.parse_args()
    begin = time.monotonic()
    emit(part="environment", torch=torch.__version__, gpu=torch.cuda.get_device_name(), ptxas=ptxas())
    # checks may take half of the time, so that there is always something timed
    half = begin + (0.5 if len(args.parts) > 1 else 1) * args.limit
    if "check" in args.parts:
        wanted = [
            (family, point)
            for point in POINTS
            for family in args.families
            if point[6] == "trained" or family in ("gla", "simple_gla")
        ]
        for family, point in wanted[args.share[0] :: args.share[1]]:
            guarded({"part": "check", "family": family, "point": point}, half, check, family, point)
    for part in args.parts:
        if part == "sweep":
            sweep(args.shapes, args.families, begin + args.limit)
        elif part != "check":
            measure(part, args.shapes, args.families, begin + args.limit)


def measure(part, shapes, families, deadline):
    """One part other than the checks, for each length, shape and family."""
    runs = {"time": timed, "profile": profiled, "host": host, "cold": cold, "counted": counted}
    lengths = {"time": (1024, 4096, 8192, 16384), "host": (1024,), "cold": (1024,)}
    for T in lengths.get(part, (4096,)):
        for shape in shapes:
            for family in families:
                what = {"part": part, "family": family, "shape": shape, "T": T}
                guarded(what, deadline, runs[part], family, shape, T)


if __name__ == "__main__":
    main()
