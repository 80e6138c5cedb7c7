"""extrapolate.csv -> the layout of the paper's Figure 5: perplexity against position. Never imports torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glabench import paper
from glabench.figures import style as fs
from glabench.figures.panels import NAME_GAP_PT, Footer, Page, Series, draw_names
from glabench.figures.rows import device_name, runs_of, slug, typed
from glabench.quality.extrapolate_rows import FILE, KINDS, REPEATS, BucketRow, ExtrapolateRow, RepeatRow
from glabench.results import read_rows

PUBLISHED_BUCKET = 2048  # the paper's; beside other buckets its numbers would mislead
DATASETS = {"ppl_pg19": "PG19", "ppl_slimpajama_test": "SlimPajama"}
FAMILY_OF = {"Transformer++": "attention", "RetNet": "retention", "Mamba": "mamba", "GLA": "gla"}
LOST = 10.0  # times the least value: a line above it would leave the others no room
CUT = 2.0  # times a panel's least value: lines that rise above it leave the frame, as in the paper's figure
HEADINGS = ("checkpoint", "context", ">to position", "status", ">perplexity", ">95% interval", ">bits/byte")
HEADINGS += (">documents", "reason")
REPEAT_HEADINGS = ("checkpoint", "context", ">to position", ">nats a repeated token", ">tokens")
REPEAT_HEADINGS += (">nats another token", ">tokens")
HEAD_PT, PANEL_PT, SMALL_PT, GAP_PT = 36.0, 190.0, 120.0, 24.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line: (position, value, low, high) by position; `words` are its cells in the table below."""

    name: str
    family: str
    points: tuple[tuple[int, float, float, float], ...]
    train_len: int | None
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """The lines of one panel: one dataset and one bucket on one device."""

    name: str
    title: str
    bucket: int
    lines: tuple[Line, ...]
    failures: tuple[str, ...]
    note: str
    rows: tuple[ExtrapolateRow, ...]


def find(folder: Path) -> list[Path]:
    """The folders at or below `folder` that hold rows of `glabench extrapolate`."""
    return sorted(p.parent for p in folder.rglob(FILE) if p.is_file())


def load(place: Path) -> list[ExtrapolateRow]:
    """The rows of each line's last run, the latest of each cell. Raises: ResultsError."""
    return _latest([typed(ExtrapolateRow, r) for r in read_rows(place / FILE, ExtrapolateRow)])


def load_repeats(place: Path) -> list[RepeatRow]:
    """As load, of the parts of each bucket; none in a folder of an earlier version."""
    if not (place / REPEATS).is_file():
        return []
    return _latest([typed(RepeatRow, r) for r in read_rows(place / REPEATS, RepeatRow)])


def _latest(rows: list[Any]) -> list[Any]:
    last: dict[tuple, int] = {}
    for r in rows:
        last[_arm(r)] = max(r.replicate, last.get(_arm(r), 0))
    kept = (r for r in rows if r.replicate == last[_arm(r)])
    return list({(_arm(r), r.bucket, getattr(r, "kind", "")): r for r in kept}.values())


def _arm(row: BucketRow) -> tuple:
    return row.device, row.dataset, row.bucket_tokens, row.impl, row.protocol


def sheets(place: Path, rows: Sequence[ExtrapolateRow]) -> list[Sheet]:
    """One a device, dataset and bucket; bits a byte where its models do not share a tokenizer."""
    runs = {str(run.get("id")): run for run in runs_of(place / "run.json")}
    groups: dict[tuple[str, str, int], list[ExtrapolateRow]] = {}
    for row in rows:
        groups.setdefault((row.device, row.dataset, row.bucket_tokens), []).append(row)
    return [_sheet(key, found, runs.get(found[-1].env, {})) for key, found in sorted(groups.items())]


def _sheet(key: tuple[str, str, int], rows: list[ExtrapolateRow], run: dict[str, Any]) -> Sheet:
    device, dataset, bucket = key
    is_bits = len({r.tokenizer for r in rows}) > 1
    arms: dict[tuple[str, str], list[ExtrapolateRow]] = {}
    for row in rows:
        arms.setdefault((row.impl, row.protocol), []).append(row)
    lines = tuple(_line(found, is_bits) for found in arms.values())
    failures = dict.fromkeys(words for found in arms.values() for words in _failures(found))
    unit = "bits a byte" if is_bits else "perplexity"
    return Sheet(
        name=f"{slug(dataset)}_{bucket}",
        title=f"{dataset}: {unit} by position",
        bucket=bucket,
        lines=lines,
        failures=tuple(failures),
        note=_note(rows, device_name(run, device)),
        rows=tuple(rows),
    )


