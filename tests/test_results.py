"""Rows and their file: what is written survives, what is broken is named, nothing is lost."""

import csv
import fcntl
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from glabench.errors import ResultsError
from glabench.results import RowFile, read_rows, rows_path, write_whole
from glabench.rows import MemoryRow, RowError, SpeedRow, ThroughputRow, columns, to_line

UNITS = (
    "_ms",
    "_s",
    "_mib",
    "_gib",
    "_gb_s",
    "_tflop_s",
    "_tok_s",
    "_pct",
    "_frac",
    "_ratio",
    "_mhz",
    "_c",
    "_w",
    "_nats",
)
COUNTS = {
    "reps",
    "calls_per_sample",
    "outliers",
    "throttled",
    "visits",
    "flop_count",
    "replicate",
    "seed",
    "schema",
    "vocabulary",
    "params",
    "flop_per_token",
    "steps",
    "warmup_steps",
}
SIZES = {"batch", "seqlen", "heads", "d_k", "d_v", "head_dim", "device_index"}


def row(**changes):
    base = {
        "verb": "speed",
        "suite": "s",
        "case": "c0",
        "impl": "gla_chunk_torch",
        "impl_version": "v",
        "family": "gla",
        "device": "cpu",
        "env": "e",
        "shape": "cpu",
        "passes": "fwd",
        "batch": 1,
        "seqlen": 1024,
        "heads": 2,
        "d_k": 16,
        "d_v": 32,
        "head_dim": 64,
        "dtype": "fp32",
    }
    cls = changes.pop("cls", SpeedRow)
    return cls(**(base | changes))


def test_every_number_has_a_unit_or_is_a_count():
    for cls in (SpeedRow, MemoryRow, ThroughputRow):
        for f in fields(cls):
            if "int" in str(f.type) or "float" in str(f.type):
                assert f.name in COUNTS | SIZES or f.name.endswith(UNITS), f.name


@pytest.mark.parametrize(
    "changes",
    [
        {},  # ok without a time
        {"time_ms": 1.0, "reason": "x"},
        {"time_ms": math.nan},
        {"time_ms": math.inf},
        {"status": "wrong"},  # no reason
        {"status": "oom", "reason": "x", "time_ms": 1.0},
        {"status": "fine", "time_ms": 1.0},
        {"time_ms": 1.0, "host_ms": math.nan},
    ],
)
def test_a_row_that_contradicts_itself_cannot_be_made(changes):
    with pytest.raises(RowError):
        row(**changes)


def test_a_hostile_reason_stays_one_csv_line(tmp_path):
    reason = 'ValueError: "a", b;\n  line two\r\nthree'
    file = RowFile(tmp_path / "rows.csv", SpeedRow)
    file.append(row(status="error", reason=reason))
    text = (tmp_path / "rows.csv").read_text()
    assert len(text.splitlines()) == 2
    back = next(csv.DictReader(text.splitlines()))
    assert back["reason"] == 'ValueError: "a", b; / line two / three' and back["time_ms"] == ""


def test_full_precision_survives(tmp_path):
    file = RowFile(tmp_path / "rows.csv", SpeedRow)
    file.append(row(time_ms=0.1 + 0.2))
    assert float(read_rows(tmp_path / "rows.csv", SpeedRow)[0]["time_ms"]) == 0.1 + 0.2


