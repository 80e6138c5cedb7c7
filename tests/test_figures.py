"""Figures say what the rows say: the drawn objects are compared with the rows they came from."""

import itertools
import math

import pytest
from made_rows import FEW, LENGTHS, MANY, cases, memory, speed, write

from glabench.figures import layers as figures
from glabench.figures import style as fs
from glabench.figures.rows import load, sheets


def drawn(draw, folder, verb="speed"):
    results = load(folder)
    (sheet,) = sheets(getattr(results, verb))
    with fs.style():
        return draw(sheet, results), sheet


def axes(figure, label):
    return next(a for a in figure.axes if a.get_label() == label)


def line(axes, label):
    return next(x for x in axes.get_lines() if x.get_label() == label)


def texts(figure):
    return [t for a in figure.axes for t in a.texts if t.get_text()]


@pytest.fixture
def few(tmp_path):
    bad = {("mamba_torch", 8192): "oom", ("mamba_torch", 1024): "wrong", ("attention_sdpa", 4096): "timeout"}
    rows = [
        speed(c, i, f, bad.get((i, c.seqlen), "ok"), "yes" if c.seqlen == 1024 else "no")
        for c in cases() for i, f in FEW.items()
    ]  # fmt: skip
    rows += [speed(c, "attention_fa2", "attention", "unavailable") for c in cases()]
    rows += [memory(c, i, f, bad.get((i, c.seqlen), "ok")) for c in cases() for i, f in FEW.items()]
    return write(tmp_path, rows)


def test_a_line_is_the_rows_times_and_breaks_where_a_cell_failed(few):
    figure, sheet = drawn(figures.draw_time, few)
    for impl, passes in itertools.product(FEW, ("fwd", "fwd_bwd")):
        rows = sheet.of(impl, passes)
        x, y = line(axes(figure, f"time {passes}"), impl).get_data()
        assert list(x) == [r.seqlen for r in rows] == list(LENGTHS)
        assert [None if math.isnan(v) else v for v in y] == [r.time_ms for r in rows]
    assert math.isnan(line(axes(figure, "time fwd"), "mamba_torch").get_ydata()[3])


def test_a_step_is_drawn_with_what_it_keeps_and_apart_from_sequences(tmp_path):
    arms = {"gla_step": "gla", "attention_cached_fa2": "attention"}
    rows = [
        speed(c, i, f, "oom" if (f, c.seqlen) == ("attention", 8192) else "ok", state_mib=c.seqlen / 64)
        for c in cases(passes=("decode",))
        for i, f in arms.items()
    ]
    rows += [speed(c, "gla_chunk", "gla") for c in cases(passes=("fwd",))]
    results = load(write(tmp_path, rows))
    whole, steps = sorted(sheets(results.speed), key=lambda s: s.is_decode)
    assert {r.impl for r in whole.rows} == {"gla_chunk"} and {r.impl for r in steps.rows} == set(arms)
    with fs.style():
        figure = figures.draw_decode(steps, results)
    for impl in arms:
        mine = steps.of(impl, "decode")
        times = line(axes(figure, "time decode"), impl).get_ydata()
        assert [None if math.isnan(v) else v for v in times] == [r.time_ms for r in mine]
        states = line(axes(figure, "state decode"), impl).get_ydata()
        assert list(states) == [r.state_mib for r in mine]  # known where the step failed, too
    assert "oom" in {t.get_text() for t in texts(figure)}
    names = {p.name for p in figures.render(tmp_path, tmp_path / "out", ("svg",))}
    assert {n.partition("_")[0] for n in names} == {"decode", "time", "floor"}


def test_the_band_is_the_interval(few):
    figure, sheet = drawn(figures.draw_time, few)
    bands = axes(figure, "time fwd").collections
    for impl, band in zip([impl for impl, _ in sheet.arms], bands, strict=True):
        corners = {(x, y) for path in band.get_paths() for x, y in path.vertices}
        for row in sheet.of(impl, "fwd"):
            ends = {(row.seqlen, row.time_lo_ms), (row.seqlen, row.time_hi_ms)}
            assert row.status != "ok" or ends <= corners


