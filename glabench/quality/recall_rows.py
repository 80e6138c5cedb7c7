"""Rows of `glabench recall`, and which learning rate of a sweep counts. No torch: figures read them too."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from glabench import paper, rows
from glabench.results import read_rows
from glabench.rows import Row

FILE = "recall.csv"
DIVERGED = "diverged: "  # how the reason of a run without a finite loss begins
KEYS = ("mixer", "seqlen", "kv_pairs", "vocab", "d_model", "layers", "heads", "lr", "epochs_max", "batch")
KEYS += ("examples", "test", "valid", "dtype")
# what every run of one panel of a figure shares
TASK = ("seqlen", "kv_pairs", "vocab", "layers", "epochs_max", "batch", "examples", "test", "valid", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallRow(Row):
    """One trained model: a mixer at a width, a learning rate and a seed.

    `acc_token_frac` counts queries and `acc_example_frac` examples with every query right, both of the test
    set; `val_acc_frac` counts queries of the validation set, by which a learning rate is chosen.
    """

    MEASURED: ClassVar[str] = "acc_token_frac"

    mixer: str
    seqlen: int
    kv_pairs: int
    vocab: int
    d_model: int
    layers: int
    heads: int | None
    lr: float
    epochs_max: int
    batch: int
    examples: int
    test: int
    valid: int
    dtype: str
    acc_token_frac: float | None = None
    acc_example_frac: float | None = None
    val_acc_frac: float | None = None
    loss_nats: float | None = None
    epochs: int | None = None
    steps: int | None = None
    stop: str = ""  # "solved": the test accuracy passed 0.99; "epochs": all were run
    params: int | None = None
    state_bytes: int | None = None
    graphed: str = ""  # yes: a step is one CUDA graph
    compiled: str = ""
    epoch_s: float | None = None  # the last epoch's training alone; runs side by side share the device
    train_s: float | None = None  # with compilation, capture and evaluation
    peak_mem_mib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """A mixer at a width: of each seed, the run at the learning rate that validation chose."""

    mixer: str
    heads: int
    family: str
    d_model: int
    chosen: Sequence[dict[str, Any]]  # one row a seed
    best_on_test: float  # the largest over learning rates, median over seeds: what the reference reports
    failed: int  # rows without a measurement

    @property
    def accuracies(self) -> list[float]:
        return [row["acc_token_frac"] for row in self.chosen]

    @property
    def median(self) -> float:
        return statistics.median(self.accuracies)


def load(path: Path) -> list[dict[str, Any]]:
    """The last row of each cell, with numbers. Raises ResultsError for a file that is not ours."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in read_rows(path, RecallRow):
        last[tuple(row[key] for key in ("suite", "device", *KEYS, "impl", "seed"))] = row
    return [typed(row) for row in last.values()]


def typed(row: dict[str, str]) -> dict[str, Any]:
    """A CSV row with its numbers; empty fields are None."""
    return asdict(rows.typed(RecallRow, row))


def by_task(rows: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(what they share, rows) of each task and way of training, the smallest task first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in TASK), []).append(row)
    return [(dict(zip(TASK, key, strict=True)), groups[key]) for key in sorted(groups)]


def best_of_sweep(rows: Iterable[dict[str, Any]]) -> list[Best]:
    """A Best a mixer, number of heads and width of one task's rows; none where no run was measured.

    Validation chooses; equal accuracies go to the smaller final loss, not to the test set.
    """
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mixer"], row["heads"] or 0, row["d_model"]), []).append(row)
    found = []
    for (mixer, heads, dim), group in sorted(groups.items()):
        seeds: dict[int, list[dict[str, Any]]] = {}
        for row in group:
            if row["status"] == "ok":
                seeds.setdefault(row["seed"], []).append(row)
        if seeds:
            found.append(_best(mixer, heads, dim, group, [seeds[seed] for seed in sorted(seeds)]))
    return found


def _best(
    mixer: str, heads: int, dim: int, group: Sequence[dict[str, Any]], seeds: Sequence[list[dict[str, Any]]]
) -> Best:
    return Best(
        mixer=mixer,
        heads=heads,
        family=group[0]["family"],
        d_model=dim,
        chosen=[max(of, key=lambda r: (r["val_acc_frac"], -r["loss_nats"])) for of in seeds],
        best_on_test=statistics.median(max(r["acc_token_frac"] for r in of) for of in seeds),
        failed=sum(row["status"] != "ok" for row in group),
    )


def published() -> dict[tuple[str, int, int, int], float]:
    """(mixer, seqlen, pairs, width) -> accuracy as GLA's Figure 4 prints it."""
    return {
        (r["mixer"], int(r["seqlen"]), int(r["kv_pairs"]), int(r["d_model"])): float(r["acc_token_frac"])
        for r in paper.read("figure4")
    }
