"""`glabench tune`: what is tried, what is chosen, and a tiny tuning under Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glabench.cases import Shape
from glabench.cli import app
from glabench.errors import UsageError
from glabench.installed import has_cuda
from glabench.kernels import gla_configs, plan_files
from glabench.kernels.plan_files import Launch, Point
from glabench.runners import tune, tune_table, tune_variants
from glabench.runners.tune_variants import RULE, Trial, Whole, choose_launches, choose_plan

HERE = Path(__file__).parent
FAST, SLOW = Launch(128, 8, 3), Launch(16, 1, 1)
GLA, PLAIN, HEAD = Point(128, 256, 3, False), Point(128, 256, 0, False), Point(128, 256, 2, False)
PLAN = gla_configs.rule(PLAIN)


def run(*words):
    return CliRunner().invoke(app, ["tune", *words])


def ok(use, launch, us):
    return Trial(64, use, launch, "ok", us)


def failed(use, launch, status="error"):
    return Trial(64, use, launch, status, None, "why")


# --- choosing ---------------------------------------------------------------------------------------------


def test_the_fastest_launch_over_all_uses_of_a_kernel_is_taken():
    found = [ok("state", PLAN.state, 100), ok("state back", PLAN.state, 100)]
    found += [
        ok("state", FAST, 120),
        ok("state back", FAST, 60),
        ok("state", SLOW, 10),
        ok("state back", SLOW, 300),
    ]
    assert choose_launches(PLAN, found) == replace(PLAN, state=FAST)


def test_each_kernel_is_chosen_by_itself_and_carry_back_is_one():
    found = [ok(use, PLAN.carry, 100) for use in ("carry", "carry alone", "carry back")]
    found += [ok("carry", FAST, 100), ok("carry alone", FAST, 100), ok("carry back", FAST, 50)]
    assert choose_launches(PLAN, found) == replace(PLAN, carry_back=FAST)


@pytest.mark.parametrize("status", ["error", "wrong", "timeout", "crashed", "skipped", "planned"])
def test_a_launch_that_failed_in_one_use_is_not_taken(status):
    found = [ok("state", PLAN.state, 100), ok("state back", PLAN.state, 100)]
    found += [ok("state", FAST, 1), failed("state back", FAST, status)]
    assert choose_launches(PLAN, found) == PLAN


def test_a_gain_within_the_noise_changes_nothing():
    assert choose_launches(PLAN, [ok("gradient", PLAN.gradient, 100), ok("gradient", FAST, 99.5)]) == PLAN


def test_where_the_rules_launch_does_not_run_another_is_taken():
    found = [failed("gradient", PLAN.gradient), ok("gradient", SLOW, 900)]
    assert choose_launches(PLAN, found).gradient == SLOW
    assert choose_launches(PLAN, [failed("gradient", PLAN.gradient), failed("gradient", SLOW)]) == PLAN


def whole(name, ms, status="ok"):
    return Whole(name, PLAN, status, ms)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ([whole(RULE, 1.0), whole("a", 0.9), whole("b", 0.8)], "b"),
        ([whole(RULE, 1.0), whole("a", 0.9), whole("b", 0.5, "wrong")], "a"),
        ([whole(RULE, 1.0), whole("a", 0.995)], RULE),
        ([whole(RULE, 1.0), whole("a", 1.2)], RULE),
        ([whole(RULE, None, "error"), whole("a", 5.0)], "a"),
    ],
)
def test_the_fastest_plan_that_is_right_is_taken(found, name):
    assert choose_plan(found).name == name


def test_without_a_right_plan_there_is_none():
    assert choose_plan([whole(RULE, None, "wrong"), whole("a", None, "oom")]) is None


# --- what is tried ----------------------------------------------------------------------------------------


def test_every_use_of_a_kernel_that_exists_is_tried_with_the_rules_launch_first():
    trials = list(tune_variants.trials(GLA, tune_variants.VARIANTS))
    uses = set(tune_variants.USES)
    assert {t.use for t in trials} == uses
    for use in uses:
        mine = [t.launch for t in trials if t.use == use and t.chunk == 64]
        assert mine[0] == getattr(PLAN, tune_variants.kernel_of(use)) and len(mine) == len(set(mine)) > 2


@pytest.mark.parametrize(
    ("point", "missing"),
    [
        (PLAIN, {"scale", "wide"}),
        (HEAD, {"scale", "wide"}),
        (GLA, set()),
        (Point(256, 512, 3, False), {"carry", "carry back", "carry alone"}),
        (Point(256, 512, 0, False), {"carry", "carry back", "carry alone"}),
    ],
)
def test_kernels_that_a_call_does_not_use_are_not_tried(point, missing):
    trials = tune_variants.trials(point, tune_variants.VARIANTS)
    assert {t.use for t in trials} == set(tune_variants.USES) - missing


def test_no_tile_is_wider_than_the_values():
    trials = list(tune_variants.trials(Point(64, 64, 0, False), tune_variants.VARIANTS))
    assert trials and max(t.launch.BV for t in trials) == 64


# --- the command ------------------------------------------------------------------------------------------


def test_dry_run_lists_what_would_be_tried():
    found = json.loads(
        run("--dry-run", "--shape", "340m,fig2", "--impl", "gla_chunk,retention_chunk", "--json").stdout
    )
    assert [(p["impl"], p["d_k"], p["heads"]) for p in found["points"]] == [
        ("gla_chunk", 128, 4),
        ("retention_chunk", 128, 4),
        ("gla_chunk", 64, 16),
        ("retention_chunk", 64, 16),
    ]
    for point in found["points"]:
        assert len(point["launches"]) > 10
        assert {t["chunk"] for t in point["launches"]} == {64, 128}
    text = run("--dry-run", "--d-k", "96", "--d-v", "192", "--heads", "3", "--impl", "gla_chunk").stdout
    assert "gradient" in text and "96" in text and "nothing was run" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--impl", "gla_chnk"), "did you mean 'gla_chunk'"),
        (("--impl", "gla_chunk_torch"), "has no plan to tune (--impl)"),
        (("--shape", "341m"), "did you mean '340m'"),
        (("--d-k", "64"), "give --d-k, --d-v and --heads together"),
        (("--d-k", "64", "--d-v", "64", "--heads", "2", "--shape", "340m"), "without --shape"),
        (("--d-k", "40", "--d-v", "64", "--heads", "2"), "40 is no width (--d-k); give a multiple of 16"),
        (("--limit", "0"), "0 is not a time (--limit)"),
        (("--dtype", "fp8"), "no dtype 'fp8'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message):
    done = run(*words, "--dry-run")
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(has_cuda(), reason="there is a GPU to tune for")
def test_without_a_gpu_it_is_one_line_and_exit_code_2(tmp_path):
    done = run("--out", str(tmp_path / "x.toml"))
    assert done.exit_code == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: no GPU to tune for (--device);") and done.stderr.count("\n") == 1


# --- tuning -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    pytest.importorskip("triton", reason="the kernels are Triton's")
    out = tmp_path_factory.mktemp("plans") / "cpu.toml"
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {k: v for k, v in os.environ.items() if k != plan_files.FOLDER} | {"PYTHONPATH": path}
    command = [sys.executable, str(HERE / "tune_points.py"), str(out)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out, done.stderr


def test_every_launch_is_compared_and_timed_and_a_failure_is_a_line(tuned):
    found, _, said = tuned
    (point,) = found["report"]["points"]
    by_status = {}
    for trial in point["launches"]:
        by_status.setdefault(trial["status"], []).append(trial)
    assert by_status.keys() == {"ok", "error"} and all(t["us"] > 0 for t in by_status["ok"])
    assert {t["use"] for t in by_status["ok"]} == {"gradient", "state", "state back"}
    (bad,) = by_status["error"]
    assert bad["launch"]["BV"] == 24 and "power of 2" in bad["reason"]
    assert f"gradient, BV 24, 1 warps, 1 stages, chunks of 64: error: {bad['reason']}" in said


def test_whole_calls_are_checked_and_the_choice_is_written_and_read(tuned):
    found, out, _ = tuned
    report, (point,) = found["report"], found["report"]["points"]
    assert point["calls"][0]["name"] == RULE and len(point["calls"]) >= 2
    assert all(c["status"] == "ok" and c["ms"] > 0 and c["err_ratio"] < 1e-5 for c in point["calls"])
    assert point["chosen"] in {c["name"] for c in point["calls"]} and report["bad"] == 0
    (block,) = plan_files.read(out)
    assert block["plan"].keys() == {Point(16, 32, 0, True)} and block["device"] == "cpu"
    assert found["in_force"] == point["plan"] and found["others_are_the_rule"]
    assert report["file"] == str(out) and report["in_force"] == f"export GLABENCH_PLANS={out.parent}"


def test_the_tables_tell_what_was_chosen_and_how_to_use_it(tuned, capsys):
    found, out, _ = tuned
    tune_table.show(found["report"])
    text = capsys.readouterr().out
    assert "warps, 1 stages" in text and "chosen" in text and "chunks of 32" in text
    assert f"wrote {out}; in force after: export GLABENCH_PLANS={out.parent}" in text.replace("\n", "")


def test_past_the_limit_nothing_is_tried_or_written(tmp_path):
    shape = Shape("test", heads=1, d_k=16, d_v=32, head_dim=32)
    request = tune.Request(
        impls=("gla_chunk",), shapes=(shape,), device="cpu", out=tmp_path / "cpu.toml", limit_s=1e-9
    )
    said = []
    report = tune.run(request, said.append)
    (point,) = report["points"]
    assert {(t["status"], t["reason"]) for t in point["launches"]} == {("skipped", "time limit")}
    assert report["file"] is None and report["bad"] == 0 and list(tmp_path.iterdir()) == []
    assert "gla_chunk 16x32 bf16: skipped: time limit" in said


def test_a_plan_file_that_is_wrong_is_told_before_anything_is_tried(tmp_path):
    (tmp_path / "cpu.toml").write_text("plans = 1\n")
    request = tune.Request(impls=("gla_chunk",), shapes=(), device="cpu", out=tmp_path / "cpu.toml")
    with pytest.raises(UsageError, match=r"no key 'plans' .*cpu\.toml"):
        tune.run(request, print)


def test_an_answer_beyond_rounding_or_unwritten_is_wrong():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason="the kernels are Triton's")
    from glabench.runners import tune_cells
    from glabench.worker import CellFailure

    want = [torch.ones(8), torch.linspace(1, 2, 8)]
    assert tune_cells._compare([x * (1 + 2**-15) for x in want], want, "fp32") < 2**-13
    with pytest.raises(CellFailure, match="differs from the plan it is tried against by 9"):
        tune_cells._compare([want[0], want[1] * (1 + 2**-10)], want, "fp32")
    with pytest.raises(CellFailure, match="NaN or infinity"):
        tune_cells._compare([want[0], torch.full((8,), float("nan"))], want, "bf16")
    assert tune_cells._compare(want, None, "fp32") is None
