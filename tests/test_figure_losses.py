"""Loss curves from metrics.csv: what is read, what is drawn, and that unchanged runs give the same files."""

import json

import pytest

from glabench import report
from glabench.errors import ResultsError
from glabench.figures import losses as figure_losses
from glabench.figures import style

HEADER = "step,tokens,loss,lr,grad_norm,tokens_per_s,peak_mem_mib,valid_loss"


def made_run(folder, model, loss, steps=120, tail="", of=None):
    folder.mkdir(parents=True)
    lines = [
        f"{n},{n * 100},{loss + 1 / n!r},0.1,1.0,5.0,9.0,{loss if n % 60 == 0 else ''}"
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.csv").write_text("\n".join([HEADER, *lines]) + "\n" + tail)
    identity = {
        "model": {"name": model},
        "train": {"steps": of or steps},
        "seed": 3,
        "data": "0123456789abcdef",
    }
    (folder / "train.json").write_text(json.dumps({"identity": identity, "runs": [{"device": "a machine"}]}))


def test_a_run_is_read_up_to_a_line_that_is_being_written(tmp_path):
    made_run(tmp_path / "a", "gla-tiny", 2.0, tail="121,121")
    run = figure_losses.load(tmp_path / "a", tmp_path)
    assert (run.name, run.family, len(run.train)) == ("a", "gla", 120)
    assert run.valid == [(6000, 2.0), (12000, 2.0)] and run.train[0] == (100, 3.0)


def test_a_run_has_the_colour_of_its_token_mixer_and_a_second_one_another_line(tmp_path):
    models = ("transformer-30m", "retnet-30m", "mamba-30m", "gla-30m", "gla-30m-1-head", "gla-30m-no-gate")
    for model in models:
        made_run(tmp_path / model, model, 2.0)
    runs = [figure_losses.load(tmp_path / model, tmp_path) for model in models]
    families = [run.family for run in runs]
    assert families == ["attention", "retention", "mamba", "gla", "gla", "linear_attention"]
    looks = style.family_looks(families)
    assert [look.colour for look in looks] == [style.FAMILIES[family][0] for family in families]
    assert len({(look.colour, str(look.dashes)) for look in looks}) == len(models)


def test_the_first_losses_do_not_flatten_the_rest(tmp_path):
    made_run(tmp_path / "a", "gla-tiny", 2.0)  # 3 nats at first, 2.17 after a twentieth
    low, high = figure_losses.limits([figure_losses.load(tmp_path / "a", tmp_path)])
    assert 1.9 < low < 2.0 and 2.1 < high < 2.2


def test_smoothing_keeps_the_mean_and_few_points():
    points = [(n, float(n % 7)) for n in range(1000)]
    means = figure_losses.smooth(points)
    assert len(means) == 50 and figure_losses.smooth(points[:3]) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert sum(y for _, y in means) / 50 == pytest.approx(sum(y for _, y in points) / 1000, rel=1e-12)


def test_the_report_has_a_figure_of_every_run_and_draws_it_the_same_again(tmp_path):
    made_run(tmp_path / "runs" / "gla", "gla-tiny", 2.0)
    made_run(tmp_path / "runs" / "retnet", "retnet-tiny", 2.1)
    page = report.build(tmp_path / "runs", tmp_path / "out")
    assert "<h2>Training</h2>" in page.read_text() and 'alt="Loss against tokens"' in page.read_text()
    report.build(tmp_path / "runs", tmp_path / "again")
    for name in ("loss.svg", "loss.png"):
        first, second = (tmp_path / out / "training" / name for out in ("out", "again"))
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 5000


def test_runs_of_several_folders_have_a_figure_each(tmp_path):
    for name in ("main/gla", "tune/gla", "main/retnet"):
        made_run(tmp_path / "results" / name, "gla-tiny", 2.0)
    page = report.build(tmp_path / "results", tmp_path / "out").read_text()
    assert page.count('alt="Loss against tokens"') == 2
    assert "<h2>Training: main</h2>" in page and "<h2>Training: tune</h2>" in page
    assert {p.parent.name for p in (tmp_path / "out").rglob("loss.svg")} == {"main", "tune"}


def test_a_run_that_was_cut_off_says_so(tmp_path):
    made_run(tmp_path / "a", "gla-tiny", 2.0, steps=60, of=1000)
    made_run(tmp_path / "b", "gla-tiny", 2.0)
    notes = [figure_losses.load(tmp_path / name, tmp_path).note for name in "ab"]
    assert notes[0].endswith("; 60 of 1,000 steps") and "steps" not in notes[1]


def test_a_run_that_cannot_be_read_is_named(tmp_path):
    made_run(tmp_path / "a", "gla-tiny", 2.0)
    (tmp_path / "a" / "metrics.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ResultsError, match=r"metrics.csv has other columns .*; take the folder away"):
        report.build(tmp_path, tmp_path / "out")
