"""recall.csv -> accuracy against width beside the published one, and against the learning rate.

Never imports torch.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glabench.figures import style as fs
from glabench.quality import recall_rows

ALT = {
    "recall_width": "Accuracy against model width, measured and published",
    "recall_rates": "Accuracy against the learning rate, every seed",
}
LEFT_PT, RIGHT_PT, TOP_PT, GAP_PT = 34.0, 84.0, 34.0, 26.0
PANEL_PT, RATE_PANEL_PT = 150.0, 92.0  # heights
FOOT_PT = 26.0  # below a panel: ticks and the axis' name


def find(folder: Path) -> list[Path]:
    """The folders at or below `folder` that hold rows of recall."""
    return sorted(path.parent for path in folder.rglob(recall_rows.FILE))


def draw(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write recall_width and recall_rates, .svg and .png, into `out`; returns the .svg files.

    Unchanged rows give identical files. Raises ResultsError where `out` cannot be written.
    """
    written = []
    for name, figure_of in (("recall_width", _widths), ("recall_rates", _rates)):
        with fs.style():
            figure = figure_of(rows)
            written.append(fs.save(figure, out, name)[0])
    return written


def table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headings (">": right-aligned) and lines: the learning rate that validation chose, and its accuracy."""
    published, lines = recall_rows.published(), []
    for task, of in recall_rows.by_task(rows):
        labels = _labels(of)
        for best in recall_rows.best_of_sweep(of):
            printed = published.get((best.mixer, task["seqlen"], task["kv_pairs"], best.d_model))
            low, high = min(best.accuracies), max(best.accuracies)
            lines.append(
                [
                    _title(task),
                    labels[best.mixer, best.heads],
                    str(best.d_model),
                    _percent(best.median),
                    f"{_percent(low)} to {_percent(high)}" if len(best.chosen) > 1 else "",
                    ", ".join(_percent(row["acc_example_frac"]) for row in best.chosen),
                    _percent(best.best_on_test),
                    "" if printed is None else f"{100 * printed:g}",
                    ", ".join(f"{row['lr']:.3g}" for row in best.chosen),
                    ", ".join(f"{row['epochs']}" for row in best.chosen),
                    str(best.failed or ""),
                ]
            )
    headings = (
        "task",
        "mixer",
        ">width",
        ">% of queries",
        ">seeds' range",
        ">% of examples",
        ">best rate on test",
    )
    return (*headings, ">published", ">rate", ">epochs", ">failed"), lines


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _title(task: dict[str, Any]) -> str:
    return f"{task['seqlen']} tokens, {task['kv_pairs']} pairs"


def _how(task: dict[str, Any]) -> str:
    return (
        f"{task['layers']} layers, vocabulary {task['vocab']:,}, {task['examples']:,} examples in batches of "
        f"{task['batch']}, at most {task['epochs_max']} epochs, {task['dtype']}"
    )


def _labels(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Name of each (mixer, heads): the heads where a mixer comes with several numbers of them."""
    arms = sorted({(row["mixer"], row["heads"] or 0) for row in rows})
    names = [mixer for mixer, _ in arms]
    return {(m, h): m if names.count(m) == 1 else f"{m}, {h} heads" for m, h in arms}


def _looks(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], fs.Look]:
    """The family's colour and marker; a family's second arm is dashed."""
    families = {(row["mixer"], row["heads"] or 0): row["family"] for row in rows}
    arms = sorted(families, key=lambda a: (a[0].count("-"), a))
    return dict(zip(arms, fs.family_looks(families[arm] for arm in arms), strict=True))