def _failures(rows: Sequence[ExtrapolateRow]) -> Iterable[str]:
    """What a line lacks, a sentence a reason."""
    for reason in dict.fromkeys(r.reason for r in rows if r.reason):
        lost = [r for r in rows if r.reason == reason]
        ends = ", ".join(fs.tokens_text(r.end) for r in lost)
        yield f"{lost[0].impl}, {_protocol(lost[0])}, at {ends}: {lost[0].status}, {reason}."


def _note(rows: Sequence[ExtrapolateRow], device: str) -> str:
    docs = " to ".join(map(str, sorted({r.n_docs for r in rows})))
    tokenizers, dtypes = (", ".join(sorted({getattr(r, n) for r in rows})) for n in ("tokenizer", "dtype"))
    size = fs.tokens_text(rows[0].bucket_tokens)
    word = "document" if docs == "1" else "documents"
    return (
        f"{docs} {word} of {rows[0].dataset}, each read from its start; a point is the mean over the "
        f"{size} positions that end there. Bands: 95% bootstrap interval over documents. "
        f"{tokenizers} tokens; {dtypes}; {device}."
    )


def _protocol(row: ExtrapolateRow) -> str:
    if row.protocol == "sliding":
        return f"window of {fs.tokens_text(row.window or 0)}, {fs.tokens_text(row.stride or 0)} apart"
    return {"document": "whole context", "state_passing": "state of the document before"}[row.protocol]


def _line(rows: list[ExtrapolateRow], is_bits: bool) -> Line:
    kind = "bits_per_byte" if is_bits else "ppl"
    lows, highs = ("bits_per_byte_lo", "bits_per_byte_hi") if is_bits else ("ppl_lo", "ppl_hi")
    ok = sorted((r for r in rows if r.status == "ok" and getattr(r, kind) is not None), key=lambda r: r.end)
    points = tuple(
        (r.end, *(math.nan if v is None else v for v in (getattr(r, n) for n in (kind, lows, highs))))
        for r in ok
    )
    first = rows[0]
    suffix = {"document": "", "sliding": ", window", "state_passing": ", passed state"}[first.protocol]
    trained = "" if first.train_len is None else fs.tokens_text(first.train_len)
    if (first.train_segments or 1) > 1:
        trained = f"{first.train_segments} x {trained}"
    ends = ok[:1] + ok[1:][-1:]
    cells = [f"{fs.number_text(getattr(r, kind), 4)} at {fs.tokens_text(r.end)}" for r in ends]
    bits = [fs.number_text(r.bits_per_byte, 4) for r in ok[-1:] if r.bits_per_byte is not None]
    cells += [""] * (2 - len(cells)) + (bits or [""])
    words = (first.impl + suffix, _protocol(first), trained, *cells)
    return Line(first.impl + suffix, first.family, points, first.train_len, words)


def published() -> list[tuple[str, list[Line]]]:
    """(dataset, lines) of the paper's Figure 5, from the numbers that ship with glabench."""
    rows = paper.read("figure5")
    found = []
    for metric, title in DATASETS.items():
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        for r in rows:
            if r["metric"] == metric:
                x = int(float(r["x"]) * 1024)
                lines.setdefault(r["model"], []).append((x, float(r["value"]), math.nan, math.nan))
        made = [Line(n, FAMILY_OF[n.split(" (")[0]], tuple(sorted(p)), None, (n,)) for n, p in lines.items()]
        found.append((title, made))
    return found


def table_rows(sheet: Sheet) -> list[list[str]]:
    """The cells under HEADINGS, a line a row of the sheet."""

    def digits(value: float | None) -> str:
        return "" if value is None else fs.number_text(value, 5)

    def interval(low: float | None, high: float | None) -> str:
        return "" if low is None else f"{digits(low)} to {digits(high)}"

    lines = []
    for r in sheet.rows:
        point = [r.impl, _protocol(r), fs.tokens_text(r.end), r.status, digits(r.ppl)]
        point += [interval(r.ppl_lo, r.ppl_hi), digits(r.bits_per_byte), str(r.n_docs), r.reason]
        lines.append(point)
    return lines


