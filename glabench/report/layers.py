"""A section a suite and device of layers: what made it, figures, the fastest, failures, every row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glabench.figures import style as fs
from glabench.figures.rows import Results, Sheet, device_name, provenance, sheets
from glabench.report.page import anchor, commands, environments, figure, runs_used, table, text


def section(part: Results, place: Path, pictures: Sequence[Path]) -> str:
    """One suite on one device: what made it, figures, best, failures, then every row."""
    rows = part.rows()
    where = device_name(part.run_of(rows[-1].env), rows[-1].device)
    blocks = [
        f'<section id="{anchor(place)}">\n<h2>{text(rows[0].suite)} on {text(where)}</h2>',
        "".join(f'<p class="soft">{text(line)}</p>' for line in provenance(part, rows)),
        commands(runs_used(part)),
        *(figure(path) for path in pictures),
        *(_best(sheet) for sheet in sheets(part.speed)),
        _failed(rows),
        environments(part),
        _every_row(part),
        "</section>",
    ]
    return "\n".join(block for block in blocks if block)


def interval(row: Any) -> str:
    if row.time_lo_ms is None or row.time_hi_ms is None:
        return ""
    return f"{fs.time_text(row.time_lo_ms)} to {fs.time_text(row.time_hi_ms)}"


def _best(sheet: Sheet) -> str:
    """The fastest implementation of each grid point, and by how much."""
    rows = []
    for passes in sheet.passes:
        for seqlen in sheet.seqlens:
            timed = [r for r in sheet.rows if (r.passes, r.seqlen, r.status) == (passes, seqlen, "ok")]
            point = [passes, fs.tokens_text(seqlen)]
            if not timed:
                rows.append([*point, "", "no implementation has a time", "", "", "", ""])
                continue
            first, *others = sorted(timed, key=lambda r: (r.time_ms, r.impl))
            floor = "" if first.floor_ratio is None else fs.ratio_text(first.floor_ratio)
            point += [str(first.batch), first.impl, fs.time_text(first.time_ms), interval(first), floor]
            rows.append([*point, _next(first, others[0]) if others else ""])
    headings = ("passes", ">seqlen", ">batch", "fastest", ">time", ">95% interval", ">over the floor", "next")
    return f"<h3>Fastest: {text(sheet.title)}, {text(sheet.batches)}</h3>\n" + table(headings, rows)


def _next(first: Any, second: Any) -> str:
    """The runner-up; where the intervals overlap, the order is not decided."""
    said = f"{second.impl}, {fs.ratio_text(second.time_ms / first.time_ms)} the time"
    if (
        first.time_hi_ms is not None
        and second.time_lo_ms is not None
        and second.time_lo_ms <= first.time_hi_ms
    ):
        said += " (intervals overlap)"
    return said


def _failed(rows: Sequence[Any]) -> str:
    """Every cell without a measurement, with its reason; the cells of one arm that share it share a line."""
    groups: dict[tuple, dict[str, list[int]]] = {}
    for r in rows:
        if r.status != "ok":
            key = (r.verb, f"{r.shape} {r.dtype}", r.impl, r.status, r.reason)
            groups.setdefault(key, {}).setdefault(r.passes, []).append(r.seqlen)
    if not groups:
        return ""
    lines = []
    for (verb, shape, impl, status, reason), cells in groups.items():
        spans = (f"{p} {', '.join(fs.tokens_text(s) for s in sorted(set(v)))}" for p, v in cells.items())
        lines.append([verb, shape, impl, "; ".join(spans), status, reason])
    headings = ("verb", "shape", "implementation", "cells", "status", "reason")
    return "<h3>Cells without a measurement</h3>\n" + table(headings, lines)


def _every_row(part: Results) -> str:
    blocks = []
    for word, rows, show in (("Time", part.speed, _times), ("Memory", part.memory, _memory)):
        for sheet in sheets(rows):
            title = text(f"{word}, every row: {sheet.title}, {sheet.batches}")
            blocks.append(f"<details><summary>{title}</summary>{show(sheet)}</details>")
    return "\n".join(blocks)


def _ordered(sheet: Sheet) -> list[Any]:
    return [
        r for p in sheet.passes for impl in sorted({r.impl for r in sheet.rows}) for r in sheet.of(impl, p)
    ]


def _times(sheet: Sheet) -> str:
    def ms(value: float | None) -> str:
        return "" if value is None else fs.time_text(value)

    rows, marks = _ordered(sheet), []
    fastest: dict[tuple, float] = {}
    for r in rows:
        if r.time_ms is not None:
            point = (r.passes, r.seqlen)
            fastest[point] = min(fastest.get(point, r.time_ms), r.time_ms)
    for r in rows:
        marks.append("best" if r.time_ms is not None and r.time_ms == fastest[r.passes, r.seqlen] else "")
    flags = {
        "launch_bound": "launch-bound",
        "syncs_inside": "syncs",
        "async_outside": "async outside",
        "shared_device": "shared device",
    }
    lines = []
    for r in rows:
        notes = [word for name, word in flags.items() if getattr(r, name) == "yes"]
        notes += ["not converged"] * (r.converged == "no")
        over = (
            ""
            if r.floor_ratio is None
            else f"{fs.ratio_text(r.floor_ratio)} ({r.floor_kind or 'kind unknown'})"
        )
        point = [r.passes, r.impl, fs.tokens_text(r.seqlen), str(r.batch), r.status]
        lines.append(
            [*point, ms(r.time_ms), interval(r), ms(r.host_ms), ms(r.wall_ms), over, ", ".join(notes)]
        )
    headings = ("passes", "implementation", ">seqlen", ">batch", "status", ">time", ">95% interval")
    return table((*headings, ">host", ">wall", ">over the floor", "notes"), lines, marks=marks)


def _memory(sheet: Sheet) -> str:
    names = ("extra_mem_mib", "outputs_mib", "saved_mib", "workspace_mib", "inputs_mib", "predicted_mib")
    lines = []
    for r in _ordered(sheet):
        sizes = [getattr(r, name) for name in names]
        point = [r.passes, r.impl, fs.tokens_text(r.seqlen), str(r.batch), r.status]
        lines.append([*point, *("" if size is None else fs.memory_text(size) for size in sizes)])
    headings = (
        "passes",
        "implementation",
        ">seqlen",
        ">batch",
        "status",
        ">beyond inputs",
        ">outputs, gradients",
    )
    return table((*headings, ">saved", ">workspace", ">inputs", ">least"), lines)
