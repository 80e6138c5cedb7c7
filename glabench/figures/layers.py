"""CSV -> figures, SVG and PNG: time, speed-up, memory and time over the floor, against sequence length; and
a step of decoding against the context.

Each figure says under itself what made it and how its arms differ. Never imports torch.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glabench.figures import style as fs
from glabench.figures.panels import (
    NAME_GAP_PT,
    Axis,
    Box,
    Footer,
    Page,
    Panel,
    Series,
    common_limits,
    draw_names,
    draw_panel,
    name_lines,
    names_width,
    strip_height,
)
from glabench.figures.rows import (
    PASSES,
    Results,
    Sheet,
    arm_texts,
    device_name,
    how_timed,
    load,
    provenance,
    sheets,
    what_is_missing,
)

HEAD_PT, TITLE_PT, TICKS_PT, GAP_PT = 36.0, 14.0, 16.0, 10.0
EMPTY_PT = 40.0  # height of a panel where no panel has a value
SEGMENTS = (
    ("outputs_mib", "outputs, gradients"),
    ("saved_mib", "saved for backward"),
    ("workspace_mib", "workspace"),
)
FILLS: tuple[dict[str, Any], ...] = ({}, {"alpha": 0.4}, {"fill": False, "hatch": "///////"})
Values = tuple[float | None, float | None, float | None]  # y and its interval


def render(folder: Path, out: Path, formats: Sequence[str] = fs.FORMATS) -> list[Path]:
    """Draw every figure of a results folder; unchanged rows give identical files.

    Several suites or devices in one folder get a folder <suite>/<device> each below `out`.
    Raises ResultsError for a folder without rows, or an `out` that cannot be written.
    """
    parts = load(folder).parts()
    many = len(parts) > 1
    return [
        path for part in parts for path in render_part(part, out / part.place() if many else out, formats)
    ]


def render_part(part: Results, out: Path, formats: Sequence[str] = fs.FORMATS) -> list[Path]:
    """Draw one suite and device's figures into `out`. Raises ResultsError."""
    written: list[Path] = []
    speed = sheets(part.speed)
    whole = (draw_time, draw_speedup, draw_floor)
    jobs = [(draw, s) for s in speed for draw in ((draw_decode,) if s.is_decode else whole)]
    jobs += [(draw_memory, s) for s in sheets(part.memory)]
    for draw, sheet in jobs:
        if draw is draw_speedup and sheet.baseline() is None:
            continue  # nothing to compare with was asked for
        stem = f"{draw.__name__.removeprefix('draw_')}_{sheet.name}"
        with fs.style():
            figure = draw(sheet, part)
            written += fs.save(figure, out, stem, formats)
    return written


def series_of(sheet: Sheet, passes: str, value: Callable[[Any], Values]) -> list[Series]:
    """One Series an arm; `value(row)` gives y and its interval, each None where there is none."""
    looks, found = fs.looks(sheet.arms), []
    for impl, _ in sheet.arms:
        one = Series(impl, looks[impl])
        for row in sheet.of(impl, passes):
            y, low, high = (math.nan if v is None else v for v in value(row))
            one.x.append(row.seqlen)
            one.y.append(y)
            one.low.append(low)
            one.high.append(high)
            one.hollow.append(getattr(row, "launch_bound", "") == "yes")
            if row.status != "ok":
                one.failed.append((row.seqlen, row.status))
        found.append(one)
    return found


def _panels(sheet: Sheet, kind: str, value: Callable[[Any], Values], **options: Any) -> list[Panel]:
    return [
        Panel(f"{kind} {p}", PASSES.get(p, p), series_of(sheet, p, value), **options) for p in sheet.passes
    ]


def draw_time(sheet: Sheet, results: Results) -> Any:
    """Figure of time against length, log-log."""
    panels = _panels(sheet, "time", lambda row: (row.time_ms, row.time_lo_ms, row.time_hi_ms))
    axis = Axis(fs.time_text, fs.decade_ticks, has_guides=sheet.is_batch_fixed)
    return _lines(sheet, results, "Time of one call", panels, axis)


