"""Perplexity against position, from extrapolate.csv alone."""

import itertools
import math
import re
import subprocess
import sys

import pytest

from glabench import report
from glabench.errors import ResultsError
from glabench.figures import extrapolate as figure
from glabench.quality.extrapolate_rows import FILE, REPEATS, ExtrapolateRow, RepeatRow
from glabench.results import RowFile

KEYS = {"verb": "extrapolate", "suite": "extrapolate", "impl_version": "0", "device": "cpu", "env": "e"}
KEYS |= {"params": 9, "dataset": "books", "data_digest": "d", "dtype": "fp32", "n_docs": 4, "train_len": 2048}


def write(folder, curves, bucket=2048, **common):
    """Rows of {(name, family, protocol): [perplexity or None, ...]}."""
    file = RowFile(folder / FILE, ExtrapolateRow)
    for (name, family, protocol), values in curves.items():
        for number, value in enumerate(values, start=1):
            measured = {"status": "error", "reason": "non-finite loss at position 5 of a.txt"}
            if value is not None:
                measured = {"ppl": value, "ppl_lo": value * 0.9, "ppl_hi": value * 1.1}
                measured |= {"nll_nats": math.log(value), "bits_per_byte": math.log2(value) / 4}
            place = {"bucket": number, "bucket_tokens": bucket, "case": f"{protocol}{number}"}
            fields = {**KEYS, "tokenizer": "mistral", **place, **common, **measured}
            file.append(ExtrapolateRow(impl=name, family=family, protocol=protocol, **fields))


CURVES = {
    ("gla", "gla", "document"): [20.0, 19.0, 18.5, 18.2],
    ("gla", "gla", "state_passing"): [20.5, 19.2, 18.6, None],
    ("transformer", "attention", "document"): [19.0, 60.0, 400.0, 900.0],
}


def test_a_line_a_checkpoint_and_protocol_with_what_is_missing(tmp_path):
    write(tmp_path, CURVES)
    (sheet,) = figure.sheets(tmp_path, figure.load(tmp_path))
    assert [line.name for line in sheet.lines] == ["gla", "gla, passed state", "transformer"]
    assert [p[0] for p in sheet.lines[0].points] == [2048, 4096, 6144, 8192]
    assert (
        len(sheet.lines[1].points) == 3 and "at 8k: error, non-finite loss at position 5" in sheet.failures[0]
    )
    looks = figure._looks(sheet.lines)
    assert looks["gla"].colour == looks["gla, passed state"].colour != looks["transformer"].colour
    assert looks["gla"].dashes != looks["gla, passed state"].dashes
    assert figure._top(sheet.lines) == 20.5  # the line that leaves does not flatten the others
    assert figure._ending(sheet.lines[2], 20.5) == "transformer ↑ 900.0 at 8k"


def test_lines_that_begin_higher_are_drawn_and_lost_ones_are_not(tmp_path):
    higher = {("mamba", "mamba", "document"): [60.0, 58.0, 57.0, 56.0]}
    lost = {("other", "attention", "document"): [3000.0, 4000.0, 4000.0, 4000.0]}
    write(tmp_path, CURVES | higher | lost)
    (sheet,) = figure.sheets(tmp_path, figure.load(tmp_path))
    top = figure._top(sheet.lines)
    assert top == 60.0 and [figure._ending(line, top) for line in sheet.lines if line.name == "mamba"] == [
        "mamba"
    ]
    low, high = figure._limits(sheet.lines)
    assert low < 18.2 * 0.9 and 60.0 * 1.1 <= high < 120


def test_the_figure_marks_the_training_length_and_draws_bands(tmp_path):
    write(tmp_path, CURVES)
    (sheet,) = figure.sheets(tmp_path, figure.load(tmp_path))
    made = figure._figure(sheet)
    panels = {axes.get_label(): axes for axes in made.axes}
    assert {"measured", "PG19", "SlimPajama"} <= panels.keys()
    axes = panels["measured"]
    assert len(axes.collections) == 3 and len(axes.lines) == 4  # bands; three lines and the mark
    assert list(axes.lines[0].get_xdata()) == [2048, 2048]
    words = [text.get_text() for text in panels["page"].texts]
    assert "trained at 2k" in words and "transformer ↑ 900.0 at 8k" in words


