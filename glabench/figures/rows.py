"""From a results folder to the rows of each figure: the latest row of every cell, grouped by what varies."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glabench.errors import ResultsError
from glabench.figures.style import FAMILIES, memory_text, number_text, short, tokens_text
from glabench.results import read_rows, rows_path
from glabench.rows import CaseRow, MemoryRow, SpeedRow, typed

PASSES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward and backward"}
DECODE = "decode"  # one token of each sequence: never in one figure with whole sequences
BASELINES = ("attention_fa2", "attention_sdpa")


@dataclass(frozen=True, slots=True)
class Results:
    """The rows of a results folder, the latest of each cell, and its runs (run.json, oldest first)."""

    folder: Path
    speed: tuple[SpeedRow, ...]
    memory: tuple[MemoryRow, ...]
    runs: tuple[dict[str, Any], ...] = ()
    earlier: tuple[CaseRow, ...] = ()  # rows of cells that were measured again later: not drawn

    def rows(self) -> tuple[CaseRow, ...]:
        return self.speed + self.memory

    def run_of(self, env: str) -> dict[str, Any]:
        """The latest run of an environment id, or an empty dict."""
        return next((r for r in reversed(self.runs) if r.get("id") == env), {})

    def parts(self) -> list["Results"]:
        """One a suite and device: they never share a figure."""
        keys = sorted({(r.suite, r.device) for r in self.rows()})
        return [
            replace(
                self,
                speed=tuple(r for r in self.speed if (r.suite, r.device) == key),
                memory=tuple(r for r in self.memory if (r.suite, r.device) == key),
                earlier=tuple(r for r in self.earlier if (r.suite, r.device) == key),
            )
            for key in keys
        ]

    def place(self) -> Path:
        """<suite>/<device> of a part, safe as a path whatever the rows say."""
        first = self.rows()[0]
        return Path(slug(first.suite)) / slug(first.device)


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._") or "unnamed"


def load(folder: Path) -> Results:
    """Read rows.csv, memory.csv and run.json. Raises ResultsError for no rows or a file not ours."""
    speed, memory = (
        [typed(kind, r) for r in read_rows(path, kind)] if path.is_file() else []
        for kind, path in ((SpeedRow, rows_path(folder, "speed")), (MemoryRow, rows_path(folder, "memory")))
    )
    if not speed and not memory:
        raise ResultsError(
            "no rows", where=str(folder), fix="name a folder that holds rows.csv or memory.csv"
        )
    last_speed, last_memory = latest(speed), latest(memory)
    drawn = {id(r) for r in (*last_speed, *last_memory)}
    earlier = tuple(r for r in (*speed, *memory) if id(r) not in drawn)
    return Results(folder, tuple(last_speed), tuple(last_memory), runs_of(folder / "run.json"), earlier)


def latest(rows: Iterable[Any]) -> list[Any]:
    """The last row of each cell."""
    return list({(r.suite, r.device, r.case, r.impl): r for r in rows}.values())


def runs_of(path: Path) -> tuple[dict[str, Any], ...]:
    """Entries of run.json; none where there is no such file."""
    if not path.is_file():
        return ()
    try:
        runs = json.loads(path.read_text(encoding="utf-8")).get("runs", [])
        return tuple(run for run in runs if isinstance(run, dict))
    except (OSError, ValueError, AttributeError, TypeError) as err:
        raise ResultsError(
            f"run.json is not readable: {err}", where=str(path), fix="mend it, or take it away"
        ) from err


@dataclass(frozen=True, slots=True)
class Sheet:
    """The rows of one figure: one shape and dtype, the batch following the length in one way."""

    rows: tuple[Any, ...]
    batches: str  # "batch 32", "32,768 tokens a call"
    is_batch_fixed: bool
    name: str  # end of the figure's file name

    @property
    def seqlens(self) -> list[int]:
        return sorted({r.seqlen for r in self.rows})

    @property
    def passes(self) -> list[str]:
        found = {r.passes for r in self.rows}
        return [p for p in PASSES if p in found] + sorted(found - set(PASSES))

    @property
    def is_decode(self) -> bool:
        return self.passes == [DECODE]

    @property
    def arms(self) -> list[tuple[str, str]]:
        """(impl, family) of everything that could run here, in a fixed order."""
        order = list(FAMILIES)
        arms = {(r.impl, r.family) for r in self.rows if r.status != "unavailable"}
        return sorted(arms, key=lambda a: (order.index(a[1]) if a[1] in order else len(order), a[0]))

    @property
    def unavailable(self) -> list[str]:
        here = {impl for impl, _ in self.arms}
        return sorted({r.impl for r in self.rows} - here)

    @property
    def title(self) -> str:
        r = self.rows[0]
        text = f"{r.shape} ({r.heads} heads, d_k {r.d_k}, d_v {r.d_v}), {r.dtype}"
        return text + (", not causal" if r.causal == "no" else "") + (", packed" if r.packed == "yes" else "")

    def of(self, impl: str, passes: str) -> list[Any]:
        """One arm's rows of one panel, by length."""
        mine = [r for r in self.rows if r.impl == impl and r.passes == passes]
        return sorted(mine, key=lambda r: r.seqlen)

    def baseline(self) -> str | None:
        """FlashAttention-2 where it has a time, else SDPA; None where neither was asked for."""
        timed = {r.impl for r in self.rows if r.status == "ok"}
        asked = {impl for impl, _ in self.arms}
        return next((b for names in (timed, asked) for b in BASELINES if b in names), None)


