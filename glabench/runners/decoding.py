"""Is a step right? One token's output, and the state or cache after it, against the float64 oracle.

Runs in a worker. A step changes what it carries, so that is compared with what it was before.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from glabench import oracle
from glabench.cases import DECODE, Case
from glabench.runners.checking import Tensors, must_fit
from glabench.worker import CellFailure


def compared_length(family: str, case: Case) -> int:
    """Tokens of a row that the oracle goes through: a state stands for all before a step."""
    return 1 if case.passes == DECODE and family != "attention" else case.seqlen


def check(
    step: Callable[..., Any],
    build: Callable[[], Tensors],
    *,
    family: str,
    dtype: str,
    rows: list[int],
    poisoned: bool,
) -> dict[str, Any]:
    """Take one step and compare; the row's check fields. Raises CellFailure("wrong", ...)."""
    errors = compare(step, build(), family=family, dtype=dtype, rows=rows, poisoned=poisoned)
    worst = max(errors, key=lambda e: (not e.ok, (e.rms_ratio or 0.0) / (e.tol_ratio or 1.0)))
    if not worst.ok:
        raise CellFailure("wrong", f"{worst.name}: {worst.reason}")
    return {"err_ratio": worst.rms_ratio, "tol_ratio": worst.tol_ratio, "worst_tensor": worst.name}


def compare(
    step: Callable[..., Any],
    tensors: Tensors,
    *,
    family: str,
    dtype: str,
    rows: list[int],
    poisoned: bool,
) -> list[oracle.Error]:
    """The errors of the output and of what is carried on, of those rows of the batch.

    Raises CellFailure("wrong", ...) where the step changes an input, or gives something else than an answer.
    """
    import torch

    given = {name: x.clone() for name, x in tensors.inputs.items()}
    before = {name: x[rows] for name, x in tensors.carried.items()}
    poison = oracle.poisoned_memory if poisoned else contextlib.nullcontext
    with poison(), torch.no_grad():
        out, after = answer(step(*tensors.inputs.values(), *tensors.carried.values()), tensors)
    must_fit(out, tensors)
    if not out.isfinite().all():
        raise CellFailure("wrong", "out: NaN or infinity")
    for name, x in given.items():
        if not x.equal(tensors.inputs[name]):
            raise CellFailure("wrong", f"it changes its input {name} in place")
    picked = {name: x if name in ("A", "D") else x[rows] for name, x in given.items()}
    kept = {name: x[rows] for name, x in after.items()}
    judge = _with_cache if family == "attention" else _with_state
    return judge(family, picked, before, out[rows], kept, dtype)


def answer(result: Any, tensors: Tensors) -> tuple[Any, dict[str, Any]]:
    """(out, what is carried on): returned by the step, or changed by it in place."""
    import torch

    out, *new = result if isinstance(result, tuple) and result else (result,)
    if not isinstance(out, torch.Tensor):
        raise CellFailure("wrong", f"it returns {type(out).__name__}, not a tensor")
    if new and "state" in tensors.carried and new[0] is not None:
        return out, {"state": new[0]}
    return out, tensors.carried


def _with_state(family, inputs, before, out, after, dtype) -> list[oracle.Error]:
    want = oracle.reference(family, inputs, initial_state=before["state"])
    return [
        oracle.compare("out", out, want.out, dtype),
        oracle.compare("final_state", after["state"], want.final_state, dtype),
    ]


def _with_cache(family, inputs, before, out, after, dtype) -> list[oracle.Error]:
    """The cache must hold the token, bit for bit, and nothing else may have changed."""
    import torch

    whole = {}
    for name, cache in before.items():
        cache[:, -1:] = inputs[name[0]]
        if not cache.equal(after[name]):
            raise CellFailure("wrong", f"{name} is not the cache before with the new token at its end")
        whole[name[0]] = cache
    last = whole["k"].shape[1] - 1
    query = torch.zeros_like(whole["k"])
    query[:, last:] = inputs["q"]
    at = torch.tensor([last], device=out.device)
    want = oracle.reference(family, {"q": query, **whole}, positions=at)
    return [oracle.compare("out", out, want.out, dtype)]