def draw_speedup(sheet: Sheet, results: Results) -> Any:
    """Figure of the baseline's time over each arm's; the band takes both intervals at their worst."""
    base = sheet.baseline() or ""
    times = {r.case: r for r in sheet.rows if r.impl == base and r.status == "ok"}

    def ratio(row: Any) -> Values:
        ref = times.get(row.case)
        if ref is None or row.impl == base or row.status != "ok":
            return None, None, None
        if None in (ref.time_lo_ms, ref.time_hi_ms, row.time_lo_ms, row.time_hi_ms):
            return ref.time_ms / row.time_ms, None, None
        low, high = ref.time_lo_ms / row.time_hi_ms, ref.time_hi_ms / row.time_lo_ms
        return ref.time_ms / row.time_ms, low, high

    panels = _panels(sheet, "speedup", ratio, missing=f"no time of {base} to compare with")
    name = "FlashAttention-2" if base == "attention_fa2" else "PyTorch's SDPA"
    note = (
        f"The time of {base} over the arm's: above 1 the arm is faster. Bands: both intervals at their worst."
    )
    axis = Axis(fs.ratio_text, fs.decade_ticks, one=base)
    return _lines(sheet, results, f"Speed-up over {name}", panels, axis, note)


def draw_floor(sheet: Sheet, results: Results) -> Any:
    """Figure of time over the least time the device needs for the bytes or the FLOPs."""

    def over(row: Any) -> Values:
        if row.floor_ms is None or row.time_lo_ms is None or row.time_hi_ms is None:
            return row.floor_ratio, None, None
        return row.floor_ratio, row.time_lo_ms / row.floor_ms, row.time_hi_ms / row.floor_ms

    panels = _panels(sheet, "floor", over, missing="no floor is known for these cells")
    axis = Axis(fs.ratio_text, fs.decade_ticks, one="device's limit")
    note = (
        "Floor: the unavoidable bytes over the copy rate, or the unavoidable FLOPs over the matrix rate, "
        "whichever takes longer on this device."
    )
    return _lines(sheet, results, "Time over the floor", panels, axis, note)


def _lines(sheet: Sheet, results: Results, title: str, panels: list[Panel], axis: Axis, *notes: str) -> Any:
    """A figure of line panels, side by side where the names leave room, else one under the other."""
    names = names_width(panels, axis.one)
    room = fs.WIDTH_PT - 2 * fs.EDGE_PT
    half = (room - GAP_PT - fs.TICK_ROOM_PT) / 2 - names  # the second column shares the first one's ticks
    columns = 2 if len(panels) > 1 and half >= 120 else 1
    width = half if columns == 2 else room - fs.TICK_ROOM_PT - names
    height = max(165.0 if columns == 2 else 132.0, min(260.0, len(sheet.arms) * fs.LABEL_PT + 8))
    limits = common_limits(panels, axis)
    height = height if limits else EMPTY_PT
    step = TITLE_PT + strip_height(panels) + height + TICKS_PT
    foot = _footer(sheet, results, [*how_timed(sheet.rows), *notes])
    foot_top = HEAD_PT + math.ceil(len(panels) / columns) * step + 20
    page = Page(foot_top + foot.height)
    _head(page, title, sheet, results)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left = fs.EDGE_PT + fs.TICK_ROOM_PT + column * (half + names + GAP_PT)
        box = (left, HEAD_PT + (row + 1) * step - TICKS_PT - height, width, height)
        axes = draw_panel(page, panel, box, axis, limits, sheet.seqlens)
        if column:
            axes.tick_params(labelleft=False)
        if panel.drawn():
            ones = [_name_of_one(axis, sheet)] if axis.one else []
            name_lines(page, axes, [*panel.drawn(), *ones], box)
        if number + columns >= len(panels):
            _length_label(page, box, sheet)
    foot.draw(page, foot_top)
    return page.figure


def _name_of_one(axis: Axis, sheet: Sheet) -> Series:
    """The line at 1 as a series, to be named as the others are."""
    look = fs.looks(sheet.arms).get(axis.one, fs.Look(fs.DARK, "", "-"))
    return Series(axis.one, look, x=[sheet.seqlens[-1]], y=[1.0])


def _length_label(page: Page, box: Box, sheet: Sheet) -> None:
    left, top, width, height = box
    length = "context" if sheet.is_decode else "sequence length"
    page.text(left + width / 2, top + height + 19, f"{length}, tokens ({sheet.batches})", ha="center")


def _head(page: Page, title: str, sheet: Sheet, results: Results) -> None:
    page.text(fs.EDGE_PT, 12, f"{title}: {sheet.title}", fontsize=9, fontweight="bold", color="black")
    last = sheet.rows[-1]
    where = device_name(results.run_of(last.env), last.device)
    page.text(fs.EDGE_PT, 25, f"{where}, suite {last.suite}", color="#555555")


def _footer(sheet: Sheet, results: Results, notes: list[str]) -> Footer:
    """What stands under a figure: what made it, how it was measured, and how the arms differ."""
    heading, table = arm_texts(sheet)
    looks = fs.looks(sheet.arms)
    sentences = [*provenance(results, sheet.rows), *notes, *what_is_missing(results, sheet)]
    return Footer(sentences, heading, [(looks[cells[0]], cells) for cells in table])


