"""Rows of every verb as dataclasses, and as CSV records.

Key columns have plain names; measured columns end in their unit. Empty means not measured.
"""

import csv
import io
import math
from dataclasses import dataclass, fields
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


def typed(kind: type[Row], record: dict[str, str]) -> Any:
    """A CSV record -> its dataclass. Raises ResultsError for a field that is not of its type."""
    values: dict[str, Any] = {}
    for f in fields(kind):
        text, wanted = record[f.name], {f.type, *get_args(f.type)}
        try:
            if type(None) in wanted and text == "":
                values[f.name] = None
            else:
                values[f.name] = float(text) if float in wanted else int(text) if int in wanted else text
        except ValueError as err:
            raise ResultsError(
                f"{f.name} = {text!r} is not a number",
                where=f"{record['impl']} case {record['case']}",
                fix="mend or remove that line",
            ) from err
    return kind(**values)
