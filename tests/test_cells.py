"""Cells in real workers: every fault an implementation can have ends in its own status and reason."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from glabench.cases import Case
from glabench.pool import Worker
from glabench.rows import SpeedRow, columns
from glabench.runners import cells, checking

FAULTY = Path(__file__).with_name("faulty_impls.py")
CASE = Case(shape="tiny", passes="fwd", batch=2, seqlen=20, heads=2, d_k=4, d_v=8, head_dim=16, dtype="fp32")
LIMITS = {"cold": 20.0, "other": 20.0}
QUICK = {"min_samples": 3, "max_samples": 6, "min_busy_s": 0.0, "max_busy_s": 0.05, "interval_frac": 0.5}


def arguments(name, passes="fwd", **more):
    is_ours = name.endswith(("_torch", "_sdpa"))
    impl = {"id": name} if is_ours else {"file": f"{FAULTY}:{name}", "family": "gla"}
    case = asdict(replace(CASE, passes=passes))
    return {"impl": impl, "case": case, "device": "cpu", "seed": 1, "threads": 1, "check_tokens": 64, **more}


def call(worker, station, name, *, limits=LIMITS, **more):
    outcome = worker.call(f"glabench.runners.cells:{station}", arguments(name, **more), limits=limits)
    assert (outcome.status == "ok") == (outcome.reason == ""), outcome
    return outcome


@pytest.fixture(scope="module")
def worker():
    with Worker("cells", memory_limit_bytes=2**30, preload="glabench.runners.cells") as made:
        yield made


WRONG = [
    ("gla_wrong", r"^out: relative RMS error 1\.0e-01 is above \de-05$"),
    ("gla_wrong_last_token", r"^(out|v): relative RMS error [1-3]\.\de-01 is above \de-05$"),
    ("gla_nan", r"^out: NaN or infinity in 1 of 640 elements$"),
    ("gla_unwritten", r"^out: NaN or infinity in 1 of 640 elements$"),
    ("gla_in_place_hidden", r"^it changes its input q in place$"),
    ("gla_wrong_shape", r"^out: shape \[2, 2, 20, 8\] is not \[2, 20, 2, 8\]$"),
    ("gla_wrong_dtype", r"^out: dtype float64 is not float32$"),
    ("gla_none", r"^it returns NoneType, not a tensor$"),
]


@pytest.mark.parametrize("passes", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(("name", "reason"), WRONG)
def test_a_wrong_answer_is_never_timed(worker, name, reason, passes):
    outcome = call(worker, "prepare", name, passes=passes)
    assert outcome.status == "wrong"
    assert re.search(reason, outcome.reason), outcome.reason


@pytest.mark.parametrize(
    ("name", "passes", "status", "reason"),
    [
        ("gla_in_place", "fwd", "wrong", "it changes its input q in place"),
        ("gla_in_place", "fwd_bwd", "wrong", "it changes its inputs in place"),
        ("gla_detached", "fwd_bwd", "wrong", "its output carries no gradient"),
        ("gla_raises", "fwd", "error", 'ValueError: a, b; "quoted", and / on two lines, / three even'),
        ("gla_exits", "fwd", "crashed", "exited with code 5 during cold"),
        ("gla_segfaults", "fwd", "crashed", "killed by SIGSEGV during cold"),
    ],
)
def test_a_fault_has_its_status_and_reason(worker, name, passes, status, reason):
    outcome = call(worker, "prepare", name, passes=passes)
    assert (outcome.status, outcome.reason) == (status, reason)


def test_a_wrong_gradient_spoils_only_the_passes_that_need_it(worker):
    assert call(worker, "prepare", "gla_wrong_gradient").status == "ok"
    outcome = call(worker, "prepare", "gla_wrong_gradient", passes="fwd_bwd")
    assert outcome.status == "wrong" and outcome.reason.startswith("g: relative RMS error 2.0e-01")


def test_other_arguments_than_the_contract_are_an_error(worker):
    outcome = call(worker, "prepare", "gla_other_arguments")
    assert outcome.status == "error"
    assert outcome.reason.startswith("TypeError: gla_other_arguments() takes 3 positional arguments")


def test_a_hang_ends_at_the_limit_and_exhausted_memory_at_its_own(worker):
    outcome = call(worker, "prepare", "gla_sleeps", limits={"cold": 1.0, "other": 20.0})
    assert (outcome.status, outcome.reason) == ("timeout", "cold took longer than 1 s")
    outcome = call(worker, "prepare", "gla_exhausts_memory")
    assert (outcome.status, outcome.reason) == ("oom", "out of memory: asked for 64 MiB, limit 1024 MiB")


@pytest.mark.parametrize("name", ["gla_prints", "gla_leaves_strays"])
def test_noise_and_strays_do_not_harm_the_cell(worker, name, capfd):
    assert call(worker, "prepare", name).status == "ok"
    assert len(call(worker, "sample", name, visit=0, **QUICK).value["samples_ms"]) >= 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("passes", ["fwd", "fwd_bwd"])
def test_an_answer_kept_from_the_first_call_is_found_after_timing(worker, passes):
    assert call(worker, "prepare", "gla_caches", passes=passes).status == "ok"
    assert call(worker, "sample", "gla_caches", passes=passes, visit=0, **QUICK).status == "ok"
    outcome = call(worker, "recheck", "gla_caches", passes=passes, visit=1)
    assert outcome.status == "wrong"
    assert outcome.reason.startswith("on fresh inputs after timing, out: relative RMS error")


@pytest.mark.parametrize("passes", ["fwd", "fwd_bwd", "bwd"])
def test_a_right_cell_goes_through_every_station(worker, passes):
    name = "gla_chunk_torch"
    prepared = call(worker, "prepare", name, passes=passes).value
    assert prepared["err_ratio"] < prepared["tol_ratio"] and prepared["checked_frac"] == 1.0
    taken = call(worker, "sample", name, passes=passes, visit=0, **QUICK).value
    assert min(taken["samples_ms"]) > 0 and taken["timer"] == "perf_counter"
    assert call(worker, "recheck", name, passes=passes, visit=1).status == "ok"
    assert set(prepared) - {"check_s"} | set(taken) - {"samples_ms"} <= set(columns(SpeedRow))


def test_the_first_call_is_the_cold_start_and_a_case_is_checked_once():
    with Worker("cells") as fresh:
        forward = call(fresh, "prepare", "gla_good").value
        both = call(fresh, "prepare", "gla_good", passes="fwd_bwd").value
        assert (forward["first_in_process"], both["first_in_process"]) == ("yes", "no")
        assert both["cold_start_ms"] > forward["cold_start_ms"] > 0
        assert call(fresh, "prepare", "gla_good").value == forward
    with Worker("cells") as fresh:
        assert call(fresh, "prepare", "gla_good", passes="fwd_bwd").value["cold_start_ms"] > 0
        assert call(fresh, "prepare", "gla_good").value["cold_start_ms"] is None, "it was warm by then"


def test_a_backward_pass_that_cannot_be_repeated_is_unsupported_alone(worker):
    assert call(worker, "prepare", "gla_backward_once", passes="bwd").status == "ok"
    outcome = call(worker, "sample", "gla_backward_once", passes="bwd", visit=0, **QUICK)
    reason = "its backward pass gives other gradients when repeated"
    assert (outcome.status, outcome.reason) == ("unsupported", reason)


def test_memory_is_split_and_a_lone_backward_pass_has_none(worker):
    outcome = call(worker, "memory", "gla_chunk_torch", passes="bwd")
    assert outcome.status == "unsupported" and "use fwd_bwd" in outcome.reason
    found = call(worker, "memory", "gla_chunk_torch", passes="fwd_bwd").value
    assert found["meter"] == "peak_rss" and found["extra_mem_mib"] >= 0
    assert found["inputs_mib"] == pytest.approx(2 * 20 * 2 * (3 * 4 + 2 * 8) * 4 / 2**20)


def test_describe_tells_the_device_and_what_it_reaches():
    described = cells.describe({"device": "cpu", "threads": 1, "seconds": 0.05})
    reached = described["ceilings"]
    assert reached["copy_gb_s"] > 0.1 and reached["matmul_tflop_s"]["fp32"] > 1e-4
    assert described["gpu"] is None and described["threads"] == 1


def test_rows_hold_the_first_the_last_and_others_from_the_seed():
    assert checking.choose_rows(1, 10**6, 64, 0) == [0]
    assert checking.choose_rows(8, 10**6, 64, 0) == [0, 7]
    assert checking.choose_rows(4, 16, 64, 0) == [0, 1, 2, 3]
    some = checking.choose_rows(64, 16, 128, 5)
    assert len(some) == 8 and some[0] == 0 and some[-1] == 63 and some == sorted(set(some))
    assert some != checking.choose_rows(64, 16, 128, 6)
    positions = checking.choose_positions("attention", 8192, 3)
    assert len(positions) == 512 and positions[-1] == 8191 and positions == sorted(set(positions))
    assert checking.choose_positions("attention", 4096, 3) is None
    assert checking.choose_positions("gla", 8192, 3) is None


@pytest.mark.parametrize("family", ["gla", "mamba", "mamba2", "attention"])
def test_a_check_of_some_rows_agrees_with_the_oracle_on_shared_parameters(family):
    """A and D sum their gradient over all rows; only what the checked rows add may be compared."""
    impl = {"attention": "attention_sdpa", "gla": "gla_chunk_torch"}.get(family, f"{family}_torch")
    args = arguments(impl, passes="fwd_bwd")
    args["case"] |= {"batch": 6}
    cell = cells._cell(args)
    found = cells._check(cell, 3, [0, 5], poisoned=True)
    assert found["checked_frac"] == pytest.approx(2 / 6)
    assert found["err_ratio"] < found["tol_ratio"]
