"""Run a suite: every implementation through every case, one row a cell whatever happens.

A grid point's life: prepare each arm (cold start, check), sample the arms in shuffled rounds, check
again on fresh inputs, measure memory, write the rows. A fault costs its own cell.
"""

import random
import time
from dataclasses import asdict
from typing import Any

from glabench import cost, env, stats
from glabench.cases import Case
from glabench.pool import Outcome, Worker, wait_any
from glabench.registry import Implementation
from glabench.results import RowFile, append_json, rows_path
from glabench.rows import RESUME_KEY, ROWS, Row
from glabench.runners import probe, rows, turns
from glabench.runners.request import (
    CONTEXT_MIB,
    Arm,
    Request,
    Watch,
    fitting,
    known_failure,
    series,
    to_compile,
)

CELLS = "glabench.runners.cells"
PRELOAD = f"{CELLS} torch._inductor"  # the latter by the first check: seconds, with the device held
CHECK_TOKENS = 16384  # whole sequences are compared with the oracle up to this many tokens a cell
CEILING_S = 0.5  # of each ceiling: copy bandwidth, products
# what one process tuned the next takes from Triton's cache, instead of choosing anew on a noisy day
TUNE_ONCE = {"TRITON_CACHE_AUTOTUNING": "1"}
MORE_VISITS = 2  # rounds added for arms whose interval is still too wide


