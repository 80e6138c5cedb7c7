"""A folder of results -> its figures and one self-contained HTML page: no scripts, nothing fetched."""

import base64
import html
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glabench import (
    figure_extrapolate,
    figure_losses,
    figure_recall,
    figure_throughput,
    figures,
    paper_tables,
    recall_rows,
    score_rows,
)
from glabench import figure_style as fs
from glabench.errors import ResultsError
from glabench.figure_rows import Results, Sheet, device_name, load, provenance, runs_of, sheets
from glabench.results import rows_path, write_whole

FILES = tuple(rows_path(Path(), verb).name for verb in ("speed", "memory"))
CSS = """
:root { color-scheme: light dark;
  --ink: #1c1c1c; --soft: #5c5c5c; --paper: #fff; --line: #d8d8d8; --best: #e8f3ec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #16181a; --line: #3a3d40; --best: #1e3a2a; }
}
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n { text-align: right; white-space: nowrap; } th.n { text-align: right; }
tr.best td { background: var(--best); }
td.reason { overflow-wrap: anywhere; min-width: 18rem; }
figure { margin: 1.5rem 0; } figure img { width: 100%; max-width: 52rem; height: auto; background: #fff; }
figcaption, .soft { color: var(--soft); font-size: 13px; }
code { font-size: 13px; overflow-wrap: anywhere; } summary { cursor: pointer; margin: .6rem 0; }
nav li { margin: .15rem 0; }
"""


def build(folder: Path, out: Path) -> Path:
    """Draw every results folder below `folder` into out/<suite>/<device> and write out/index.html.

    Returns the page. Raises ResultsError where nothing below `folder` holds rows, a file is not
    ours, or `out` cannot be written.
    """
    parts, empty = _parts(folder)
    runs = [run for place in figure_losses.find(folder) if (run := figure_losses.load(place, folder)).train]
    lengths = figure_extrapolate.find(folder)
    evaluated = [found for found in paper_tables.find(folder) if _has_rows(found / score_rows.FILE)]
    recalls = [
        (place, rows)
        for place in figure_recall.find(folder)
        if (rows := recall_rows.load(place / recall_rows.FILE))
    ]
    steps = [part for place in figure_throughput.find(folder) for part in figure_throughput.load(place)]
    if not (parts or runs or lengths or evaluated or recalls or steps):
        raise ResultsError(
            "no results below this folder", where=str(folder), fix="run glabench speed or memory first"
        )
    sections, taken = [], set[Path]()
    for part in parts:
        place = _free(part.place(), taken)
        pictures = figures.render_part(part, out / place)
        sections.append((place, _section(part, place, [p for p in pictures if p.suffix == ".svg"])))
    for part in steps:
        place = _free(part.place(), taken)
        sections.append((place, _throughput(part, place, figure_throughput.draw(part, out / place))))
    if runs:
        place = _free(Path("training"), taken)
        picture = _figure(figure_losses.draw(runs, out / place))
        sections.append((place, f'<section id="{_anchor(place)}">\n<h2>Training</h2>{picture}</section>'))
    for found in lengths:
        sections += _extrapolations(found, out, taken)
    for found in evaluated:
        rows = score_rows.load(found)
        place = _free(paper_tables.place(rows), taken)
        paper_tables.write_markdown(rows, out / place / "lm-eval.md")
        sections.append((place, _scores(found, rows, place)))
    for found, rows in recalls:
        place = _free(Path(rows[-1]["suite"]) / rows[-1]["device"] / "recall", taken)
        sections.append((place, _recall_section(found, rows, place, figure_recall.draw(rows, out / place))))
    page = out / "index.html"
    write_whole(page, _page(sections, empty))
    return page


def _extrapolations(found: Path, out: Path, taken: set[Path]) -> Iterable[tuple[Path, str]]:
    """A section a figure of `glabench extrapolate`: the figure, then every row."""
    rows = figure_extrapolate.load(found)
    for sheet in figure_extrapolate.sheets(found, rows):
        place = _free(Path("extrapolate") / sheet.name, taken)
        picture = _figure(figure_extrapolate.draw(sheet, out / place)[0])
        lines = figure_extrapolate.table_rows(sheet)
        body = f"<details><summary>Every row</summary>{table(figure_extrapolate.HEADINGS, lines)}</details>"
        heading = f"<h2>Length extrapolation: {text(sheet.title)}</h2>"
        yield place, f'<section id="{_anchor(place)}">\n{heading}{picture}{body}</section>'


