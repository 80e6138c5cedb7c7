"""The grid of `glabench verify`, and the check of one of its points inside a worker.

A point is a case small enough for the oracle, chosen to hurt: one token, a chunk and one more or less,
a prime, widths that are no powers of two, gates from 0 to -1e4, states in and out, packed sequences.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from glabench.cases import DECODE, Case
from glabench.registry import FAMILIES, Implementation, from_spec
from glabench.worker import emit_phase

# batch, seqlen, heads, d_k and d_v of each
LINEAR_SIZES = (
    (1, 1, 1, 64, 64),
    (2, 63, 3, 48, 96),
    (1, 64, 1, 64, 128),
    (2, 65, 3, 96, 48),
    (1, 200, 1, 128, 128),
    (2, 509, 1, 64, 64),
    (1, 509, 3, 48, 64),
)
# batch, seqlen and model width; mamba and mamba2 have twice that many channels, in heads of 64
WIDE_SIZES = ((1, 1, 32), (2, 63, 96), (1, 64, 32), (2, 65, 96), (1, 200, 64), (2, 509, 32), (1, 509, 96))
HEAD_DIMS = {"cpu": (64, 128, 48, 96), "cuda": (64, 128)}  # builds of flash-attn may leave others out
GATED = ("gla", "simple_gla", "mamba", "mamba2")
OVERFLOWING = ("mamba", "mamba2")  # at the steps dt that wipe a state, gradients exceed float16
HARD_GATES = ("zero", "vanishing", "strong", "extreme", "mixed")
PACKED = (0, 1, 1, 64, 129, 200, 332)  # lengths 1, 0, 63, 65, 71, 132
DTYPES = ("fp32", "bf16", "fp16")


def points(impl: Implementation, device: str) -> list[dict[str, Any]]:
    """The grid for one implementation on "cpu" or "cuda", as JSON: only what it says it supports.

    A point is {"case", "regime", "state", "cu_seqlens", "scale", "seed"}; where it supports no backward
    pass, its case asks for the forward pass alone.
    """
    made = []
    for seed, (case, options) in enumerate(_candidates(impl, device)):
        for passes in ("fwd_bwd", "fwd", DECODE):
            fields = asdict(case) | {"passes": passes}
            if impl.unsupported(fields, device) is None:
                made.append({**POINT, **options, "case": fields, "seed": seed})
                break
    return made


POINT = {"regime": "trained", "state": False, "cu_seqlens": None, "scale": None}


def _candidates(impl: Implementation, device: str) -> Iterator[tuple[Case, dict[str, Any]]]:
    main = next(dtype for dtype in DTYPES if dtype in impl.dtypes)
    has_state, has_varlen = "state" in impl.features, "varlen" in impl.features
    cases = list(_cases(impl.family, device))
    for dtype in impl.dtypes:
        for i, case in enumerate(cases):
            yield _with(case, dtype=dtype), {"state": has_state and i % 2 == 0}
    long = cases[-1]
    if impl.family in GATED:
        for regime in HARD_GATES:
            yield _with(long, dtype=main), {"regime": regime, "state": has_state}
        for dtype in impl.dtypes:
            if dtype != main and (dtype != "fp16" or impl.family not in OVERFLOWING):
                yield _with(cases[3], dtype=dtype), {"regime": "mixed"}
    if "scale" in impl.features:
        yield _with(cases[1], dtype=main), {"scale": 0.3}
    if has_varlen:
        packed = _with(cases[1], dtype=main, batch=1, seqlen=PACKED[-1], packed="yes")
        yield packed, {"cu_seqlens": list(PACKED), "state": has_state}
        if impl.family in GATED:
            yield packed, {"cu_seqlens": list(PACKED), "regime": "mixed"}


def _cases(family: str, device: str) -> Iterator[Case]:
    if family not in ("attention", "mamba", "mamba2"):
        for batch, seqlen, heads, d_k, d_v in LINEAR_SIZES:
            yield _case(batch, seqlen, heads, d_k, d_v, d_v)
        return
    for i, (batch, seqlen, width) in enumerate(WIDE_SIZES):
        if family == "attention":
            size = HEAD_DIMS[device][i % len(HEAD_DIMS[device])]
            yield _case(batch, seqlen, 1 + i % 3, size, size, size)
        else:
            yield _case(batch, seqlen, 1, 16, width, 64)


def _case(batch: int, seqlen: int, heads: int, d_k: int, d_v: int, head_dim: int) -> Case:
    return Case(
        shape="verify",
        passes="fwd_bwd",
        batch=batch,
        seqlen=seqlen,
        heads=heads,
        d_k=d_k,
        d_v=d_v,
        head_dim=head_dim,
        dtype="fp32",
    )


def _with(case: Case, **changes: Any) -> Case:
    return Case(**(asdict(case) | changes))


def describe(point: dict[str, Any]) -> str:
    """One line that tells a point from the others."""
    case = point["case"]
    words = [f"{case['batch']}x{case['seqlen']}", f"{case['heads']} heads of {case['d_k']}x{case['d_v']}"]
    words += [case["dtype"], *{"fwd": ["forward only"], DECODE: ["one token"]}.get(case["passes"], [])]
    if point["regime"] != "trained":
        words.append(f"{point['regime']} gates")
    words += [text for key, text in (("state", "states"), ("cu_seqlens", "packed")) if point[key]]
    words += [] if point["scale"] is None else [f"scale {point['scale']:g}"]
    return ", ".join(words)


# --- inside a worker --------------------------------------------------------------------------------------


def check(args: dict[str, Any]) -> dict[str, Any]:
    """Check one point; args: impl (a spec), point, device. Runs where torch may be imported.

    Returns {"errors": [{"tensor", "rms_ratio", "worst_ratio", "tol_ratio", "ok"}], "reason"}: the output,
    the final state, every gradient, and an entry "inputs" where the call changed them. What the
    implementation raises is left to the caller.
    """
    import torch

    from glabench import oracle

    emit_phase("cold")
    torch.set_num_threads(1)  # points are small: more threads only wait for each other
    impl, function = _load(json.dumps(args["impl"], sort_keys=True))
    family, point = impl.family, args["point"]
    if point["case"]["passes"] == DECODE:
        return _check_step(function, family, point, args["device"])
    call = _Call(family, point, args["device"])
    with oracle.poisoned_memory():
        changed = call.changed_inputs(function)
        if changed:
            reason = f"it changes its input {changed} in place"
            return {"errors": [_entry("inputs", ok=False)], "reason": reason}
        got = call.run(function)
    emit_phase("check")
    want = call.answer()
    dtype = point["case"]["dtype"]
    found = [oracle.compare("out", got["out"], want.out, dtype)]
    if point["state"]:
        found.append(oracle.compare("final_state", got["final_state"], want.final_state, dtype))
    for name, gradient in want.gradients.items():
        floor = want.floors.get(name, 0.0)
        found.append(oracle.compare(name, got["gradients"].get(name), gradient, dtype, floor))
    return _told(found)


def _told(found: list[Any]) -> dict[str, Any]:
    reason = next((f"{e.name}: {e.reason}" for e in found if not e.ok), "")
    errors = [_entry(e.name, e.rms_ratio, e.worst_ratio, e.tol_ratio, e.ok) for e in found]
    return {"errors": errors, "reason": reason}


def _check_step(
    function: Callable[..., Any], family: str, point: dict[str, Any], device: str
) -> dict[str, Any]:
    """The same for one token with a state or a cache: the output, and the state after it."""
    from glabench import inputs
    from glabench.runners import checking, decoding

    case, seed = Case(**point["case"]), point["seed"]
    tensors = checking.Tensors(
        inputs.make_inputs(family, case, device, seed, regime=point["regime"]),
        None,
        {},
        inputs.make_carried(family, case, device, seed + 1),
    )
    rows = list(range(case.batch))
    return _told(
        decoding.compare(function, tensors, family=family, dtype=case.dtype, rows=rows, poisoned=True)
    )


def _entry(
    tensor: str,
    rms_ratio: float | None = None,
    worst_ratio: float | None = None,
    tol_ratio: float = 0.0,
    ok: bool = True,
) -> dict[str, Any]:
    return {
        "tensor": tensor,
        "rms_ratio": rms_ratio,
        "worst_ratio": worst_ratio,
        "tol_ratio": tol_ratio,
        "ok": ok,
    }


@functools.cache
def _load(spec: str) -> tuple[Implementation, Callable[..., Any]]:
    impl = from_spec(json.loads(spec))
    return impl, impl.load()


def _derivable(x: Any, gradient: Any) -> bool:
    """Whether a result can be derived from; what cannot is told when it is compared."""
    import torch

    return (
        gradient is not None and isinstance(x, torch.Tensor) and x.shape == gradient.shape and x.requires_grad
    )


class _Call:
    """One point's inputs, its options, and what is asked of the implementation and of the oracle."""

    def __init__(self, family: str, point: dict[str, Any], device: str) -> None:
        import torch

        from glabench import inputs

        self.family, self.point, case, seed = family, point, Case(**point["case"]), point["seed"]
        self.tensors = inputs.make_inputs(family, case, device, seed, regime=point["regime"])
        self.has_backward = case.passes != "fwd"
        self.d_out = inputs.make_grad_out(family, case, device, seed + 1) if self.has_backward else None
        self.options: dict[str, Any] = {}
        self.d_state, bounds = None, point["cu_seqlens"]
        if bounds:
            self.options["cu_seqlens"] = torch.tensor(bounds, device=device)
        if point["scale"] is not None:
            self.options["scale"] = point["scale"]
        if point["state"]:
            rows = len(bounds) - 1 if bounds else None
            self.options["initial_state"] = inputs.make_state(family, case, device, seed + 2, rows)
            self.options["output_final_state"] = True
            if self.has_backward:
                self.d_state = inputs.make_state(family, case, device, seed + 3, rows)

    def changed_inputs(self, function: Callable[..., Any]) -> str:
        """Call it once and name an input that it changed, or nothing."""
        import torch

        given = self.tensors | {k: v for k, v in self.options.items() if isinstance(v, torch.Tensor)}
        copies = {name: x.clone() for name, x in given.items()}
        with torch.no_grad():
            function(*self.tensors.values(), **self.options)
        return next((name for name, x in given.items() if not torch.equal(x, copies[name])), "")

    def run(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The call's out, final_state and gradients by name; a gradient it does not give is missing."""
        import torch

        wrt = {}
        if self.has_backward:
            wrt = {name: self.tensors[name].requires_grad_() for name in FAMILIES[self.family].gradients}
            if self.point["state"]:
                wrt["initial_state"] = self.options["initial_state"].requires_grad_()
        with torch.set_grad_enabled(self.has_backward):
            result = function(*self.tensors.values(), **self.options)
        out, final_state = (*result, None, None)[:2] if isinstance(result, tuple) else (result, None)
        pairs = [(x, d) for x, d in ((out, self.d_out), (final_state, self.d_state)) if _derivable(x, d)]
        gradients = {}
        if pairs:
            outs, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(outs, list(wrt.values()), given, allow_unused=True)
            gradients = dict(zip(wrt, found, strict=True))
        return {"out": out, "final_state": final_state, "gradients": gradients}

    def answer(self) -> Any:
        from glabench import oracle

        options = {k: v for k, v in self.options.items() if k != "output_final_state"}
        return oracle.reference(self.family, self.tensors, d_out=self.d_out, d_state=self.d_state, **options)
