"""Rows, their CSV, and what is already done: append-only, safe against `kill -9`.

Key columns have plain names; measured columns end in their unit. Empty means not measured.
"""

import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from glabench.errors import ResultsError

SCHEMA = 1
Status = Literal["ok", "wrong", "oom", "timeout", "unsupported", "unavailable", "crashed", "error"]
STATUSES: tuple[str, ...] = get_args(Status)
SETTLED = ("ok", "wrong", "unsupported", "oom")  # --resume leaves these; the others are tried again
BAD = ("wrong", "crashed", "error")  # these make a run's exit code 1
RESUME_KEY = ("verb", "suite", "case", "impl", "impl_version", "device", "env", "seed")


class RowError(ResultsError):
    """A row that contradicts itself: a bug in a runner, not a measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The key columns of every verb. An empty CSV field is None; NaN and 0 never stand for failure."""

    MEASURED: ClassVar[str] = ""  # the column an ok row must have

    schema: int = SCHEMA
    verb: str
    suite: str
    case: str
    impl: str
    impl_version: str
    family: str
    device: str
    device_index: int = 0
    env: str
    replicate: int = 0
    seed: int = 0
    status: Status = "ok"
    reason: str = ""
    started_utc: str = ""
    wall_s: float | None = None

    def __post_init__(self) -> None:
        where = f"{self.impl} case {self.case}"
        if self.status not in STATUSES:
            raise RowError(f"no status {self.status!r}", where=where, fix=f"one of {', '.join(STATUSES)}")
        value = getattr(self, self.MEASURED) if self.MEASURED else None
        ok, measured = self.status == "ok", value is not None
        if ok == bool(self.reason) or (self.MEASURED and ok != measured):
            raise RowError("a row has a measurement or a reason", where=where, fix="give exactly one")
        for f in fields(self):
            number = getattr(self, f.name)
            if isinstance(number, float) and not math.isfinite(number):
                raise RowError(f"{f.name} is {number}", where=where, fix="leave an unmeasured field empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRow(Row):
    """The columns that say which case, and which arm of it, a speed or memory row is about.

    `arm` is how this family splits the shape's width; `flop_model` and `state_mib` (final state of
    one call, all sequences) are what makes a comparison fair or not.
    """

    shape: str
    passes: str
    batch: int
    seqlen: int
    heads: int
    d_k: int
    d_v: int
    head_dim: int
    dtype: str
    causal: str = "yes"
    packed: str = "no"
    arm: str = ""
    state_mib: float | None = None
    layout_copy: str = "no"
    flop_model: str = ""
    flop_count: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow(CaseRow):
    """One timed cell: device time, host time and wall time of one call."""

    MEASURED: ClassVar[str] = "time_ms"

    timer: str = ""
    l2: str = ""
    time_ms: float | None = None
    time_lo_ms: float | None = None
    time_hi_ms: float | None = None
    time_p20_ms: float | None = None
    time_p80_ms: float | None = None
    time_min_ms: float | None = None
    reps: int | None = None
    calls_per_sample: int | None = None
    outliers: int | None = None
    throttled: int | None = None
    visits: int | None = None
    converged: str = ""
    host_ms: float | None = None
    wall_ms: float | None = None
    launch_bound: str = ""
    syncs_inside: str = ""
    async_outside: str = ""
    floor_ms: float | None = None
    floor_ratio: float | None = None
    floor_kind: str = ""
    tflop_s: float | None = None
    gb_s: float | None = None
    tok_s: float | None = None
    err_ratio: float | None = None
    tol_ratio: float | None = None
    worst_tensor: str = ""
    checked_frac: float | None = None
    cold_start_ms: float | None = None
    first_in_process: str = ""
    autotune_ms: float | None = None
    config: str = ""
    cache: str = ""
    sm_mhz: float | None = None
    temp_c: float | None = None
    power_w: float | None = None
    throttle: str = ""
    shared_device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow(CaseRow):
    """One cell's memory: peak beyond the inputs, split into what it is for. MiB = 2**20 bytes."""

    MEASURED: ClassVar[str] = "extra_mem_mib"

    meter: str = ""  # "cuda_allocator" or "peak_rss"
    peak_mem_mib: float | None = None
    extra_mem_mib: float | None = None
    inputs_mib: float | None = None
    outputs_mib: float | None = None
    saved_mib: float | None = None
    workspace_mib: float | None = None
    reserved_mib: float | None = None
    device_mem_mib: float | None = None
    predicted_mib: float | None = None
    repeats_equal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRow(Row):
    """One model's training step at one length and batch: forward, loss, backward, clip and AdamW.

    `layer` is the implementation that computed the mixer, `kernels` the autograd functions of libraries
    and ours that the step's graph holds, `fused` what Liger-Kernel replaced. Rates are of one device.
    """

    MEASURED: ClassVar[str] = "tok_s"

    model: str
    size: str
    condition: str
    batch: int
    seqlen: int
    precision: str
    layer: str = ""
    kernels: str = ""
    fused: str = ""
    loss_form: str = ""  # "plain", or whose fused linear cross-entropy
    compile: str = ""  # "no" or "blocks"
    checkpointing: str = "no"
    optimizer: str = ""
    vocabulary: int | None = None
    params: int | None = None
    flop_per_token: float | None = None
    flop_model: str = ""
    tok_s: float | None = None
    tok_lo_s: float | None = None
    tok_hi_s: float | None = None
    step_ms: float | None = None
    step_lo_ms: float | None = None
    step_hi_ms: float | None = None
    step_p80_ms: float | None = None
    forward_ms: float | None = None  # medians of the parts, which need not add up to the step's
    loss_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    steps: int | None = None
    warmup_steps: int | None = None
    cold_start_ms: float | None = None
    timer: str = ""
    meter: str = ""
    peak_mem_mib: float | None = None
    reserved_mib: float | None = None
    tflop_s: float | None = None
    mfu_frac: float | None = None  # of the data sheet's dense bf16 rate
    mfu_measured_frac: float | None = None  # of the products' rate that this run measured
    initial_loss_nats: float | None = None
    loss_nats: float | None = None
    err_ratio: float | None = None  # of the layer's own check, where it has one
    tol_ratio: float | None = None


ROWS: dict[str, type[CaseRow]] = {"speed": SpeedRow, "memory": MemoryRow}
CASE_COLUMNS = (
    "shape",
    "passes",
    "batch",
    "seqlen",
    "heads",
    "d_k",
    "d_v",
    "head_dim",
    "dtype",
    "causal",
    "packed",
)


def columns(row_type: type[Row]) -> list[str]:
    return [f.name for f in fields(row_type)]


def to_line(row: Row) -> str:
    """One CSV record that never spans lines: newlines in a reason become " / "."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(_text(getattr(row, name)) for name in columns(type(row)))
    return buffer.getvalue()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return " / ".join(part.strip() for part in str(value).splitlines() if part.strip())


def rows_path(folder: Path, verb: str) -> Path:
    """`speed` rows lie in rows.csv; another verb of the same suite beside it, under its own name."""
    return folder / ("rows.csv" if verb == "speed" else f"{verb}.csv")


class RowFile:
    """An append-only CSV of one row type.

    Opening it checks the header, cuts and names a torn last line, and refuses a malformed line
    elsewhere. Raises ResultsError; the file is never rewritten.
    """

    def __init__(self, path: Path, row_type: type[Row]) -> None:
        self.path, self.row_type = path, row_type
        self.repaired: str | None = None
        self.rows: list[dict[str, str]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._repair()
                self.rows = read_rows(path, row_type)
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as err:
            raise ResultsError(
                f"cannot write {path.name}: {err.strerror}",
                where=str(path),
                fix="choose another folder with --out",
            ) from err

    def _repair(self) -> None:
        data = self.path.read_bytes()
        if not data or data.endswith(b"\n"):
            return
        keep = data.rfind(b"\n") + 1
        with self.path.open("r+b") as file:
            file.truncate(keep)
        self.repaired = data[keep:].decode("utf-8", "replace")[:80]

    def append(self, *rows: Row) -> None:
        """Write the rows of one cell, all or none. Raises ResultsError when the disk does not take them."""
        lines = "".join(to_line(row) for row in rows)
        try:
            # unbuffered: a buffer that failed to flush would be written again, later, by close()
            with self.path.open("ab", buffering=0) as file, _locked(file):
                start = file.seek(0, os.SEEK_END)
                header = ",".join(columns(self.row_type)) + "\n" if start == 0 else ""
                data = (header + lines).encode()
                try:
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, start)  # no half line stays behind
                    raise
        except OSError as err:
            raise ResultsError(
                f"cannot write {self.path.name}: {err.strerror}; the rows before it are safe",
                where=str(self.path),
                fix="make room, then run the same command with --resume",
            ) from err
        self.rows += csv.DictReader(io.StringIO(lines), fieldnames=columns(self.row_type))

    @staticmethod
    def key(fields: Mapping[str, Any]) -> tuple[str, ...]:
        """What makes a cell the same cell in another run of the command."""
        return tuple(str(fields[name]) for name in RESUME_KEY)

    def settled(self, replicate: int) -> set[tuple[str, ...]]:
        """Keys that --resume skips in that replicate."""
        mine = (r for r in self.rows if int(r["replicate"]) == replicate)
        return {self.key(r) for r in mine if r["status"] in SETTLED}

    def next_replicate(self) -> int:
        return 1 + max((int(r["replicate"]) for r in self.rows), default=-1)


@contextmanager
def _locked(file: Any) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def read_rows(path: Path, row_type: type[Row] | None = None) -> list[dict[str, str]]:
    """Every row as strings. Raises ResultsError for a foreign header or a malformed line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ResultsError(f"cannot read {path.name}: {err}", where=str(path), fix="check the path") from err
    lines = list(csv.reader(io.StringIO(text)))
    if not lines:
        return []
    header = lines[0]
    known = [columns(row_type)] if row_type else [columns(t) for t in (*ROWS.values(), ThroughputRow)]
    if header not in known:
        raise ResultsError(
            f"the columns of {path.name} are not this version's",
            where=str(path),
            fix="choose another folder with --out",
        )
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ResultsError(
                f"line {number} has {len(line)} fields, not {len(header)}",
                where=str(path),
                fix="mend or remove that line",
            )
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def append_json(path: Path, record: dict[str, Any]) -> None:
    """One JSON line, flushed: the raw samples beside the rows."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as err:
        raise ResultsError(
            f"cannot write {path.name}: {err.strerror}", where=str(path), fix="make room, then --resume"
        ) from err


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: whoever reads it sees the old or the new, never half."""
    draft = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as err:
        draft.unlink(missing_ok=True)
        raise ResultsError(
            f"cannot write {path.name}: {err.strerror}", where=str(path), fix="make room, or choose --out"
        ) from err
