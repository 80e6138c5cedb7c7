"""`glabench throughput`: from what was typed to a request, a plan, rows and a table."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glabench import env, registry, tables
from glabench.cases import choose, parse_size, split_names
from glabench.errors import UnavailableError, UsageError
from glabench.installed import is_installed
from glabench.pool import Worker
from glabench.rows import BAD, ThroughputRow, columns
from glabench.runners.request import Watch, check_seconds
from glabench.runners.throughput_run import CONDITIONS, PEER, Cell, Point, Request, Run, known_failure

MODELS = "glabench.runners.step_models"
FAMILIES = ("gla", "retnet", "mamba", "transformer")
# the paper's Figure 6 on a GPU; seconds, not minutes, on a CPU
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"models": (*FAMILIES, "gla-fla"), "size": "1.3b", "points": "2kx8,4kx4,8kx2,16kx1",
             "conditions": "paper,modern", "steps": 24, "warmup": 8},
    "cpu": {"models": FAMILIES, "size": "tiny", "points": "256x4,512x2,1kx1",
            "conditions": "paper", "steps": 8, "warmup": 2},
}  # fmt: skip
BYTES_A_PARAMETER = 16  # weights, gradients and AdamW's two moments, fp32
GUESS = {"cpu": (2e10, 15.0), "cuda": (2.5e14, 40.0)}  # FLOP/s, and seconds to build and compile: the plan's


def request(
    models: Sequence[str],
    *,
    size: str,
    points: str,
    conditions: str,
    impl: str,
    device: str,
    steps: int | None,
    warmup: int | None,
    cell_limit: float | None,
    cold_limit: float | None,
    out: Path | None,
    resume: bool,
    seed: int,
    argv: Sequence[str],
) -> Request:
    """A request from the options. Raises UsageError, UnavailableError."""
    for package in ("transformers", "safetensors"):
        if not is_installed(package):
            fix = "pip install 'glabench[train]'"
            raise UnavailableError(f"{package} is not installed", where="throughput", fix=fix)
    for name, value in (("--cell-limit", cell_limit), ("--cold-limit", cold_limit)):
        check_seconds(value, name)
    device = env.pick_device(device)
    base = DEFAULTS[device.split(":")[0]]
    known = tuple(CONDITIONS)
    asked = split_names(conditions or base["conditions"], "condition", "--conditions")
    names = [choose(name, known, "condition", "--conditions") for name in asked]
    spots = parse_points(points or base["points"])
    words = [part for word in models for part in split_names(word, "model", "MODEL")] or list(base["models"])
    arms = _plan(words, split_names(size or base["size"], "size", "--size"))
    layers = _layers(impl, arms, device)
    cells = (
        Cell(arm, name, "auto" if arm["model"] == PEER else layers.get(arm["family"], "auto"), spot)
        for name in names
        for arm in arms
        for spot in spots
    )
    return Request(
        cells=tuple(cells),
        device=device,
        steps=steps or base["steps"],
        warmup=warmup or base["warmup"],
        limits={"sample": cell_limit or 180.0, "other": cold_limit or 300.0},
        out=out,
        resume=resume,
        seed=seed,
        argv=tuple(argv),
    )


def parse_points(text: str) -> tuple[Point, ...]:
    """`2kx8,4kx4` -> lengths and batches. Raises UsageError."""
    found = []
    for part in split_names(text, "point", "--points"):
        seqlen, cross, batch = part.lower().partition("x")
        if not cross:
            raise UsageError(
                f"{part!r} is no point", where="--points", fix="write LENGTHxBATCH, such as 2kx8"
            )
        spot = Point(parse_size(seqlen, "--points"), parse_size(batch, "--points"))
        if spot in found:
            raise UsageError(f"{part!r} stands twice", where="--points", fix="name each once")
        found.append(spot)
        if found[-1].seqlen < 2:
            raise UsageError(
                f"{part!r} predicts no token", where="--points", fix="write a length of 2 or more"
            )
    return tuple(found)


def _plan(words: Sequence[str], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """The models, from a process that may import torch. Raises UsageError, UnavailableError."""
    with Worker("plan") as worker:
        asked = {"words": list(words), "sizes": list(sizes)}
        outcome = worker.call(f"{MODELS}:plan", asked, limits={"other": 120.0})
    if outcome.status != "ok":
        raise UnavailableError(f"no model: {outcome.reason}", where="throughput", fix="see glabench doctor")
    if error := outcome.value.get("error"):
        raise UsageError(error["what"], where=error["where"], fix=error["fix"])
    return outcome.value["arms"]


def _layers(text: str, arms: list[dict[str, Any]], device: str) -> dict[str, str]:
    """Family -> the implementation that --impl names for it. Raises UsageError, UnavailableError."""
    if not text:
        return {}
    pairs = registry.resolve(split_names(text, "implementation", "--impl"), device)
    found: dict[str, str] = {}
    for _, impl in pairs:
        if impl.family not in {arm["family"] for arm in arms if arm["model"] != PEER}:
            fix = f"the models' layers are {', '.join(sorted({a['family'] for a in arms}))}"
            raise UsageError(f"no model has a layer of {impl.family}", where="--impl", fix=fix)
        if impl.family in found:
            raise UsageError(f"two implementations of {impl.family}", where="--impl", fix="name one a family")
        found[impl.family] = impl.id
    return found


def run(asked: Request, watch: Watch) -> dict[str, Any]:
    """Measure; {"folder", "rows", "counts", "bad"} of the rows of this run."""
    made = Run(asked, watch)
    rows = made.run()
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    return {
        "folder": str(made.out),
        "rows": [{name: getattr(row, name) for name in columns(ThroughputRow)} for row in rows],
        "counts": counts,
        "bad": any(row.status in BAD for row in rows),
    }


# --- what is shown ----------------------------------------------------------------------------------------


def plan(asked: Request) -> dict[str, Any]:
    """The cells, the memory that their weights, gradients and moments need, and a rough time."""
    rate, start_s = GUESS[asked.kind]
    cells, spots = [], len({cell.point for cell in asked.cells})
    for cell in asked.cells:
        failure = known_failure(cell, asked.device)
        tokens = cell.point.seqlen * cell.point.batch
        spent = (asked.steps + asked.warmup) * tokens * 6 * cell.arm["products"] / rate
        cells.append(
            {
                "arm": cell.arm["arm"],
                "condition": cell.condition,
                **asdict(cell.point),
                "layer": cell.layer,
                "params": cell.arm["params"],
                "memory_mib": round(cell.arm["params"] * BYTES_A_PARAMETER / 2**20, 1),
                "time_s": 0.0 if failure else round(spent + start_s / spots, 1),
                "status": failure[0] if failure else "planned",
                "reason": failure[1] if failure else "",
            }
        )
    return {"device": asked.device, "cells": cells, "time_s": round(sum(c["time_s"] for c in cells), 1)}


def show_plan(found: dict[str, Any]) -> None:
    headings = ("model", "condition", "length", "batch", "layer", "parameters", "MiB", "s", "")
    tables.show(
        headings,
        (
            (c["arm"], c["condition"], c["seqlen"], c["batch"], c["layer"], f"{c['params']:,}",
             tables.number(c["memory_mib"]), tables.number(c["time_s"]),
             f"{c['status']}: {c['reason']}" if c["reason"] else "")
            for c in found["cells"]
        ),
        right=headings[2:4] + headings[5:8],
    )  # fmt: skip
    words = "at least these MiB for weights, gradients and moments, activations apart"
    tables.say(f"{len(found['cells'])} cells on {found['device']}; about {found['time_s']:,.0f} s; {words}")


def show(done: dict[str, Any]) -> None:
    """Rates with their interval, the step's parts, memory, the share of the peak; or the reason."""
    headings = ("tokens/s", "95% interval", "step ms", "fwd", "loss", "bwd", "optim.", "MiB", "MFU %")

    def cells(r: dict[str, Any]) -> tuple[str, ...]:
        if r["status"] != "ok":
            return ("",) * len(headings)
        low, high = (tables.number(r[n]) for n in ("tok_lo_s", "tok_hi_s"))
        shares = [r[n] for n in ("mfu_frac", "mfu_measured_frac") if r[n] is not None]
        return (
            tables.number(r["tok_s"]),
            f"{low}..{high}" if low else "",
            *(tables.number(r[f"{n}_ms"]) for n in ("step", "forward", "loss", "backward", "optimizer")),
            tables.number(r["peak_mem_mib"]),
            tables.number(100 * shares[0], 3) if shares else "",
        )

    tables.show(
        ("model", "condition", "point", "layer", *headings, "status"),
        (
            (
                r["impl"],
                r["condition"],
                f"{r['seqlen']}x{r['batch']}",
                r["layer"],
                *cells(r),
                r["status"] if r["status"] == "ok" else f"{r['status']}: {r['reason']}",
            )
            for r in done["rows"]
        ),
        right=headings,
    )
    for name, formula in dict.fromkeys((r["impl"], r["flop_model"]) for r in done["rows"]):
        tables.say(f"FLOP a token, {name}: {formula}")
    shares = {r["mfu_frac"] is not None for r in done["rows"] if r["status"] == "ok"}
    if shares:
        base = (
            "the data sheet's dense bf16 rate"
            if True in shares
            else "the products' rate measured in this run"
        )
        tables.say(f"MFU: FLOPs of the model, nothing recomputed, over {base}")
    counts = ", ".join(f"{n} {status}" for status, n in done["counts"].items()) or "nothing left to measure"
    tables.say(f"{counts}; rows in {done['folder']}")