def sheets(rows: Sequence[Any]) -> list[Sheet]:
    """Rows of one suite and device, split into figures."""
    groups: dict[tuple, list[Any]] = {}
    for r in rows:
        sizes = (r.heads, r.d_k, r.d_v, r.head_dim)
        kind = (r.causal, r.packed, r.passes == DECODE)
        groups.setdefault((r.shape, r.dtype, *sizes, *kind), []).append(r)
    found: list[Sheet] = []
    for group in groups.values():
        points = {(r.batch, r.seqlen) for r in group}
        grids = split_batches(points) if group[0].passes == DECODE else split_grids(points)
        for grid in grids:
            mine = tuple(r for r in group if (r.batch, r.seqlen) in grid)
            batches, is_fixed = batch_text(grid)
            first = mine[0]
            words = [first.shape, first.dtype]
            words += ["full"] * (first.causal == "no") + ["packed"] * (first.packed == "yes")
            words += [batches.split(" a call")[0]] * (len(grids) > 1)
            found.append(Sheet(mine, batches, is_fixed, slug("_".join(words))))
    return _named_apart(found)


def _named_apart(found: list[Sheet]) -> list[Sheet]:
    """Two shapes of one name get a number each."""
    names = [s.name for s in found]
    return [
        replace(s, name=f"{s.name}_{names[:i].count(s.name) + 1}") if s.name in names[:i] else s
        for i, s in enumerate(found)
    ]


