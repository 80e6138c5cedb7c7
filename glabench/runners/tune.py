"""`glabench tune`: the launches of our chunk kernels that a device runs fastest, as a plan file.

For every point (implementation and widths): each launch is compiled, as many at once as there are cores;
compared with the rule's and timed, one after the other; then whole calls under the plans made of the best
are checked against float64 and timed, and the fastest that is right is written.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glabench import __version__, env, registry
from glabench.cases import DTYPES, SHAPES, Case, Shape, choose, split_names
from glabench.errors import UnavailableError, UsageError, nearest
from glabench.installed import installed_version, ptxas_version
from glabench.kernels import gla_configs, plan_files
from glabench.kernels.plan_files import Plan, Point
from glabench.pool import Outcome, Worker, wait_any
from glabench.registry import Implementation
from glabench.results import write_whole
from glabench.runners import tune_variants, turns
from glabench.runners.request import MAX_AHEAD, check_seconds
from glabench.runners.sweep import CHECK_TOKENS
from glabench.runners.tune_variants import RULE, Trial, Variants, Whole

CELLS = "glabench.runners.tune_cells"
TOKENS, SEQLEN = 32768, 4096  # of what is timed; kernels of shorter rows differ little
COMPILE_TOKENS = 1024
LIMITS = {"cold": 180.0, "other": 120.0}  # seconds a launch, or a whole call, may take
COMPILE_SHARE = 0.6  # of the time given: what is not compiled by then is not tried
VISITS = 2
# until the medians are known well enough to decide between two
SAMPLING = {"min_samples": 10, "max_samples": 500, "min_busy_s": 0.1, "interval_frac": 0.005}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to tune, on what, for how long, and where the plans go."""

    impls: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: str = "bf16"
    device: str = "cuda"
    out: Path | None = None  # None: named after the device, in the user's plan folder
    limit_s: float = float("inf")
    tokens: int = TOKENS
    seqlen: int = SEQLEN
    compile_tokens: int = COMPILE_TOKENS
    max_busy_s: float = 2.0  # of measured time, a launch and a visit to a whole call
    variants: Variants | None = None  # None: all

    def points(self) -> list["Tuned"]:
        """Every implementation at every shape."""
        return [Tuned(impl, shape, self) for shape in self.shapes for impl in self.impls]


