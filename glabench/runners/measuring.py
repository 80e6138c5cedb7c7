"""`glabench speed`, `memory` and `run`: from what was typed to a request, a plan, rows and a table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glabench import cost, env, registry, tables
from glabench.cases import (
    DECODE,
    DTYPES,
    PASSES,
    SHAPES,
    Case,
    Regime,
    choose,
    device_defaults,
    make_cases,
    parse_range,
    parse_size,
    split_names,
)
from glabench.errors import UnavailableError, UsageError
from glabench.registry import Implementation
from glabench.results import read_rows, rows_path
from glabench.rows import BAD, ROWS, columns
from glabench.runners.request import Request, Watch, check_seconds, known_failure
from glabench.runners.sweep import Sweep
from glabench.suite import Suite, load_suite

# for estimates alone, before anything is measured: bandwidth, matrix rate, times slower than the floor
GUESS = {
    "cpu": (cost.Ceilings(10.0, dict.fromkeys(DTYPES, 0.1)), 8.0, 0.3),
    "cuda": (cost.Ceilings(3000.0, dict.fromkeys(DTYPES, 500.0)), 5.0, 2.0),
}
DECODE_BATCHES = {"cpu": "1", "cuda": "1,64"}
STEP_BUSY_S = 0.1  # steps are short: their samples, not the clock, decide how well a median is known


def from_grid(
    verb: str,
    grid: dict[str, Any],
    *,
    argv: Sequence[str],
    impl: str,
    family: str | None,
    device: str,
    limits: dict[str, float | None],
    out: Path | None,
    resume: bool,
    seed: int,
) -> Request:
    """A request from the options of `speed` or `memory`. Raises UsageError, UnavailableError."""
    device = env.pick_device(device)
    base = device_defaults(device.split(":")[0])
    if grid["tokens"] and grid["batch"]:
        raise UsageError("both --tokens and --batch are given", where="--tokens", fix="keep one")
    tokens, batch = base["tokens"], base["batch"]
    if grid["tokens"] or grid["batch"]:
        tokens = parse_size(grid["tokens"], "--tokens") if grid["tokens"] else None
        batch = grid["batch"]
    passes = tuple(
        choose(p, PASSES, "pass", "--passes") for p in split_names(grid["passes"], "pass", "--passes")
    )
    suite = Suite(
        name=verb,
        verbs=(verb,),
        cases=_cases(grid, base, passes=passes, tokens=tokens, batch=batch, where="--seqlen"),
        regime=_limited(base["regime"], limits),
        seed=seed,
    )
    arms = registry.resolve(split_names(impl, "implementation", "--impl"), device, family)
    return _request(suite, arms, device=device, out=out, resume=resume, argv=argv)


def for_decode(
    grid: dict[str, Any],
    *,
    argv: Sequence[str],
    impl: str,
    family: str | None,
    device: str,
    limits: dict[str, float | None],
    out: Path | None,
    resume: bool,
    seed: int,
) -> Request:
    """A request from the options of `decode`: speed rows of one token, `seqlen` the context with it.

    Raises UsageError, UnavailableError.
    """
    device = env.pick_device(device)
    kind = device.split(":")[0]
    base, cases = device_defaults(kind), []
    for batch in parse_range(grid["batch"] or DECODE_BATCHES[kind], "--batch"):
        how = {"passes": (DECODE,), "tokens": None, "batch": batch, "where": "--context"}
        cases += _cases(grid, base, **how)
    regime = replace(_limited(base["regime"], limits), min_busy_s=STEP_BUSY_S)
    suite = Suite(name=DECODE, cases=tuple(cases), regime=regime, seed=seed)
    names = split_names(impl, "implementation", "--impl")
    arms = registry.resolve(names, device, family, passes=DECODE)
    return _request(suite, arms, device=device, out=out, resume=resume, argv=argv)


def _cases(grid: dict[str, Any], base: dict[str, Any], *, where: str, **how: Any) -> tuple[Case, ...]:
    """The cases of a command line's lengths, shapes and dtypes."""
    shapes = split_names(grid["shape"] or base["shape"], "shape", "--shape")
    dtypes = split_names(grid["dtype"] or base["dtype"], "dtype", "--dtype")
    return make_cases(
        shapes=tuple(SHAPES[choose(s, tuple(SHAPES), "shape", "--shape")] for s in shapes),
        seqlens=parse_range(grid["seqlen"], where),
        dtypes=tuple(choose(d, DTYPES, "dtype", "--dtype") for d in dtypes),
        where=where,
        **how,
    )


