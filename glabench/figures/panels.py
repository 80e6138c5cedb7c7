"""Parts of a figure: a page in points, lines and bands, failed cells, names at line ends, the table below."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glabench.figures.style import (
    DARK,
    EDGE_PT,
    GREY,
    LABEL_PT,
    LIGHT,
    LINE_PT,
    STRIP_ROW_PT,
    WIDTH_PT,
    Look,
    fit,
    length_ticks,
    short,
    spread,
    text_width,
    tokens_text,
    wrap,
)

NAME_GAP_PT = 12.0  # from a panel's right edge to the names of its lines
Box = tuple[float, float, float, float]  # left, top, width, height in points


@dataclass(slots=True)
class Series:
    """One arm of one panel: y is NaN where there is no value; `failed` holds (seqlen, status)."""

    impl: str
    look: Look
    x: list[int] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    hollow: list[bool] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def last(self) -> tuple[int, float] | None:
        """The right-most point that has a value."""
        return next(((x, y) for x, y in zip(self.x[::-1], self.y[::-1], strict=True) if y == y), None)


@dataclass(frozen=True, slots=True)
class Axis:
    """What a y axis shows: its ticks and their words, the name of the line at 1, and whether slopes help."""

    text: Callable[[float], str]
    ticks: Callable[[float, float], list[float]]
    one: str = ""
    has_guides: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """What one set of axes shows; `name` is the axes' label in the figure."""

    name: str
    title: str
    series: list[Series]
    missing: str = "nothing here was measured"

    def failures(self) -> list[tuple[Series, str]]:
        """(series, status), one a row of the strip of failed cells."""
        return [(s, status) for s in self.series for status in dict.fromkeys(word for _, word in s.failed)]

    def drawn(self) -> list[Series]:
        return [s for s in self.series if s.last()]


class Page:
    """A figure seven inches wide, laid out in points from the top left."""

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH_PT / 72, height / 72), dpi=200, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.sheet = self.figure.add_axes((0, 0, 1, 1), label="page", zorder=5)
        self.sheet.set(xlim=(0, WIDTH_PT), ylim=(height, 0))
        self.sheet.axis("off")

    def axes(self, label: str, box: Box) -> Any:
        left, top, width, height = box
        across, up = width / WIDTH_PT, height / self.height
        place = (left / WIDTH_PT, 1 - (top + height) / self.height, across, up)
        return self.figure.add_axes(place, label=label, facecolor="none")

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        """Text whose vertical middle is at y."""
        self.sheet.text(x, y, text, **{"va": "center_baseline", "color": DARK, **options})

    def at(self, axes: Any, x: float, y: float) -> tuple[float, float]:
        """Where a data point lies on the page, in points."""
        across, up = axes.transData.transform((x, y))
        scale = 72 / self.figure.dpi
        return across * scale, self.height - up * scale


def marker(look: Look, face: str | None = None) -> dict[str, Any]:
    """Line2D options of a bare marker, filled with its own colour unless `face` says otherwise."""
    return {
        "linestyle": "none",
        "marker": look.marker,
        "markersize": 3.8,
        "markerfacecolor": face or look.colour,
        "markeredgecolor": look.colour,
        "markeredgewidth": 0.9,
    }


def strip_height(panels: Sequence[Panel]) -> float:
    """Room for the failed cells of the panel that has the most, in points."""
    rows = max((len(p.failures()) for p in panels), default=0)
    return rows * STRIP_ROW_PT + 4 if rows else 0.0


def names_width(panels: Sequence[Panel], *more: str) -> float:
    """Room for the widest name right of a panel, and its status where that may have to stand there."""
    names = [*more]
    for panel in panels:
        names += [s.impl for s in panel.series]
        for s, status in panel.failures():
            lengths = {x for x, word in s.failed if word == status}
            names += [f"{s.impl}: {status}"] if {s.x[0], s.x[-1]} <= lengths else []
    return max(map(text_width, names), default=0.0) + NAME_GAP_PT + 2


def common_limits(panels: Sequence[Panel], axis: Axis) -> tuple[float, float] | None:
    """y limits for all panels, padded, at least a factor of 1.6 apart; None without any value."""
    values = [v for p in panels for s in p.series for v in (*s.y, *s.low, *s.high) if v == v and v > 0]
    if not values:
        return None
    values += [1.0] * bool(axis.one)
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.06, (1.6 * low / high) ** 0.5, 1.08)
    return low / pad, high * pad