@dataclass
class Tuned:
    """One point: its trials, its whole calls, and what was chosen."""

    impl: str
    shape: Shape
    request: Request
    trials: list[Trial] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)
    chosen: Whole | None = None

    def __post_init__(self) -> None:
        wide = self.request.dtype != "bf16"
        self.point = Point(self.shape.d_k, self.shape.d_v, tune_variants.GATES[self.impl], wide)
        variants = tune_variants.WIDE_VARIANTS if wide else tune_variants.VARIANTS
        self.trials = list(tune_variants.trials(self.point, self.request.variants or variants))

    @property
    def title(self) -> str:
        return f"{self.impl} {self.shape.d_k}x{self.shape.d_v} {self.request.dtype}"

    def case(self, tokens: int, seqlen: int) -> Case:
        """The call that is timed, or one of fewer tokens."""
        return Case(
            passes="fwd_bwd",
            batch=max(1, tokens // seqlen),
            seqlen=seqlen,
            dtype=self.request.dtype,
            shape=self.shape.name,
            heads=self.shape.heads,
            d_k=self.shape.d_k,
            d_v=self.shape.d_v,
            head_dim=self.shape.head_dim,
        )

    def arguments(self, trial: Trial, case: Case) -> dict[str, Any]:
        """What a worker needs to launch one trial."""
        return {
            "family": _impl(self.impl).family,
            "point": list(self.point),
            "case": asdict(case),
            "device": self.request.device,
            "base": asdict(gla_configs.rule(self.point, trial.chunk)),
            "use": trial.use,
            "launch": asdict(trial.launch),
        }

    def plans(self) -> dict[str, Plan]:
        """The plans worth a whole call: the rule, and the best of each chunk length."""
        found = {RULE: gla_configs.rule(self.point)}
        for chunk in dict.fromkeys(t.chunk for t in self.trials):
            mine = [t for t in self.trials if t.chunk == chunk]
            if any(t.status == "ok" for t in mine):
                plan = tune_variants.choose_launches(gla_configs.rule(self.point, chunk), mine)
                found[f"chunks of {chunk}"] = plan
        return {name: plan for name, plan in found.items() if name == RULE or plan != found[RULE]}

    def document(self) -> dict[str, Any]:
        """All of it, for --json."""
        return {
            "impl": self.impl,
            "d_k": self.point.d_k,
            "d_v": self.point.d_v,
            "heads": self.shape.heads,
            "gate": plan_files.GATES[self.point.gate],
            "dtype": self.request.dtype,
            "launches": [{"kernel": t.kernel, **asdict(t)} for t in self.trials],
            "calls": [asdict(w) for w in self.wholes],
            "chosen": self.chosen.name if self.chosen else None,
            "plan": asdict(self.chosen.plan) if self.chosen else None,
        }


@functools.cache
def _impl(name: str) -> Implementation:
    return registry.implementations()[name]


# --- what was typed ---------------------------------------------------------------------------------------


def from_command(
    *,
    shape: str,
    widths: dict[str, int | None],
    impl: str,
    dtype: str,
    device: str,
    out: Path | None,
    limit: float | None,
    dry_run: bool,
) -> Request:
    """A request from the options of `tune`. Raises UsageError, and, unless `dry_run`, UnavailableError."""
    known = tuple(tune_variants.GATES)
    impls = split_names(impl, "implementation", "--impl")
    for name in impls:
        if name not in known:
            raise UsageError(f"{name!r} has no plan to tune", where="--impl", fix=nearest(name, known))
    check_seconds(limit, "--limit")
    request = Request(
        impls=impls,
        shapes=_shapes(shape, widths),
        dtype=choose(dtype or "bf16", DTYPES, "dtype", "--dtype"),
        device=device,
        out=out,
        limit_s=float("inf") if limit is None else limit,
    )
    return request if dry_run else _on_a_gpu(request)


def _shapes(names: str, widths: dict[str, int | None]) -> tuple[Shape, ...]:
    given = [name for name, value in widths.items() if value is not None]
    if not given:
        words = split_names(names or "340m,1.3b,fig2", "shape", "--shape")
        return tuple(SHAPES[choose(w, tuple(SHAPES), "shape", "--shape")] for w in words)
    if names or len(given) < len(widths):
        fix = "give --d-k, --d-v and --heads together, without --shape"
        raise UsageError("a shape in parts", where=", ".join(given), fix=fix)
    for name in ("--d-k", "--d-v"):
        if not 0 < widths[name] <= 512 or widths[name] % 16:
            raise UsageError(f"{widths[name]} is no width", where=name, fix="give a multiple of 16 up to 512")
    d_k, d_v = widths["--d-k"], widths["--d-v"]
    return (Shape(f"{d_k}x{d_v}", heads=widths["--heads"], d_k=d_k, d_v=d_v, head_dim=d_v),)


def _on_a_gpu(request: Request) -> Request:
    device = env.pick_device(request.device)
    if device == "cpu":
        fix = "run it on a machine with one; --dry-run lists what would be tried"
        raise UnavailableError("no GPU to tune for", where="--device", fix=fix)
    registry.resolve(request.impls, device)
    return dataclasses.replace(request, device=device)


def own_folder() -> Path:
    """Where this user's plan files go: GLABENCH_PLANS, else the usual place of settings."""
    own = os.environ.get(plan_files.FOLDER)
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(own) if own else Path(settings) / "glabench" / "plans"


# --- tuning -----------------------------------------------------------------------------------------------


def run(request: Request, say: Say) -> dict[str, Any]:
    """Tune every point; each is written when it is done. Returns the document that --json prints.

    Raises UsageError or ResultsError where the plan file cannot be read or written, before anything is tried.
    """
    name = env.gpu_name(request.device)
    slug = env.device_slug(name)
    path = request.out or own_folder() / f"{slug}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = plan_files.read(path) if path.exists() else []
    made = _made(name or slug)
    points, deadline = request.points(), time.monotonic() + request.limit_s
    written = False
    with turns.device_lock(request.device, say):
        _compile(points, time.monotonic() + COMPILE_SHARE * request.limit_s, say)
        with Worker("tune", preload=CELLS) as worker:
            for tuned in points:
                _tune(tuned, worker, deadline, say)
                if tuned.chosen is not None:
                    changes = tune_variants.changes(tuned.point, tuned.chosen.plan)
                    blocks = plan_files.merged(blocks, made, {tuned.point: changes})
                    write_whole(path, plan_files.text(blocks, slug))
                    written = True
    return {
        "device": slug,
        "file": str(path) if written else None,
        "in_force": _in_force(path, slug) if written else None,
        "bad": sum(t.chosen is None and bool(t.wholes) for t in points),
        "points": [t.document() for t in points],
    }


def _made(device: str) -> dict[str, str]:
    return {
        "device": device,
        "torch": installed_version("torch"),
        "triton": installed_version("triton"),
        "ptxas": ptxas_version() or "",
        "date": env.now_utc()[:10],
        "glabench": __version__,
    }


def _in_force(path: Path, slug: str) -> str:
    """The line that makes the kernels read this file."""
    line = f"export {plan_files.FOLDER}={path.resolve().parent}"
    return line if path.name == f"{slug}.toml" else f"mv {path} {path.with_name(slug + '.toml')} && {line}"


def _compile(points: list[Tuned], deadline: float, say: Say) -> None:
    """Compile every trial once, in processes of their own; what fails or is late becomes that trial's end."""
    tasks = iter([(tuned, i) for tuned in points for i in range(len(tuned.trials))])
    count = sum(len(tuned.trials) for tuned in points)
    workers = [Worker(f"compile {i}") for i in range(max(1, min(env.usable_cores() - 1, MAX_AHEAD, count)))]
    say(f"compiling {count} launches in {len(workers)} processes")
    begun = time.monotonic()
    flying: dict[Worker, tuple[Tuned, int]] = {}
    try:
        for worker in workers:
            _next(worker, tasks, flying, deadline)
        while flying:
            for worker, outcome in wait_any(list(flying), timeout=1.0):
                tuned, i = flying.pop(worker)
                if outcome.status != "ok":
                    tuned.trials[i] = _failed(tuned.trials[i], outcome)
                _next(worker, tasks, flying, deadline)
    finally:
        for worker in workers:
            worker.close()
    failed = sum(trial.status != "planned" for tuned in points for trial in tuned.trials)
    say(f"compiled in {time.monotonic() - begun:.0f} s; {failed} were late or failed")


def _next(worker: Worker, tasks: Iterator, flying: dict[Worker, tuple[Tuned, int]], deadline: float) -> None:
    for tuned, i in tasks:
        if time.monotonic() >= deadline:
            tuned.trials[i] = _late(tuned.trials[i])
            continue
        tokens = tuned.request.compile_tokens
        arguments = tuned.arguments(tuned.trials[i], tuned.case(tokens, tokens))
        worker.start(f"{CELLS}:compile_one", arguments, limits=LIMITS)
        flying[worker] = (tuned, i)
        return


def _failed(trial: Trial, outcome: Outcome) -> Trial:
    return dataclasses.replace(trial, status=outcome.status, reason=outcome.reason)


def _late(trial: Trial) -> Trial:
    return dataclasses.replace(trial, status="skipped", reason="time limit")


def _tune(tuned: Tuned, worker: Worker, deadline: float, say: Say) -> None:
    """Try what compiled; then whole calls under the plans that come of it. Past the deadline, nothing."""
    if time.monotonic() >= deadline:
        tuned.trials = [_late(t) if t.status == "planned" else t for t in tuned.trials]
        say(f"{tuned.title}: skipped: time limit")
        return
    case = tuned.case(tuned.request.tokens, tuned.request.seqlen)
    for i, trial in enumerate(tuned.trials):
        if trial.status == "planned":
            tuned.trials[i] = (
                _late(trial) if time.monotonic() >= deadline else _try(tuned, trial, case, worker)
            )
        if tuned.trials[i].status != "ok":
            say(f"{tuned.title}: {trial.describe()}: {tuned.trials[i].status}: {tuned.trials[i].reason}")
    tuned.wholes = _whole_calls(tuned, case, worker)
    tuned.chosen = tune_variants.choose_plan(tuned.wholes)
    for whole in tuned.wholes:
        found = f"{whole.ms:.4g} ms" if whole.status == "ok" else f"{whole.status}: {whole.reason}"
        say(f"{tuned.title}: forward and backward under {whole.name}: {found}")


def _try(tuned: Tuned, trial: Trial, case: Case, worker: Worker) -> Trial:
    arguments = tuned.arguments(trial, case) | {"max_busy_s": tuned.request.max_busy_s}
    outcome = worker.call(f"{CELLS}:try_one", arguments, limits=LIMITS)
    if outcome.status != "ok":
        return _failed(trial, outcome)
    note = "" if outcome.value["differs"] is not None else "not compared: the plan's own launch does not run"
    return dataclasses.replace(trial, status="ok", us=round(outcome.value["us"], 2), reason=note)


def _whole_calls(tuned: Tuned, case: Case, worker: Worker) -> list[Whole]:
    """Check each plan's call as `speed` does, time them in turns, check again."""
    wholes = [Whole(name, plan, "planned") for name, plan in tuned.plans().items()]
    times: dict[str, list[float]] = {w.name: [] for w in wholes}

    def call(i: int, function: str, **more: Any) -> dict[str, Any] | None:
        if wholes[i].status not in ("planned", "ok"):
            return None
        arguments = {
            "impl": _impl(tuned.impl).spec(),
            "case": asdict(case),
            "device": tuned.request.device,
            "threads": env.usable_cores(),
            "seed": i,  # a check that a process has passed is not repeated for the same seed
            "point": list(tuned.point),
            "plan": asdict(wholes[i].plan),
            **more,
        }
        outcome = worker.call(f"{CELLS}:{function}", arguments, limits=LIMITS)
        wholes[i] = dataclasses.replace(wholes[i], status=outcome.status, reason=outcome.reason)
        return outcome.value

    for i in range(len(wholes)):
        found = call(i, "prepare", check_tokens=CHECK_TOKENS)
        if found is not None:
            wholes[i] = dataclasses.replace(wholes[i], err_ratio=found["err_ratio"])
    for visit in range(VISITS):
        for i in range(len(wholes)):
            found = call(i, "sample", visit=visit, max_busy_s=tuned.request.max_busy_s, **SAMPLING)
            times[wholes[i].name] += found["samples_ms"] if found is not None else []
    for i in range(len(wholes)):
        call(i, "recheck", visit=VISITS)
    return [_timed(w, times[w.name]) for w in wholes]


def _timed(whole: Whole, samples_ms: list[float]) -> Whole:
    return dataclasses.replace(whole, ms=statistics.median(samples_ms)) if whole.status == "ok" else whole
