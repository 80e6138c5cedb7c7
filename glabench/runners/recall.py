"""`glabench recall`: the plan, the rows and their summary."""

import collections
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glabench import tables
from glabench.quality import recall_rows
from glabench.quality.recall_rows import DIVERGED
from glabench.rows import BAD
from glabench.runners.recall_grid import Panel, Request
from glabench.runners.recall_training import Training


def plan(asked: Request) -> dict[str, Any]:
    """What a run would do: cells with the steps each may take; trains nothing, writes nothing."""
    cells = [
        {**cell.keys(), "seed": cell.seed, "impl": asked.impl(cell).id, "steps_max": _steps(cell.panel)}
        for cell in asked.cells
    ]
    return {
        "device": asked.device,
        "suites": sorted({p.suite for p in asked.panels}),
        "jobs": asked.jobs,
        "cells": cells,
        "steps_max": sum(cell["steps_max"] for cell in cells),
    }


def _steps(panel: Panel) -> int:
    return panel.epochs * -(-panel.examples // panel.batch)


def run(asked: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Train what is missing; rows, and their summary. Raises GlabenchError before training."""
    training = Training(asked, say)
    rows = training.run()
    return {
        "folders": [str(folder) for folder in training.folders.values()],
        "trained": len(training.rows),
        "left_out": training.left_out,
        "rows": rows,
        "summary": summarise(rows),
        "bad": _bad(rows),
    }


def _bad(rows: Sequence[Mapping[str, Any]]) -> int:
    """Rows that failed; a learning rate that diverged counts only where all of its model's did."""
    diverged = [row for row in rows if row["reason"].startswith(DIVERGED)]
    model = ("seqlen", "kv_pairs", "mixer", "d_model", "seed")
    fine = {tuple(row[k] for k in model) for row in rows if row["status"] == "ok"}
    hopeless = sum(tuple(row[k] for k in model) not in fine for row in diverged)
    return hopeless + sum(row["status"] in BAD for row in rows) - len(diverged)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a task, mixer and width: the accuracy of the learning rate that validation chose."""
    published = recall_rows.published()
    return [
        {
            **task,
            "mixer": best.mixer,
            "heads": best.heads or None,
            "d_model": best.d_model,
            "seeds": len(best.chosen),
            "acc_token_frac": best.median,
            "acc_token_min_frac": min(best.accuracies),
            "acc_token_max_frac": max(best.accuracies),
            "acc_example_frac": statistics.median([row["acc_example_frac"] for row in best.chosen]),
            "best_on_test_frac": best.best_on_test,
            "lr": sorted({row["lr"] for row in best.chosen}),
            "published_frac": published.get((best.mixer, task["seqlen"], task["kv_pairs"], best.d_model)),
            "failed": best.failed,
        }
        for task, of in recall_rows.by_task(rows)
        for best in recall_rows.best_of_sweep(of)
    ]


def show(done: dict[str, Any]) -> None:
    """The summary as a table, and where the rows are."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    lines = []
    for s in done["summary"]:
        low, high = percent(s["acc_token_min_frac"]), percent(s["acc_token_max_frac"])
        lines.append(
            [
                f"T={s['seqlen']} K={s['kv_pairs']}",
                s["mixer"],
                s["d_model"],
                percent(s["acc_token_frac"]),
                f"{low} to {high}" if s["seeds"] > 1 else "",
                percent(s["acc_example_frac"]),
                percent(s["best_on_test_frac"]),
                percent(s["published_frac"]),
                ", ".join(f"{lr:.3g}" for lr in s["lr"]),
                s["seeds"],
                s["failed"] or "",
            ]
        )
    headings = ("task", "mixer", "width", "% queries", "seeds' range", "% examples", "best on test")
    headings += ("published", "rate chosen", "seeds", "failed")
    tables.show(headings, lines, right=headings[2:8])
    tables.say("% of test queries at the learning rate that validation chose, median over seeds.")
    if done["left_out"]:
        tables.say(f"{done['left_out']} runs left out: another rate had solved the task for their model.")
    for folder in done["folders"]:
        tables.say(f"rows: {Path(folder) / recall_rows.FILE}")


def show_plan(planned: dict[str, Any]) -> None:
    models = collections.Counter(
        (c["seqlen"], c["kv_pairs"], c["mixer"], c["impl"], c["d_model"]) for c in planned["cells"]
    )
    lines = [[f"T={t} K={k}", mixer, impl, dim, count] for (t, k, mixer, impl, dim), count in models.items()]
    tables.show(("task", "mixer", "implementation", "width", "runs"), lines, right=("width", "runs"))
    tables.say(
        f"{len(planned['cells'])} runs of at most {planned['steps_max']:,} steps together, "
        f"{planned['jobs']} at once on {planned['device']}; a run ends once it is solved."
    )
