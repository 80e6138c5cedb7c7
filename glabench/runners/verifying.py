"""`glabench verify`: implementations against the float64 oracle over a grid, in processes of their own."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from glabench import env, registry, tables
from glabench.errors import UsageError
from glabench.pool import Worker
from glabench.registry import Implementation
from glabench.runners import verify as grid

CHECK = "glabench.runners.verify:check"
COLD_LIMIT_S, POINT_LIMIT_S = 300.0, 60.0
MOST_JOBS = 12  # each holds a CUDA context


def verify(
    names: tuple[str, ...],
    *,
    device: str,
    family: str | None,
    say: Callable[[str], None],
    jobs: int | None = None,
) -> dict[str, Any]:
    """Check `names` (default: all that run on `device`) in `jobs` processes; an entry a grid point.

    Raises UsageError or UnavailableError for a name that is unknown or cannot run here.
    """
    device = env.pick_device(device)
    if names:
        impls = [impl for _, impl in registry.resolve(names, device, family)]
    else:
        known = registry.implementations().values()
        impls = [i for i in known if i.unavailable(device) is None and (family is None or i.family == family)]
        if not impls:
            raise UsageError(
                f"nothing of {family} runs on {device}", where="--family", fix="see glabench list"
            )
    tasks = [(impl, point) for impl in impls for point in grid.points(impl, device.split(":")[0])]
    of_each = Counter(impl.id for impl, _ in tasks)
    found: dict[str, list[dict[str, Any]]] = {}
    for (impl, _), point in zip(tasks, _checked(tasks, device, jobs or _jobs(device)), strict=True):
        mine = found.setdefault(impl.id, [])
        mine.append(point)
        if len(mine) == of_each[impl.id]:
            off = sum(not point["ok"] for point in mine)
            say(f"{impl.id}: {len(mine)} points, {'all within tolerance' if not off else f'{off} off'}")
    points = [point for mine in found.values() for point in mine]
    return {"device": device, "ok": all(p["ok"] for p in points), "points": points}


def _jobs(device: str) -> int:
    """One process on a CPU; on a GPU as many as compile well beside each other, since nothing is timed."""
    return 1 if device == "cpu" else max(1, min(MOST_JOBS, env.usable_cores() // 2))


def _checked(
    tasks: list[tuple[Implementation, dict[str, Any]]], device: str, jobs: int
) -> Iterator[dict[str, Any]]:
    """The outcome of each task, in order, `jobs` at once; no process sees two implementations."""
    idle: dict[str, list[Worker]] = {impl.id: [] for impl, _ in tasks}

    def check(task: tuple[Implementation, dict[str, Any]]) -> dict[str, Any]:
        impl, point = task
        mine = idle[impl.id]
        worker = mine.pop() if mine else Worker(impl.id)
        try:
            return _check(worker, impl, point, device)
        finally:
            mine.append(worker)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            outcomes = pool.map(check, tasks)
            for number, outcome in enumerate(outcomes):
                yield outcome
                if number + 1 == len(tasks) or tasks[number + 1][0] is not tasks[number][0]:
                    _close(idle[tasks[number][0].id])
    finally:
        for workers in idle.values():
            _close(workers)


def _close(workers: list[Worker]) -> None:
    while workers:
        workers.pop().close()


def _check(worker: Worker, impl: Implementation, point: dict[str, Any], device: str) -> dict[str, Any]:
    arguments = {"impl": impl.spec(), "point": point, "device": device, "threads": env.usable_cores()}
    outcome = worker.call(CHECK, arguments, limits={"cold": COLD_LIMIT_S, "other": POINT_LIMIT_S})
    errors = outcome.value["errors"] if outcome.status == "ok" else []
    return {
        "impl": impl.id,
        "point": point,
        "status": outcome.status,
        "reason": outcome.reason or (outcome.value or {}).get("reason", ""),
        "errors": errors,
        "ok": outcome.status == "ok" and all(e["ok"] for e in errors),
    }


def show(report: dict[str, Any]) -> None:
    """The worst error of every tensor and dtype, and each point that failed."""
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for point in report["points"]:
        for error in point["errors"]:
            key = (point["impl"], point["point"]["case"]["dtype"], error["tensor"])
            if key not in worst or _share(error) > _share(worst[key]):
                worst[key] = error
    tables.show(
        ("implementation", "dtype", "tensor", "worst error", "tolerance", ""),
        (
            (
                *key,
                tables.number(error["rms_ratio"], 3),
                tables.number(error["tol_ratio"], 3),
                "ok" if error["ok"] else "off",
            )
            for key, error in worst.items()
        ),
        right=("worst error", "tolerance"),
    )
    for point in report["points"]:
        if not point["ok"]:
            names = ", ".join(e["tensor"] for e in point["errors"] if not e["ok"])
            why = point["reason"] or f"{names} beyond tolerance"
            tables.say(f"{point['impl']}: {grid.describe(point['point'])}: {point['status']}: {why}")
    failed = sum(not p["ok"] for p in report["points"])
    tables.say(f"{len(report['points'])} points on {report['device']}, {failed} failed")


def _share(error: dict[str, Any]) -> float:
    """Error over tolerance; one that is not a number at all is the worst."""
    ratio = error["rms_ratio"]
    return float("inf") if ratio is None or not error["ok"] else ratio / error["tol_ratio"]
