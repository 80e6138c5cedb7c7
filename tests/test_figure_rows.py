"""What a figure is drawn from, how its parts are placed, and that files are the same when rows are."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import FEW, MANY, RUN, cases, memory, speed, write

from glabench.errors import ResultsError
from glabench.figures import layers as figures
from glabench.figures import style as fs
from glabench.figures.rows import arm_texts, how_timed, load, provenance, sheets, split_grids

NEVER = settings(derandomize=True, deadline=None, max_examples=200)


def test_the_last_row_of_a_cell_is_drawn_whatever_its_environment(tmp_path):
    (case,) = cases((1024,), ("fwd",))
    first = speed(case, "gla_chunk", "gla")
    rows = [first, replace(first, time_ms=9.0, env="e2"), speed(case, "attention_fa2", "attention")]
    results = load(write(tmp_path, rows))
    assert [(r.impl, r.time_ms) for r in results.speed if r.impl == "gla_chunk"] == [("gla_chunk", 9.0)]
    assert [r.time_ms for r in results.earlier] == [first.time_ms]


def test_a_failure_after_a_success_is_what_is_drawn(tmp_path):
    (case,) = cases((1024,), ("fwd",))
    rows = [speed(case, "gla_chunk", "gla"), speed(case, "gla_chunk", "gla", "crashed")]
    assert [r.status for r in load(write(tmp_path, rows)).speed] == ["crashed"]


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [speed(c, i, f) for c in cases() for i, f in FEW.items()] + [
        memory(cases()[0], "gla_chunk", "gla")
    ]
    results = load(write(tmp_path, rows))
    assert list(results.speed) == rows[:-1] and list(results.memory) == rows[-1:]


@pytest.mark.parametrize("names", [(), ("rows.csv",), ("rows.csv", "memory.csv")])
def test_a_folder_without_rows_is_an_error(tmp_path, names):
    write(tmp_path, [])
    for name in ("rows.csv", "memory.csv"):
        if name not in names:
            (tmp_path / name).unlink()
    with pytest.raises(ResultsError, match="no rows") as caught:
        figures.render(tmp_path, tmp_path / "out")
    assert caught.value.where == str(tmp_path) and not (tmp_path / "out").exists()


def test_a_field_that_is_not_a_number_is_an_error_that_names_it(tmp_path):
    write(tmp_path, [speed(cases()[0], "gla_chunk", "gla")])
    path = tmp_path / "rows.csv"
    path.write_text(path.read_text().replace(",1024,", ",many,"))
    with pytest.raises(ResultsError, match="seqlen = 'many' is not a number"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}'])
def test_a_run_json_that_cannot_be_read_is_an_error(tmp_path, text):
    (write(tmp_path, [speed(cases()[0], "gla_chunk", "gla")]) / "run.json").write_text(text)
    with pytest.raises(ResultsError, match=r"run\.json is not readable"):
        load(tmp_path)


@pytest.mark.parametrize(
    "run", [{}, {"id": "e1"}, {"id": "e1", "comparable": None, "measured": {"copy_gb_s": "?"}}]
)
def test_a_run_json_with_little_in_it_will_do(tmp_path, run):
    results = load(write(tmp_path, [speed(cases()[0], "gla_chunk", "gla")], run))
    assert provenance(results, results.speed) == ["h200, environment\u00a0e1"]


def test_what_made_a_figure_stands_under_it(tmp_path):
    results = load(write(tmp_path, [speed(c, "gla_chunk", "gla") for c in cases()]))
    first, second = provenance(results, results.speed)
    for word in ("NVIDIA H200", "torch 2.11.0", "driver 580.65", "CUDA 13.0", "glabench 0.1.0", "e1"):
        assert word in first
    assert second == "Ceilings measured in the run: copy 4,010 GB/s, bf16 products 703 TFLOP/s."
    (sheet,) = sheets(results.speed)
    heading, table = arm_texts(sheet)
    assert heading[2] == "state at 8k"
    assert table == [["gla_chunk", "4 heads of 128x256", "1.5 MiB", "no", "4 dk dv per token; bwd 2x"]]


def test_what_a_reader_must_not_miss_about_times_is_said():
    a, b = (speed(c, "gla_chunk", "gla") for c in cases((1024, 2048), ("fwd",)))
    said = " ".join(how_timed([replace(a, converged="no", throttle="power"), replace(b, l2="warm")]))
    assert "wider than asked in 1 cell (gla_chunk 1k)" in said
    assert "throttled in 1 cell (gla_chunk 1k)" in said
    assert "timer events" in said and "warm" in said and "cold" in said


def test_devices_and_suites_never_share_a_figure(tmp_path):
    rows = [speed(c, "gla_chunk", "gla", device=d, suite=s) for c in cases() for d, s in
            (("h200", "s"), ("cpu", "s"), ("h200", "../up"))]  # fmt: skip
    written = figures.render(write(tmp_path / "r", rows), tmp_path / "out", ("png",))
    places = {p.parent.relative_to(tmp_path / "out").as_posix() for p in written}
    assert places == {"s/h200", "s/cpu", "up/h200"}


def test_unchanged_rows_give_identical_files_whatever_the_users_settings(tmp_path):
    import matplotlib

    grid = cases((1024, 4096), ("fwd",))
    rows = [speed(c, i, f) for c in grid for i, f in FEW.items()] + [
        memory(c, i, f, "oom" if c.seqlen == 1024 else "ok") for c in grid for i, f in FEW.items()
    ]
    write(tmp_path / "r", rows)
    first = figures.render(tmp_path / "r", tmp_path / "a")
    with matplotlib.rc_context(
        {"font.size": 20, "svg.hashsalt": None, "axes.grid": True, "lines.linewidth": 9}
    ):
        second = figures.render(tmp_path / "r", tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 20
    assert {p.suffix for p in first} == {".svg", ".png"} and len(first) == 8
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert b"<dc:date>" not in first[0].read_bytes()


def test_all_failed_rows_give_a_figure_that_says_so(tmp_path):
    rows = [speed(c, i, f, "crashed") for c in cases() for i, f in FEW.items()]
    results = load(write(tmp_path, rows))
    (sheet,) = sheets(results.speed)
    with fs.style():
        figure = figures.draw_time(sheet, results)
    said = [t.get_text() for a in figure.axes for t in a.texts]
    assert said.count("nothing here was measured") == 2 and said.count("crashed") == 6


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    write(tmp_path / "r", [speed(cases()[0], "gla_chunk", "gla")])
    with pytest.raises(ResultsError, match="cannot write"):
        figures.render(tmp_path / "r", tmp_path / "out")


def test_a_grid_of_fixed_tokens_and_one_of_fixed_batch_are_apart():
    tokens = {(16, 1024), (8, 2048), (10, 1536), (2, 8192)}
    batch = {(1, 1024), (1, 2048), (1, 8192), (1, 16384)}
    assert split_grids(tokens) == [tokens]
    found = split_grids(tokens | batch)
    assert sorted(map(sorted, found)) == sorted(map(sorted, (tokens | {(1, 16384)}, batch)))


def test_an_arm_looks_the_same_in_every_figure_and_unlike_its_family():
    alone = fs.looks([("gla_chunk_fla", "gla")])["gla_chunk_fla"]
    arms = [*MANY.items(), ("gla_of_mine", "gla"), ("gla_zz", "gla")]
    every = fs.looks(arms)
    assert every["gla_chunk_fla"] == alone
    assert len({(x.colour, x.marker, str(x.dashes)) for x in every.values()}) == len(arms)
    assert {every[i].colour for i, f in arms if f == "gla"} == {alone.colour}


@NEVER
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_spread_names_keep_their_order_their_distance_and_the_panel(targets):
    placed = fs.spread(targets, 8.0, 0.0, 100.0)
    by_target = [p for _, p in sorted(zip(targets, placed, strict=True))]
    assert all(b - a >= 8.0 - 1e-9 for a, b in itertools.pairwise(by_target))
    assert by_target[0] >= 0 and by_target[-1] <= max(100.0, 8.0 * (len(targets) - 1)) + 1e-9


def test_spread_moves_nothing_that_has_room():
    assert fs.spread([10.0, 50.0, 30.0], 8.0, 0.0, 100.0) == [10.0, 50.0, 30.0]


@NEVER
@given(st.floats(1e-4, 1e6), st.floats(1.6, 1e9))
def test_axes_have_two_to_seven_ticks_inside_them(low, factor):
    for ticks in (fs.decade_ticks(low, low * factor), fs.binary_ticks(low, low * factor)):
        assert 2 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= low * factor


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (fs.time_text(0.25), "250 µs"), (fs.time_text(1.2), "1.20 ms"), (fs.time_text(999.9), "1.00 s"),
        (fs.time_text(1e-5), "10.0 ns"), (fs.memory_text(1536), "1.50 GiB"),
        (fs.memory_text(0.25), "256 KiB"),
        (fs.short("1.20 ms"), "1.2 ms"), (fs.short("100 ms"), "100 ms"), (fs.short("2.00×"), "2×"),  # noqa: RUF001
        (fs.tokens_text(16384), "16k"), (fs.tokens_text(1536), "1.5k"), (fs.tokens_text(1000), "1000"),
        (fs.number_text(9.999), "10.0"), (fs.number_text(0.0), "0"), (fs.number_text(1234.5), "1,230"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(said, want):
    assert said == want


def test_drawing_imports_neither_torch_nor_pyplot_and_importing_not_even_matplotlib(tmp_path):
    write(tmp_path, [speed(cases()[0], "gla_chunk", "gla"), memory(cases()[0], "gla_chunk", "gla")])
    program = """if True:
        import sys, pathlib
        from glabench import report
        from glabench.figures import layers as figures
        early = {"matplotlib", "numpy", "pandas"} & set(sys.modules)
        figures.render(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]) / "out")
        print(sorted(early | ({"torch", "triton", "matplotlib.pyplot"} & set(sys.modules))))
    """
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_run_of_another_environment_is_not_taken_for_this_one(tmp_path):
    runs = {"schema": 1, "runs": [RUN, {"id": "e2", "comparable": {"gpu": "another"}}]}
    folder = write(tmp_path, [speed(cases()[0], "gla_chunk", "gla")])
    (folder / "run.json").write_text(json.dumps(runs))
    results = load(folder)
    assert "NVIDIA H200" in provenance(results, results.speed)[0]
