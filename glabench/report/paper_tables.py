"""Rows of lm-eval -> the paper's Tables 2, 3 and 5, ours beside the published. CSV in, never torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glabench import paper
from glabench.figures.rows import slug
from glabench.quality.score_rows import ScoreRow
from glabench.results import write_whole

MODELS = {"glabench_gla": "GLA", "glabench_retnet": "RetNet", "mamba": "Mamba", "llama": "Transformer++"}
SIZES = {"340M": 340e6, "1.3B": 1.3e9}
SAME_SIZE = 1.5  # parameters may differ by this factor and still be the published size
LONG = 1e5  # from here numbers are written with an exponent
LEVEL = 1.96  # standard errors of ours within which a difference counts as noise
SHORT = {"lambada_openai": "lambada", "squad_completion": "squad", "average": "average"}
SUFFIX = {"word_perplexity": "ppl", "perplexity": "ppl", "contains": "", "": ""}
Key = tuple[str, str]  # (task, metric)


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table: a line each for ours, the published, and the difference, per checkpoint."""

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Published:
    """One line of one of the paper's tables, in the columns' order."""

    model: str
    size: str
    tokens: str
    values: dict[Key, float]


def published() -> dict[str, list[Published]]:
    """Every table by its title."""
    found: dict[str, dict[tuple[str, str], Published]] = {}
    for r in paper.read("tables"):  # Yang et al., ICML 2024 (PMLR 235)
        lines = found.setdefault(r["table"], {})
        line = lines.setdefault((r["model"], r["size"]), Published(r["model"], r["size"], r["tokens"], {}))
        line.values[r["task"], r["metric"]] = float(r["value"])
    return {table: list(lines.values()) for table, lines in found.items()}


def sheets(rows: Sequence[ScoreRow]) -> list[Sheet]:
    """The tables that hold a task of the rows'. Table 5 repeats Table 2 and is drawn where it adds to it.

    Of a checkpoint that went on training under its name, the later weights'.
    """
    made, newest = [], _newest(rows)
    rows = [r for r in rows if r.checkpoint_digest == newest[_named(r)]]
    for table, lines in published().items():
        shots = 5 if table.endswith("5-shot") else 0
        columns = list(max((line.values for line in lines), key=len))
        scored = {(r.task, r.metric) for r in _fitting(rows, shots)}
        wanted = [c for c in columns if c in scored]
        if table == "Table 5, 0-shot" and not set(wanted) - set(_table2()):
            continue
        if wanted:
            made.append(_sheet(table, columns, lines, _fitting(rows, shots)))
    return made


def _named(row: ScoreRow) -> tuple[str, ...]:
    return row.device, row.checkpoint, row.dtype


def _newest(rows: Iterable[ScoreRow]) -> dict[tuple[str, ...], str]:
    """The digest of the weights that were scored last, by checkpoint."""
    return {_named(r): r.checkpoint_digest for r in sorted(rows, key=lambda r: r.started_utc)}


def transposed(sheet: Sheet) -> Sheet:
    """A line a column of the paper's table: it fits a terminal."""
    columns = list(zip(sheet.headings, *sheet.lines, strict=True))
    return Sheet(sheet.title, columns[0], columns[1:])


def _table2() -> list[Key]:
    return list(published()["Table 2"][0].values)


def _fitting(rows: Iterable[ScoreRow], shots: int) -> list[ScoreRow]:
    return [r for r in rows if r.status == "ok" and r.num_fewshot == shots]


def _sheet(table: str, columns: list[Key], lines: list[Published], rows: list[ScoreRow]) -> Sheet:
    body: list[tuple[str, ...]] = []
    for name in dict.fromkeys(map(_named, rows)):
        mine = [r for r in rows if _named(r) == name]
        cells = {(r.task, r.metric): r for r in mine}
        if not cells.keys() & set(columns):
            continue
        ours = {c: _ours(c, columns, cells) for c in columns}
        body.append(
            (f"{mine[0].checkpoint} ({_size(mine[0].parameters)})", *(_cell(ours[c]) for c in columns))
        )
        theirs = _nearest(lines, mine[0])
        if theirs is None:
            continue
        said = [theirs.values.get(c) for c in columns]
        body.append((f"{theirs.model} {theirs.size}, {theirs.tokens} tokens (paper)", *map(_number, said)))
        same = _is_size(theirs, mine[0].parameters)
        differences = (_difference(ours[c], value) for c, value in zip(columns, said, strict=True))
        body.append(("difference" if same else "difference (other size)", *differences))
    return Sheet(f"{table} of the paper", ("model", *(_title(c) for c in columns)), body)


