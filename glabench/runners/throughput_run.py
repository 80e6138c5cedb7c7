"""One run of `glabench throughput`: a worker a model and condition, one row a cell whatever happens."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glabench import __version__, cost, env, stats
from glabench.cases import Arm
from glabench.installed import INSTALL, installed_version, is_installed, no_fused_operations
from glabench.pool import Outcome, Worker
from glabench.results import RowFile, append_json, rows_path
from glabench.rows import RESUME_KEY, ThroughputRow
from glabench.runners import probe, turns
from glabench.runners.request import Watch
from glabench.runners.sweep import CEILING_S, TUNE_ONCE, spare_memory

STEPS = "glabench.runners.steps"
VERB = "throughput"
# transformers would ask its hub for kernels where it could; those that are measured are installed here
LOCAL_KERNELS = {**TUNE_ONCE, "USE_HUB_KERNELS": "NO", "HF_HUB_OFFLINE": "1"}
PEER = "gla-fla"  # flash-linear-attention's own GLA model, at the sizes of ours
CONDITIONS = {
    "paper": "plain cross-entropy, eager; on a GPU fused norms and SwiGLU, as the paper has SwiGLU",
    "modern": "fused linear cross-entropy and torch.compile for all",
}
# dense bf16 TFLOP/s of the data sheets, by env.device_slug; often printed twice as high, for sparse matrices
PEAK_TFLOP_S = {"h100_sxm": 989.4, "h100_pcie": 756.0, "h200": 989.4, "a100_sxm4": 312.0, "a100_pcie": 312.0}
IMPOSSIBLE = (
    1.1  # of the products' measured rate: faster than this is a mistake of the clock or of the formula
)
PEERS = ("torch", "transformers", "triton", "liger_kernel", "flash_attn", "mamba_ssm", "causal_conv1d", "fla")


@dataclass(frozen=True, slots=True)
class Point:
    """A sequence length and a batch; the paper writes 2048 x 8."""

    seqlen: int
    batch: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One model under one condition at one point."""

    arm: dict[str, Any]  # of steps.plan
    condition: str
    layer: str
    point: Point

    def key(self) -> str:
        """Digest of everything but the model: the `case` column."""
        said = [self.arm["size"], self.condition, self.layer, asdict(self.point)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]

    def describe(self) -> str:
        return f"{self.condition} {self.point.seqlen}x{self.point.batch}"


def known_failure(cell: Cell, device: str) -> tuple[str, str] | None:
    """(status, reason) where a cell cannot run on `device`, known without running it."""
    if cell.arm["model"] == PEER and not is_installed("fla"):
        return "unavailable", f"flash-linear-attention is not installed: {INSTALL['fla']}"
    if cell.arm["model"] == PEER and not device.startswith("cuda"):
        return "unavailable", "flash-linear-attention needs a GPU"
    reason = no_fused_operations(device) if cell.condition == "modern" else None
    if reason is None:
        return None
    return ("unavailable" if "installed" in reason else "unsupported"), f"for a fused loss, {reason}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, checked; `cells` in the order they run."""

    cells: tuple[Cell, ...]
    device: str
    steps: int
    warmup: int
    limits: dict[str, float]
    out: Path | None
    resume: bool
    seed: int
    argv: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.device.split(":")[0]