def split_grids(points: set[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """(batch, seqlen) points -> sets with one batch a length: the fewest that fix batch or tokens."""
    if len({s for _, s in points}) == len(points):
        return [points]
    left, grids = set(points), []
    while left:
        fixed_batch = [{p for p in points if p[0] == b} for b in sorted({b for b, _ in left})]
        totals = sorted({b * s for b, s in left}, reverse=True)
        # a length that does not divide the tokens gets the batch below
        fixed_tokens = [{p for p in points if p[0] == max(1, t // p[1])} for t in totals]
        best = max(fixed_tokens + fixed_batch, key=lambda grid: len(grid & left))
        grids.append(best)
        left -= best
    return grids


def split_batches(points: set[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """One set a batch: a step of 64 sequences is no point of a step of one."""
    return [{p for p in points if p[0] == batch} for batch in sorted({b for b, _ in points})]


def batch_text(points: set[tuple[int, int]]) -> tuple[str, bool]:
    """How the batch follows the length, in words, and whether it stays the same."""
    batches, tokens = {b for b, _ in points}, {b * s for b, s in points}
    if len(batches) == 1:
        return f"batch {min(batches)}", True
    if len(tokens) == 1:
        return f"{min(tokens):,} tokens a call", False
    if max(tokens) <= 1.5 * min(tokens):
        return f"about {max(tokens):,} tokens a call", False
    spans = ", ".join(f"{b} at {tokens_text(s)}" for b, s in sorted(points, key=lambda p: p[1]))
    return f"batch {spans}", False


def provenance(results: Results, rows: Sequence[Any]) -> list[str]:
    """What made these rows: one line an environment, then what was measured of the device."""
    lines = []
    for env in sorted({r.env for r in rows}):
        run = results.run_of(env)
        part = _dict(run.get("comparable"))
        days = sorted({r.started_utc[:10] for r in rows if r.env == env and r.started_utc})
        days = days or [str(run.get("started_utc") or "")[:10]]
        words = [device_name(run, rows[0].device)]
        words += [f"{part['threads']} threads"] if part.get("threads") and not part.get("gpu") else []
        words += [f"{key} {part[key]}" for key in ("torch", "driver", "triton") if part.get(key)]
        words += [f"CUDA {part['cuda']}"] if part.get("cuda") else []
        words += [_program(run)] if run.get("glabench") else []
        words += [" to ".join(dict.fromkeys((days[0], days[-1])))] if days[0] else []
        lines.append(", ".join([*words, f"environment\u00a0{env}"]))
    measured = _dict(results.run_of(rows[-1].env).get("measured"))
    ceilings = (
        [f"copy {number_text(measured['copy_gb_s'])} GB/s"] if _is_number(measured.get("copy_gb_s")) else []
    )
    rates = _dict(measured.get("matmul_tflop_s"))
    ceilings += [f"{k} products {number_text(v)} TFLOP/s" for k, v in sorted(rates.items()) if _is_number(v)]
    return lines + ([f"Ceilings measured in the run: {', '.join(ceilings)}."] if ceilings else [])


def _program(run: dict[str, Any]) -> str:
    changed = " with changes" if run.get("dirty") else ""
    return f"glabench {run['glabench']}" + (f" at {run['commit']}{changed}" if run.get("commit") else "")


def device_name(run: dict[str, Any], device: str) -> str:
    """The GPU's or CPU's name as run.json has it, else the slug of the rows."""
    part = _dict(run.get("comparable"))
    name = part.get("cpu") if device.startswith("cpu") else part.get("gpu")
    return str(name or device)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_flop_model(text: str) -> str:
    """ "4 dk dv per token forward, 2x that backward (...)" -> "4 dk dv per token; bwd 2x"."""
    forward = re.split(r", | \(", text, maxsplit=1)[0].removesuffix(" forward")
    backward = re.search(r"([\d.]+x) that backward", text)
    return forward + (f"; bwd {backward[1]}" if backward else "")


def arm_texts(sheet: Sheet) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table under a figure: what makes its comparison fair, or not."""
    longest = sheet.seqlens[-1]
    heading = [
        "implementation",
        "width split",
        f"state at {tokens_text(longest)}",
        "layout copy",
        "FLOP model",
    ]
    table = []
    for impl, _ in sheet.arms:
        mine = [r for r in sheet.rows if r.impl == impl]
        state = next((r.state_mib for r in mine if r.seqlen == longest and r.state_mib is not None), None)
        table.append(
            [
                impl,
                next((r.arm for r in mine if r.arm), ""),
                "" if state is None else short(memory_text(state)),
                mine[0].layout_copy,
                short_flop_model(next((r.flop_model for r in mine if r.flop_model), "")),
            ]
        )
    return heading, table


def how_timed(rows: Sequence[Any]) -> list[str]:
    """Timer, L2 and interval of speed rows, and what a reader must not miss about them."""
    timed = [r for r in rows if r.status == "ok"]
    if not timed:
        return []
    words = ["Median of one call, band: its 95% interval within one process"]
    words += [f"timer {_by_impl(timed, 'timer')}", f"L2 {_by_impl(timed, 'l2')}"]
    text = "; ".join(w for w in words if not w.endswith(" "))
    if any(r.launch_bound == "yes" for r in timed):
        text += "; hollow: launch-bound (host time ≥ 0.8 of it)"
    lines = [f"{text}."]
    unsettled = [r for r in timed if r.converged == "no"]
    if unsettled:
        lines.append(f"The interval stayed wider than asked in {_cells(unsettled)}.")
    flags = {
        "throttle": "The device throttled in",
        "shared_device": "Other processes used the device in",
        "async_outside": "Work ran outside the timed stream in",
        "syncs_inside": "The call waits for the device, so launches are not hidden, in",
    }
    for name, said in flags.items():
        marked = [r for r in timed if getattr(r, name) not in ("", "no")]
        lines += [f"{said} {_cells(marked)}."] if marked else []
    return lines


def _cells(rows: Sequence[Any]) -> str:
    """ "3 cells (gla_chunk 1k, 2k; mamba_ssm 4k)", or how many implementations where that is long."""
    lengths: dict[str, list[int]] = {}
    for r in rows:
        lengths.setdefault(r.impl, []).append(r.seqlen)
    named = [f"{i} {', '.join(tokens_text(s) for s in sorted(set(v)))}" for i, v in sorted(lengths.items())]
    count = "1 cell" if len(rows) == 1 else f"{len(rows)} cells"
    return f"{count} ({'; '.join(named)})" if len(named) <= 3 else f"{count} of {len(named)} implementations"


def _by_impl(rows: Sequence[Any], name: str) -> str:
    """The one value of a column, or each value with the implementations that have it."""
    impls: dict[str, set[str]] = {}
    for r in rows:
        impls.setdefault(getattr(r, name), set()).add(r.impl)
    if len(impls) == 1:
        return next(iter(impls))
    most = max(impls, key=lambda v: (len(impls[v]), v))
    rest = [f"{v or 'none'} for {', '.join(sorted(i))}" for v, i in sorted(impls.items()) if v != most]
    return f"{most} ({'; '.join(rest)})"


def what_is_missing(results: Results, sheet: Sheet) -> list[str]:
    """Arms that could not run here, and rows that a later one replaced."""
    lines = [f"Not available here: {', '.join(sheet.unavailable)}."] if sheet.unavailable else []
    keys = {(r.case, r.impl, r.verb) for r in sheet.rows}
    replaced = sum((r.case, r.impl, r.verb) in keys for r in results.earlier)
    return lines + ([f"Earlier rows of the same cells, not drawn: {replaced}."] if replaced else [])