def test_append_adds_to_what_is_there_and_counts_replicates(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    for number in range(2):
        file = RowFile(path, SpeedRow)
        assert file.next_replicate() == number
        file.append(row(time_ms=1.0, replicate=number))
    assert [r["replicate"] for r in read_rows(path, SpeedRow)] == ["0", "1"]


def test_settled_knows_statuses_and_replicates(tmp_path):
    file = RowFile(tmp_path / "rows.csv", SpeedRow)
    for status in ("ok", "wrong", "unsupported", "oom", "timeout", "crashed", "error", "unavailable"):
        measured = {"time_ms": 1.0} if status == "ok" else {"reason": "r"}
        file.append(row(case=status, status=status, **measured))
    file.append(row(case="later", time_ms=1.0, replicate=1))
    assert {key[2] for key in file.settled(0)} == {"ok", "wrong", "unsupported", "oom"}
    assert {key[2] for key in file.settled(1)} == {"later"}


@pytest.mark.parametrize("cut", [1, 20, 5000])
def test_a_torn_last_line_is_cut_and_named(tmp_path, cut):
    path = tmp_path / "rows.csv"
    file = RowFile(path, SpeedRow)
    file.append(row(case="first", time_ms=1.0))
    whole = path.read_bytes()
    file.append(row(case="second", time_ms=2.0))
    torn = path.read_bytes()[: max(len(whole) + 1, len(path.read_bytes()) - cut)]
    path.write_bytes(torn)
    again = RowFile(path, SpeedRow)
    assert again.repaired == torn[len(whole) :].decode()[:80]
    assert path.read_bytes() == whole and [r["case"] for r in again.rows] == ["first"]


def test_a_malformed_line_elsewhere_is_an_error_and_the_file_is_untouched(tmp_path):
    path = tmp_path / "rows.csv"
    file = RowFile(path, SpeedRow)
    file.append(row(time_ms=1.0))
    broken = path.read_text() + "1,speed,half\n" + to_line(row(time_ms=2.0))
    path.write_text(broken)
    with pytest.raises(ResultsError, match="line 3 has 3 fields"):
        RowFile(path, SpeedRow)
    assert path.read_text() == broken


def test_a_foreign_header_is_refused_and_kept(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("name,ms\nx,1\n")
    with pytest.raises(ResultsError, match="not this version's"):
        RowFile(path, SpeedRow)
    assert path.read_text() == "name,ms\nx,1\n"


def test_two_verbs_do_not_share_a_file(tmp_path):
    assert (
        rows_path(tmp_path, "speed").name == "rows.csv" and rows_path(tmp_path, "memory").name == "memory.csv"
    )
    RowFile(rows_path(tmp_path, "speed"), SpeedRow).append(row(time_ms=1.0))
    with pytest.raises(ResultsError):
        RowFile(rows_path(tmp_path, "speed"), MemoryRow)


READ_ONLY = """
import os, pathlib, sys
from glabench.errors import ResultsError
from glabench.results import (RowFile)
from glabench.rows import (SpeedRow)
if os.getuid() == 0:  # root may write anything: become nobody
    os.setuid(65534)
try:
    RowFile(pathlib.Path(sys.argv[1]), SpeedRow)
except ResultsError as err:
    print(err)
"""


def test_a_read_only_file_is_one_clear_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(columns(SpeedRow)) + "\n")
    path.chmod(0o444)
    for folder in (tmp_path, *list(tmp_path.parents)[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(path)], capture_output=True, text=True, check=True
    )
    assert "cannot write rows.csv" in done.stdout and "--out" in done.stdout


def test_a_disk_that_fills_up_loses_nothing_that_was_written(tmp_path):
    """A file size limit makes write() fail as a full disk does, in the middle of a line."""
    path = tmp_path / "rows.csv"
    file = RowFile(path, SpeedRow)
    file.append(row(case="first", time_ms=1.0))
    before = path.read_bytes()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, len(before) + 30))
            file.append(row(case="second", time_ms=2.0))
        except ResultsError as err:
            code = 0 if "rows before it are safe" in str(err) and "--resume" in str(err) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == before


def test_a_line_that_another_process_is_writing_is_not_torn(tmp_path):
    path = tmp_path / "rows.csv"
    RowFile(path, SpeedRow).append(row(case="first", time_ms=1.0))
    line = to_line(row(case="second", time_ms=2.0)).encode()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with path.open("ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(line[:20])
                os.write(write, b"x")
                time.sleep(0.3)  # the other process meets half a line here, unless it waits
                file.write(line[20:])
        finally:
            os._exit(0)
    os.read(read, 1)
    again = RowFile(path, SpeedRow)
    os.waitpid(child, 0)
    assert again.repaired is None and [r["case"] for r in again.rows] == ["first", "second"]


def test_write_whole_replaces_in_one_step(tmp_path):
    path = tmp_path / "run.json"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["run.json"]
