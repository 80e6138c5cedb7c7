"""The page of results: complete, escaped, well-formed, and needing nothing but itself."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made_rows import FEW, RUN, cases, memory, speed, write

from glabench import report
from glabench.errors import ResultsError
from glabench.figures import style as fs
from glabench.report import layers

NASTY = '<script>alert("x")</script> & \'more\', "quoted"'
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags that do not close as they opened, ids, references and the text of the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.ids, self.sources, self.cells = [], [], [], [], []
        self.tags = set()
        self.feed(text)
        self.faults += [f"{tag} is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        self.ids += [v for k, v in attrs if k == "id"]
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        opened = self.open.pop() if self.open else None
        if opened != tag:
            self.faults.append(f"</{tag}> closes <{opened}>")

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("out")
    few = cases((1024, 2048), ("fwd",))
    rows = [speed(c, i, f) for c in few for i, f in FEW.items()]
    rows += [replace(speed(c, "gla_recurrent", "gla", "error"), reason=f"{NASTY} {c.seqlen}") for c in few]
    rows += [
        replace(memory(few[0], "gla_chunk", "gla", "oom"), reason=f"{NASTY} of memory"),
        memory(few[1], "gla_chunk", "gla"),
    ]
    run = {**RUN, "argv": ["run", "suites/q.toml", "--out", "my <results>"], "note": NASTY}
    write(folder / "a" / "h200", rows, run)
    write(folder / "b" / "h200", [speed(few[0], "gla_chunk", "gla")])
    write(folder / "c" / "cpu", [speed(few[0], "gla_chunk", "gla", suite="q", device="cpu")])
    write(folder / "empty", [])
    write(folder / ".hidden", [speed(few[0], "gla_chunk", "gla", suite="hidden")])
    page = report.build(folder, out)
    return out, page.read_text(encoding="utf-8")


def test_every_results_folder_has_its_figures_and_its_section(built):
    out, text = built
    found = {p.parent.relative_to(out).as_posix() for p in out.rglob("time_*.svg")}
    assert found == {"s/h200", "s/h200_2", "q/cpu"}
    assert Page(text).ids == ["s-h200", "s-h200_2", "q-cpu"]
    assert "No rows yet in: empty" in text and "hidden" not in text
    assert {p.suffix for p in (out / "s" / "h200").iterdir()} == {".svg", ".png"}


def test_every_reason_is_on_the_page_and_escaped(built):
    _, text = built
    for ending in ("1024", "2048", "of memory"):
        assert html.escape(f"{NASTY} {ending}", quote=True) in text
        assert f"{NASTY} {ending}" in Page(text).cells
    assert "<script" not in text and html.escape(NASTY) in text


def test_the_page_is_well_formed_and_needs_nothing_else(built):
    page = Page(built[1])
    assert page.faults == [] and len(set(page.ids)) == len(page.ids)
    assert built[1].startswith("<!DOCTYPE html>")
    assert page.tags >= {"title", "table", "figure", "details"} and not page.tags & {
        "script",
        "link",
        "iframe",
    }
    assert len(page.sources) > 9
    assert all(s.startswith(("data:image/svg+xml;base64,", "#")) for s in page.sources)
    assert "url(" not in built[1] and "prefers-color-scheme: dark" in built[1]
    targets = {s[1:] for s in page.sources if s.startswith("#")}
    assert targets == set(page.ids)


def test_the_fastest_of_a_grid_point_is_named_with_its_interval_and_floor(built):
    times = {i: speed(cases((1024,), ("fwd",))[0], i, f) for i, f in FEW.items()}
    first, second = sorted(times.values(), key=lambda r: r.time_ms)[:2]
    row = re.search(r"<tr><td>fwd</td><td[^>]*>1k</td>.*?</tr>", built[1])[0]
    cells = Page(row).cells
    assert cells[3] == first.impl and cells[4] == fs.time_text(first.time_ms)
    assert cells[5] == layers.interval(first) and cells[6] == fs.ratio_text(3.0)
    assert cells[7].startswith(f"{second.impl}, {fs.ratio_text(second.time_ms / first.time_ms)} the time")


def test_an_order_that_the_intervals_leave_open_is_said_to_be_open():
    a = speed(cases()[0], "gla_chunk", "gla")
    near, far = (
        replace(a, impl="b", time_lo_ms=a.time_hi_ms * k, time_ms=a.time_hi_ms * 1.2) for k in (0.99, 1.01)
    )
    assert layers._next(a, near).endswith("(intervals overlap)")
    assert not layers._next(a, far).endswith("(intervals overlap)")


def test_the_command_and_the_environment_are_shown(built):
    _, text = built
    assert html.escape("glabench run suites/q.toml --out 'my <results>'") in text
    cells = Page(text).cells
    for value in ("NVIDIA H200", "2.11.0", "4012.0", "bf16 703.0"):
        assert value in cells


def test_every_row_is_in_a_table(built):
    rows = [r for r in re.findall(r"<tr.*?</tr>", built[1]) if "<td>ok</td>" in r]
    timed = [Page(r).cells for r in rows]
    for case in cases((1024, 2048), ("fwd",)):
        for impl, family in FEW.items():
            want = fs.time_text(speed(case, impl, family).time_ms)
            assert any(cells[1] == impl and cells[5] == want for cells in timed)


def test_the_same_results_give_the_same_page(tmp_path):
    write(tmp_path / "r", [speed(cases((1024,), ("fwd",))[0], "gla_chunk", "gla")])
    first, second = (report.build(tmp_path / "r", tmp_path / name) for name in ("a", "b"))
    assert first.name == "index.html" and first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("make", [lambda f: None, lambda f: f.mkdir(), lambda f: write(f, [])])
def test_nothing_below_a_folder_is_an_error(tmp_path, make):
    make(tmp_path / "r")
    with pytest.raises(ResultsError, match="no results below"):
        report.build(tmp_path / "r", tmp_path / "out")


def test_a_file_that_is_not_ours_is_an_error_that_names_it(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match="not this version's") as caught:
        report.build(tmp_path, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "rows.csv")