def test_failed_cells_have_crosses_with_their_status_and_unavailable_ones_a_sentence(few):
    figure, _ = drawn(figures.draw_time, few)
    strip = axes(figure, "failed time fwd")
    crosses = {x.get_label(): (list(x.get_xdata()), x.get_color()) for x in strip.get_lines()}
    green, black = fs.FAMILIES["mamba"][0], fs.FAMILIES["attention"][0]
    assert crosses == {
        "mamba_torch oom": ([8192], green),
        "mamba_torch wrong": ([1024], green),
        "attention_sdpa timeout": ([4096], black),
    }
    words = [t.get_text() for t in texts(figure)]
    assert {"oom", "wrong", "timeout"} <= set(words)
    assert "Not available here: attention_fa2." in words


def test_launch_bound_points_are_hollow(few):
    figure, _ = drawn(figures.draw_time, few)
    panel = axes(figure, "time fwd")
    hollow, solid = line(panel, "gla_chunk_torch launch-bound"), line(panel, "gla_chunk_torch points")
    assert list(hollow.get_xdata()) == [1024] and hollow.get_markerfacecolor() == "white"
    assert list(solid.get_xdata()) == [2048, 4096, 8192]
    assert solid.get_markerfacecolor() == fs.FAMILIES["gla"][0] == solid.get_markeredgecolor()
    assert any("launch-bound" in t.get_text() for t in texts(figure))


def test_a_speed_up_is_the_baselines_time_over_the_arms_and_the_title_names_it(few):
    figure, sheet = drawn(figures.draw_speedup, few)
    base = {r.seqlen: r.time_ms for r in sheet.of("attention_sdpa", "fwd")}
    y = line(axes(figure, "speedup fwd"), "gla_chunk_torch").get_ydata()
    rows = sheet.of("gla_chunk_torch", "fwd")
    assert [v for v in y if v == v] == [base[r.seqlen] / r.time_ms for r in rows if base[r.seqlen]]
    assert math.isnan(y[2])  # the baseline timed out there
    assert list(line(axes(figure, "speedup fwd"), "one").get_ydata()) == [1.0, 1.0]
    assert any(t.get_text().startswith("Speed-up over PyTorch's SDPA") for t in texts(figure))


def test_flash_attention_2_is_the_baseline_where_it_has_a_time(tmp_path):
    arms = {"attention_fa2": "attention", "attention_sdpa": "attention", "gla_chunk": "gla"}
    write(tmp_path, [speed(c, i, f) for c in cases() for i, f in arms.items()])
    figure, sheet = drawn(figures.draw_speedup, tmp_path)
    first, arm = sheet.of("attention_fa2", "fwd")[0], sheet.of("gla_chunk", "fwd")[0]
    panel = axes(figure, "speedup fwd")
    assert line(panel, "gla_chunk").get_ydata()[0] == first.time_ms / arm.time_ms
    assert any(t.get_text().startswith("Speed-up over FlashAttention-2") for t in texts(figure))
    corners = {tuple(v) for b in panel.collections for p in b.get_paths() for v in p.vertices}
    assert (1024, first.time_lo_ms / arm.time_hi_ms) in corners


def test_sdpa_is_the_baseline_where_flash_attention_2_has_no_time(tmp_path):
    arms = {"attention_fa2": "oom", "attention_sdpa": "ok"}
    rows = [speed(c, i, "attention", s) for c in cases() for i, s in arms.items()]
    figure, _ = drawn(figures.draw_speedup, write(tmp_path, rows))
    assert any(t.get_text().startswith("Speed-up over PyTorch's SDPA") for t in texts(figure))


def test_no_speed_up_is_drawn_where_no_baseline_was_asked_for(tmp_path):
    write(tmp_path / "r", [speed(c, "gla_chunk", "gla") for c in cases()])
    names = {p.name for p in figures.render(tmp_path / "r", tmp_path / "out", ("png",))}
    assert names == {"time_340m_bf16.png", "floor_340m_bf16.png"}


