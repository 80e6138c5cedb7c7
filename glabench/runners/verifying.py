"""`glabench verify`: implementations against the float64 oracle over a grid, each in its own process."""

from collections.abc import Callable
from typing import Any

from glabench import env, registry, tables
from glabench.errors import UsageError
from glabench.pool import Worker
from glabench.registry import Implementation
from glabench.runners import verify as grid

CHECK = "glabench.runners.verify:check"
COLD_LIMIT_S, POINT_LIMIT_S = 300.0, 60.0


def verify(
    names: tuple[str, ...], *, device: str, family: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check `names` (default: all that run on `device`); one entry a grid point, `ok` over all.

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
    points = []
    for impl in impls:
        mine = _verify_one(impl, device)
        off = sum(not point["ok"] for point in mine)
        say(f"{impl.id}: {len(mine)} points, {'all within tolerance' if not off else f'{off} off'}")
        points += mine
    return {"device": device, "ok": all(p["ok"] for p in points), "points": points}


def _verify_one(impl: Implementation, device: str) -> list[dict[str, Any]]:
    worker = Worker(impl.id)
    threads = env.usable_cores()
    made = []
    try:
        for point in grid.points(impl, device.split(":")[0]):
            arguments = {"impl": impl.spec(), "point": point, "device": device, "threads": threads}
            outcome = worker.call(CHECK, arguments, limits={"cold": COLD_LIMIT_S, "other": POINT_LIMIT_S})
            errors = outcome.value["errors"] if outcome.status == "ok" else []
            made.append(
                {
                    "impl": impl.id,
                    "point": point,
                    "status": outcome.status,
                    "reason": outcome.reason or (outcome.value or {}).get("reason", ""),
                    "errors": errors,
                    "ok": outcome.status == "ok" and all(e["ok"] for e in errors),
                }
            )
    finally:
        worker.close()
    return made


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
