"""Figure 6 from throughput.csv: what is drawn, what failed is said, and the same rows give the same files."""

import json

import pytest
from made_rows import RUN

from glabench import report
from glabench.errors import ResultsError
from glabench.figures import style as fs
from glabench.figures import throughput as figure_throughput
from glabench.results import RowFile
from glabench.rows import ThroughputRow

FAMILIES = {"gla": "gla", "gla-fla": "gla", "mamba": "mamba", "transformer": "attention"}
POINTS = ((2048, 8), (4096, 4), (8192, 2), (16384, 1))


def made(folder, size="1.3b", conditions=("paper", "modern")):
    """Rows with made-up numbers, never kept: Mamba runs out of memory once, the peer is missing once."""
    file = RowFile(folder / "throughput.csv", ThroughputRow)
    for condition in conditions:
        for rank, (model, family) in enumerate(FAMILIES.items()):
            for seqlen, batch in POINTS:
                keys = {"verb": "throughput", "suite": "throughput", "case": f"{size}{condition}{seqlen}"}
                keys |= {"impl": f"{model}-{size}", "impl_version": "1", "family": family, "device": "h200"}
                keys |= {
                    "model": model,
                    "size": size,
                    "condition": condition,
                    "batch": batch,
                    "seqlen": seqlen,
                }
                keys |= {"precision": "bf16", "env": "e1", "flop_model": f"6 x {seqlen}"}
                if model == "mamba" and (condition, seqlen) == ("modern", 16384):
                    file.append(ThroughputRow(**keys, status="oom", reason="asked for 9 MiB"))
                elif model == "gla-fla" and condition == "modern":
                    file.append(ThroughputRow(**keys, status="unavailable", reason="it is not installed"))
                else:
                    rate = 4e4 + 4e3 * rank - seqlen * (model == "transformer")
                    seen = {
                        "tok_s": rate,
                        "tok_lo_s": 0.98 * rate,
                        "tok_hi_s": 1.02 * rate,
                        "layer": "some_layer",
                    }
                    seen |= {"step_ms": 4e5 / rate, "peak_mem_mib": 33e3 + 900 * rank, "mfu_frac": 0.3}
                    file.append(ThroughputRow(**keys, **seen))
    (folder / "run.json").write_text(json.dumps({"schema": 1, "runs": [RUN]}))
    return folder


@pytest.fixture
def part(tmp_path):
    (found,) = figure_throughput.load(made(tmp_path / "throughput" / "h200"))
    return found


def test_bars_are_the_rows_and_rings_the_papers_values(part):
    with fs.style():
        figure = figure_throughput._figure(part.speed, "1.3b")
    axes = {a.get_label(): a for a in figure.axes}
    assert set(axes) == {f"{c} {n}" for c in ("paper", "modern") for n in ("tok_s", "peak_mem_mib")}
    heights = sorted(bar.get_height() for bar in axes["paper tok_s"].patches)
    ok = [r for r in part.speed if r.condition == "paper"]
    assert heights == pytest.approx(sorted(r.tok_s / 1e3 for r in ok)) and len(heights) == 16
    rings = [line.get_ydata()[0] for line in axes["paper tok_s"].lines if line.get_marker() == "o"]
    assert sorted(rings) == sorted(v for rates, _ in figure_throughput.PUBLISHED.values() for v in rates)
    assert not [line for line in axes["modern tok_s"].lines if line.get_marker() == "o"]
    words = [t.get_text().strip() for t in axes["modern tok_s"].texts]
    assert words.count("oom") == 1 and words.count("unavailable") == 4


def test_the_legend_says_what_computed_and_why_bars_are_missing(part):
    with fs.style():
        figure = figure_throughput._figure(part.speed, "1.3b")
    said = [t.get_text() for t in figure.texts]
    assert "gla-fla-1.3b: some_layer; modern: unavailable (it is not installed)" in said
    assert any(t.startswith("published: the paper's Figure 6") for t in said)


def test_another_size_has_nothing_published_beside_it(tmp_path):
    (found,) = figure_throughput.load(made(tmp_path, size="340m", conditions=("paper",)))
    with fs.style():
        figure = figure_throughput._figure(found.speed, "340m")
    assert not any("published" in t.get_text() for t in figure.texts)


def test_the_report_has_the_figure_and_every_row_and_is_the_same_again(tmp_path):
    made(tmp_path / "results" / "throughput" / "h200")
    page = report.build(tmp_path / "results", tmp_path / "out").read_text()
    assert "<h2>Training throughput on NVIDIA H200</h2>" in page and page.count("<td>unavailable</td>") == 4
    assert "FLOPs a token, gla-1.3b: 6 x 2048" in page and "asked for 9 MiB" in page
    report.build(tmp_path / "results", tmp_path / "again")
    for kind in ("svg", "png"):
        name = f"throughput/h200/throughput_1.3b.{kind}"
        first, second = ((tmp_path / out / name).read_bytes() for out in ("out", "again"))
        assert first == second and len(first) > 5000


def test_a_file_of_other_columns_is_named(tmp_path):
    (tmp_path / "throughput.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match=r"columns of throughput\.csv"):
        report.build(tmp_path, tmp_path / "out")
