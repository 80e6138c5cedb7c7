"""metrics.csv: one line a step, cut back to the checkpoint that a run goes on from."""

import csv
import math
from dataclasses import dataclass, fields
from pathlib import Path

from glabench.errors import ResultsError
from glabench.results import write_whole

METRICS = "metrics.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One step. Losses in nats per predicted token; `tokens` since the start; empty is not measured."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float  # before clipping
    tokens_per_s: float
    peak_mem_mib: float
    valid_loss: float | None = None


COLUMNS = tuple(f.name for f in fields(Metric))


class MetricsFile:
    """Append-only within a run. `step` is the checkpoint a run goes on from: later lines are cut."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [",".join(COLUMNS)]
        if path.exists():
            header, *lines = path.read_text(encoding="utf-8").split("\n")
            if header != kept[0]:
                raise ResultsError(
                    f"the columns of {path.name} are not this version's",
                    where=str(path),
                    fix="choose another --out",
                )
            kept += [
                line for line in lines[:-1] if int(line.split(",", 1)[0]) <= step
            ]  # the last may be torn
        if len(kept) - 1 != step:
            raise ResultsError(
                f"{path.name} has {len(kept) - 1} of the checkpoint's {step} steps",
                where=str(path),
                fix="put the file back, or choose another --out",
            )
        write_whole(path, "\n".join(kept) + "\n")
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def append(self, metric: Metric) -> None:
        values = [getattr(metric, name) for name in COLUMNS]
        if any(isinstance(v, float) and not math.isfinite(v) for v in values):
            raise ValueError(f"a value that is not finite at step {metric.step}")
        self._writer.writerow("" if v is None else repr(v) for v in values)
        self._file.flush()  # the process may be killed at any time

    def close(self) -> None:
        self._file.close()