def _ours(
    column: Key, columns: list[Key], cells: dict[Key, ScoreRow]
) -> tuple[float, float | None, str] | None:
    """(value as the paper has it, its standard error, "*" for a subset); accuracies in percent."""
    if column[0] == "average":
        parts = [cells.get(c) for c in columns if c[1] in ("acc", "acc_norm")]
        if any(p is None for p in parts):
            return None
        errors = [p.stderr or 0.0 for p in parts]
        mark = "*" if any(p.subset == "yes" for p in parts) else ""
        mean = sum(p.value for p in parts) / len(parts)
        return 100 * mean, 100 * math.sqrt(sum(e * e for e in errors)) / len(parts), mark
    row = cells.get(column)
    if row is None:
        return None
    scale = 100 if row.unit == "frac" else 1
    error = None if row.stderr is None else scale * row.stderr
    return scale * row.value, error, "*" if row.subset == "yes" else ""


def _nearest(lines: Iterable[Published], row: ScoreRow) -> Published | None:
    """The paper's line of the same kind of model whose size is nearest."""
    wanted = MODELS.get(row.model_type)
    if wanted == "GLA" and row.family != "gla":
        wanted = None  # an ablation
    near = [line for line in lines if line.model == wanted]
    return min(near, key=lambda line: abs(math.log(SIZES[line.size] / row.parameters)), default=None)


def _is_size(line: Published, parameters: int) -> bool:
    return max(SIZES[line.size] / parameters, parameters / SIZES[line.size]) <= SAME_SIZE


def _difference(ours: tuple[float, float | None, str] | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return ""
    value, error, mark = ours
    noise = not mark and error is not None and abs(value - theirs) <= LEVEL * error
    sign = "+" if value >= theirs else ""
    return sign + _number(value - theirs) + (" (noise)" if noise else "")


def _cell(ours: tuple[float, float | None, str] | None) -> str:
    if ours is None:
        return ""
    value, error, mark = ours
    form = ".2f" if max(abs(value), abs(error or 0.0)) < LONG else ".2e"  # both alike
    return f"{value:{form}}{mark}" + (f" ± {error:{form}}" if error is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) < LONG else f"{value:.2e}"


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _title(column: Key) -> str:
    task, metric = column
    return f"{SHORT.get(task, task)} {SUFFIX.get(metric, metric)}".strip()


def notes(rows: Sequence[ScoreRow]) -> list[str]:
    """What a reader must know to read the tables."""
    if not any(r.status == "ok" for r in rows):
        return []
    versions = ", ".join(sorted({r.harness_version for r in rows}))
    said = [
        f"± is one standard error over documents; (noise): the difference is within {LEVEL} of ours. "
        f"The paper names no version of the harness; ours is {versions}."
    ]
    if any(r.subset == "yes" for r in rows):
        said.append("* fewer documents than the published split: not comparable.")
    newest = _newest(rows)
    for name in dict.fromkeys(r.checkpoint for r in rows if r.checkpoint_digest != newest[_named(r)]):
        said.append(f"{name}: earlier weights of that name were scored too; the tables have the later ones'.")
    return said + _speedups(rows)


def _speedups(rows: Sequence[ScoreRow]) -> list[str]:
    """Per checkpoint, the seconds of the harness's own model class over ours, where they were compared."""
    lines = []
    for name in dict.fromkeys(r.checkpoint for r in rows):
        timed = {r.task: r for r in rows if r.checkpoint == name and r.hf_answer_s and r.answer_s}
        if timed:
            ours, theirs = (sum(getattr(r, f) for r in timed.values()) for f in ("answer_s", "hf_answer_s"))
            parts = ", ".join(f"{task} {r.hf_ratio:.2f}x" for task, r in timed.items())
            lines.append(f"{name}: {theirs / ours:.2f}x as fast as the harness's own model class ({parts}).")
    return lines


# --- a folder of results ---------------------------------------------------------------------------------


def place(rows: Sequence[ScoreRow]) -> Path:
    """<verb>/<device>: where a report puts what it makes of them."""
    return Path("lm-eval") / slug(rows[0].device)


def scores(rows: Sequence[ScoreRow]) -> Sheet:
    """Every row, failures with their reason."""
    headings = (
        "checkpoint",
        "weights",
        "task",
        "shots",
        "metric",
        "value",
        "stderr",
        "n",
        "version",
        "status",
        "reason",
    )
    lines = [
        (
            r.checkpoint,
            r.checkpoint_digest,
            r.task,
            str(r.num_fewshot),
            r.metric,
            "" if r.value is None else f"{r.value:.5g}",
            "" if r.stderr is None else f"{r.stderr:.2g}",
            "" if r.n is None else str(r.n),
            r.task_version,
            r.status,
            r.reason,
        )
        for r in rows
    ]
    return Sheet("Every score", headings, lines)


def write_markdown(rows: Sequence[ScoreRow], path: Path) -> Path:
    """The tables as Markdown. Raises: ResultsError where it cannot be written."""
    blocks = []
    for sheet in (*sheets(rows), scores(rows)):
        rule = "|" + "---|" * len(sheet.headings)
        lines = ["| " + " | ".join(w.replace("|", "/") for w in line) + " |" for line in sheet.lines]
        head = "| " + " | ".join(sheet.headings) + " |"
        blocks.append("\n".join((f"## {sheet.title}", "", head, rule, *lines)))
    write_whole(path, "\n\n".join((*blocks, *notes(rows))) + "\n")
    return path
