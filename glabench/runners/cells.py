"""A cell's life inside its worker: build, first call, check, sample, check again, measure memory.

Each public function takes and returns a dict that JSON can hold and is called through glabench.pool. `fwd`
runs under torch.no_grad, as at inference; `fwd_bwd` builds the graph and calls torch.autograd.grad with a
random output gradient made beforehand; `bwd` repeats the backward pass on one retained graph.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # by the first gradient: seconds, with the device held
from torch import Tensor

from glabench import ceilings, cost, footprint, inputs, measure, nvml, registry
from glabench.cases import DECODE, Case
from glabench.errors import UnavailableError
from glabench.runners import checking, decoding, tuning, turns
from glabench.runners.checking import Tensors
from glabench.worker import CellFailure, emit_phase, settle_garbage

VISIT_STEP, COPY_STEP = 100_003, 7_919  # primes: seeds of visits and of input copies do not meet
RECHECK_SEED = 15_485_863  # apart from every visit's
SAME_GRADIENT = 0.01  # of its norm: what atomic sums may differ by between two backward passes
IN_PLACE_ON_LEAF = "leaf Variable that requires grad is being used in an in-place"


@dataclass(frozen=True, slots=True)
class Cell:
    """What the arguments of a call name."""

    impl: registry.Implementation
    function: Callable[..., Any]
    case: Case
    device: str
    seed: int

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def needs_gradients(self) -> bool:
        return self.case.passes not in ("fwd", DECODE)

    def key(self, passes: str | None = None) -> tuple[str, str]:
        """This cell, or the same cell with other passes, in this process's memory of what it has run."""
        return self.impl.id, replace(self.case, passes=passes or self.case.passes).key()


@dataclass(frozen=True, slots=True)
class First:
    """The row's fields about the first call of a case in this process."""

    cold_start_ms: float | None
    first_in_process: str
    autotune_ms: float | None
    config: str
    cache: str


_firsts: dict[tuple[str, str], First] = {}
_passed: dict[tuple[str, str, int], dict[str, Any]] = {}


# --- what a cell is made of -------------------------------------------------------------------------------


@functools.cache
def _load(spec: str) -> tuple[registry.Implementation, Callable[..., Any]]:
    impl = registry.from_spec(json.loads(spec))
    return impl, impl.load()


def _cell(args: dict[str, Any]) -> Cell:
    torch.set_num_threads(args["threads"])
    device = args["device"]
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device) if ":" in device else 0)
        tuning.install(turns.step_aside)
    impl, function = _load(json.dumps(args["impl"], sort_keys=True))
    return Cell(impl, function, Case(**args["case"]), device, args["seed"])


def _tensors(cell: Cell, seed: int) -> Tensors:
    """Inputs and, for a backward pass, the output's gradient; derived by what the family names."""
    family, case = cell.impl.family, cell.case
    made = inputs.make_inputs(family, case, cell.device, seed)
    if case.passes == DECODE:
        return Tensors(made, None, {}, inputs.make_carried(family, case, cell.device, seed + 1))
    if not cell.needs_gradients:
        return Tensors(made, None, {})
    names = registry.FAMILIES[family].gradients
    return Tensors(
        made,
        inputs.make_grad_out(family, case, cell.device, seed + 1),
        {name: made[name].requires_grad_() for name in names},
    )


def _forward(cell: Cell, tensors: Tensors) -> Tensor:
    """The output alone. Raises CellFailure where the implementation returns something else."""
    result = cell.function(*tensors.inputs.values(), *tensors.carried.values())
    out = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(out, Tensor):
        raise CellFailure("wrong", f"it returns {type(out).__name__}, not a tensor")
    return out


def _gradients(out: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, list(tensors.wrt.values()), tensors.d_out)


def _call(cell: Cell, tensors: Tensors) -> Callable[[], Any]:
    """The call that is timed."""
    if not cell.needs_gradients:
        return lambda: _forward(cell, tensors)
    if cell.case.passes == "fwd_bwd":
        return lambda: _gradients(_forward(cell, tensors), tensors)
    out, wrt = _forward(cell, tensors), list(tensors.wrt.values())
    backward = functools.partial(torch.autograd.grad, out, wrt, tensors.d_out, retain_graph=True)
    _must_repeat(backward)
    return backward


def _must_repeat(backward: Callable[[], tuple[Tensor, ...]]) -> None:
    """A backward pass that eats its graph, or scribbles on what it saved, cannot be timed alone."""
    first = backward()
    try:
        second = backward()
    except RuntimeError as err:
        if "second time" not in str(err):
            raise
        raise CellFailure("unsupported", f"its backward pass cannot be repeated: {err}") from err
    for a, b in zip(first, second, strict=True):
        if (a.double() - b.double()).norm() > SAME_GRADIENT * a.double().norm():
            raise CellFailure("unsupported", "its backward pass gives other gradients when repeated")


def _synchronize(cell: Cell) -> None:
    if cell.is_cuda:
        torch.cuda.synchronize()


def _empty(cell: Cell) -> None:
    """Leave no memory behind for the next cell; the cell's tensors must be out of scope."""
    settle_garbage()  # what a call imported and compiled stays, and is not looked through again
    if cell.is_cuda:
        torch.cuda.empty_cache()


# --- the stations of a cell's life ------------------------------------------------------------------------


def prepare(args: dict[str, Any]) -> dict[str, Any]:
    """First call, then the check; args: impl, case, device, seed, threads, check_tokens.

    Phases: "cold" until the first result, then "check". The row's cold-start and check fields; they are
    remembered, so that a case costs one check a process. Raises CellFailure("wrong", ...).
    """
    emit_phase("cold")
    cell = _cell(args)
    key = (*cell.key(), cell.seed)
    if key not in _passed:
        with turns.turn(cell.device) as turn:
            _first_call(cell, turn)
            emit_phase("check")
            length = decoding.compared_length(cell.impl.family, cell.case)
            rows = checking.choose_rows(cell.case.batch, length, args["check_tokens"], cell.seed)
            begun = time.perf_counter()
            found = _check(cell, cell.seed, rows, poisoned=True)
            found["check_s"] = round(time.perf_counter() - begun, 3)
            _empty(cell)
        _passed[key] = asdict(_firsts[cell.key()]) | found
    return _passed[key]


def compile_ahead(args: dict[str, Any]) -> dict[str, Any]:
    """The first call alone: what it compiles and tunes is in Triton's cache when a sweep begins.

    args: impl, case, device, seed, threads. The row's cold-start fields. Others have the device while this
    compiles: whoever starts it leaves room for the inputs of all.
    """
    emit_phase("cold")
    cell = _cell(args)
    tuning.compile_aside()
    with turns.turn(cell.device) as turn:
        _first_call(cell, turn)
    _empty(cell)
    return asdict(_firsts[cell.key()])


def _first_call(cell: Cell, turn: turns.Turn) -> None:
    """Time the first call of this case, compiling and tuning included, the wait for other workers not."""
    if cell.key() in _firsts:
        return
    tensors = _tensors(cell, cell.seed)
    watched = tuning.recording() if cell.is_cuda else contextlib.nullcontext(tuning.Record())
    _synchronize(cell)
    with watched as record, torch.set_grad_enabled(cell.needs_gradients):
        waited_s, begun = turn.waited_s, time.perf_counter()
        try:
            out = _forward(cell, tensors)
            checking.must_fit(out, tensors)
            if cell.needs_gradients:
                _gradients(out, tensors)
        except RuntimeError as err:
            if IN_PLACE_ON_LEAF not in str(err):
                raise
            raise CellFailure("wrong", "it changes its inputs in place") from err
        _synchronize(cell)
        spent_s = time.perf_counter() - begun - (turn.waited_s - waited_s)
    _firsts[cell.key()] = _first(cell, spent_s * 1e3, record)


def _first(cell: Cell, spent_ms: float, record: tuning.Record) -> First:
    """With the forward pass's share, where that ran here as a cell of its own; None where it was not cold."""
    cold_ms: float | None = spent_ms
    tune_ms: float | None = record.tune_s * 1e3 if cell.is_cuda else None
    before = _firsts.get(cell.key("fwd"))
    if cell.needs_gradients and before is not None and before.cold_start_ms is not None:
        cold_ms = spent_ms + before.cold_start_ms
        tune_ms = None if tune_ms is None else tune_ms + (before.autotune_ms or 0.0)
    elif not cell.needs_gradients and (cell.key("fwd_bwd") in _firsts or cell.key("bwd") in _firsts):
        cold_ms = None
    return First(cold_ms, "no" if _firsts else "yes", tune_ms, record.config, record.cache)


def _check(cell: Cell, seed: int, rows: list[int], *, poisoned: bool) -> dict[str, Any]:
    if cell.case.passes == DECODE:
        found = decoding.check(
            cell.function,
            functools.partial(_tensors, cell, seed),
            family=cell.impl.family,
            dtype=cell.case.dtype,
            rows=rows,
            poisoned=poisoned,
        )
        return found | {"checked_frac": len(rows) / cell.case.batch}
    return checking.check(
        functools.partial(_forward, cell),
        functools.partial(_tensors, cell, seed),
        family=cell.impl.family,
        case=cell.case,
        rows=rows,
        seed=seed,
        poisoned=poisoned,
    )


