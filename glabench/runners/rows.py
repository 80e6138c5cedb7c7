"""From what a worker measured to a row: the only place where measurements meet costs and keys."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from glabench import cost, stats
from glabench.cases import Case, Regime, arm_of
from glabench.errors import UsageError
from glabench.registry import Implementation
from glabench.rows import CaseRow, MemoryRow, SpeedRow, columns

PREPARED = (
    "err_ratio",
    "tol_ratio",
    "worst_tensor",
    "checked_frac",
    "cold_start_ms",
    "first_in_process",
    "autotune_ms",
    "config",
    "cache",
)
LAST_VISIT = ("timer", "l2", "calls_per_sample", "throttle", "shared_device")
FASTER_THAN_POSSIBLE = 0.9  # of the floor, once the bytes cannot hide in L2


def base_fields(impl: Implementation, case: Case) -> dict[str, Any]:
    """The case's columns and what makes this arm comparable: its split, state, FLOP model."""
    fields: dict[str, Any] = {**asdict(case), "layout_copy": "yes" if impl.layout_copy else "no"}
    try:
        fields["arm"] = arm_of(impl.family, case).text
    except UsageError:
        return fields  # the width does not divide: the row is `unsupported` and says so
    fields["state_mib"] = cost.state_mib(impl.family, case)
    fields["flop_model"] = cost.flop_model(impl.family, case)
    fields["flop_count"] = cost.flop_count(impl.family, case)
    return fields


def failed(row_type: type[CaseRow], keys: dict[str, Any], status: str, reason: str) -> CaseRow:
    return row_type(**keys, status=status, reason=reason or "no reason was given")


def speed_row(
    keys: dict[str, Any],
    impl: Implementation,
    case: Case,
    prepared: dict[str, Any],
    visits: Sequence[dict[str, Any]],
    ceilings: cost.Ceilings,
    l2_bytes: int,
    regime: Regime,
) -> SpeedRow:
    """An `ok` row, or an `error` row where the time is below what the device can do."""
    samples = [ms for visit in visits for ms in visit["samples_ms"]]
    summary = stats.summarise(samples)
    floor = cost.floor(impl.family, case, ceilings)
    moved = cost.unavoidable_bytes(impl.family, case)
    checks = {name: prepared.get(name) for name in PREPARED if prepared.get(name) is not None}
    ratio = summary.median / floor.time_ms
    if l2_bytes and moved > 4 * l2_bytes and ratio < FASTER_THAN_POSSIBLE:
        times = f"{summary.median:.4g} ms, floor {floor.time_ms:.4g} ms"
        reason = f"faster than the device can move the bytes: {times}"
        return SpeedRow(**keys, **checks, status="error", reason=reason)
    seconds = summary.median / 1e3
    host = _middle(visits, "host_ms")
    return SpeedRow(
        **keys,
        **checks,
        **{name: visits[-1][name] for name in LAST_VISIT if visits[-1].get(name) is not None},
        time_ms=summary.median,
        time_lo_ms=summary.low,
        time_hi_ms=summary.high,
        time_p20_ms=summary.p20,
        time_p80_ms=summary.p80,
        time_min_ms=summary.least,
        reps=summary.count,
        outliers=summary.outliers,
        throttled=_total(visits, "throttled"),
        visits=len(visits),
        converged="yes" if summary.converged(regime.interval_frac) else "no",
        host_ms=host,
        wall_ms=_middle(visits, "wall_ms"),
        launch_bound=_yes(host is not None and keys["device"] != "cpu" and host >= 0.8 * summary.median),
        syncs_inside=_yes(any(v.get("syncs_inside") == "yes" for v in visits)),
        async_outside=_yes(any(v.get("async_outside") == "yes" for v in visits)),
        floor_ms=floor.time_ms,
        floor_ratio=ratio,
        floor_kind=floor.kind,
        tflop_s=keys["flop_count"] / seconds / 1e12,
        gb_s=moved / seconds / 1e9,
        tok_s=case.computed / seconds,
        sm_mhz=_middle(visits, "sm_mhz"),
        temp_c=_middle(visits, "temp_c"),
        power_w=_middle(visits, "power_w"),
    )


def memory_row(keys: dict[str, Any], impl: Implementation, case: Case, measured: dict[str, Any]) -> MemoryRow:
    known = set(columns(MemoryRow)) - set(keys)
    fields = {name: value for name, value in measured.items() if name in known and value is not None}
    return MemoryRow(**keys, **{**fields, "predicted_mib": cost.predicted_mib(impl.family, case)})


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _middle(visits: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [v[name] for v in visits if v.get(name) is not None]
    return stats.summarise(values).median if values else None


def _total(visits: Sequence[dict[str, Any]], name: str) -> int | None:
    values = [v[name] for v in visits if v.get(name) is not None]
    return sum(values) if values else None