def repeat_rows(sheet: Sheet, repeats: Sequence[RepeatRow]) -> list[list[str]]:
    """The cells under REPEAT_HEADINGS: each line's first and last bucket."""
    cells: dict[tuple, dict[str, RepeatRow]] = {}
    for r in repeats:
        cells.setdefault((_arm(r), r.bucket), {})[r.kind] = r
    arms = {_arm(r): r for r in sheet.rows}
    lines = []
    for arm, row in arms.items():
        buckets = sorted(b for a, b in cells if a == arm)
        for bucket in dict.fromkeys([*buckets[:1], *buckets[-1:]]):
            found = [cells[arm, bucket].get(kind) for kind in KINDS]
            end = fs.tokens_text(bucket * row.bucket_tokens)
            words = (w for r in found for w in (_nats(r), f"{r.n_tokens:,}" if r else ""))
            lines.append([row.impl, _protocol(row), end, *words])
    return lines


def _nats(row: RepeatRow | None) -> str:
    if row is None or row.nll_nats is None:
        return ""
    ends = "" if row.nll_lo_nats is None else f" ({row.nll_lo_nats:.3f} to {row.nll_hi_nats:.3f})"
    return f"{row.nll_nats:.3f}{ends}"


def draw(sheet: Sheet, out: Path) -> list[Path]:
    """Write out/extrapolate_NAME.svg and .png; the same rows give the same files. Raises: ResultsError."""
    with fs.style():
        return fs.save(_figure(sheet), out, f"extrapolate_{sheet.name}")


def _figure(sheet: Sheet) -> Any:
    looks = _looks(sheet.lines)
    heading = ("line", "context", "trained at", "first", "last", "bits/byte, last")
    foot = Footer((sheet.note, *sheet.failures), heading, [(looks[n.name], n.words) for n in sheet.lines])
    paper = published() if sheet.bucket == PUBLISHED_BUCKET else []
    below = _published_foot(paper)
    foot_top = HEAD_PT + PANEL_PT + 40
    small_top = foot_top + foot.height + 34
    page = Page(small_top + SMALL_PT + 36 + below.height if paper else foot_top + foot.height)
    page.text(fs.EDGE_PT, 12, sheet.title, fontweight="bold", fontsize=9)
    names = max(fs.text_width(_ending(n, _top(sheet.lines))) for n in sheet.lines) + NAME_GAP_PT + 4
    left = fs.EDGE_PT + fs.TICK_ROOM_PT
    box = (left, HEAD_PT, fs.WIDTH_PT - fs.EDGE_PT - left - names, PANEL_PT)
    axes = _panel(page, "measured", sheet.lines, looks, box)
    _name(page, axes, sheet.lines, looks, box)
    page.text(left + box[2] / 2, HEAD_PT + PANEL_PT + 24, "position in the document, tokens", ha="center")
    foot.draw(page, foot_top)
    if paper:
        title = "As published (the paper's Figure 5): 1.3B parameters, 100B tokens of training, perplexity"
        page.text(fs.EDGE_PT, small_top - 22, title, fontweight="bold")
        width = (fs.WIDTH_PT - 2 * fs.EDGE_PT - GAP_PT) / 2 - fs.TICK_ROOM_PT
        for number, (name, lines) in enumerate(paper):
            x = fs.EDGE_PT + fs.TICK_ROOM_PT + number * (width + GAP_PT + fs.TICK_ROOM_PT)
            _panel(page, name, lines, _looks(lines), (x, small_top, width, SMALL_PT))
            page.text(x, small_top - 8, name)
        below.draw(page, small_top + SMALL_PT + 30)
    return page.figure


