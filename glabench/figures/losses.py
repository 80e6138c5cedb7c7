"""metrics.csv of training runs -> one figure of their losses against tokens. Never imports torch."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glabench.errors import ResultsError
from glabench.figures import style as fs

METRICS, IDENTITY = "metrics.csv", "train.json"
HEADER = "step,tokens,loss,"
SMOOTH = 50  # parts a training curve is averaged into: the noise of single batches hides the order of runs
EARLY = 0.05  # of the tokens: losses before them may lie above the frame, or the rest would be a flat line
FAMILY_OF = {"transformer": "attention", "llama": "attention", "retnet": "retention"}  # by the model's name
ABLATION_OF = {"no-gate": "linear_attention", "fixed-decay": "retention", "scalar-gate": "simple_gla"}


@dataclass(frozen=True, slots=True)
class Run:
    """One run's curves: (tokens, nats) of each step, and of each evaluation."""

    name: str
    family: str
    train: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    note: str


def find(folder: Path) -> list[Path]:
    """The folders of training runs at or below `folder`."""
    return sorted(p.parent for p in folder.rglob(METRICS) if (p.parent / IDENTITY).is_file())


def together(folder: Path) -> list[tuple[Path, list[Path]]]:
    """The folders of runs that lie beside each other, which share a figure, with their place in `folder`."""
    found = find(folder)
    if found == [folder]:
        return [(Path(), found)]
    groups: dict[Path, list[Path]] = {}
    for place in found:
        groups.setdefault(place.parent.relative_to(folder), []).append(place)
    return list(groups.items())


def load(place: Path, folder: Path) -> Run:
    """Read a run; a last line that is still being written is left out. Raises: ResultsError."""
    try:
        text = (place / METRICS).read_text(encoding="utf-8")
        record = json.loads((place / IDENTITY).read_text(encoding="utf-8"))
        identity, started = record["identity"], record["runs"][-1]
        if not text.startswith(HEADER):
            raise ValueError(f"{METRICS} has other columns")
        rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
        train = [(int(r["tokens"]), float(r["loss"])) for r in rows]
        valid = [(int(r["tokens"]), float(r["valid_loss"])) for r in rows if r["valid_loss"]]
        model = identity["model"]
        note = f"seed {identity['seed']}, data {identity['data'][:12]}, {started['device']}"
        wanted, done = identity["train"]["steps"], int(rows[-1]["step"]) if rows else 0
        note += "" if done == wanted else f"; {done:,} of {wanted:,} steps"
    except (OSError, ValueError, KeyError, IndexError, TypeError) as err:
        raise ResultsError(
            f"cannot read the run: {err}", where=str(place), fix="take the folder away, or mend it"
        ) from err
    name = place.relative_to(folder).as_posix() if place != folder else place.resolve().name
    return Run(name, family_of(str(model.get("name") or model.get("model_type"))), train, valid, note)


def family_of(model: str) -> str:
    """The registry's family of a model's token mixer, by its name: gla-30m-no-gate is linear attention."""
    base, _, rest = model.partition("-")
    return ABLATION_OF.get(rest.partition("-")[2]) or FAMILY_OF.get(base, base)


def smooth(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over at most SMOOTH parts of equal length, each at the middle of its tokens."""
    size = -(-len(points) // SMOOTH)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def draw(runs: list[Run], out: Path) -> Path:
    """Write out/loss.svg and loss.png and return the first; unchanged runs give identical files."""
    with fs.style():
        return fs.save(_figure(runs), out, "loss")[0]


def _figure(runs: list[Run]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    # inches: a row of the page for the axes, and a line for each run's name and note below them
    height_pt = 230.0 + fs.LINE_PT * len(runs)
    figure = Figure(figsize=(fs.WIDTH_PT / 72, height_pt / 72))
    bottom = (34.0 + fs.LINE_PT * len(runs)) / height_pt
    axes = figure.add_axes((0.08, bottom, 0.9, 1 - bottom - 20 / height_pt))
    has_valid = any(run.valid for run in runs)
    for number, (run, look) in enumerate(zip(runs, fs.family_looks(r.family for r in runs), strict=True)):
        line = {"color": look.colour, "linestyle": look.dashes}
        faint = {"alpha": 0.35, "linewidth": 0.8} if has_valid else {"linewidth": 1.2}
        axes.plot(*zip(*smooth(run.train), strict=True), **line, **faint)
        if run.valid:
            dots = {"marker": look.marker, "markersize": 2.5, "linewidth": 1.2}
            axes.plot(*zip(*run.valid, strict=True), **line, **dots)
        last = (run.valid or run.train)[-1][1]
        words = f"{run.name}: {'validation' if run.valid else 'training'} {last:.4f} ({run.note})"
        y = (8.0 + fs.LINE_PT * (len(runs) - 1 - number)) / height_pt
        middle = y + fs.TEXT_PT / 2 / height_pt
        figure.add_artist(Line2D((0.08, 0.115), (middle, middle), **line, linewidth=1.2))
        figure.text(0.125, y, words, color=look.ink, va="bottom")
    axes.set_ylim(*limits(runs))
    axes.grid(True)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.5M
    figure.text(
        0.01,
        1 - 6 / height_pt,
        "Loss, nats a token" + ("; validation marked, training faint" if has_valid else ""),
        va="top",
    )
    return figure


def limits(runs: list[Run]) -> tuple[float, float]:
    """Of all losses but the EARLY ones, with a margin."""
    first = EARLY * max(run.train[-1][0] for run in runs)
    late = [
        loss
        for run in runs
        for curve in (smooth(run.train), run.valid)
        for tokens, loss in curve
        if tokens >= first
    ]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin
