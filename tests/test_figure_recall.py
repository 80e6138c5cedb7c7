"""Recall's rows: which learning rate counts, and the figures and the page drawn from them."""

import json

import pytest
from made_recall import made_folder, made_row

from glabench import report
from glabench.errors import ResultsError
from glabench.figures import recall as figure_recall
from glabench.quality import recall_rows
from glabench.quality.recall_rows import FILE, RecallRow
from glabench.results import RowFile


def rows_of(tmp_path, *rows):
    file = RowFile(tmp_path / FILE, RecallRow)
    for row in rows:
        file.append(row)
    return recall_rows.load(tmp_path / FILE)


def test_validation_chooses_the_rate_and_never_the_test_set(tmp_path):
    rows = rows_of(
        tmp_path,
        made_row("gla", 64, 1e-3, 0, acc_token_frac=0.7, val_acc_frac=0.8),
        made_row("gla", 64, 1e-2, 0, acc_token_frac=0.9, val_acc_frac=0.6),
        made_row("gla", 64, 1e-3, 1, acc_token_frac=0.5, val_acc_frac=0.5),
        made_row("gla", 64, 1e-4, 1, status="error", reason="diverged: the loss is not finite"),
    )
    (best,) = recall_rows.best_of_sweep(rows)
    assert [row["lr"] for row in best.chosen] == [1e-3, 1e-3]
    assert best.accuracies == [0.7, 0.5] and best.median == pytest.approx(0.6)
    assert best.best_on_test == pytest.approx(0.7) and best.failed == 1  # median of 0.9 and 0.5


def test_a_later_row_of_a_cell_takes_the_place_of_the_earlier(tmp_path):
    first = made_row("gla", 64, 1e-3, 0, status="timeout", reason="train took longer than 1 s")
    rows = rows_of(tmp_path, first, made_row("gla", 64, 1e-3, 0, acc_token_frac=0.25, replicate=1))
    assert len(rows) == 1 and rows[0]["acc_token_frac"] == 0.25 and rows[0]["peak_mem_mib"] is None


def test_tasks_and_ways_of_training_are_kept_apart(tmp_path):
    rows = rows_of(tmp_path, made_row("gla", 64, 1e-3, 0), made_row("gla", 64, 1e-3, 0, layers=4))
    groups = recall_rows.by_task(rows)
    assert [task["layers"] for task, _ in groups] == [2, 4] and all(len(of) == 1 for _, of in groups)


def test_the_report_draws_recall_the_same_again_and_names_what_failed(tmp_path):
    made_folder(tmp_path / "results" / "fig4" / "cpu")
    run = {"id": "0123456789ab", "argv": ["recall", "--panel", "paper"], "comparable": {"cpu": "A CPU"}}
    (tmp_path / "results" / "fig4" / "cpu" / "run.json").write_text(json.dumps({"schema": 1, "runs": [run]}))
    page = report.build(tmp_path / "results", tmp_path / "out").read_text()
    assert "Recall (MQAR), fig4 on A CPU" in page and "glabench recall --panel paper" in page
    assert "diverged: the loss" in page and all(alt in page for alt in figure_recall.ALT.values())
    assert "<td>512 tokens, 64 pairs</td><td>gla</td>" in page
    report.build(tmp_path / "results", tmp_path / "again")
    for name in figure_recall.ALT:
        for kind in ("svg", "png"):
            first, second = (
                tmp_path / out / "fig4" / "cpu" / "recall" / f"{name}.{kind}" for out in ("out", "again")
            )
            assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 8000


def test_the_table_sets_the_published_accuracy_beside_the_measured(tmp_path):
    rows = recall_rows.load(made_folder(tmp_path, mixers=("gla",), dims=(128,), seeds=2) / FILE)
    headings, lines = figure_recall.table(rows)
    published = headings.index(">published")
    assert [line[published] for line in lines] == ["99", "95"]
    assert all(" to " in line[headings.index(">seeds' range")] for line in lines)


def test_one_mixer_at_one_width_and_rate_is_drawn_too(tmp_path):
    rows = rows_of(tmp_path, made_row("gla-no-gate", 64, 1e-3, 0), made_row("gla", 64, 1e-3, 0, heads=4))
    assert [path.name for path in figure_recall.draw(rows, tmp_path)] == [
        "recall_width.svg",
        "recall_rates.svg",
    ]


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / FILE).write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match=r"columns of recall.csv are not this version's"):
        report.build(tmp_path, tmp_path / "out")