def _request(suite: Suite, arms: list[tuple[str, Implementation]], **how: Any) -> Request:
    argv = tuple(how.pop("argv"))
    impls, asked = tuple(i for _, i in arms), tuple(name for name, _ in arms)
    return Request(suite=suite, verbs=suite.verbs, impls=impls, asked=asked, argv=argv, **how)


def from_suite(
    name: str,
    *,
    argv: Sequence[str],
    impl: str,
    family: str | None,
    shape: str,
    device: str,
    limits: dict[str, float | None],
    out: Path | None,
    resume: bool,
) -> Request:
    """A request from a suite file. An id that cannot run here becomes `unavailable` rows."""
    device = env.pick_device(device)
    suite = load_suite(name, device.split(":")[0])
    suite = replace(suite, regime=_limited(suite.regime, limits))
    if shape:
        suite = replace(suite, cases=_of_shapes(suite, shape))
    if impl:
        arms = registry.resolve(split_names(impl, "implementation", "--impl"), device, family)
    else:
        arms = registry.resolve(suite.impls, device, where=f"{suite.name}.toml: impl", lenient=True)
        if all(i.unavailable(device) for _, i in arms):
            reasons = "; ".join(f"{i.id}: {i.unavailable(device)}" for _, i in arms)
            raise UnavailableError(
                f"nothing in the suite {suite.name} runs on {device}", where=name, fix=reasons
            )
    return _request(suite, arms, device=device, out=out, resume=resume, argv=argv)


def _of_shapes(suite: Suite, wanted: str) -> tuple[Case, ...]:
    has = tuple(dict.fromkeys(case.shape for case in suite.cases))
    names = [choose(n, has, "shape in the suite", "--shape") for n in split_names(wanted, "shape", "--shape")]
    return tuple(case for case in suite.cases if case.shape in names)


def _limited(regime: Regime, limits: dict[str, float | None]) -> Regime:
    for name, value in limits.items():
        check_seconds(value, "--" + name.removesuffix("_s").replace("_", "-"))
    return replace(regime, **{name: value for name, value in limits.items() if value is not None})


def tell_resolved(request: Request, say: Callable[[str], None]) -> None:
    """Which implementation each family's name took: never silently."""
    for asked, impl in zip(request.asked, request.impls, strict=True):
        if asked != impl.id and asked in registry.FAMILIES:
            say(f"{asked} -> {impl.id} ({impl.label})")


# --- the plan ---------------------------------------------------------------------------------------------


def plan(request: Request) -> dict[str, Any]:
    """What a run would do: the cells, the memory each needs, and a rough time; measures nothing."""
    seen = _seconds_seen(request)
    cells = []
    for case in request.suite.cases:
        for impl in request.impls:
            failure = known_failure(impl, case, request.device)
            for verb in request.verbs:
                cell = {"verb": verb, "impl": impl.id, "family": impl.family, **asdict(case)}
                if failure:
                    cells.append(
                        {**cell, "status": failure[0], "reason": failure[1], "memory_mib": 0, "time_s": 0}
                    )
                    continue
                seconds = seen.get((verb, impl.id, case.key()))
                cells.append(
                    {
                        **cell,
                        "status": "planned",
                        "reason": "" if seconds is None else "time as measured before",
                        "memory_mib": round(
                            cost.inputs_mib(impl.family, case) + cost.predicted_mib(impl.family, case), 2
                        ),
                        "time_s": round(_guess_s(impl, case, request) if seconds is None else seconds, 1),
                    }
                )
    return {
        "device": request.device,
        "suite": request.suite.name,
        "cells": cells,
        "memory_mib": max((c["memory_mib"] for c in cells), default=0),
        "time_s": round(sum(c["time_s"] for c in cells), 1),
    }


def _seconds_seen(request: Request) -> dict[tuple[str, str, str], float]:
    """Seconds each cell took the last time, from rows already in the output folder."""
    seen = {}
    for verb in request.verbs:
        path = rows_path(request.folder(env.device_slug(env.gpu_name(request.device))), verb)
        for row in read_rows(path, ROWS[verb]) if path.exists() else ():
            if row["status"] == "ok" and row["wall_s"]:
                seen[verb, row["impl"], row["case"]] = float(row["wall_s"])
    return seen


