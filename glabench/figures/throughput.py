"""throughput.csv -> tokens/s and memory against length x batch, as in the paper's Figure 6; without torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glabench.figures import style as fs
from glabench.figures.rows import Results, latest, runs_of, typed
from glabench.results import read_rows, rows_path
from glabench.rows import ThroughputRow

FILE = rows_path(Path(), "throughput").name
PEER = "gla-fla"
# GLA Figure 6: 1.3B models, one H100; thousand tokens a second and GB at 2048x8, 4096x4, 8192x2, 16384x1
PUBLISHED_AT = ((2048, 8), (4096, 4), (8192, 2), (16384, 1))
PUBLISHED = {
    "transformer": ((51.3, 46.7, 38.7, 29.1), 33.0),
    "mamba": ((22.8, 22.8, 22.8, 26.0), 36.0),
    "gla": ((43.8, 43.5, 43.2, 41.1), 37.0),
}
PUBLISHED_SIZE = "1.3b"
ROW_PT, HEAD_PT, GAP_PT, LEFT_PT = 118.0, 30.0, 34.0, 30.0
Rows = Sequence[ThroughputRow]


def load(place: Path) -> list[Results]:
    """The latest row of each cell, a part a device. Raises: ResultsError for a file that is not ours."""
    rows = latest(typed(ThroughputRow, record) for record in read_rows(place / FILE, ThroughputRow))
    whole = Results(place, tuple(rows), (), runs_of(place / "run.json"))
    devices = sorted({row.device for row in rows})
    return [replace(whole, speed=tuple(r for r in rows if r.device == device)) for device in devices]


def draw(part: Results, out: Path) -> list[Path]:
    """Write out/throughput_SIZE.svg and .png for each size; unchanged rows give identical files."""
    made = []
    for size in dict.fromkeys(row.size for row in part.speed):
        rows = [row for row in part.speed if row.size == size]
        with fs.style():
            made.append(fs.save(_figure(rows, size), out, f"throughput_{size}")[0])
    return made


def _figure(rows: Rows, size: str) -> Any:
    from matplotlib.figure import Figure

    conditions = list(dict.fromkeys(row.condition for row in rows))
    arms = _arms(rows)
    has_published = size == PUBLISHED_SIZE and any(_published(r, "tok_s") for r in rows)
    foot = fs.LINE_PT * (len(arms) + has_published) + 6
    height = HEAD_PT + len(conditions) * (ROW_PT + GAP_PT) + foot
    figure = Figure(figsize=(fs.WIDTH_PT / 72, height / 72))
    width = (fs.WIDTH_PT - 2 * LEFT_PT - 24) / 2
    measures = (("tok_s", "Thousand tokens a second", 1e-3), ("peak_mem_mib", "Peak memory, GiB", 2.0**-10))
    for line, condition in enumerate(conditions):
        mine = [row for row in rows if row.condition == condition]
        top = HEAD_PT + line * (ROW_PT + GAP_PT)
        for column, (name, title, scale) in enumerate(measures):
            left = LEFT_PT + column * (width + LEFT_PT)
            box = (left / fs.WIDTH_PT, 1 - (top + ROW_PT) / height, width / fs.WIDTH_PT, ROW_PT / height)
            axes = figure.add_axes(box, label=f"{condition} {name}")
            _bars(axes, mine, arms, name, scale)
            axes.set_title(f"{title}: {condition}", loc="left", fontsize=fs.TEXT_PT, fontweight="bold")
            if condition == conditions[-1]:
                axes.set_xlabel("tokens a sequence × sequences a step")  # noqa: RUF001
    _legend(figure, arms, rows, height, has_published)
    return figure


def _arms(rows: Rows) -> list[str]:
    """Names of the models, by family in the order of the palette, each model's own peer after it."""
    order = list(fs.FAMILIES)
    ranked = {r.impl: (order.index(r.family) if r.family in order else len(order), r.impl) for r in rows}
    return sorted(ranked, key=ranked.__getitem__)


def _look(row: ThroughputRow) -> dict[str, Any]:
    colour = fs.FAMILIES.get(row.family, fs.OTHER_FAMILY)[0]
    if row.model == PEER:
        return {"facecolor": "white", "edgecolor": colour, "hatch": "//////"}
    return {"facecolor": colour, "edgecolor": colour}