def _published_foot(paper: list[tuple[str, list[Line]]]) -> Footer:
    """The published lines with their first and last values on both datasets."""
    cells: dict[str, list[str]] = {}
    for number, (_, lines) in enumerate(paper):
        for line in lines:
            row = cells.setdefault(line.name, [line.name, "", ""])
            ends = [line.points[0], line.points[-1]]
            row[number + 1] = ", ".join(f"{fs.number_text(y, 4)} at {fs.tokens_text(x)}" for x, y, *_ in ends)
    looks = _looks(paper[0][1]) if paper else {}
    said = "Other models, other texts and another scale than above: compare shapes, not heights."
    arms = [(looks[name], row) for name, row in cells.items()]
    return Footer((said,), ("line", *(name for name, _ in paper)), arms)


def _looks(lines: Iterable[Line]) -> dict[str, fs.Look]:
    """The family's colour and marker; a family's second line is dashed, and so on."""
    lines = list(lines)
    made = fs.family_looks(line.family for line in lines)
    return {line.name: look for line, look in zip(lines, made, strict=True)}


def _top(lines: Sequence[Line]) -> float:
    """The highest value inside the frame: of the lines that stay within CUT times the least value.

    A line that begins higher, by less than LOST, has its own least value: it is drawn, not only named.
    """
    values = [[y for _, y, *_ in line.points] for line in lines if line.points]
    least = min((min(ys) for ys in values), default=1.0)
    floors = [min(ys) if CUT * least < min(ys) <= LOST * least else least for ys in values]
    staying = [max(ys) for ys, floor in zip(values, floors, strict=True) if max(ys) <= CUT * floor]
    return max(staying or [y for ys in values for y in ys if y <= CUT * least], default=1.0)


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    top = _top(lines)
    inside = [v for line in lines for _, y, *band in line.points if y <= top for v in (y, *band) if v == v]
    low, high = min(inside, default=0.0), min(max(inside, default=1.0), CUT * top)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _panel(page: Page, label: str, lines: Sequence[Line], looks: dict[str, fs.Look], box: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    axes = page.axes(label, box)
    positions = sorted({x for line in lines for x, *_ in line.points})
    if not positions:
        axes.text(0.5, 0.5, "no bucket has a value", transform=axes.transAxes, ha="center", color=fs.GREY)
        axes.set(xticks=[], yticks=[])
        return axes
    axes.set(xlim=(0, positions[-1] * 1.03), ylim=_limits(lines))
    every = math.ceil(len(positions) / max(1, int(box[2] // 32)))
    ticks = positions[::-1][::every]
    axes.set_xticks(ticks, [fs.tokens_text(x) for x in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(True)
    for length in sorted({n.train_len for n in lines if n.train_len and n.train_len <= positions[-1]}):
        axes.axvline(length, color=fs.GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        x, y = page.at(axes, length, axes.get_ylim()[1])
        page.text(x, y - 6, f"trained at {fs.tokens_text(length)}", ha="center", color=fs.GREY)
    for line in lines:
        if not line.points:
            continue
        x, y, low, high = zip(*line.points, strict=True)
        look = looks[line.name]
        axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
        style = {"markersize": 3.0, "marker": look.marker, "linewidth": 1.1}
        axes.plot(x, y, color=look.colour, linestyle=look.dashes, label=line.name, zorder=3, **style)
    return axes


def _ending(line: Line, top: float) -> str:
    """The line's name, and how high it ends where that is outside the frame."""
    if not line.points or line.points[-1][1] <= top:
        return line.name
    x, y, *_ = line.points[-1]
    return f"{line.name} ↑ {fs.number_text(y, 4)} at {fs.tokens_text(x)}"


def _name(page: Page, axes: Any, lines: Sequence[Line], looks: dict[str, fs.Look], box: Any) -> None:
    """Names right of the panel, level with the ends of their lines where they can be."""
    left, top, width, height = box
    drawn = [n for n in lines if n.points]
    if not drawn or len(drawn) * fs.LABEL_PT > height + fs.LABEL_PT:
        return  # the table below names them
    highest, limit = _top(lines), axes.get_ylim()[1]
    ends = []
    for line in drawn:
        inside = [(x, y) for x, y, *_ in line.points if y <= limit]
        last = line.points[-1]
        x, y = inside[-1] if inside and last[1] <= limit else (last[0], limit)
        ends.append(Series(_ending(line, highest), looks[line.name], x=[x], y=[y]))
    ys = fs.spread([page.at(axes, *s.last())[1] for s in ends], fs.LABEL_PT, top, top + height)
    draw_names(page, axes, ends, left + width + NAME_GAP_PT, ys)