def draw_panel(
    page: Page, panel: Panel, box: Box, axis: Axis, limits: tuple[float, float] | None, lengths: Sequence[int]
) -> Any:
    """Axes with lines, the strip of failed cells above them, the title above both; returns the axes."""
    left, top, width, _ = box
    axes = page.axes(panel.name, box)
    _set_lengths(axes, lengths, width)
    failures, drawn = panel.failures(), panel.drawn()
    over = strip_height([panel])
    if failures:
        strip = page.axes(f"failed {panel.name}", (left, top - over, width, over - 4))
        strip.set(xscale="log", xlim=axes.get_xlim())
        _draw_strip(page, strip, failures, (left, left + width))
    page.text(left, top - over - 7, panel.title, fontweight="bold")
    if not drawn or limits is None:
        axes.set_yticks([])
        at = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "\n".join(wrap(panel.missing, width - 12)), color=GREY, **at)
        return axes
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.minorticks_off()
    ticks = axis.ticks(*limits)
    axes.set_yticks(ticks, [short(axis.text(t)) for t in ticks])
    if axis.one:
        axes.axhline(1.0, color=DARK, linewidth=0.8, label="one", zorder=2)
    if axis.has_guides:
        _draw_guides(axes, drawn, limits)
    for s in drawn:
        _draw_series(axes, s)
    return axes


def _set_lengths(axes: Any, lengths: Sequence[int], width: float) -> None:
    """A log x axis with the measured lengths as ticks."""
    axes.set_xscale("log")
    pad = max((lengths[-1] / lengths[0]) ** 0.04, 1.05)
    axes.set_xlim(lengths[0] / pad, lengths[-1] * pad)
    ticks = length_ticks(lengths, width * 0.92)
    axes.minorticks_off()
    axes.set_xticks(ticks, [tokens_text(t) for t in ticks])
    axes.grid(True)


def _draw_series(axes: Any, series: Series) -> None:
    """Band, line (broken where a value is missing) and markers, hollow where launch-bound."""
    look = series.look
    if any(low == low for low in series.low):
        axes.fill_between(series.x, series.low, series.high, color=look.colour, alpha=0.2, linewidth=0)
    line = {"color": look.colour, "linestyle": look.dashes, "linewidth": 1.1}
    axes.plot(series.x, series.y, zorder=3, label=series.impl, **line)
    for is_hollow, word in ((False, "points"), (True, "launch-bound")):
        picked = [i for i, h in enumerate(series.hollow) if h is is_hollow and series.y[i] == series.y[i]]
        if picked:
            x, y = [series.x[i] for i in picked], [series.y[i] for i in picked]
            face = "white" if is_hollow else None
            axes.plot(x, y, label=f"{series.impl} {word}", zorder=4, **marker(look, face))


def _draw_guides(axes: Any, drawn: Sequence[Series], limits: tuple[float, float]) -> None:
    """Grey lines that grow with T and T², bottom right, below the arms where those leave room."""
    last, tall = max(s.x[-1] for s in drawn), limits[1] / limits[0]
    y0 = limits[0] * tall**0.04
    least = min((y for s in drawn for x, y in zip(s.x, s.y, strict=True) if x == last and y == y), default=y0)
    below = max(1.6, (least / y0 / 3) ** 0.5)  # room for a name
    grow = min(4.0, tall**0.2, below)  # T² then takes two fifths of the height at most
    right = {"xytext": (2, 0), "ha": "left", "va": "center"}
    above = {"xytext": (-1, 2.5), "ha": "right", "va": "bottom"}  # right of it may be arms' names
    for power, name, at in ((1, "∝ T", right), (2, "∝ T²", above)):
        y = y0 * grow**power
        axes.plot([last / grow, last], [y0, y], color="#c4c4c4", linewidth=1.4, zorder=1, label=name)
        axes.annotate(name, (last, y), color=GREY, zorder=1, textcoords="offset points", **at)