def draw_decode(sheet: Sheet, results: Results) -> Any:
    """Figure of the time of one step against the context, and of what the step carries on."""
    (passes,) = sheet.passes
    times = series_of(sheet, passes, lambda row: (row.time_ms, row.time_lo_ms, row.time_hi_ms))
    states = series_of(sheet, passes, lambda row: (row.state_mib, None, None))
    for one in states:  # known by shape, whether or not the step ran
        one.failed, one.hollow = [], [False] * len(one.x)
    panels = [Panel("time decode", "time a token", times), Panel("state decode", "state or cache", states)]
    axes = (Axis(fs.time_text, fs.decade_ticks), Axis(fs.memory_text, fs.binary_ticks))
    names = names_width(panels) + 6
    width = (fs.WIDTH_PT - 2 * fs.EDGE_PT - 2 * fs.TICK_ROOM_PT - names) / 2
    height = max(165.0, len(sheet.arms) * fs.LABEL_PT + 8)
    step = TITLE_PT + strip_height(panels) + height + TICKS_PT
    note = (
        "One layer, one token of each sequence: a state is read and written, a key-value cache is read and "
        "the token written into it. Right: what is kept between steps, all sequences."
    )
    foot = _footer(sheet, results, [*how_timed(sheet.rows), note])
    page = Page(HEAD_PT + step + 20 + foot.height)
    _head(page, "Decoding, one step", sheet, results)
    left = fs.EDGE_PT + fs.TICK_ROOM_PT
    for number, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
        at = left + number * (width + names + fs.TICK_ROOM_PT)
        box = (at, HEAD_PT + step - TICKS_PT - height, width, height)
        drawn = draw_panel(page, panel, box, axis, common_limits([panel], axis), sheet.seqlens)
        if panel.drawn() and not number:
            name_lines(page, drawn, panel.drawn(), box)
        _length_label(page, box, sheet)
    foot.draw(page, HEAD_PT + step + 20)
    return page.figure


def draw_memory(sheet: Sheet, results: Results) -> Any:
    """Figure of memory beyond the inputs against length, and at one length what it is for."""
    panels = _panels(sheet, "memory", lambda row: (row.extra_mem_mib or None, None, None))  # 0 has no log
    names = names_width(panels) + 6
    width = (fs.WIDTH_PT - 2 * fs.EDGE_PT - fs.TICK_ROOM_PT - names - 14) / 2
    axis = Axis(fs.memory_text, fs.binary_ticks)
    limits = common_limits(panels, axis)
    height = max(132.0, len(sheet.arms) * 10.0) if limits else EMPTY_PT
    step = TITLE_PT + strip_height(panels) + height + TICKS_PT + 20
    foot = _footer(sheet, results, _how_metered(sheet))
    foot_top = HEAD_PT + len(panels) * step
    page = Page(foot_top + foot.height)
    _head(page, "Memory of one call beyond its inputs", sheet, results)
    for number, (panel, passes) in enumerate(zip(panels, sheet.passes, strict=True)):
        top = HEAD_PT + (number + 1) * step - TICKS_PT - 20 - height
        box = (fs.EDGE_PT + fs.TICK_ROOM_PT, top, width, height)
        axes = draw_panel(page, panel, box, axis, limits, sheet.seqlens)
        _length_label(page, box, sheet)
        if panel.drawn():
            rows = _bar_rows(sheet, passes)
            size = {i: r.extra_mem_mib for i, r in rows.items() if r.extra_mem_mib is not None}
            order = sorted(panel.drawn(), key=lambda s: -size.get(s.impl, s.last()[1]))
            ys = [top + (i + 0.5) * height / len(order) for i in range(len(order))]
            draw_names(page, axes, order, box[0] + width + NAME_GAP_PT, ys)
            split = (box[0] + width + names, top, width, height)
            _draw_bars(page, page.axes(f"split {passes}", split), [(s, rows.get(s.impl)) for s in order])
            _bar_key(page, split)
    foot.draw(page, foot_top)
    return page.figure