def _guess_s(impl: Implementation, case: Case, request: Request) -> float:
    """Rough: the floor at guessed ceilings, times what unfused code usually needs, plus check and start."""
    ceilings, slower, start_s = GUESS[request.kind]
    regime = request.suite.regime
    call_s = cost.floor(impl.family, case, ceilings).time_ms / 1e3 * slower + 1e-4
    sampled = min(max(regime.min_busy_s, regime.min_samples * call_s), regime.max_busy_s)
    return start_s + 12 * call_s + 1.3 * sampled


def show_plan(found: dict[str, Any]) -> None:
    tables.show(
        ("verb", "implementation", "shape", "passes", "batch", "seqlen", "dtype", "MiB", "s", ""),
        (
            (
                c["verb"],
                c["impl"],
                c["shape"],
                c["passes"],
                c["batch"],
                c["seqlen"],
                c["dtype"],
                tables.number(c["memory_mib"]),
                tables.number(c["time_s"]),
                c["reason"] if c["status"] == "planned" else f"{c['status']}: {c['reason']}",
            )
            for c in found["cells"]
        ),
        right=("batch", "seqlen", "MiB", "s"),
    )
    tables.say(
        f"{len(found['cells'])} cells on {found['device']}; about {found['time_s']:,.0f} s; "
        f"at least {found['memory_mib']:,.0f} MiB for inputs, outputs and gradients"
    )


# --- the run ----------------------------------------------------------------------------------------------


def run(request: Request, watch: Watch) -> dict[str, Any]:
    """Measure; {"folder", "rows": [...], "counts", "bad"} of the rows of this run."""
    sweep = Sweep(request, watch)
    made = sweep.run()
    counts: dict[str, int] = {}
    for row in made:
        counts[row.status] = counts.get(row.status, 0) + 1
    return {
        "folder": str(sweep.out),
        "rows": [{name: getattr(row, name) for name in columns(type(row))} for row in made],
        "counts": counts,
        "bad": any(row.status in BAD for row in made),
    }


def show(done: dict[str, Any]) -> None:
    """A table a verb: time or memory with what qualifies it, or the reason."""
    for verb in dict.fromkeys(row["verb"] for row in done["rows"]):
        mine = [row for row in done["rows"] if row["verb"] == verb]
        headings, cells = (_speed_cells if verb == "speed" else _memory_cells)()
        length = "seqlen"
        if all(row["passes"] == DECODE for row in mine):
            length, headings, cells = "context", ("state MiB", *headings), (_state_cell, *cells)
        first = ("implementation", "shape", "passes", "batch", length, "dtype", *headings, "status")
        tables.show(
            first,
            (
                (
                    r["impl"],
                    r["shape"],
                    r["passes"],
                    r["batch"],
                    r["seqlen"],
                    r["dtype"],
                    *(cell(r) for cell in cells),
                    r["status"] if r["status"] == "ok" else f"{r['status']}: {r['reason']}",
                )
                for r in mine
            ),
            right=("batch", length, *headings),
        )
    counts = ", ".join(f"{n} {status}" for status, n in done["counts"].items()) or "nothing left to measure"
    tables.say(f"{counts}; rows in {done['folder']}")


def _state_cell(row: dict[str, Any]) -> str:
    return tables.number(row["state_mib"])


def _speed_cells() -> tuple[tuple[str, ...], tuple[Callable[[dict], str], ...]]:
    def interval(row: dict) -> str:
        if row["time_lo_ms"] is None:
            return ""
        return f"{tables.number(row['time_lo_ms'])}..{tables.number(row['time_hi_ms'])}"

    def flags(row: dict) -> str:
        named = {
            "launch_bound": "launch-bound",
            "syncs_inside": "syncs",
            "async_outside": "async",
            "shared_device": "shared device",
        }
        words = [word for name, word in named.items() if row[name] == "yes"]
        return ", ".join(words + (["not converged"] if row["converged"] == "no" else []))

    return (
        ("ms", "95% interval", "host ms", "x floor", "cold start ms", "note"),
        (
            lambda r: tables.number(r["time_ms"]),
            interval,
            lambda r: tables.number(r["host_ms"]),
            lambda r: tables.number(r["floor_ratio"], 3),
            lambda r: tables.number(r["cold_start_ms"]),
            flags,
        ),
    )


def _memory_cells() -> tuple[tuple[str, ...], tuple[Callable[[dict], str], ...]]:
    names = {
        "beyond inputs MiB": "extra_mem_mib",
        "outputs": "outputs_mib",
        "saved": "saved_mib",
        "workspace": "workspace_mib",
        "inputs": "inputs_mib",
        "at least": "predicted_mib",
    }
    return tuple(names), tuple((lambda r, n=name: tables.number(r[n])) for name in names.values())