def find(folder: Path) -> list[Path]:
    """Every directory at or below `folder` that holds rows, hidden ones left out."""
    found = {p.parent for name in FILES for p in folder.rglob(name) if p.is_file()}
    return sorted(d for d in found if not any(x.startswith(".") for x in d.relative_to(folder).parts))


def _parts(folder: Path) -> tuple[list[Results], list[str]]:
    """One Results a suite and device, and the folders whose files hold no row yet."""
    parts, empty = [], []
    for place in find(folder):
        if any(_has_rows(place / name) for name in FILES):
            parts += load(place).parts()
        else:
            empty.append(place.relative_to(folder).as_posix())
    return parts, empty


def _has_rows(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return bool(file.readline()) and bool(file.readline())


def _free(place: Path, taken: set[Path]) -> Path:
    """`place`, or with a number where another results folder has the same suite and device."""
    number, free = 1, place
    while free in taken:
        number += 1
        free = place.with_name(f"{place.name}_{number}")
    taken.add(free)
    return free


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, marks: Sequence[str] = ()) -> str:
    """An HTML table of plain strings, escaped here. A heading that starts with ">" aligns right."""
    kinds = ["n" if h.startswith(">") else "reason" if h == "reason" else "" for h in headings]
    classes = [f' class="{k}"' if k else "" for k in kinds]
    head = "".join(f"<th{c}>{text(h.lstrip('>'))}</th>" for h, c in zip(headings, classes, strict=True))
    body = []
    for number, row in enumerate(rows):
        mark = f' class="{marks[number]}"' if number < len(marks) and marks[number] else ""
        cells = "".join(f"<td{c}>{text(v)}</td>" for v, c in zip(row, classes, strict=True))
        body.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _page(sections: Sequence[tuple[Path, str]], empty: Sequence[str]) -> str:
    links = "".join(f'<li><a href="#{_anchor(p)}">{text(p.as_posix())}</a></li>\n' for p, _ in sections)
    none = f'<p class="soft">No rows yet in: {text(", ".join(empty))}</p>' if empty else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>glabench: results</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>glabench: results</h1>\n<nav><ul>\n{links}</ul></nav>\n{none}\n"
        + "\n".join(section for _, section in sections)
        + "\n</body>\n</html>\n"
    )


def _anchor(place: Path) -> str:
    return text("-".join(place.parts))


def _section(part: Results, place: Path, pictures: Sequence[Path]) -> str:
    """One suite on one device: what made it, figures, best, failures, then every row."""
    rows = part.rows()
    where = device_name(part.run_of(rows[-1].env), rows[-1].device)
    blocks = [
        f'<section id="{_anchor(place)}">\n<h2>{text(rows[0].suite)} on {text(where)}</h2>',
        "".join(f'<p class="soft">{text(line)}</p>' for line in provenance(part, rows)),
        _commands(run for run in part.runs if run.get("id") in {r.env for r in rows}),
        *(_figure(path) for path in pictures),
        *(_best(sheet) for sheet in sheets(part.speed)),
        _failed(rows),
        _environments(part),
        _every_row(part),
        "</section>",
    ]
    return "\n".join(block for block in blocks if block)


def _scores(found: Path, rows: Sequence[Any], place: Path) -> str:
    """The paper's tables with ours beside them, and every score."""
    part = Results(found, tuple(rows), (), runs_of(found / "run.json"))  # who made them is told as of times
    where = device_name(part.run_of(rows[-1].env), rows[-1].device)
    blocks = [f'<section id="{_anchor(place)}">\n<h2>lm-evaluation-harness on {text(where)}</h2>']
    blocks += [f'<p class="soft">{text(line)}</p>' for line in provenance(part, rows)]
    blocks.append(_commands(part))
    for sheet in paper_tables.sheets(rows):
        headings = (sheet.headings[0], *(f">{h}" for h in sheet.headings[1:]))
        blocks.append(f"<h3>{text(sheet.title)}</h3>\n" + table(headings, sheet.lines))
    blocks += [f'<p class="soft">{text(note)}</p>' for note in paper_tables.notes(rows)]
    whole = paper_tables.scores(rows)
    body = table(whole.headings, whole.lines)
    blocks.append(f"<details><summary>{text(whole.title)}</summary>{body}</details>\n</section>")
    return "\n".join(blocks)