def _draw_strip(page: Page, strip: Any, rows: list[tuple[Series, str]], edges: tuple[float, float]) -> None:
    """Failed cells: a row for an arm and status, crosses at the lengths, the word where there is room."""
    strip.set(ylim=(len(rows) - 0.5, -0.5), yticks=[], xticks=[], facecolor="#f5f5f5")
    strip.minorticks_off()
    for spine in strip.spines.values():
        spine.set_visible(False)
    name_x = edges[1] + NAME_GAP_PT
    for number, (series, status) in enumerate(rows):
        lengths = [x for x, word in series.failed if word == status]
        ink = {"color": series.look.ink}
        cross = {
            "marker": "x",
            "markersize": 4.2,
            "markeredgewidth": 1.1,
            "linestyle": "none",
            "color": series.look.colour,
        }
        strip.plot(lengths, [number] * len(lengths), label=f"{series.impl} {status}", **cross)
        places = [page.at(strip, x, number) for x in lengths]
        y = places[0][1]
        middle = _room([x for x, _ in places], edges, text_width(status) + 4)
        if middle is None:
            page.text(name_x, y, f"{series.impl}: {status}", **ink)
            continue
        page.text(middle, y, status, ha="center", **ink)
        page.text(name_x, y, series.impl, **ink)


def _room(crosses: Sequence[float], edges: tuple[float, float], need: float) -> float | None:
    """Middle of a gap that takes `need` points: before the crosses, after them, or between two."""
    half = 4.0  # of a cross and the air around it
    if crosses[0] - half - edges[0] >= need:
        return crosses[0] - half - need / 2
    if edges[1] - crosses[-1] - half >= need:
        return crosses[-1] + half + need / 2
    pairs = itertools.pairwise(crosses)
    return next(((a + b) / 2 for a, b in pairs if b - a - 2 * half >= need), None)


def draw_names(page: Page, axes: Any, series: Sequence[Series], x: float, ys: Sequence[float]) -> None:
    """The names of lines at x points, each tied to the last point of its line."""
    for arm, y in zip(series, ys, strict=True):
        end_x, end_y = page.at(axes, *(arm.last() or (1, 1.0)))
        page.sheet.plot(
            [end_x + 3, x - 9, x - 2], [end_y, y, y], color=arm.look.colour, linewidth=0.4, alpha=0.6
        )
        page.text(x, y, arm.impl, color=arm.look.ink)


def name_lines(page: Page, axes: Any, series: Sequence[Series], box: Box) -> None:
    """Names right of a panel, level with their lines where they can be; none where they cannot all fit."""
    left, top, width, height = box
    if len(series) * LABEL_PT <= height + LABEL_PT:
        ends = [page.at(axes, *(s.last() or (1, 1.0)))[1] for s in series]
        draw_names(page, axes, series, left + width + NAME_GAP_PT, spread(ends, LABEL_PT, top, top + height))


@dataclass(slots=True)
class Footer:
    """The block under a figure: wrapped sentences, then a table of the arms with each one's line sample."""

    sentences: Sequence[str]
    heading: Sequence[str]
    arms: Sequence[tuple[Look, Sequence[str]]]
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        room = WIDTH_PT - 2 * EDGE_PT
        self.lines = [line for sentence in self.sentences for line in wrap(sentence, room)]

    @property
    def height(self) -> float:
        return LINE_PT * (len(self.lines) + len(self.arms) + 1) + 16

    def draw(self, page: Page, top: float) -> None:
        """The columns are as wide as their texts; the last one takes what is left, and is cut there."""
        right, key, gap = WIDTH_PT - EDGE_PT, 30.0, 11.0
        cells = [self.heading, *(texts for _, texts in self.arms)]
        widths = [max(text_width(row[i]) for row in cells) + gap for i in range(len(self.heading))]
        starts = [EDGE_PT + key + sum(widths[:i]) for i in range(len(widths))]
        page.sheet.plot([EDGE_PT, right], [top, top], color=LIGHT, linewidth=0.6)
        y = top + 8
        for line in self.lines:
            page.text(EDGE_PT, y, line, color="#555555")
            y += LINE_PT
        y += 3
        for i, words in enumerate(cells):
            for start, text in zip(starts, words, strict=True):
                page.text(start, y, fit(text, right - start), color=DARK if i else "#555555")
            if i:
                look = self.arms[i - 1][0]
                ends = [EDGE_PT, EDGE_PT + 22]
                page.sheet.plot(ends, [y, y], color=look.colour, linestyle=look.dashes, linewidth=1.1)
                page.sheet.plot([EDGE_PT + 11], [y], **marker(look))
            y += LINE_PT