def _bars(axes: Any, rows: Rows, arms: list[str], name: str, scale: float) -> None:
    """Grouped bars over the points; a failed cell is its status in words, a published value a ring."""
    points = sorted({(row.seqlen, row.batch) for row in rows})
    wide = 0.8 / len(arms)
    for row in rows:
        x = points.index((row.seqlen, row.batch)) + (arms.index(row.impl) + 0.5) * wide - 0.4
        value = getattr(row, name)
        if value is None:
            axes.text(x, 0, f" {row.status}", rotation=90, ha="center", va="bottom", color=fs.GREY)
            continue
        axes.bar(x, value * scale, wide * 0.86, linewidth=0.6, **_look(row))
        if name == "tok_s" and row.tok_lo_s is not None:
            low, high = row.tok_lo_s * scale, row.tok_hi_s * scale
            axes.plot([x, x], [low, high], color=fs.DARK, linewidth=0.8)
        published = _published(row, name)
        if published is not None:
            axes.plot(x, published, **_ring())
    axes.set_xticks(range(len(points)), [f"{seqlen} × {batch}" for seqlen, batch in points])  # noqa: RUF001
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_ylim(bottom=0)
    axes.grid(True, axis="y")


def _ring() -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.6, "markerfacecolor": "white", "markeredgecolor": "black",
            "markeredgewidth": 0.8, "linestyle": "none", "zorder": 4}  # fmt: skip


def _published(row: ThroughputRow, name: str) -> float | None:
    """The paper's value beside this row, in its own units; the paper measured its own conditions only."""
    known = PUBLISHED.get(row.model)
    point = (row.seqlen, row.batch)
    if known is None or row.size != PUBLISHED_SIZE or row.condition != "paper" or point not in PUBLISHED_AT:
        return None
    return known[0][PUBLISHED_AT.index(point)] if name == "tok_s" else known[1]


def _legend(figure: Any, arms: list[str], rows: Rows, height: float, has_published: bool) -> None:
    """A line a model: its colour, what computed it, and why it has no bars; then what the rings are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    y = height - fs.LINE_PT * (len(arms) + has_published) - 6
    for name in arms:
        row = next(r for r in rows if r.impl == name)
        mark = Rectangle(
            (LEFT_PT / fs.WIDTH_PT, 1 - (y + 2.5) / height),
            8 / fs.WIDTH_PT,
            5 / height,
            transform=figure.transFigure,
            linewidth=0.6,
            **_look(row),
        )
        figure.add_artist(mark)
        words = fs.fit(f"{name}: {_said(name, rows)}", fs.WIDTH_PT - LEFT_PT - 24)
        figure.text((LEFT_PT + 14) / fs.WIDTH_PT, 1 - y / height, words, va="center")
        y += fs.LINE_PT
    if has_published:
        at = (LEFT_PT + 4) / fs.WIDTH_PT
        figure.add_artist(Line2D([at], [1 - y / height], transform=figure.transFigure, **_ring()))
        words = "published: the paper's Figure 6, one H100, memory in its GB; its precision is not stated"
        figure.text((LEFT_PT + 14) / fs.WIDTH_PT, 1 - y / height, words, va="center")


def _said(name: str, rows: Rows) -> str:
    mine = [row for row in rows if row.impl == name]
    layers = " ".join(dict.fromkeys(row.layer for row in mine if row.status == "ok"))
    failed: dict[str, list[str]] = {}
    for row in mine:
        if row.status != "ok":
            failed.setdefault(f"{row.condition}: {row.status}", []).append(row.reason)
    return "; ".join([*([layers] if layers else []), *(f"{k} ({v[0]})" for k, v in failed.items())])


HEADINGS = (
    "model",
    "condition",
    ">length",
    ">batch",
    "layer",
    "status",
    ">tokens/s",
    ">95% interval",
    ">step",
)
HEADINGS += (">forward", ">loss", ">backward", ">optimiser", ">memory", ">MFU", ">of measured", "reason")


def table_rows(part: Results) -> list[list[str]]:
    """Every row as words, under HEADINGS."""
    return [_words(row) for row in part.speed]


def _words(row: ThroughputRow) -> list[str]:
    def ms(name: str) -> str:
        value = getattr(row, f"{name}_ms")
        return "" if value is None else fs.time_text(value)

    def share(value: float | None) -> str:
        return "" if value is None else f"{fs.number_text(100 * value)}%"

    rate = "" if row.tok_s is None else f"{row.tok_s:,.0f}"
    span = "" if row.tok_lo_s is None else f"{row.tok_lo_s:,.0f} to {row.tok_hi_s:,.0f}"
    parts = [ms(name) for name in ("step", "forward", "loss", "backward", "optimizer")]
    memory = "" if row.peak_mem_mib is None else fs.memory_text(row.peak_mem_mib)
    point = [row.impl, row.condition, str(row.seqlen), str(row.batch), row.layer, row.status]
    return [*point, rate, span, *parts, memory, share(row.mfu_frac), share(row.mfu_measured_frac), row.reason]


def formulas(part: Results) -> list[str]:
    """What a token's FLOPs are, a line a model and length where the length matters."""
    return list(dict.fromkeys(f"{row.impl}: {row.flop_model}" for row in part.speed))