def test_the_published_lines_are_the_papers():
    (pg19, first), (slim, second) = figure.published()
    assert (pg19, slim) == ("PG19", "SlimPajama") and len(first) == len(second) == 8
    gla = next(line for line in second if line.name == "GLA (train 2K)")
    assert gla.points[0][:2] == (2048, 9.22) and gla.points[-1][0] == 20480 and gla.family == "gla"


def test_other_buckets_stand_without_the_published_ones_and_mixed_tokens_in_bits(tmp_path):
    write(tmp_path, {("gla", "gla", "document"): [20.0, 19.0]}, bucket=256)
    write(tmp_path, {("mamba", "mamba", "document"): [3.0, 2.5]}, bucket=256, tokenizer="bytes")
    (sheet,) = figure.sheets(tmp_path, figure.load(tmp_path))
    assert sheet.title == "books: bits a byte by position"
    assert sheet.lines[0].points[0][1] == pytest.approx(math.log2(20) / 4)
    assert "PG19" not in {axes.get_label() for axes in figure._figure(sheet).axes}


def test_the_last_replicate_is_drawn(tmp_path):
    write(tmp_path, {("gla", "gla", "document"): [20.0, 19.0, 18.0]})
    write(tmp_path, {("gla", "gla", "document"): [21.0, 20.0]}, replicate=1)
    assert [r.ppl for r in figure.load(tmp_path)] == [21.0, 20.0]


def test_the_report_has_it_and_draws_it_the_same_again(tmp_path):
    write(tmp_path / "in" / "extrapolate" / "cpu", CURVES)
    page = report.build(tmp_path / "in", tmp_path / "out").read_text()
    assert "Length extrapolation: books: perplexity by position" in page
    assert re.search(r"<td>transformer</td><td>whole context</td><td[^>]*>8k</td>", page)
    report.build(tmp_path / "in", tmp_path / "again")
    for name in ("extrapolate_books_2048.svg", "extrapolate_books_2048.png"):
        first, second = (tmp_path / o / "extrapolate/books_2048" / name for o in ("out", "again"))
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 5000


def test_losses_on_repeated_tokens_are_told_of_the_first_and_last_bucket(tmp_path):
    place = tmp_path / "in" / "extrapolate" / "cpu"
    write(place, CURVES)
    assert "Loss on tokens seen before" not in report.build(tmp_path / "in", tmp_path / "before").read_text()
    file = RowFile(place / REPEATS, RepeatRow)
    for bucket, kind in itertools.product((1, 2, 3), ("repeated", "other")):
        fields = {**KEYS, "impl": "gla", "family": "gla", "protocol": "document", "tokenizer": "mistral"}
        fields |= {"bucket": bucket, "bucket_tokens": 2048, "case": f"{bucket}{kind}", "kind": kind}
        nats = bucket + (kind == "other") / 4
        file.append(RepeatRow(**fields, nll_nats=nats, n_tokens=1000 * bucket))
    (sheet,) = figure.sheets(place, figure.load(place))
    lines = figure.repeat_rows(sheet, figure.load_repeats(place))
    assert lines == [
        ["gla", "whole context", "2k", "1.000", "1,000", "1.250", "1,000"],
        ["gla", "whole context", "6k", "3.000", "3,000", "3.250", "3,000"],
    ]
    assert "Loss on tokens seen before" in report.build(tmp_path / "in", tmp_path / "out").read_text()


def test_drawing_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import glabench.figures.extrapolate, glabench.report"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_file_that_is_not_ours_is_named(tmp_path):
    (tmp_path / FILE).write_text("x,y\n1,2\n")
    with pytest.raises(ResultsError, match=r"the columns of extrapolate.csv are not this version's"):
        report.build(tmp_path, tmp_path / "out")