class Run:
    """Owns the workers and the files of one run."""

    def __init__(self, asked: Request, watch: Watch) -> None:
        self.asked, self.watch = asked, watch
        self.slug = env.device_slug(env.gpu_name(asked.device))
        self.out = folder(asked)
        self.threads = env.usable_cores()
        self.rows: list[ThroughputRow] = []
        self.version = version()

    def run(self) -> list[ThroughputRow]:
        """Measure what is missing, return the new rows. Raises GlabenchError before measuring."""
        with turns.device_lock(self.asked.device, self.watch.say):
            self._open()
            cells = [cell for cell in self.asked.cells if RowFile.key(self._keys(cell)) not in self.done]
            self.watch.begin(len(cells))
            waiting: dict[tuple[str, str], list[Cell]] = {}
            for cell in cells:  # a process a model and condition: it is built and checked once
                failure = known_failure(cell, self.asked.device)
                if failure:
                    self._write(cell, env.now_utc(), 0.0, Outcome(*failure))
                    continue
                waiting.setdefault((cell.arm["arm"], cell.condition), []).append(cell)
            self._groups(list(waiting.values()))
        self.entry["finished_utc"] = env.now_utc()
        env.write_run(self.out, self.entry)
        return self.rows

    def _open(self) -> None:
        self.file = RowFile(rows_path(self.out, VERB), ThroughputRow)
        if torn := self.file.torn("cell"):
            self.watch.say(torn)
        env.read_runs(self.out)  # a foreign run.json is refused before anything is measured
        self.watch.say(f"measuring the ceilings of {self.asked.device}")
        described = probe.describe(self.asked.device, threads=self.threads, seconds=CEILING_S)
        rates = described["ceilings"]["matmul_tflop_s"]
        self.ceiling = rates.get("bf16" if self.asked.kind == "cuda" else "fp32")
        regime = {"steps": self.asked.steps, "warmup": self.asked.warmup, **self.asked.limits}
        self.entry = env.make_run(
            described=described,
            argv=list(self.asked.argv),
            suite=VERB,
            suite_digest="",
            regime=regime | {"conditions": CONDITIONS},
        )
        self.replicate = self.file.replicate(self.asked.resume)
        self.done = self.file.settled(self.replicate) if self.asked.resume else set()
        env.write_run(self.out, self.entry)

    def _groups(self, groups: list[list[Cell]]) -> None:
        """On a GPU the next model's process imports while this one measures; on a CPU it would spoil it."""
        ahead = 1 if self.asked.kind == "cuda" else 0
        workers: dict[int, Worker] = {}
        try:
            for number, cells in enumerate(groups):
                for at in range(number, min(number + 1 + ahead, len(groups))):
                    if at not in workers:
                        workers[at] = self._worker(groups[at][0])
                for cell in cells:
                    self._cell(workers[number], cell)
                workers.pop(number).close()
        finally:
            for worker in workers.values():
                worker.close()

    def _worker(self, cell: Cell) -> Worker:
        limit = spare_memory() if self.asked.kind == "cpu" else None
        return Worker(cell.arm["arm"], memory_limit_bytes=limit, env=LOCAL_KERNELS, preload=STEPS)

    def _cell(self, worker: Worker, cell: Cell) -> None:
        started, begun = env.now_utc(), time.perf_counter()
        arguments = {
            "arm": cell.arm,
            "condition": cell.condition,
            "layer": cell.layer,
            **asdict(cell.point),
            "device": self.asked.device,
            "seed": self.asked.seed,
            "threads": self.threads,
            "warmup": self.asked.warmup,
            "steps": self.asked.steps,
        }
        outcome = worker.call(
            f"{STEPS}:measure",
            arguments,
            limits=self.asked.limits,
            on_phase=lambda phase: self.watch.now(cell.arm["arm"], cell, phase),
        )
        self._write(cell, started, time.perf_counter() - begun, outcome)

    def _write(self, cell: Cell, started: str, spent_s: float, outcome: Outcome) -> None:
        fields = self._keys(cell) | self._facts(cell)
        fields |= {"started_utc": started, "wall_s": round(spent_s, 3)}
        row = make_row(
            fields, outcome, steps=self.asked.steps, peak=PEAK_TFLOP_S.get(self.slug), ceiling=self.ceiling
        )
        self.file.append(row)
        self.rows.append(row)
        if row.status == "ok":
            record = {name: getattr(row, name) for name in (*RESUME_KEY, "replicate")}
            record |= {"samples_ms": [outcome.value["step_list_ms"]], "seconds": {"cell": row.wall_s}}
            append_json(self.out / "samples.jsonl", record)
        self.watch.row(row)

    def _keys(self, cell: Cell) -> dict[str, Any]:
        return {
            "verb": VERB,
            "suite": VERB,
            "case": cell.key(),
            "impl": cell.arm["arm"],
            "impl_version": self.version,
            "family": cell.arm["family"],
            "device": self.slug,
            "device_index": env.device_index(self.asked.device),
            "env": self.entry["id"],
            "replicate": self.replicate,
            "seed": self.asked.seed,
        }

    def _facts(self, cell: Cell) -> dict[str, Any]:
        arm = cell.arm
        flop, formula = cost.training_flop_per_token(
            arm["family"], Arm(**arm["split"]), arm["layers"], arm["products"], cell.point.seqlen
        )
        return {
            "model": arm["model"],
            "size": arm["size"],
            "condition": cell.condition,
            **asdict(cell.point),
            "precision": "",
            "vocabulary": arm["vocabulary"],
            "params": arm["params"],
            "flop_per_token": flop,
            "flop_model": formula,
            "warmup_steps": self.asked.warmup,
        }


def make_row(
    fields: dict[str, Any], outcome: Outcome, *, steps: int, peak: float | None, ceiling: float | None
) -> ThroughputRow:
    """A row from what a worker answered; rates come from the median step. `peak`, `ceiling` in TFLOP/s."""
    if outcome.status != "ok":
        return ThroughputRow(**fields, status=outcome.status, reason=outcome.reason)
    found = dict(outcome.value)
    seen = stats.summarise(found.pop("step_list_ms"))
    tokens = fields["batch"] * fields["seqlen"]

    def rate(ms: float | None) -> float | None:
        return None if ms is None else tokens / ms * 1e3

    tflop_s = rate(seen.median) * fields["flop_per_token"] / 1e12
    if ceiling and tflop_s > IMPOSSIBLE * ceiling:
        reason = f"{tflop_s:.0f} TFLOP/s, and products alone reach {ceiling:.0f} here: not possible"
        return ThroughputRow(**fields, status="error", reason=reason)
    return ThroughputRow(
        **(fields | found),
        tok_s=rate(seen.median),
        tok_lo_s=rate(seen.high),
        tok_hi_s=rate(seen.low),
        step_ms=seen.median,
        step_lo_ms=seen.low,
        step_hi_ms=seen.high,
        step_p80_ms=seen.p80,
        steps=steps,
        tflop_s=tflop_s,
        mfu_frac=tflop_s / peak if peak else None,
        mfu_measured_frac=tflop_s / ceiling if ceiling else None,
    )


def version() -> str:
    """Digest of what a step is made of: our models, kernels and optimiser, and the libraries' versions."""
    root, whole = Path(__file__).parents[1], hashlib.sha256(__version__.encode())
    for part in ("models", "kernels", "impls", "training", "runners/steps.py"):
        place = root / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            whole.update(path.read_bytes())
    whole.update(json.dumps([installed_version(name) for name in PEERS]).encode())
    return whole.hexdigest()[:12]


def folder(asked: Request) -> Path:
    return asked.out or Path("results") / VERB / env.device_slug(env.gpu_name(asked.device))