def sample(args: dict[str, Any]) -> dict[str, Any]:
    """One visit: fresh inputs, warm up, sample, drop everything; the fields of `measure.time_calls`.

    args: impl, case, device, seed, threads, visit, min_samples, max_samples, min_busy_s, max_busy_s,
    interval_frac.
    """
    emit_phase("sample")
    cell = _cell(args)
    names = ("min_samples", "max_samples", "min_busy_s", "max_busy_s", "interval_frac")
    plan = measure.Plan(**{name: args[name] for name in names})
    seed = cell.seed + VISIT_STEP * (1 + args["visit"])

    def make(i: int) -> Callable[[], Any]:
        return _call(cell, _tensors(cell, seed + COPY_STEP * i))

    call_bytes = round(cost.inputs_mib(cell.impl.family, cell.case) * cost.MIB)
    with torch.set_grad_enabled(cell.needs_gradients):
        taken = measure.time_calls(make, call_bytes, plan, cell.device)
    _empty(cell)
    return taken


def recheck(args: dict[str, Any]) -> dict[str, Any]:
    """After timing, a check of one row of inputs never seen before; args: as `prepare`, and visit.

    Finds answers cached by pointer or shape, state left in buffers, and races that only hot kernels show:
    nothing is poisoned or deterministic here. Raises CellFailure("wrong", ...).
    """
    emit_phase("recheck")
    cell = _cell(args)
    seed = cell.seed + RECHECK_SEED + VISIT_STEP * args["visit"]
    rows = [checking.one_row(cell.case.batch, seed)]
    try:
        found = _check(cell, seed, rows, poisoned=False)
    except CellFailure as err:
        raise CellFailure(err.status, f"on fresh inputs after timing, {err.reason}") from err
    _empty(cell)
    return found


def memory(args: dict[str, Any]) -> dict[str, Any]:
    """One call's memory, measured apart from time: the fields of `footprint.measure`.

    args: impl, case, device, seed, threads. Raises CellFailure("unsupported", ...) for `bwd`, which holds
    a graph that is not its own, and where the system does not tell the peak.
    """
    emit_phase("memory")
    cell = _cell(args)
    if cell.case.passes == "bwd":
        raise CellFailure("unsupported", "a backward pass alone has no memory of its own: use fwd_bwd")
    _empty(cell)
    try:
        found = _footprint(cell)
    except UnavailableError as err:
        raise CellFailure("unsupported", str(err)) from err
    _empty(cell)
    return found


def _footprint(cell: Cell) -> dict[str, Any]:
    tensors = _tensors(cell, cell.seed)
    forward = functools.partial(_forward, cell, tensors)
    backward = functools.partial(_gradients, tensors=tensors) if cell.needs_gradients else None
    with torch.set_grad_enabled(cell.needs_gradients):
        return footprint.measure(forward, backward, tensors.all(), cell.device)


# --- the device -------------------------------------------------------------------------------------------


def describe(args: dict[str, Any]) -> dict[str, Any]:
    """What the device is and reaches; args: device, threads, seconds (of each ceiling)."""
    emit_phase("describe")
    torch.set_num_threads(args["threads"])
    return {"ceilings": ceilings.measure(args["device"], args["seconds"]), **describe_device(args["device"])}


def describe_device(device: str) -> dict[str, Any]:
    """What run.json keeps of a device and of the torch that drives it; nothing is measured."""
    is_cuda = device.startswith("cuda")
    gpu, state = _describe_gpu(device) if is_cuda else (None, None)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "gpu": gpu,
        "state": state,
        "threads": torch.get_num_threads(),
        "tf32": "no" if torch.get_float32_matmul_precision() == "highest" else "yes",
    }


def _describe_gpu(device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The GPU's fixed facts, and its state before anything is asked of it."""
    properties = torch.cuda.get_device_properties(torch.device(device) if ":" in device else 0)
    gpu = nvml.Gpu(f"GPU-{properties.uuid}")
    watch = nvml.Watch(gpu)
    watch.look()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_mib": properties.total_memory // 2**20,
        "uuid_digest": hashlib.sha256(str(properties.uuid).encode()).hexdigest()[:12],
        "driver": gpu.driver(),
        "power_limit_w": gpu.power_limit_w(),
    }, watch.summary()
