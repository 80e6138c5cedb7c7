"""Whole runs of the command: faults cost their own cells, a killed run goes on, files are respected."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from glabench import registry
from glabench.cases import SHAPES, Shape, make_cases
from glabench.runners.request import MAX_AHEAD, Arm, Request, fitting, to_compile
from glabench.runners.sweep import Sweep
from glabench.suite import Suite

FAULTY = Path(__file__).with_name("faulty_impls.py")
GOOD = "gla_chunk_torch"
SMALL = ("--device", "cpu", "--seqlen", "128,256", "--passes", "fwd")


def glabench(*words, cwd, **more):
    command = [sys.executable, "-m", "glabench", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=180, **more)


def rows(folder, name="rows.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_four_families_are_measured_and_the_rows_say_what_made_them(tmp_path):
    words = ("--seqlen", "128", "--passes", "fwd,fwd_bwd", "--out", "out", "--json")
    done = glabench("speed", *SMALL, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = rows(tmp_path / "out")
    assert len(made) == 4 * 2 and {r["status"] for r in made} == {"ok"}
    assert {r["family"] for r in made} == {"gla", "attention", "mamba", "retention"}
    (run,) = json.loads((tmp_path / "out" / "run.json").read_text())["runs"]
    assert {r["env"] for r in made} == {run["id"]} and run["finished_utc"]
    for row in made:
        assert float(row["time_lo_ms"]) <= float(row["time_ms"]) <= float(row["time_hi_ms"])
        assert float(row["err_ratio"]) <= float(row["tol_ratio"]) and float(row["checked_frac"]) == 1.0
        assert float(row["cold_start_ms"]) > 0 and float(row["floor_ms"]) > 0 and int(row["reps"]) >= 6
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sum(map(len, s["samples_ms"])) for s in samples] == [int(r["reps"]) for r in made]
    assert "gla -> gla_chunk_torch" in done.stderr


def test_memory_splits_into_what_it_is_for(tmp_path):
    done = glabench(
        "memory", "--device", "cpu", "--seqlen", "4k", "--impl", "gla", "--out", "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    made = {r["passes"]: r for r in rows(tmp_path / "out", "memory.csv")}
    assert set(made) == {"fwd", "fwd_bwd"}
    for row in made.values():
        assert float(row["extra_mem_mib"]) > 0 and float(row["predicted_mib"]) > 0 and row["meter"]
    assert float(made["fwd_bwd"]["extra_mem_mib"]) > float(made["fwd"]["extra_mem_mib"])


def test_a_fault_costs_its_own_cells_and_the_exit_code_says_so(tmp_path):
    impls = f"{GOOD},{FAULTY}:gla_wrong,{FAULTY}:gla_raises,{FAULTY}:gla_exits"
    done = glabench("speed", *SMALL, "--impl", impls, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    made = rows(tmp_path / "out")
    assert len(made) == 2 * 4
    status = {(r["impl"], r["seqlen"]): r["status"] for r in made}
    for seqlen in ("128", "256"):
        assert status[GOOD, seqlen] == "ok"
        assert status["faulty_impls:gla_wrong", seqlen] == "wrong"
        assert status["faulty_impls:gla_raises", seqlen] == "error"
        assert status["faulty_impls:gla_exits", seqlen] == "crashed"
    assert all(bool(r["reason"]) != bool(r["time_ms"]) for r in made)
    assert len((tmp_path / "out" / "rows.csv").read_text().splitlines()) == len(made) + 1


def test_a_hang_is_cut_at_the_limit_and_longer_sequences_are_written_off(tmp_path):
    words = ("--impl", f"{FAULTY}:gla_sleeps", "--cell-limit", "2", "--cold-limit", "2", "--out", "out")
    started = time.perf_counter()
    done = glabench("speed", *SMALL, *words, cwd=tmp_path)
    assert time.perf_counter() - started < 60
    short, long = rows(tmp_path / "out")
    assert (short["status"], long["status"]) == ("timeout", "timeout") and done.returncode == 0
    assert "2" in short["reason"] and long["reason"] == "skipped: timeout at seqlen 128, batch 1"


def sweep_until_a_row_then_kill(folder):
    """Start a sweep, `kill -9` it in the middle, and return the rows it left."""
    command = [sys.executable, "-m", "glabench", "speed", *SMALL, "--seqlen", "128..512", "--out", "out"]
    parent = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.perf_counter() + 120
    path = folder / "out" / "rows.csv"
    while time.perf_counter() < deadline and (not path.exists() or len(path.read_text().splitlines()) < 6):
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    return rows(folder / "out")


def test_a_killed_sweep_goes_on_with_no_cell_lost_or_repeated(tmp_path):
    before = sweep_until_a_row_then_kill(tmp_path)
    words = ("speed", *SMALL, "--seqlen", "128..512", "--out", "out", "--resume")
    done = glabench(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = rows(tmp_path / "out")
    assert 0 < len(before) < len(after) == 3 * 4
    assert after[: len(before)] == before
    assert len({(r["impl"], r["case"]) for r in after}) == len(after) and {r["replicate"] for r in after} == {
        "0"
    }
    again = glabench(*words, "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["rows"] == [] and rows(tmp_path / "out") == after


def test_a_torn_line_is_named_and_its_cell_measured_again(tmp_path):
    words = ("speed", *SMALL, "--impl", "retention", "--out", "out")
    assert glabench(*words, cwd=tmp_path).returncode == 0
    path = tmp_path / "out" / "rows.csv"
    path.write_bytes(path.read_bytes()[:-40])
    done = glabench(*words, "--resume", cwd=tmp_path)
    assert "cut a torn last line" in done.stderr
    assert [r["seqlen"] for r in rows(tmp_path / "out")] == ["128", "256"]


def test_without_resume_a_second_run_is_a_replicate(tmp_path):
    words = ("speed", *SMALL, "--impl", "retention", "--out", "out")
    assert [glabench(*words, cwd=tmp_path).returncode for _ in range(2)] == [0, 0]
    assert [r["replicate"] for r in rows(tmp_path / "out")] == ["0", "0", "1", "1"]


def test_rows_of_another_environment_are_named_kept_and_measured_again(tmp_path, monkeypatch):
    words = ("speed", *SMALL, "--impl", "retention", "--out", "out", "--resume")
    first = glabench(*words, cwd=tmp_path)
    monkeypatch.setenv("GLABENCH_TUNE_MS", "20")
    second = glabench(*words, cwd=tmp_path)
    assert "another environment" not in first.stderr
    assert "the last rows here are of another environment (variables): kept, and run again" in second.stderr
    assert len({r["env"] for r in rows(tmp_path / "out")}) == 2 and len(rows(tmp_path / "out")) == 4


def test_a_foreign_file_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.csv").write_text("name,ms\nx,1\n")
    done = glabench("speed", *SMALL, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "not this version's" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "rows.csv").read_text() == "name,ms\nx,1\n"


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv = ["glabench", *sys.argv[1:]]
from glabench.cli import main
main()
"""


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_rows(tmp_path):
    """The file size limit makes every write past 4 KiB fail as on a full disk."""
    words = ("speed", *SMALL, "--seqlen", "128..4k", "--impl", "retention", "--out", "out")
    command = [sys.executable, "-c", FULL, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 2 and "--resume" in done.stderr and "Traceback" not in done.stderr
    kept = rows(tmp_path / "out")
    assert kept and {r["status"] for r in kept} == {"ok"}
    resumed = glabench(*words, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0 and len(rows(tmp_path / "out")) == 6


def gla_arms(**how):
    cases = make_cases(
        shapes=(SHAPES["340m"],), passes=("fwd", "fwd_bwd"), dtypes=("bf16",), where="test",
        **{"tokens": None, "batch": None} | how,
    )  # fmt: skip
    return [Arm(registry.implementations()["gla_chunk"], case, ("speed",)) for case in cases]


def test_no_more_compile_at_once_than_the_devices_memory_holds():
    small, large = gla_arms(seqlens=(64,), batch=1)[:1] * 30, gla_arms(seqlens=(2**20,), batch=1)[1:]
    small, large = [[arm] for arm in small], [[small[0], arm] for arm in large]
    assert len(fitting(small, [], 80_000, 64)) == MAX_AHEAD
    assert len(fitting(small, small[:2], 80_000, 11)) == 3  # two cores each
    assert len(fitting(small, [], 80_000, 1)) == 1
    assert fitting(small[:3] + large * 4, [], 80_000, 64) == small[:3] + large * 3  # of 22 GB each
    assert 0 < len(fitting(small, large * 3, 80_000, 64)) < MAX_AHEAD  # a context each
    assert fitting(large, [], 100, 64) == large  # alone, it may yet fit
    assert fitting(large, small[:1], 100, 64) == []


def test_the_shortest_and_the_longest_case_are_compiled_ahead():
    arms = gla_arms(seqlens=(1024, 4096, 16384), tokens=16384)
    (group,) = to_compile(arms)
    assert [(a.case.passes, a.case.seqlen) for a in group] == [("fwd_bwd", 1024), ("fwd_bwd", 16384)]
    alone = [a for a in arms if (a.case.passes, a.case.seqlen) == ("fwd", 4096)]
    assert to_compile(alone) == [alone]


class Listener:
    """Keeps what a sweep says."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def compiled_ahead(cores, names):
    """Two shapes and three lengths of faulty implementations, compiled ahead on the CPU, by (name, case)."""
    impls = [replace(registry.from_file(f"{FAULTY}:{name}", "gla"), compiles=True) for name in names]
    cases = make_cases(
        shapes=(Shape("one", 2, 4, 8, 16), Shape("two", 2, 8, 8, 16)), seqlens=(8, 16, 32), batch=1,
        tokens=None, passes=("fwd_bwd",), dtypes=("fp32",), where="test",
    )  # fmt: skip
    suite, how = Suite(name="test", cases=cases), {"verbs": ("speed",), "device": "cpu", "out": None}
    sweep = Sweep(Request(suite=suite, impls=tuple(impls), asked=names, **how), Listener())
    sweep.memory_mib, sweep.threads = 80_000, cores
    sweep._compile_ahead([Arm(impl, case, ("speed",)) for case in cases for impl in impls])
    return cases, sweep


def test_a_process_compiles_one_shape_of_an_implementation_after_the_other():
    cases, sweep = compiled_ahead(1, ("gla_good", "gla_prints"))
    ends = [case.key() for case in cases if case.seqlen in (8, 32)]
    for name in ("faulty_impls:gla_good", "faulty_impls:gla_prints"):
        found = {case: first for (impl, case), first in sweep.ahead.items() if impl == name}
        assert sorted(found) == sorted(ends)
        assert [first["first_in_process"] for first in found.values()] == ["yes", "no", "no", "no"]
        assert all(first["cold_start_ms"] > 0 for first in found.values())


def test_with_cores_to_spare_every_shape_is_compiled_in_a_process_of_its_own():
    cases, sweep = compiled_ahead(64, ("gla_good",))
    shortest = {case.key() for case in cases if case.seqlen == 8}
    firsts = {case for (_, case), first in sweep.ahead.items() if first["first_in_process"] == "yes"}
    assert len(sweep.ahead) == 4 and firsts == shortest


def test_what_fails_ahead_is_said_and_its_longer_case_left_alone():
    _, sweep = compiled_ahead(1, ("gla_exits", "gla_good"))
    assert {impl for impl, _ in sweep.ahead} == {"faulty_impls:gla_good"} and len(sweep.ahead) == 4
    failed = [text for text in sweep.watch.said if "crashed: exited with code 5" in text]
    assert len(failed) == 2, "a shape each"
