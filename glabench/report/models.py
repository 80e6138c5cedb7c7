"""Sections of trained models: training, its throughput, length extrapolation, recall, lm-eval."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glabench.figures import extrapolate as figure_extrapolate
from glabench.figures import losses as figure_losses
from glabench.figures import recall as figure_recall
from glabench.figures import throughput as figure_throughput
from glabench.figures.rows import Results, device_name, provenance, runs_of
from glabench.quality import recall_rows, score_rows
from glabench.report import paper_tables
from glabench.report.page import anchor, commands, environments, figure, free, runs_used, table, text
from glabench.results import folders_with


def sections(folder: Path, out: Path, taken: set[Path]) -> Iterator[tuple[Path, str]]:
    """(place, section) of everything below `folder` that is about models, its pictures drawn into `out`."""
    for beside, found in figure_losses.together(folder):
        runs = [run for place in found if (run := figure_losses.load(place, folder / beside)).train]
        if runs:
            place = free(beside if beside.parts else Path("training"), taken)
            picture = figure(figure_losses.draw(runs, out / place))
            title = f"Training: {beside}" if beside.parts else "Training"
            yield place, f'<section id="{anchor(place)}">\n<h2>{text(title)}</h2>{picture}</section>'
    for found in folders_with(folder, figure_throughput.FILE):
        for part in figure_throughput.load(found):
            place = free(part.place(), taken)
            yield place, _throughput(part, place, figure_throughput.draw(part, out / place))
    for found in figure_extrapolate.find(folder):
        yield from _extrapolations(found, out, taken)
    for found in figure_recall.find(folder):
        if rows := recall_rows.load(found / recall_rows.FILE):
            place = free(Path(rows[-1]["suite"]) / rows[-1]["device"] / "recall", taken)
            yield place, _recall(found, rows, place, figure_recall.draw(rows, out / place))
    for found in folders_with(folder, score_rows.FILE):
        if rows := score_rows.load(found):
            place = free(paper_tables.place(rows), taken)
            paper_tables.write_markdown(rows, out / place / "lm-eval.md")
            yield place, _scores(found, rows, place)


def _throughput(part: Results, place: Path, pictures: Sequence[Path]) -> str:
    """Training steps on one device: what made them, the figures, every row, what a FLOP is."""
    rows = part.rows()
    where = device_name(part.run_of(rows[-1].env), rows[-1].device)
    lines = [
        *provenance(part, rows),
        *(f"FLOPs a token, {line}" for line in figure_throughput.formulas(part)),
    ]
    blocks = [
        f'<section id="{anchor(place)}">\n<h2>Training throughput on {text(where)}</h2>',
        "".join(f'<p class="soft">{text(line)}</p>' for line in lines),
        commands(runs_used(part)),
        *(figure(path) for path in pictures),
        table(figure_throughput.HEADINGS, figure_throughput.table_rows(part)),
        environments(part),
        "</section>",
    ]
    return "\n".join(block for block in blocks if block)


def _extrapolations(found: Path, out: Path, taken: set[Path]) -> Iterator[tuple[Path, str]]:
    """A section a figure of `glabench extrapolate`: the figure, then every row."""
    rows, repeats = figure_extrapolate.load(found), figure_extrapolate.load_repeats(found)
    for sheet in figure_extrapolate.sheets(found, rows):
        place = free(Path("extrapolate") / sheet.name, taken)
        picture = figure(figure_extrapolate.draw(sheet, out / place)[0])
        lines = figure_extrapolate.table_rows(sheet)
        body = f"<details><summary>Every row</summary>{table(figure_extrapolate.HEADINGS, lines)}</details>"
        heading = f"<h2>Length extrapolation: {text(sheet.title)}</h2>"
        parts = _repeats(figure_extrapolate.repeat_rows(sheet, repeats))
        yield place, f'<section id="{anchor(place)}">\n{heading}{picture}{parts}{body}</section>'


def _repeats(lines: Sequence[Sequence[str]]) -> str:
    """What recall from the context is worth to each line."""
    if not lines:
        return ""
    note = "A repeated token ends a pair of tokens that stood exactly once before in its document."
    whole = table(figure_extrapolate.REPEAT_HEADINGS, lines)
    return f'<h3>Loss on tokens seen before</h3><p class="soft">{note}</p>{whole}'


def _recall(found: Path, rows: Sequence[dict[str, Any]], place: Path, pictures: Sequence[Path]) -> str:
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
            f'<section id="{anchor(place)}">\n<h2>{text(title)}</h2>',
            commands(runs),
            *(figure(path) for path in pictures),
            "<h3>Accuracy at the learning rate that validation chose</h3>",
            table(*figure_recall.table(rows)),
            "<h3>Runs without a measurement</h3>" + table(headings, failed) if failed else "",
            "</section>",
        )
    )


def _scores(found: Path, rows: Sequence[Any], place: Path) -> str:
    """The paper's tables with ours beside them, and every score."""
    part = Results(found, tuple(rows), (), runs_of(found / "run.json"))  # who made them is told as of times
    where = device_name(part.run_of(rows[-1].env), rows[-1].device)
    blocks = [f'<section id="{anchor(place)}">\n<h2>lm-evaluation-harness on {text(where)}</h2>']
    blocks += [f'<p class="soft">{text(line)}</p>' for line in provenance(part, rows)]
    blocks.append(commands(runs_used(part)))
    for sheet in paper_tables.sheets(rows):
        headings = (sheet.headings[0], *(f">{h}" for h in sheet.headings[1:]))
        blocks.append(f"<h3>{text(sheet.title)}</h3>\n" + table(headings, sheet.lines))
    blocks += [f'<p class="soft">{text(note)}</p>' for note in paper_tables.notes(rows)]
    whole = paper_tables.scores(rows)
    body = table(whole.headings, whole.lines)
    blocks.append(f"<details><summary>{text(whole.title)}</summary>{body}</details>\n</section>")
    return "\n".join(blocks)
