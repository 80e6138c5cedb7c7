"""Compiling ahead of Triton's tuning, and turns on a device among workers."""

import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glabench.pool import Worker, wait_any
from glabench.runners import tuning

HERE = Path(__file__).parent
DEVICE = "cuda:97"  # no GPU is touched: only its lock file
LIMITS = {"other": 20.0}


def tune(cache, word):
    pytest.importorskip("triton", reason="Triton is not installed: there is nothing to tune")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "tune_without_gpu.py"), word]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_configurations_compile_in_threads_before_the_first_is_timed(tmp_path):
    found = tune(tmp_path, "ahead")
    assert found["is_ahead"] and found["threads"] > 1
    assert found["aside"] == [0], "once, and before any launch"
    assert (found["tried"], found["compiled"]) == (7, 6), "the one that does not compile is tried too"
    assert found["launched"] == 6 + 2, "to be timed, and then by the two calls"
    chosen = "double_kernel(N=256, num_warps=2, num_ctas=1, num_stages=3)"
    assert found["config"] == chosen, "the fastest: the last one"
    assert found["again"] == [0, 0, chosen], "a tuned kernel is not tuned again, but still named"
    assert found["cache"] == "cold"
    second = tune(tmp_path, "ahead")
    assert (second["compiled"], second["cache"], second["config"]) == (0, "warm", chosen)


def test_tuning_without_the_hook_is_tritons_own(tmp_path):
    found = tune(tmp_path, "plain")
    assert (found["is_ahead"], found["threads"], found["tried"]) == (False, 1, 0)
    assert found["compiled"] == 6 and found["config"].startswith("double_kernel(N=256")


def test_others_have_the_device_while_a_kernel_without_tuning_compiles(tmp_path):
    assert tune(tmp_path, "aside") == {"aside": [0, 1], "launched": 3}


def test_threads_that_compile_step_aside_once_and_the_last_one_back():
    events = []

    @contextlib.contextmanager
    def step_aside():
        events.append("left")
        yield
        events.append("back")

    aside = tuning.Aside()
    aside.step_aside = step_aside
    with aside:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(8):
                pool.submit(aside.__enter__).result()
                pool.submit(aside.__exit__).result()
        assert events == ["left"]
    assert events == ["left", "back"]
    with aside:
        assert events == ["left", "back", "left"]


def test_without_triton_there_is_nothing_to_install_or_record(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.runtime.autotuner", None)
    assert tuning.install() is False
    with tuning.recording() as record:
        pass
    assert (record.tried, record.config, record.cache) == (0, "", "")


@pytest.fixture
def pair():
    env = {"PYTHONPATH": str(HERE)}
    with Worker("a", env=env) as a, Worker("b", env=env) as b:
        yield a, b


def both(pair, first, second, limits=LIMITS):
    """Start the second once the first holds the turn; both outcomes."""
    a, b = pair
    a.start("pool_calls:hold_turn", {"device": DEVICE, **first}, limits=LIMITS)
    while a.phase != "held":
        assert a.poll(0.02) is None
    b.start("pool_calls:hold_turn", {"device": DEVICE, **second}, limits=limits)
    ended = {}
    while len(ended) < 2:
        ended |= dict(wait_any(pair, 1.0))
    return ended[a], ended[b]


def test_a_turn_is_waited_for_with_the_clock_stopped(pair):
    first, second = both(pair, {"seconds": 1.5}, {"seconds": 0.1}, limits={"other": 0.5, "start": 20.0})
    assert second.status == "ok", second
    assert second.value["begun"] >= first.value["ended"] and second.value["waited_s"] > 0.3


def test_one_who_steps_aside_lets_the_other_in(pair):
    first, second = both(pair, {"seconds": 1.5, "aside": True}, {"seconds": 0.1})
    assert second.value["ended"] < first.value["ended"]


def test_a_killed_holder_gives_its_turn_back(pair):
    a, b = pair
    a.start("pool_calls:hold_turn", {"device": DEVICE, "seconds": 60}, limits={"other": 0.5, "start": 20.0})
    while a.phase != "held":
        assert a.poll(0.02) is None
    b.start("pool_calls:hold_turn", {"device": DEVICE, "seconds": 0.0}, limits=LIMITS)
    while (outcome := a.poll(1.0)) is None:
        pass
    assert outcome.status == "timeout"
    while (outcome := b.poll(1.0)) is None:
        pass
    assert outcome.status == "ok"