def _recall_section(
    found: Path, rows: Sequence[dict[str, Any]], place: Path, pictures: Sequence[Path]
) -> str:
    """Recall of one folder: the figures, the chosen learning rates, and what failed."""
    runs = [run for run in runs_of(found / "run.json") if run.get("id") in {row["env"] for row in rows}]
    where = device_name(runs[-1] if runs else {}, rows[-1]["device"])
    failed = [
        [
            row["mixer"],
            str(row["d_model"]),
            f"{row['lr']:.3g}",
            str(row["seed"]),
            row["status"],
            row["reason"],
        ]
        for row in rows
        if row["status"] != "ok"
    ]
    headings = ("mixer", ">width", ">rate", ">seed", "status", "reason")
    title = f"Recall (MQAR), {rows[-1]['suite']} on {where}"
    return "\n".join(
        (
            f'<section id="{_anchor(place)}">\n<h2>{text(title)}</h2>',
            _commands(runs),
            *(_figure(path) for path in pictures),
            "<h3>Accuracy at the learning rate that validation chose</h3>",
            table(*figure_recall.table(rows)),
            "<h3>Runs without a measurement</h3>" + table(headings, failed) if failed else "",
            "</section>",
        )
    )


def _throughput(part: Results, place: Path, pictures: Sequence[Path]) -> str:
    """Training steps on one device: what made them, the figures, every row, what a FLOP is."""
    rows = part.rows()
    where = device_name(part.run_of(rows[-1].env), rows[-1].device)
    lines = [
        *provenance(part, rows),
        *(f"FLOPs a token, {line}" for line in figure_throughput.formulas(part)),
    ]
    blocks = [
        f'<section id="{_anchor(place)}">\n<h2>Training throughput on {text(where)}</h2>',
        "".join(f'<p class="soft">{text(line)}</p>' for line in lines),
        _commands(part),
        *(_figure(path) for path in pictures),
        table(figure_throughput.HEADINGS, figure_throughput.table_rows(part)),
        _environments(part),
        "</section>",
    ]
    return "\n".join(block for block in blocks if block)


def _figure(path: Path) -> str:
    """The picture as a data URI: inlined as elements, two pictures would share ids."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    kind, _, name = path.stem.partition("_")
    words = {"time": "Time", "speedup": "Speed-up", "floor": "Time over the floor", "memory": "Memory"}
    words |= {"decode": "Time of one token, and what is kept between tokens,"}
    length = "context" if kind == "decode" else "sequence length"
    alt = f"{words.get(kind, kind)} against {length}: {name}"
    alt = {"loss": "Loss against tokens", **figure_recall.ALT}.get(path.stem, alt)
    if kind == "throughput":
        alt = f"Tokens a second and memory of a training step against length and batch: {name}"
    return f'<figure><img alt="{text(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _commands(runs: Iterable[dict[str, Any]]) -> str:
    found = {}
    for run in runs:
        argv = run.get("argv")
        if isinstance(argv, list) and argv:
            words = [str(word) for word in argv]
            found[shlex.join(words if "glabench" in words[0] else ["glabench", *words])] = None
    return "".join(f"<p><code>{text(line)}</code></p>" for line in found)


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


def _environments(part: Results) -> str:
    """What run.json says of each environment, as it stands there."""
    blocks = []
    for env in sorted({r.env for r in part.rows()}):
        run = part.run_of(env)
        lines = [[k, _plain(v)] for k, v in run.items() if not isinstance(v, dict) and k != "argv"]
        for name in ("comparable", "measured", "regime", "noted"):
            inner = run.get(name)
            lines += [[k, _plain(v)] for k, v in inner.items()] if isinstance(inner, dict) else []
        lines = [line for line in lines if line[1]]
        body = table(("what", "value"), lines) if lines else "<p>run.json does not describe it.</p>"
        blocks.append(f"<details><summary>Environment {text(env)}</summary>{body}</details>")
    return "\n".join(blocks)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v not in (None, "", {}))
    return "" if value is None else str(value)


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
    flags = {"launch_bound": "launch-bound", "syncs_inside": "syncs", "async_outside": "async outside"}
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
