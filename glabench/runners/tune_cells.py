"""Tuning inside a worker: one launch of one kernel compiled, or checked and timed; a whole call under a plan.

Each public function takes and returns a dict that JSON can hold and is called through glabench.pool. A
launch's answer is compared with that of the plan it is tried against; a whole call's with float64.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from glabench import cost, inputs, measure
from glabench.cases import Case
from glabench.kernels import gla_alone, gla_configs
from glabench.kernels.plan_files import Launch, Plan, Point
from glabench.runners import cells
from glabench.runners.tune_variants import kernel_of
from glabench.worker import CellFailure, emit_phase

Uses = dict[str, gla_alone.Alone]
# relative RMS difference of two right answers in the same chunks: a unit in the last place of the products
ROUNDING = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-13}
# until a median is known well enough to decide between two; max_busy_s is the caller's
SAMPLING = {"min_samples": 10, "max_samples": 500, "min_busy_s": 0.01, "interval_frac": 0.005}


def compile_one(args: dict[str, Any]) -> dict[str, Any]:
    """Launch one variant once, on a few tokens, so that it is in Triton's cache on disk.

    args: family, point, case, device, base, use, launch. Raises what compiling and launching raise.
    """
    emit_phase("cold")
    with _in_force(args, _varied(args)):
        _uses(_key(args), 0, scaled=False)[args["use"]].run()
        _synchronize(args["device"])
    return {}


def try_one(args: dict[str, Any]) -> dict[str, Any]:
    """Compare one variant with the base plan's launch, then time it; args: as compile_one, and max_busy_s.

    Returns us, the median on the device, and `differs`, the relative RMS difference, None where the base
    plan's launch does not run. Raises CellFailure("wrong", ...).
    """
    emit_phase("cold")
    key, use = _key(args), args["use"]
    want = _expected(key, use)
    with _in_force(args, _varied(args)):
        differs = _compare(_outcome(_uses(key, 0)[use]), want, args["case"]["dtype"])
        emit_phase("sample")
        call_bytes = round(cost.inputs_mib(args["family"], Case(**args["case"])) * cost.MIB)
        plan = measure.Plan(**SAMPLING, max_busy_s=args["max_busy_s"])
        with torch.no_grad():
            taken = measure.time_calls(lambda i: _uses(key, i)[use].run, call_bytes, plan, args["device"])
    return {"us": 1e3 * statistics.median(taken["samples_ms"]), "differs": differs}


def prepare(args: dict[str, Any]) -> dict[str, Any]:
    """cells.prepare under a plan; args: point, plan and what that takes."""
    return _under_plan(cells.prepare, args)


def sample(args: dict[str, Any]) -> dict[str, Any]:
    """cells.sample under a plan; args: point, plan and what that takes."""
    return _under_plan(cells.sample, args)


def recheck(args: dict[str, Any]) -> dict[str, Any]:
    """cells.recheck under a plan; args: point, plan and what that takes."""
    return _under_plan(cells.recheck, args)


def _under_plan(call: Callable[[dict[str, Any]], dict[str, Any]], args: dict[str, Any]) -> dict[str, Any]:
    _forget()  # the tensors of kernels tried alone
    with _in_force(args, plan_from(args["plan"])):
        return call(args)


def plan_from(table: dict[str, Any]) -> Plan:
    """A plan from what dataclasses.asdict made of it."""
    return Plan(**{n: Launch(**x) if isinstance(x, dict) else x for n, x in table.items()})


def _in_force(args: dict[str, Any], plan: Plan) -> AbstractContextManager[None]:
    return gla_configs.in_force(Point(*args["point"]), plan)


def _varied(args: dict[str, Any]) -> Plan:
    return dataclasses.replace(plan_from(args["base"]), **{kernel_of(args["use"]): Launch(**args["launch"])})


def _key(args: dict[str, Any]) -> str:
    names = ("family", "point", "case", "device", "base")
    return json.dumps({name: args[name] for name in names}, sort_keys=True)


@functools.lru_cache(maxsize=1)
def _made(key: str, scaled: bool) -> dict[int, Uses]:
    """What `_uses` keeps, until it is asked for another key."""
    return {}


def _uses(key: str, copy: int, *, scaled: bool = True) -> Uses:
    """Every use on inputs of its own for each `copy`; those of the last key are kept."""
    made = _made(key, scaled)
    if copy not in made:
        args = json.loads(key)
        point, case = Point(*args["point"]), Case(**args["case"])
        _set_device(args["device"])
        q, k, v, *g = inputs.make_inputs(args["family"], case, args["device"], copy).values()
        with gla_configs.in_force(point, plan_from(args["base"])):
            made[copy] = gla_alone.uses_of(q, k, v, g[0] if g else None, point.gate, scaled=scaled)
    return made[copy]


def _set_device(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device) if ":" in device else 0)
        torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def _expected(key: str, use: str) -> list[torch.Tensor] | None:
    """What the base plan's launch gives; None where that does not run on this device, or is not finite."""
    args = json.loads(key)
    with gla_configs.in_force(Point(*args["point"]), plan_from(args["base"])):
        uses = _uses(key, 0)
        try:
            found = [x.clone() for x in _outcome(uses[use])]
            return found if all(x.isfinite().all() for x in found) else None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001  it is a variant like the others, and is told as one
            return None


def _forget() -> None:
    _made.cache_clear()
    _expected.cache_clear()


def _outcome(alone: gla_alone.Alone) -> list[torch.Tensor]:
    """Run a use on buffers full of NaN, where they are its own, so that an element left unwritten shows."""
    filled = alone.filled(alone.run())
    for x in filled:
        x.fill_(float("nan"))
    return alone.filled(alone.run())


def _compare(got: list[torch.Tensor], want: list[torch.Tensor] | None, dtype: str) -> float | None:
    """The largest relative RMS difference. Raises CellFailure("wrong", ...) where it is beyond rounding."""
    if not all(x.isfinite().all() for x in got):
        raise CellFailure("wrong", "NaN or infinity, or an element left unwritten")
    if want is None:
        return None
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        off, size = (x.double() - y.double()).norm().item(), y.double().norm().item()
        worst = max(worst, off / size if size else off)
    if not worst <= ROUNDING[dtype]:
        raise CellFailure("wrong", f"differs from the plan it is tried against by {worst:.1e} of its norm")
    return worst


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
