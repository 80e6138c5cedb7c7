"""Worker processes under real faults: what a call does to its process costs that call only."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from glabench.pool import Outcome, Worker, wait_any
from glabench.rows import STATUSES

HERE = Path(__file__).parent
LIMITS = {"other": 20.0}


@pytest.fixture
def worker():
    with Worker("test", env={"PYTHONPATH": str(HERE)}) as made:
        yield made


def call(worker, name, args=None, limits=LIMITS):
    outcome = worker.call(f"pool_calls:{name}", args or {}, limits=limits)
    assert outcome.status in STATUSES
    assert (outcome.status == "ok") == (outcome.reason == "")
    assert "\n" not in outcome.reason
    return outcome


def group_members(pgid):
    """Living processes of a group (zombies do not count)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == pgid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_a_call_returns_its_value_and_the_process_is_reused(worker):
    first, second = call(worker, "echo", {"x": [1, None, "é\n"]}), call(worker, "echo")
    assert first.value["x"] == [1, None, "é\n"]
    assert first.value["pid"] == second.value["pid"] == worker.pid != os.getpid()


def test_what_a_call_prints_corrupts_nothing(worker, capfd):
    assert call(worker, "talk").value == {"said": 3}
    assert capfd.readouterr() == ("", "")
    assert call(worker, "echo", {"x": 1}).value["x"] == 1


def test_a_hang_ends_at_the_deadline_of_its_phase(worker):
    begun = time.monotonic()
    outcome = call(worker, "phases", {"check": 0.1, "cold": 60}, {"cold": 0.4, "other": 30})
    assert outcome == Outcome("timeout", "cold took longer than 0.4 s")
    assert time.monotonic() - begun < 10
    assert call(worker, "echo").status == "ok"


def test_each_phase_has_the_whole_limit(worker):
    heard = []
    outcome = worker.call(
        "pool_calls:phases", {"a": 0.7, "b": 0.7}, limits={"other": 1.0}, on_phase=heard.append
    )
    assert outcome.status == "ok"
    assert heard == ["call", "a", "b"]


def test_waiting_for_a_turn_stops_the_clock_and_starts_no_new_one(worker):
    limits = {"other": 0.6}
    assert call(worker, "wait_for_turn", {"paused_s": 1.0, "then_s": 0.1}, limits).status == "ok"
    assert call(worker, "wait_for_turn", {"paused_s": 0.1, "then_s": 5}, limits).status == "timeout"


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("leave", {"code": 3}, "exited with code 3 during call; it printed: about to leave"),
        ("leave", {"code": 0}, "exited with code 0 during call; it printed: about to leave"),
        ("segfault", {}, "killed by SIGSEGV during call"),
        ("signal_self", {"signal": int(signal.SIGABRT)}, "killed by SIGABRT during call"),
        ("signal_self", {"signal": int(signal.SIGKILL)}, "killed by SIGKILL during call"),
        ("close_pipes", {}, "closed the harness's pipe during call"),
    ],
)
def test_a_death_costs_one_call(worker, name, args, reason):
    before = worker.pid
    assert call(worker, "talk").status == "ok", "what an earlier call printed is not quoted"
    assert call(worker, name, args) == Outcome("crashed", reason)
    assert call(worker, "echo").value["pid"] != before


@pytest.mark.parametrize(
    ("kind", "text", "status", "reason"),
    [
        ("runtime", 'a, "b"\n c\n', "error", 'RuntimeError: a, "b" / c'),
        ("runtime", "", "error", "RuntimeError"),
        ("key", "k", "error", "KeyError: 'k'"),
        ("exit", "3", "error", "SystemExit: 3"),
        ("runtime", "CUDA error: out of memory", "oom", "out of memory: CUDA error: out of memory"),
        (
            "runtime",
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
            "of which 512.50 MiB is free.",
            "oom",
            "out of memory: asked for 20480 MiB, 512 MiB free",
        ),
        (
            "runtime",
            "Triton Error [CUDA]: an illegal memory access was encountered",
            "crashed",
            "the CUDA context is lost: Triton Error [CUDA]: an illegal memory access was encountered",
        ),
    ],
)
def test_an_exception_becomes_a_status_and_one_line(worker, kind, text, status, reason):
    before = worker.pid
    assert call(worker, "raise_it", {"kind": kind, "text": text}) == Outcome(status, reason)
    after = call(worker, "echo").value["pid"]
    assert (after != before) == (status == "crashed"), "only a lost context needs a new process"


def test_a_cell_may_choose_its_status(worker):
    outcome = call(worker, "fail", {"status": "wrong", "reason": "o is off"})
    assert outcome == Outcome("wrong", "o is off")


def test_a_value_that_is_not_json_is_the_calls_fault(worker):
    outcome = call(worker, "return_object")
    assert outcome.status == "error"
    assert "not JSON serializable" in outcome.reason


def test_memory_beyond_the_limit_is_oom_and_the_next_call_runs_afresh():
    with Worker("test", env={"PYTHONPATH": str(HERE)}, memory_limit_bytes=2**30) as worker:
        before = worker.pid
        outcome = call(worker, "eat_with_torch", {"bytes": 2**31})
        assert outcome == Outcome("oom", "out of memory: asked for 2048 MiB, limit 1024 MiB")
        assert call(worker, "eat_memory", {"bytes": 2**27}).status == "ok"
        assert worker.pid != before
        assert call(worker, "eat_memory", {"bytes": 2**31}).status == "oom"


def test_several_workers_run_at_once():
    with Worker("a", env={"PYTHONPATH": str(HERE)}) as a, Worker("b", env={"PYTHONPATH": str(HERE)}) as b:
        for worker, seconds in ((a, 0.8), (b, 0.1)):
            worker.start("pool_calls:phases", {"x": seconds}, limits=LIMITS)
        assert a.poll(0.0) is None
        assert [w.name for w, _ in wait_any([a, b], 10.0)] == ["b"]
        assert [w.name for w, o in wait_any([a, b], 10.0) if o.status == "ok"] == ["a"]
        assert wait_any([a, b], 1.0) == []


def test_a_busy_worker_refuses_a_second_call(worker):
    worker.start("pool_calls:hang", {}, limits=LIMITS)
    with pytest.raises(RuntimeError, match="busy"):
        worker.start("pool_calls:echo", {}, limits=LIMITS)


@pytest.mark.parametrize("die", [False, True])
def test_what_a_call_leaves_running_goes_with_its_worker(worker, die):
    group = worker.pid
    begun = time.monotonic()
    outcome = call(worker, "spawn_stray", {"die": die})
    assert outcome.status == ("crashed" if die else "ok")
    assert time.monotonic() - begun < 10, "a fork that holds the pipes must not hide the death"
    assert die or len(group_members(group)) >= 4
    worker.close()
    assert wait_until(lambda: group_members(group) == []), group_members(group)


@pytest.mark.parametrize("function", ["hang", "block_interpreter", "spawn_stray"])
def test_no_worker_outlives_a_killed_parent(function):
    script = textwrap.dedent(f"""
        import time
        from glabench.pool import Worker
        worker = Worker("test", env={{"PYTHONPATH": {str(HERE)!r}}})
        worker.start("pool_calls:{function}", {{}}, limits={{"other": 300.0}})
        while worker.phase != "call":
            worker.poll(0.05)
        time.sleep(0.3)
        print(worker.pid, flush=True)
        time.sleep(300)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=HERE.parent) as parent:
        group = int(parent.stdout.readline())
        assert group_members(group), "the worker runs"
        parent.kill()
    assert wait_until(lambda: group_members(group) == []), group_members(group)