class Sweep:
    """Owns the workers and the result files of one run."""

    def __init__(self, request: Request, watch: Watch) -> None:
        self.request, self.watch = request, watch
        self.suite, self.regime = request.suite, request.suite.regime
        self.workers: dict[str, Worker] = {}
        self.broken: dict[tuple[str, ...], tuple[str, Case]] = {}  # arm -> status, case it failed at
        self.ahead: dict[tuple[str, str], dict[str, Any]] = {}  # (implementation, case) -> its cold start
        self.rows: list[Row] = []
        self.threads = env.usable_cores()
        self.call_s = 0.0

    def run(self) -> list[Row]:
        """Measure what is missing and return the new rows. Raises GlabenchError before measuring."""
        started = time.perf_counter()
        with turns.device_lock(self.request.device, self.watch.say):
            try:
                self._open()
                points = self._points()
                if points:
                    for impl in self.request.impls:  # they import torch all at once
                        self._worker(impl.id)
                if self.request.kind == "cuda":
                    self._compile_ahead([arm for _, arms in points for arm in arms])
                self.watch.begin(sum(len(arm.verbs) for _, arms in points for arm in arms))
                for _, arms in points:
                    self._point(arms)
            finally:
                for worker in self.workers.values():
                    worker.close()
        self.entry["finished_utc"] = env.now_utc()
        self.entry["measured"]["run_s"] = round(time.perf_counter() - started, 3)
        self.entry["measured"]["in_workers_s"] = round(self.call_s, 3)
        env.write_run(self.out, self.entry)
        return self.rows

    # --- before measuring ---------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the files, describe the device, know what is done. Raises GlabenchError."""
        self.slug = env.device_slug(env.gpu_name(self.request.device))
        self.out = self.request.folder(self.slug)
        self.files = {v: RowFile(rows_path(self.out, v), ROWS[v]) for v in self.request.verbs}
        for file in self.files.values():
            if torn := file.torn("cell"):
                self.watch.say(torn)
        earlier = env.read_runs(self.out)  # a foreign run.json is refused before anything is measured
        described = self._describe()
        gpu = described.get("gpu") or {}
        self.l2_bytes, self.memory_mib = gpu.get("l2_bytes") or 0, gpu.get("memory_mib") or 0
        self.ceilings = cost.Ceilings(
            described["ceilings"]["copy_gb_s"], described["ceilings"]["matmul_tflop_s"]
        )
        self.entry = env.make_run(
            described=described,
            argv=list(self.request.argv),
            suite=self.suite.name,
            suite_digest=self.suite.digest,
            regime=asdict(self.regime),
        )
        self.replicate = max(file.replicate(self.request.resume) for file in self.files.values())
        self.done = {v: file.settled(self.replicate) for v, file in self.files.items()}
        if self.request.resume and earlier and earlier[-1]["id"] != self.entry["id"]:
            other = ", ".join(env.differing(earlier[-1], self.entry))
            self.watch.say(f"the last rows here are of another environment ({other}): kept, and run again")
        env.write_run(self.out, self.entry)

    def _describe(self) -> dict[str, Any]:
        """The device and its ceilings, from a process alone with it: the arms' workers start later."""
        self.watch.say(f"measuring the ceilings of {self.request.device}")
        limit_s = self.regime.cold_limit_s
        return probe.describe(self.request.device, threads=self.threads, seconds=CEILING_S, limit_s=limit_s)

    def _points(self) -> list[tuple[Case, list[Arm]]]:
        """Grid points in order, each with the arms and verbs that still lack a row."""
        points = []
        for case in sorted(self.suite.cases, key=lambda c: (c.shape, c.dtype, c.seqlen)):
            arms = []
            for impl in self.request.impls:
                verbs = tuple(v for v in self.request.verbs if self._key(v, impl, case) not in self.done[v])
                if verbs:
                    arms.append(Arm(impl, case, verbs))
            if arms:
                points.append((case, arms))
        return points

    def _fields(self, verb: str, impl: Implementation, case: Case) -> dict[str, Any]:
        return {
            "verb": verb,
            "suite": self.suite.name,
            "case": case.key(),
            "impl": impl.id,
            "impl_version": self._version(impl),
            "family": impl.family,
            "device": self.slug,
            "device_index": env.device_index(self.request.device),
            "env": self.entry["id"],
            "replicate": self.replicate,
            "seed": self.suite.seed,
        }

    def _version(self, impl: Implementation) -> str:
        known = self.__dict__.setdefault("_versions", {})
        if impl.id not in known:
            known[impl.id] = impl.version()
        return known[impl.id]

    def _key(self, verb: str, impl: Implementation, case: Case) -> tuple[str, ...]:
        return RowFile.key(self._fields(verb, impl, case))

    def _compile_ahead(self, arms: list[Arm]) -> None:
        """Let every (implementation, shape) that compiles do so now, as many at once as `fitting` allows.

        A process takes one shape of an implementation after the other. What they compile and tune stays in
        Triton's cache on disk; how long it took belongs to the row of the cell that was run for it.
        """
        waiting = to_compile(a for a in arms if a.impl.compiles and self._failure_before(a) is None)
        flying: dict[Worker, list[Arm]] = {}  # the case that runs, and what follows of its group
        room_mib = self.memory_mib - CONTEXT_MIB * len(self.workers)
        begun = time.perf_counter()
        while waiting or flying:
            for group in fitting(waiting, list(flying.values()), room_mib, self.threads):
                waiting.remove(group)
                worker = Worker(f"ahead {group[0].impl.id}", env=TUNE_ONCE)
                flying[worker] = self._start_ahead(worker, group)
            for worker, outcome in wait_any(list(flying), timeout=1.0):
                arm, *rest = flying.pop(worker)
                if outcome.status == "ok":
                    self.ahead[arm.impl.id, arm.case.key()] = outcome.value
                else:
                    self.watch.say(f"{arm.impl.id}: {outcome.status}: {outcome.reason}")
                    rest = []  # the longer case would end no better
                same = [] if rest else [g for g in waiting if g[0].impl.id == arm.impl.id]
                for group in fitting(same, list(flying.values()), room_mib, self.threads)[:1]:
                    waiting.remove(group)
                    rest = group
                if rest:
                    flying[worker] = self._start_ahead(worker, rest)
                else:
                    worker.close()
        self.call_s += time.perf_counter() - begun

    def _start_ahead(self, worker: Worker, group: list[Arm]) -> list[Arm]:
        self.watch.say(f"compiling ahead: {group[0].impl.id}, {group[0].case.describe()}")
        worker.start(f"{CELLS}:compile_ahead", self._arguments(group[0]), limits=self._limits())
        return group

    # --- one grid point -----------------------------------------------------------------------------------

    def _point(self, arms: list[Arm]) -> None:
        for arm in arms:
            arm.started_utc = env.now_utc()
            arm.failure = self._failure_before(arm)
        live = [arm for arm in arms if arm.failure is None]
        if self.request.kind == "cuda":
            self._together(live, "prepare")
        else:
            for arm in live:  # two arms at once on a CPU would spoil each other's cold start
                self._together([arm], "prepare")
        if "speed" in self.request.verbs:
            self._sample([a for a in live if a.failure is None and "speed" in a.verbs])
            for arm in live:
                if arm.failure is None and "speed" in arm.verbs:
                    self._call(arm, "recheck", self._arguments(arm, visit=len(arm.visits)))
        for arm in arms:
            self._write(arm)

    def _failure_before(self, arm: Arm) -> tuple[str, str] | None:
        """Why a cell needs no run: it cannot, or a shorter sequence already failed."""
        failure = known_failure(arm.impl, arm.case, self.request.device)
        if failure:
            return failure
        status, at = self.broken.get(series(arm), (None, None))
        if status and self.regime.backstop and arm.case.seqlen > at.seqlen and arm.case.tokens >= at.tokens:
            return status, f"skipped: {status} at seqlen {at.seqlen}, batch {at.batch}"
        return None

    def _arguments(self, arm: Arm, **more: Any) -> dict[str, Any]:
        return {
            "impl": arm.impl.spec(),
            "case": asdict(arm.case),
            "device": self.request.device,
            "seed": self.suite.seed,
            "threads": self.threads,
            **more,
        }

    def _together(self, arms: list[Arm], function: str) -> None:
        """Prepare several arms at once; on a GPU their compilations overlap, a lock orders the rest."""
        flying: dict[Worker, tuple[Arm, float]] = {}
        for arm in arms:
            worker = self._worker(arm.impl.id)
            arguments = self._arguments(arm, check_tokens=CHECK_TOKENS)
            worker.start(f"{CELLS}:{function}", arguments, limits=self._limits(), on_phase=self._phase(arm))
            flying[worker] = (arm, time.perf_counter())
            self.watch.now(arm.impl.id, arm.case, "prepare")
        begun = time.perf_counter()
        while flying:
            for worker, outcome in wait_any(list(flying), timeout=1.0):
                arm, since = flying.pop(worker)
                arm.spend(function, time.perf_counter() - since)
                self._take(arm, outcome)
                if outcome.status == "ok":
                    arm.seconds["check"] = outcome.value["check_s"]
                    arm.prepared = outcome.value | self.ahead.get((arm.impl.id, arm.case.key()), {})
        self.call_s += time.perf_counter() - begun

    def _sample(self, arms: list[Arm]) -> None:
        """Rounds over the arms in an order shuffled from the recorded seed, until each is known well."""
        regime = self.regime
        for number in range(regime.visits + MORE_VISITS):
            pending = [arm for arm in arms if arm.failure is None and self._wants_visit(arm, number)]
            random.Random(f"{self.suite.seed} {number} {pending and pending[0].case.key()}").shuffle(pending)
            for arm in pending:
                value = self._call(
                    arm,
                    "sample",
                    self._arguments(
                        arm,
                        visit=number,
                        min_samples=-(-regime.min_samples // regime.visits),
                        max_samples=regime.max_samples,
                        min_busy_s=regime.min_busy_s / regime.visits,
                        max_busy_s=regime.max_busy_s / (regime.visits + MORE_VISITS),
                        interval_frac=regime.interval_frac,
                    ),
                )
                if value is not None:
                    arm.visits.append(value)

    def _wants_visit(self, arm: Arm, number: int) -> bool:
        if number < self.regime.visits:
            return True
        samples = [ms for visit in arm.visits for ms in visit["samples_ms"]]
        calls = [visit["calls_per_sample"] * sum(visit["samples_ms"]) for visit in arm.visits]
        is_spent = len(samples) >= self.regime.max_samples or sum(calls) >= 1e3 * self.regime.max_busy_s
        return not is_spent and not stats.summarise(samples).converged(self.regime.interval_frac)

    def _call(self, arm: Arm, function: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """One blocking call to the arm's worker; a failure is noted on the arm."""
        self.watch.now(arm.impl.id, arm.case, function)
        begun = time.perf_counter()
        outcome = self._worker(arm.impl.id).call(f"{CELLS}:{function}", arguments, limits=self._limits())
        spent = time.perf_counter() - begun
        arm.spend(function, spent)
        self.call_s += spent
        self._take(arm, outcome)
        return outcome.value if outcome.status == "ok" else None

    def _take(self, arm: Arm, outcome: Outcome) -> None:
        if outcome.status == "ok":
            return
        arm.failure = (outcome.status, outcome.reason)
        if outcome.status in ("oom", "timeout"):
            self.broken.setdefault(series(arm), (outcome.status, arm.case))

    def _write(self, arm: Arm) -> None:
        """The arm's rows, one a verb; memory is measured here, after every timing of the point."""
        for verb in arm.verbs:
            fields = self._fields(verb, arm.impl, arm.case) | rows.base_fields(arm.impl, arm.case)
            measured = None
            if verb == "memory" and arm.failure is None:
                measured = self._call(arm, "memory", self._arguments(arm))
            fields |= {"started_utc": arm.started_utc, "wall_s": round(arm.busy_s, 4)}
            arm.busy_s = 0.0  # the next verb's row counts its own seconds
            if arm.failure is not None:
                row = rows.failed(ROWS[verb], fields, *arm.failure)
            elif verb == "memory":
                row = rows.memory_row(fields, arm.impl, arm.case, measured)
            else:
                row = rows.speed_row(
                    fields,
                    arm.impl,
                    arm.case,
                    arm.prepared,
                    arm.visits,
                    self.ceilings,
                    self.l2_bytes,
                    self.regime,
                )
            self.files[verb].append(row)
            self.rows.append(row)
            if verb == "speed" and row.status == "ok":
                self._keep_samples(arm, row)
            self.watch.row(row)

    def _keep_samples(self, arm: Arm, row: Row) -> None:
        record = {name: getattr(row, name) for name in (*RESUME_KEY, "replicate")}
        record |= {"samples_ms": [visit["samples_ms"] for visit in arm.visits], "seconds": arm.seconds}
        append_json(self.out / "samples.jsonl", record)

    # --- workers ------------------------------------------------------------------------------------------

    def _worker(self, impl_id: str) -> Worker:
        if impl_id not in self.workers:
            limit = spare_memory() if self.request.kind == "cpu" else None
            self.workers[impl_id] = Worker(impl_id, memory_limit_bytes=limit, env=TUNE_ONCE, preload=PRELOAD)
        return self.workers[impl_id]

    def _limits(self) -> dict[str, float]:
        return {"cold": self.regime.cold_limit_s, "other": self.regime.cell_limit_s}

    def _phase(self, arm: Arm) -> Any:
        return lambda phase: self.watch.now(arm.impl.id, arm.case, phase)


def spare_memory() -> int:
    """Most of what is free: past it an allocation fails in the worker, and no OOM killer has to choose."""
    import psutil

    return int(psutil.virtual_memory().available * 0.8)