class _Sheet:
    """A figure as wide as a page, laid out in points from the top left."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(fs.WIDTH_PT / 72, height / 72), dpi=200)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        place = (
            left / fs.WIDTH_PT,
            1 - (top + height) / self.height,
            width / fs.WIDTH_PT,
            height / self.height,
        )
        axes = self.figure.add_axes(place)
        axes.grid(True)
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        return axes

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        at = (x / fs.WIDTH_PT, 1 - y / self.height)
        self.figure.text(*at, words, **{"va": "center_baseline", "color": fs.DARK, **options})


def _widths(rows: Sequence[dict[str, Any]]) -> Any:
    """Figure 4's layout: a panel a task, a line a mixer, seeds as a band, the published values hollow."""
    groups = recall_rows.by_task(rows)
    looks, labels, published = _looks(rows), _labels(rows), recall_rows.published()
    per_row = min(2, len(groups))
    down = -(-len(groups) // per_row)
    step = TOP_PT + PANEL_PT + FOOT_PT
    notes = _notes(groups)
    sheet = _Sheet(down * step + fs.LINE_PT * (len(notes) + 1))
    width = (fs.WIDTH_PT - RIGHT_PT - LEFT_PT * per_row - GAP_PT * (per_row - 1)) / per_row
    for number, (task, of) in enumerate(groups):
        left = LEFT_PT + (number % per_row) * (width + GAP_PT + LEFT_PT)
        top = (number // per_row) * step + TOP_PT
        axes = sheet.axes(left, top, width, PANEL_PT)
        sheet.text(left, top - 8, f"{_title(task)}: % of queries", fontweight="bold")
        bests = recall_rows.best_of_sweep(of)
        dims = sorted({row["d_model"] for row in of})
        _dims_axis(axes, dims)
        lines = {}
        for arm in sorted({(b.mixer, b.heads) for b in bests}):
            mine = [b for b in bests if (b.mixer, b.heads) == arm]
            lines[arm] = _draw_arm(axes, mine, looks[arm], task, published)
        if number % per_row == per_row - 1 or number == len(groups) - 1:
            _name_lines(sheet, lines, labels, looks, left + width, top, PANEL_PT)
    for i, words in enumerate(notes):
        sheet.text(LEFT_PT, sheet.height - fs.LINE_PT * (len(notes) - i) + 3, words, color=fs.DARK)
    return sheet.figure


def _dims_axis(axes: Any, dims: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(dims[0] / 1.12, dims[-1] * 1.12)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.minorticks_off()
    axes.set_xlabel("model width")


def _draw_arm(
    axes: Any, bests: Sequence[Any], look: fs.Look, task: dict[str, Any], published: dict[Any, float]
) -> float:
    """A mixer's line, band and published points; returns where its line ends, in %."""
    x = [best.d_model for best in bests]
    y = [100 * best.median for best in bests]
    low, high = ([100 * pick(best.accuracies) for best in bests] for pick in (min, max))
    if any(len(best.chosen) > 1 for best in bests):
        axes.fill_between(x, low, high, color=look.colour, alpha=0.2, linewidth=0)
    axes.plot(
        x, y, color=look.colour, linestyle=look.dashes, linewidth=1.2, marker=look.marker, markersize=3.8
    )
    keys = [(best.mixer, task["seqlen"], task["kv_pairs"], best.d_model) for best in bests]
    known = [(key[3], 100 * published[key]) for key in keys if key in published]
    if known:
        hollow = {"markerfacecolor": "white", "markeredgecolor": look.colour, "markersize": 5.5}
        axes.plot(
            *zip(*known, strict=True), color=look.colour, linestyle=(0, (1, 2)), linewidth=0.8,
            marker=look.marker, zorder=1.5, **hollow,
        )  # fmt: skip
    return y[-1]


def _name_lines(
    sheet: _Sheet,
    ends: dict[tuple[str, int], float],
    labels: dict[tuple[str, int], str],
    looks: dict[tuple[str, int], fs.Look],
    right: float,
    top: float,
    height: float,
) -> None:
    """The mixers and their last values right of a panel, as near the lines' ends as they do not overlap."""
    arms = list(ends)
    targets = [top + height * (104 - ends[arm]) / 108 for arm in arms]
    for arm, y in zip(arms, fs.spread(targets, fs.LABEL_PT, top, top + height), strict=True):
        sheet.text(
            right + 8, y, fs.fit(f"{ends[arm]:.1f} {labels[arm]}", RIGHT_PT - 10), color=looks[arm].ink
        )


def _notes(groups: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[str]:
    """What made the figure, and what a reader must not miss."""
    seeds = max(len({row["seed"] for row in of}) for _, of in groups)
    spread = f"median of {seeds} seeds, band from the worst to the best" if seeds > 1 else "one seed"
    devices = ", ".join(sorted({row["device"] for _, of in groups for row in of}))
    words = [
        f"Trained on {devices}. Learning rate chosen on validation examples; {spread}. "
        "Numbers: at the largest width."
    ]
    published = {key[:3] for key in recall_rows.published()}
    if any((r["mixer"], r["seqlen"], r["kv_pairs"]) in published for _, of in groups for r in of):
        words[0] += " Hollow: as published (GLA, Figure 4), the best rate on the test set."
    words += [f"{_title(task)}: {_how(task)}." for task, _ in groups]
    gone = sum(row["status"] != "ok" for _, of in groups for row in of)
    if gone:
        words.append(f"Runs without a measurement: {gone}; their reasons stand in recall.csv.")
    return [line for text in words for line in fs.wrap(text, fs.WIDTH_PT - LEFT_PT - fs.EDGE_PT)]


def _rates(rows: Sequence[dict[str, Any]]) -> Any:
    """A row a task, a column a width: every run's accuracy over its learning rate, medians joined."""
    groups = recall_rows.by_task(rows)
    looks, labels = _looks(rows), _labels(rows)
    dims = sorted({row["d_model"] for row in rows})
    width = (fs.WIDTH_PT - LEFT_PT - RIGHT_PT - GAP_PT / 2 * (len(dims) - 1)) / len(dims)
    step = TOP_PT + RATE_PANEL_PT + FOOT_PT
    sheet = _Sheet(len(groups) * step + 2 * fs.LINE_PT)
    for down, (task, of) in enumerate(groups):
        top = down * step + TOP_PT
        sheet.text(
            LEFT_PT, top - 20, f"{_title(task)}: % of queries over the learning rate", fontweight="bold"
        )
        for across, dim in enumerate(dims):
            left = LEFT_PT + across * (width + GAP_PT / 2)
            axes = sheet.axes(left, top, width, RATE_PANEL_PT)
            sheet.text(left, top - 7, f"width {dim}", color=fs.DARK)
            ends = _draw_rates(axes, [row for row in of if row["d_model"] == dim], looks)
            _rate_axis(axes, sorted({row["lr"] for row in of}))
            if across:
                axes.set_yticklabels([])
            if across == len(dims) - 1 and ends:
                _name_lines(sheet, ends, labels, looks, left + width, top, RATE_PANEL_PT)
    words = "A point a run, lines through medians over seeds; crosses at the bottom: no measurement."
    sheet.text(LEFT_PT, sheet.height - fs.LINE_PT, words)
    return sheet.figure


def _rate_axis(axes: Any, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    axes.set_xticks(rates, [f"{rate:.1e}".replace("e-0", "e-") for rate in rates])
    axes.tick_params(axis="x", labelsize=5.5)
    axes.minorticks_off()


def _draw_rates(
    axes: Any, rows: Sequence[dict[str, Any]], looks: dict[tuple[str, int], fs.Look]
) -> dict[tuple[str, int], float]:
    """Points, lines and crosses of one width; returns where each line ends, in %."""
    ends = {}
    for arm in sorted({(row["mixer"], row["heads"] or 0) for row in rows}):
        look = looks[arm]
        mine = [row for row in rows if (row["mixer"], row["heads"] or 0) == arm]
        by_rate: dict[float, list[float]] = {}
        for row in mine:
            if row["status"] == "ok":
                by_rate.setdefault(row["lr"], []).append(100 * row["acc_token_frac"])
        for rate, values in by_rate.items():
            axes.plot([rate] * len(values), values, linestyle="none", color=look.colour, marker=look.marker,
                      markersize=2.6, alpha=0.7)  # fmt: skip
        rates = sorted(by_rate)
        middle = [statistics.median(by_rate[rate]) for rate in rates]
        axes.plot(rates, middle, color=look.colour, linestyle=look.dashes, linewidth=1.0)
        failed = [row["lr"] for row in mine if row["status"] != "ok"]
        axes.plot(failed, [-1] * len(failed), linestyle="none", marker="x", markersize=3.5, color=look.colour)
        if middle:
            ends[arm] = middle[-1]
    return ends