def _how_metered(sheet: Sheet) -> list[str]:
    """What memory rows count, and which cells a log axis cannot show."""
    meters = ", ".join(sorted({r.meter for r in sheet.rows if r.meter}))
    lines = [
        f"Peak memory of one call beyond its inputs, meter {meters or 'not named'}; 1 MiB = 2**20 bytes. "
        "Outline: the measured peak; black tick: the output and gradients by shape, the least there is."
    ]
    if any(r.extra_mem_mib is not None and _parts_mib(r) > 1.01 * r.extra_mem_mib for r in sheet.rows):
        lines.append("Parts that reach beyond their outline, the peak, were not all held at once.")
    none = [f"{r.impl} {fs.tokens_text(r.seqlen)}" for r in sheet.rows if r.extra_mem_mib == 0]
    return lines + (
        [f"No memory beyond the inputs, so not on a log axis: {', '.join(none)}."] if none else []
    )


def _bar_rows(sheet: Sheet, passes: str) -> dict[str, Any]:
    """Each arm's row at the longest length at which half the arms, or as many as anywhere, have memory."""
    rows = [r for r in sheet.rows if r.passes == passes]
    counts = {s: sum(r.seqlen == s and bool(r.extra_mem_mib) for r in rows) for s in sheet.seqlens}
    enough = min(max(counts.values()), len(sheet.arms) / 2)
    chosen = max(s for s, count in counts.items() if count >= enough)
    return {r.impl: r for r in rows if r.seqlen == chosen}


def _draw_bars(page: Page, axes: Any, arms: Sequence[tuple[Series, Any]]) -> None:
    """Stacked bars of what memory is for, a tick at the least that is needed, the total at the end."""
    measured = [row for _, row in arms if row and row.status == "ok"]
    widest = max(max(r.extra_mem_mib, r.predicted_mib or 0.0, _parts_mib(r)) for r in measured)
    axes.set(xlim=(0, widest * 1.3), ylim=(len(arms) - 0.5, -0.5), yticks=[])
    pitch = page.at(axes, 0, 1)[1] - page.at(axes, 0, 0)[1]
    thick = 0.8 * min(1.0, 22 / pitch)
    for number, (series, row) in enumerate(arms):
        text = {"va": "center_baseline", "color": series.look.ink}
        if row is None or row.status != "ok":
            axes.text(widest * 0.02, number, row.status if row else "no row", **text)
            continue
        end = _draw_bar(axes, number, thick, series, row)
        axes.text(end + widest * 0.02, number, fs.memory_text(row.extra_mem_mib), **text)
    step = 2.0 ** math.floor(math.log2(widest / 2))
    ticks = [step * i for i in range(int(widest / step) + 1)]
    axes.set_xticks(ticks, [fs.short(fs.memory_text(t)) for t in ticks])
    x, y = page.at(axes, 0, -0.5)
    page.text(x, y - 7, f"at {fs.tokens_text(measured[0].seqlen)}", fontweight="bold")


def _parts_mib(row: Any) -> float:
    return sum(getattr(row, column) or 0.0 for column, _ in SEGMENTS)


def _draw_bar(axes: Any, number: int, thick: float, series: Series, row: Any) -> float:
    """One arm's parts, stacked, and around them the measured peak as an outline. Returns where both end."""
    left, name = 0.0, series.impl
    ink = {
        "color": series.look.colour,
        "edgecolor": series.look.colour,
        "linewidth": 0.5,
        "height": 0.78 * thick,
    }
    for (column, part), fill in zip(SEGMENTS, FILLS, strict=True):
        size = getattr(row, column) or 0.0
        axes.barh(number, size, left=left, label=f"{name} {part}", **ink, **fill)
        left += size
    outline = {"fill": False, "edgecolor": fs.DARK, "linewidth": 0.8, "height": thick}
    axes.barh(number, row.extra_mem_mib, label=f"{name} peak", **outline)
    least = row.predicted_mib
    if least is not None:
        tick = {"color": "black", "linewidth": 1.4, "label": f"{name} least"}
        axes.plot([least] * 2, [number - 0.6 * thick, number + 0.6 * thick], **tick)
    return max(left, row.extra_mem_mib, least or 0.0)


def _bar_key(page: Page, box: Box) -> None:
    """What the fills of a bar mean, under the bars."""
    from matplotlib.patches import Rectangle

    names = [name for _, name in SEGMENTS]
    total = sum(fs.text_width(n) + 11 for n in names) + 9 * (len(names) - 1)
    x, y = min(box[0] + (box[2] - total) / 2, fs.WIDTH_PT - fs.EDGE_PT - total), box[1] + box[3] + 19
    for name, fill in zip(names, FILLS, strict=True):
        patch = Rectangle((x, y - 3), 8, 6, facecolor=fs.GREY, edgecolor=fs.GREY, linewidth=0.5)
        patch.set(**fill)
        page.sheet.add_patch(patch)
        page.text(x + 11, y, name)
        x += fs.text_width(name) + 20
