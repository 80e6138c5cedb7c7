"""Plans of the chunk kernels as data: files, which one counts, what is wrong with one, and its digest."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from glabench import env
from glabench.errors import UsageError
from glabench.kernels import gla_configs, plan_files
from glabench.kernels.plan_files import Launch, Point

HERE = Path(__file__).parent
H100 = "NVIDIA H100 80GB HBM3"
MADE = {"device": H100, "torch": "2", "triton": "3", "ptxas": "13", "date": "2026-01-01", "glabench": "1"}
POINT = Point(128, 256, 0, False)
OTHER = Point(64, 64, 3, True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(plan_files.FOLDER, str(tmp_path))
    return tmp_path


def write(folder, plans, device="h100_sxm", made=MADE):
    path = folder / f"{device}.toml"
    path.write_text(plan_files.text(plan_files.merged([], made, plans), device))
    return path


def test_what_is_written_is_what_is_read(tmp_path):
    plans = {POINT: {"chunk": 128, "carry": Launch(64, 8, 2, 168)}, OTHER: {}}
    (block,) = plan_files.read(write(tmp_path, plans))
    assert block == {**MADE, "plan": plans}


@pytest.mark.parametrize("path", sorted(plan_files.SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_files_hold_what_differs_from_the_rule(path):
    for block in plan_files.read(path):
        assert env.device_slug(block["device"]) == path.stem
        for point, changes in block["plan"].items():
            rule = gla_configs.rule(point)
            assert gla_configs.plan_on(path.stem, point) == replace(rule, **changes)
            assert all(getattr(rule, name) != value for name, value in changes.items())


def test_without_a_file_there_is_the_rule():
    assert gla_configs.plan_on("no_such_gpu", POINT) == gla_configs.rule(POINT)
    assert plan_files.digest("no_such_gpu") is None


def test_a_users_file_counts_before_the_shipped_one_point_by_point(folder):
    write(folder, {OTHER: {"state": Launch(32, 8, 1)}})
    assert gla_configs.plan_on("h100_sxm", OTHER).state == Launch(32, 8, 1)
    shipped = {
        p: c for b in plan_files.read(plan_files.SHIPPED / "h100_sxm.toml") for p, c in b["plan"].items()
    }
    point, changes = shipped.popitem()
    rule = gla_configs.rule(point)
    assert gla_configs.plan_on("h100_sxm", point) == replace(rule, **changes) != rule


def test_a_point_without_launches_takes_the_rule_back(folder):
    write(folder, {POINT: {}})
    assert gla_configs.plan_on("h100_sxm", POINT) == gla_configs.rule(POINT)


def test_the_digest_follows_launches_and_not_comments(folder, tmp_path_factory, monkeypatch):
    path = write(folder, {POINT: {"carry": Launch(64, 8, 2)}})
    before = plan_files.digest("h100_sxm")
    found = set()
    for change in (lambda t: "# a word\n" + t, lambda t: t.replace("warps = 8", "warps = 4")):
        place = tmp_path_factory.mktemp("plans")
        (place / path.name).write_text(change(path.read_text()))
        monkeypatch.setenv(plan_files.FOLDER, str(place))
        found.add(plan_files.digest("h100_sxm"))
    assert before in found and len(found) == 2


def test_a_run_names_the_plans_in_force_and_its_id_follows_them(folder):
    def run():
        how = {"argv": [], "suite": "s", "suite_digest": "", "regime": {}}
        return env.make_run(described={"gpu": {"name": H100}, "torch": "2"}, **how)

    write(folder, {POINT: {"carry": Launch(64, 8, 2)}})
    mine = run()
    assert mine["comparable"]["variables"][plan_files.FOLDER] == plan_files.digest("h100_sxm")
    os.environ.pop(plan_files.FOLDER)
    shipped = run()
    assert shipped["id"] != mine["id"] and str(folder) not in json.dumps(mine)


def test_a_plan_under_trial_is_in_force_for_its_point_alone_and_ends():
    trial = replace(gla_configs.rule(POINT), state=Launch(32, 8, 1))
    inner = replace(trial, chunk=32)
    before = gla_configs.plan_for(*POINT, None)
    with gla_configs.in_force(POINT, trial):
        with gla_configs.in_force(POINT, inner):
            assert gla_configs.plan_for(*POINT, None) == inner
        assert gla_configs.plan_for(*POINT, None) == trial
        assert gla_configs.plan_for(*OTHER, None) == gla_configs.rule(OTHER)
    assert gla_configs.plan_for(*POINT, None) == before != trial


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[[made]]", "[[mode]]", "no key 'mode' .*toml.*did you mean 'made'"),
        ("[[made]]", "[made", "not a plan file"),
        ('torch = "2"', "torch = 2", "torch 2 is not a text .*made 1"),
        ('torch = "2"\n', "", "torch is missing .*made 1"),
        ("d_k = 128", "d_k = 120", "d_k 120 is not a multiple of 16 .*plan 1"),
        ("d_k = 128", "d_q = 128", "no key 'd_q' .*made 1, plan 1"),
        ('"none"', '"some"', "gate 'some' is not one of none, fixed, head, channel"),
        ('"bf16"', '"bf17"', "dtype 'bf17'"),
        ("carry =", "carrry =", "no key 'carrry' .*plan 1.*did you mean 'carry'"),
        ("warps = 8", "wraps = 8", "no key 'wraps' .*plan 1, carry.*did you mean 'warps'"),
        ("warps = 8", "warps = 6", "warps 6 is not a power of two up to 32 .*plan 1, carry"),
        ("warps = 8", "warps = true", "warps True is not"),
        (", stages = 2", "", "stages is missing .*carry"),
        # a hard tile is halved seven times at most
        ("carry =", "chunk = 256\ncarry =", "chunk 256 is not a power of two from 16 to 128 .*plan 1"),
        ("{ BV = 64, warps = 8, stages = 2 }", "64", "launch 64 is not a table"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_naming_file_and_key(folder, old, new, words):
    path = write(folder, {POINT: {"carry": Launch(64, 8, 2)}})
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match=f"(?s){words}") as err:
        gla_configs.plan_on("h100_sxm", POINT)
    assert str(path) in str(err.value)
    assert old == "[[made]]" or len(str(err.value).splitlines()) == 1


def test_a_point_that_stands_twice_is_told(folder):
    path = write(folder, {POINT: {}})
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(UsageError, match="d_k 128, d_v 256, gate none, bf16 stands twice"):
        plan_files.points("h100_sxm")


def test_a_folder_that_is_none_is_told(folder, monkeypatch):
    monkeypatch.setenv(plan_files.FOLDER, str(folder / "missing"))
    with pytest.raises(UsageError, match=r"no folder .*GLABENCH_PLANS"):
        plan_files.points("h100_sxm")


def test_a_later_run_replaces_its_points_and_keeps_the_others():
    first = plan_files.merged([], MADE, {POINT: {"chunk": 128}, OTHER: {}})
    later = MADE | {"date": "2026-02-02"}
    blocks = plan_files.merged(first, later, {POINT: {}})
    assert blocks == [{**MADE, "plan": {OTHER: {}}}, {**later, "plan": {POINT: {}}}]
    assert plan_files.merged(blocks, later, {OTHER: {}})[1]["plan"] == {POINT: {}, OTHER: {}}
    assert "2026-01-01" not in plan_files.text(plan_files.merged(blocks, later, {OTHER: {}}), "x")


def test_plans_are_read_without_torch():
    code = (
        "import sys\nfrom glabench.kernels import gla_configs as c\nfrom glabench.runners import tune_table\n"
    )
    code += f"c.plan_on('h100_sxm', c.Point{tuple(POINT)})\n"
    code += "print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
