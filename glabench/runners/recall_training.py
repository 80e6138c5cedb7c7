"""Train the cells of `glabench recall` in worker processes; each finished one is a row."""

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from glabench import env
from glabench.pool import Outcome, Worker, wait_any
from glabench.quality import recall_rows
from glabench.quality.mixers import MIXERS, head_widths
from glabench.quality.recall_rows import DIVERGED, RecallRow
from glabench.results import RowFile, append_json
from glabench.rows import SETTLED
from glabench.runners import probe
from glabench.runners.recall_grid import Cell, Request

TRAIN = "glabench.quality.recall:train"
SOLVED = 0.99  # what a control must pass
CURVE = ("loss_nats", "acc_token_frac", "acc_example_frac", "val_acc_frac")  # of an epoch, in curves.jsonl


class Training:
    """Owns the workers and the row files of one run of the verb."""

    def __init__(self, asked: Request, say: Callable[[str], None]) -> None:
        self.asked, self.say = asked, say
        self.rows: list[RecallRow] = []
        self.solved: set[tuple[Any, ...]] = set()  # models one of whose learning rates passed SOLVED
        self.eager: set[str] = set()  # mixers that run without CUDA graphs
        self.left_out = 0
        self.threads = max(1, env.usable_cores() // asked.jobs) if asked.device == "cpu" else 1
        self.versions: dict[str, str] = {}

    def run(self) -> list[dict[str, Any]]:
        """Train what is missing and return the request's rows. Raises GlabenchError before training."""
        begun = time.perf_counter()
        self._open()
        queue = [cell for cell in self.asked.cells if self._key(cell) not in self.done]
        self.say(f"{len(queue)} models to train, {len(self.asked.cells) - len(queue)} already done")
        self.total = len(queue)
        workers: list[Worker] = []
        try:
            for phase in _phases(queue):
                if control := self._control_failed(phase):
                    self._refuse(phase, control)
                    continue
                while len(workers) < min(self.asked.jobs, len(phase)):
                    workers.append(self._worker(len(workers)))
                alone = self._train(phase, workers)
                for worker in workers[1:] if alone else ():
                    worker.close()  # what ran out of memory beside others runs again by itself
                workers = workers[:1] if alone else workers
                self._train(alone, workers, is_alone=True)
        finally:
            for worker in workers:
                worker.close()
        for suite, entry in self.entries.items():
            entry["finished_utc"] = env.now_utc()
            entry["measured"]["run_s"] = round(time.perf_counter() - begun, 3)
            env.write_run(self.folders[suite], entry)
        return [row for suite in self.files for row in self._last_rows(suite)]

    # --- before training ----------------------------------------------------------------------------------

    def _open(self) -> None:
        self.slug = env.device_slug(env.gpu_name(self.asked.device))
        suites = dict.fromkeys(panel.suite for panel in self.asked.panels)
        self.folders = {suite: self.asked.folder(suite, self.slug) for suite in suites}
        self.files: dict[str, RowFile] = {}
        for suite, folder in self.folders.items():
            self.files[suite] = file = RowFile(folder / recall_rows.FILE, RecallRow)
            if torn := file.torn("cell"):
                self.say(torn)
            env.read_runs(folder)
        described = self._describe()
        self.entries, self.replicates = {}, {}
        self.done: set[tuple[str, ...]] = set()
        for suite, folder in self.folders.items():
            panels = [asdict(p) for p in self.asked.panels if p.suite == suite]
            self.entries[suite] = env.make_run(
                described=described,
                argv=list(self.asked.argv),
                suite=suite,
                suite_digest=env.digest({"panels": panels}),
                regime={
                    "jobs": self.asked.jobs,
                    "stop_sweep": self.asked.stop_sweep,
                    "compile": self.asked.compiled,
                },
            )
            env.write_run(folder, self.entries[suite])
            self.replicates[suite] = self.files[suite].replicate(self.asked.resume)
            self._know(suite)

    def _know(self, suite: str) -> None:
        """What --resume skips. Not by environment: another card, or a shard's, learns the same."""
        by_key = {self._key(cell): cell for cell in self.asked.cells if cell.panel.suite == suite}
        for row in self.files[suite].rows:
            if int(row["replicate"]) != self.replicates[suite]:
                continue
            key = tuple(row[name] for name in ("suite", "case", "impl", "impl_version", "device", "seed"))
            if row["status"] in SETTLED or row["reason"].startswith(DIVERGED):
                self.done.add(key)
            if row["stop"] == "solved" and key in by_key:
                self.solved.add(by_key[key].model)

    def _describe(self) -> dict[str, Any]:
        described = probe.describe(self.asked.device, threads=self.threads, seconds=0.05)
        # its ceilings are of an instant, which is enough to see that the device works, and no measurement
        return {**described, "ceilings": {}}

    def _key(self, cell: Cell) -> tuple[str, ...]:
        impl = self.asked.impl(cell)
        if impl.id not in self.versions:
            self.versions[impl.id] = impl.version()
        version = self.versions[impl.id]
        return cell.panel.suite, cell.digest(), impl.id, version, self.slug, str(cell.seed)

    def _worker(self, number: int) -> Worker:
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return Worker(f"recall {number}", env=threads, preload="glabench.quality.recall")

    # --- training -----------------------------------------------------------------------------------------

    def _train(
        self, cells: Sequence[Cell], workers: Sequence[Worker], *, is_alone: bool = False
    ) -> list[Cell]:
        """Train cells as workers become free; returns those that ran out of memory beside others."""
        waiting = self._wanted(cells)
        flying: dict[Worker, tuple[Cell, bool, str, float]] = {}  # with or without a graph, since when
        alone: list[Cell] = []
        while True:
            for worker in workers:
                cell = None if worker in flying else next(waiting, None)
                if cell is not None:
                    arguments = self._arguments(cell)
                    flying[worker] = (cell, arguments["graph"], env.now_utc(), time.perf_counter())
                    limits = {"data": 900.0, "other": self.asked.cell_limit_s}
                    worker.start(TRAIN, arguments, limits=limits)
            if not flying:
                return alone
            for worker, outcome in wait_any(list(flying), timeout=1.0):
                cell, has_graph, started, since = flying.pop(worker)
                if has_graph and outcome.status == "crashed":  # perhaps while it captured one
                    self._go_without_graphs(cell, outcome)
                    waiting = itertools.chain([cell], waiting)
                    continue
                if outcome.status == "oom" and len(workers) > 1 and not is_alone:
                    alone.append(cell)
                    self.say(f"{cell.describe()}: out of memory beside others, runs again alone")
                    continue
                self._write(cell, outcome, started, time.perf_counter() - since)

    def _go_without_graphs(self, cell: Cell, outcome: Outcome) -> None:
        self.eager.add(cell.mixer)
        self.say(f"{cell.describe()}: {outcome.reason}; {cell.mixer} goes on without CUDA graphs")

    def _wanted(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Cells as they come up: one that cannot run becomes a row, one of a solved model is left out."""
        for cell in cells:
            if self.asked.stop_sweep and cell.model in self.solved:
                self.left_out += 1
                continue
            if reason := self._unsupported(cell):
                self._write(cell, Outcome("unsupported", reason), env.now_utc(), 0.0)
                continue
            yield cell

    def _unsupported(self, cell: Cell) -> str | None:
        if MIXERS[cell.mixer].kind == "attention":
            return None
        if self.asked.impl(cell).compiles and (reason := self.asked.misfit(cell)):
            return reason
        d_k, d_v = head_widths(cell.mixer, cell.dim, cell.heads)
        case = {"dtype": cell.panel.dtype, "passes": "fwd_bwd", "heads": cell.heads, "d_k": d_k, "d_v": d_v}
        case |= {"batch": cell.panel.batch, "seqlen": cell.panel.seqlen}
        return self.asked.impl(cell).unsupported(case, self.asked.device)

    def _arguments(self, cell: Cell) -> dict[str, Any]:
        p = cell.panel
        names = (
            "layers",
            "seqlen",
            "pairs",
            "vocab",
            "epochs",
            "batch",
            "examples",
            "test",
            "valid",
            "dtype",
        )
        return {
            **{name: getattr(p, name) for name in names},
            **{"mixer": cell.mixer, "dim": cell.dim, "heads": cell.heads, "lr": cell.lr, "seed": cell.seed},
            "impl": self.asked.impl(cell).id,
            "device": self.asked.device,
            "threads": self.threads,
            "graph": self.asked.device != "cpu" and cell.mixer not in self.eager,
            "compile": self.asked.compiled,
        }

    def _write(self, cell: Cell, outcome: Outcome, started_utc: str, seconds: float) -> None:
        suite, impl = cell.panel.suite, self.asked.impl(cell)
        value = dict(outcome.value or {}) if outcome.status == "ok" else {}
        curve = value.pop("curve", None)
        _, case, impl_id, version, device, _ = self._key(cell)
        row = RecallRow(
            verb="recall",
            suite=suite,
            case=case,
            impl=impl_id,
            impl_version=version,
            family=impl.family,
            device=device,
            device_index=env.device_index(self.asked.device),
            env=self.entries[suite]["id"],
            replicate=self.replicates[suite],
            seed=cell.seed,
            status=outcome.status,
            reason=outcome.reason,
            started_utc=started_utc,
            wall_s=round(seconds, 3),
            **cell.keys(),
            **value,
        )
        self.files[suite].append(row)
        self.rows.append(row)
        if row.stop == "solved":
            self.solved.add(cell.model)
        if curve is not None:
            key = {"case": case, "impl": impl_id, "seed": cell.seed, "replicate": row.replicate}
            record = {**key, "columns": CURVE, "epochs": curve}
            append_json(self.folders[suite] / "curves.jsonl", record)
        self.say(f"[{len(self.rows) + self.left_out}/{self.total}] {cell.describe()}: {_told(row)}")

    # --- the control --------------------------------------------------------------------------------------

    def _control_failed(self, phase: Sequence[Cell]) -> str:
        """Why the cells of `phase`, no controls themselves, say nothing here; empty where they do."""
        panel = phase[0].panel if phase else None
        if panel is None or not panel.control or phase[0].mixer == panel.control:
            return ""
        dims = collections.defaultdict(list)
        for row in self._last_rows(panel.suite):
            if row["mixer"] == panel.control and row["status"] == "ok":
                dims[row["d_model"]].append(row["acc_token_frac"])
        best = max((max(of) for of in dims.values()), default=None)
        if best is None or best > SOLVED:
            return ""
        return f"control arm did not learn: {panel.control} reached {best:.3f}, not {SOLVED}"

    def _refuse(self, phase: Sequence[Cell], reason: str) -> None:
        for cell in phase:
            self._write(cell, Outcome("error", reason), env.now_utc(), 0.0)

    def _last_rows(self, suite: str) -> list[dict[str, Any]]:
        """This replicate's rows of the request's cells, the last of each."""
        mine = {self._key(cell) for cell in self.asked.cells if cell.panel.suite == suite}
        last = {}
        for row in self.files[suite].rows:
            key = tuple(row[name] for name in ("suite", "case", "impl", "impl_version", "device", "seed"))
            if key in mine and int(row["replicate"]) == self.replicates[suite]:
                last[key] = recall_rows.typed(row)
        return list(last.values())


def _phases(queue: Sequence[Cell]) -> list[list[Cell]]:
    """Control cells first, then the rest."""
    controls = [cell for cell in queue if cell.mixer == cell.panel.control]
    return [part for part in (controls, [cell for cell in queue if cell.mixer != cell.panel.control]) if part]


def _told(row: RecallRow) -> str:
    if row.status != "ok":
        return f"{row.status}: {row.reason}"
    end = "solved" if row.stop == "solved" else "not solved"
    return (
        f"{100 * row.acc_token_frac:.1f}% of queries, {100 * row.acc_example_frac:.1f}% of examples, "
        f"{row.epochs} epochs ({end}), {row.train_s:.1f} s, the last epoch {row.epoch_s:.2f} s"
    )
