"""Live progress on stderr: what runs now, what is done, the time left; plain lines without a terminal."""

import sys
import time
from typing import Any

from glabench.cases import Case
from glabench.rows import Row

MARK = {"ok": "ok", "unsupported": "--", "unavailable": "--"}


def describe_row(row: Row) -> str:
    """One row as one line: where, and the time or the reason."""
    kind = row.condition if row.verb == "throughput" else row.passes
    where = f"{row.impl:<28} {kind:<7} {row.batch}x{row.seqlen}"
    if row.status != "ok":
        return f"{where:<54} {row.status}: {row.reason}"
    if row.verb == "throughput":
        return f"{where:<54} {row.tok_s:10,.0f} tokens/s  {row.step_ms:.4g} ms  {row.peak_mem_mib:,.0f} MiB"
    if row.verb == "memory":
        return f"{where:<54} {row.extra_mem_mib:10.1f} MiB beyond the inputs"
    half = "" if row.time_lo_ms is None else f"  [{row.time_lo_ms:.4g}, {row.time_hi_ms:.4g}]"
    flags = ("launch_bound", "syncs_inside", "async_outside", "shared_device")
    notes = [name for name in flags if getattr(row, name) == "yes"]
    notes += [] if row.converged == "yes" else ["not converged"]
    return f"{where:<54} {row.time_ms:10.4g} ms{half}{'  ' + ', '.join(notes) if notes else ''}"


class PlainWatch:
    """One line a finished row: for logs and CI."""

    def __init__(self) -> None:
        self.cells = self.finished = 0
        self.started = time.perf_counter()

    def begin(self, cells: int) -> None:
        self.cells, self.started = cells, time.perf_counter()
        self.say(f"{cells} cells to measure")

    def now(self, impl: str, case: Case, phase: str) -> None:
        pass

    def row(self, row: Row) -> None:
        self.finished += 1
        self.say(f"[{self.finished}/{self.cells}] {row.verb:<6} {describe_row(row)}")

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def __enter__(self) -> "PlainWatch":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def time_left(self) -> float | None:
        """Seconds, from the pace so far; None before the first row."""
        if not self.finished:
            return None
        return (time.perf_counter() - self.started) / self.finished * (self.cells - self.finished)


class LiveWatch(PlainWatch):
    """A bar at the foot of the terminal with what runs now; finished rows scroll above it."""

    def __enter__(self) -> "LiveWatch":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, left="")
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def begin(self, cells: int) -> None:
        self.cells, self.started = cells, time.perf_counter()
        self.bar.update(self.task, total=cells)

    def now(self, impl: str, case: Case, phase: str) -> None:
        self.bar.update(self.task, description=f"{impl} {case.describe()}: {phase}")

    def row(self, row: Row) -> None:
        super().row(row)
        left = self.time_left()
        self.bar.update(self.task, completed=self.finished, left="" if left is None else f"{left:.0f} s left")

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, soft_wrap=True)


def watch() -> Any:
    """The live display on a terminal, plain lines otherwise."""
    return LiveWatch() if sys.stderr.isatty() else PlainWatch()