def test_the_floor_figure_has_the_rows_ratios_and_the_devices_limit(few):
    figure, _ = drawn(figures.draw_floor, few)
    panel = axes(figure, "floor fwd_bwd")
    assert list(line(panel, "gla_chunk_torch").get_ydata()) == [3.0] * 4
    assert list(line(panel, "one").get_ydata()) == [1.0, 1.0]
    assert "device's limit" in [t.get_text() for t in texts(figure)]


def test_memory_lines_and_bars_are_the_rows(few):
    figure, sheet = drawn(figures.draw_memory, few, "memory")
    rows = sheet.of("gla_chunk_torch", "fwd")
    y = line(axes(figure, "memory fwd"), "gla_chunk_torch").get_ydata()
    assert list(y) == [r.extra_mem_mib for r in rows]
    bars = axes(figure, "split fwd")
    sizes = {c.get_label(): c.patches[0].get_width() for c in bars.containers}
    assert sizes["gla_chunk_torch outputs, gradients"] == rows[-1].outputs_mib
    assert sizes["gla_chunk_torch saved for backward"] == rows[-1].saved_mib
    assert sizes["gla_chunk_torch workspace"] == pytest.approx(rows[-1].workspace_mib)
    assert sizes["gla_chunk_torch peak"] == rows[-1].extra_mem_mib
    assert line(bars, "gla_chunk_torch least").get_xdata()[0] == rows[-1].predicted_mib
    assert "oom" in [t.get_text() for t in bars.texts]  # mamba_torch, in place of its bar


@pytest.mark.parametrize(
    ("fixed", "said"), [({"batch": 2}, "batch 2"), ({"batch": None, "tokens": 32768}, "32,768 tokens a call")]
)
def test_the_length_axis_says_what_is_fixed_and_slopes_are_drawn_for_a_fixed_batch(tmp_path, fixed, said):
    write(tmp_path, [speed(c, i, f) for c in cases(**fixed) for i, f in FEW.items()])
    figure, _ = drawn(figures.draw_time, tmp_path)
    assert f"sequence length, tokens ({said})" in [t.get_text() for t in texts(figure)]
    guides = [x for x in axes(figure, "time fwd").get_lines() if x.get_label() in ("∝ T", "∝ T²")]
    slopes = [math.log(y[1] / y[0]) / math.log(x[1] / x[0]) for x, y in (g.get_data() for g in guides)]
    assert slopes == pytest.approx([1.0, 2.0] if "batch" in said else [])


@pytest.mark.parametrize("arms", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    "draw", [figures.draw_time, figures.draw_speedup, figures.draw_floor, figures.draw_memory]
)
def test_no_text_overlaps_another_or_leaves_the_page_or_is_too_small(tmp_path, arms, draw):
    make, verb = (memory, "memory") if draw is figures.draw_memory else (speed, "speed")
    bad = {
        ("gla_recurrent", 8192): "timeout",
        ("mamba_torch", 1024): "unsupported",
        ("gla_chunk", 2048): "wrong",
    }
    broken = {"attention_sdpa" if arms is MANY else "gla_chunk_torch": "unsupported"}
    rows = [
        make(c, i, f, broken.get(i) or bad.get((i, c.seqlen), "ok")) for c in cases() for i, f in arms.items()
    ]
    figure, _ = drawn(draw, write(tmp_path, rows), verb)
    with fs.style():
        figure.draw_without_rendering()
        ticks = [t for a in figure.axes if a.axison for t in (*a.get_xticklabels(), *a.get_yticklabels())]
        found = texts(figure) + [t for t in ticks if t.get_text() and t.get_visible()]
        boxes = [(t.get_text(), t.get_window_extent()) for t in found]
    assert len(boxes) > 30 and min(t.get_fontsize() for t in found) >= 7
    page = figure.bbox
    assert [n for n, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > page.x1 or b.y1 > page.y1] == []
    slack = 1.5 * figure.dpi / 72  # an extent includes the font's ascent and descent, not only ink
    clashes = [
        (a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2)
        if min(p.x1, q.x1) - max(p.x0, q.x0) > 0 and min(p.y1, q.y1) - max(p.y0, q.y0) > slack
    ]  # fmt: skip
    assert clashes == []
