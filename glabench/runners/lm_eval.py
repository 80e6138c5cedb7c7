"""`glabench lm-eval`: checkpoints through lm-evaluation-harness, one row a metric, resumable a task."""

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glabench import env, tables
from glabench.errors import GlabenchError, UnavailableError, UsageError
from glabench.installed import INSTALL, installed_version, is_installed
from glabench.quality.score_rows import FILE, ScoreRow, latest, unit
from glabench.report import paper_tables
from glabench.results import RowFile, append_json
from glabench.rows import BAD

NEEDS = ("lm_eval", "transformers", "safetensors")
LEAST_VERSION = (0, 4, 13)  # older ones define the tasks of Table 3 otherwise
DTYPES = ("fp32", "bf16")
WINDOW = 2048  # tokens, where neither the training run nor the configuration says: the paper's length
BATCH = {"cpu": 8, "cuda": 64}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
DOCUMENTS = "lm-eval-documents.jsonl"
KEYS = {"schema": 1, "verb": "lm-eval"}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    checkpoints: tuple[Path, ...]
    tasks: str
    data: Path | None
    tokenizer: str
    limit: int | None
    shots: int
    batch: int | None
    max_length: int | None
    device: str
    dtype: str
    out: Path | None
    resume: bool
    compare_hf: bool
    argv: tuple[str, ...]


def run(request: Request, say: Callable[[str], None]) -> tuple[Path, list[ScoreRow]]:
    """Evaluate what is missing; the results' folder, and the latest row of every case asked for.

    Raises: UsageError, UnavailableError before a model is loaded where the request itself is wrong.
    """
    for need in NEEDS:
        if not is_installed(need):
            raise UnavailableError(f"{need} is not installed", where="glabench lm-eval", fix=INSTALL[need])
    version = installed_version("lm_eval")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < LEAST_VERSION:
        raise UnavailableError(
            f"lm-eval {version} is too old", where="glabench lm-eval", fix=f"{INSTALL['lm_eval']} --upgrade"
        )
    if request.dtype and request.dtype not in DTYPES:
        raise UsageError(f"no dtype {request.dtype!r}", where="--dtype", fix="use fp32 or bf16")
    device = env.pick_device(request.device)
    with _scratch(offline=request.data is not None) as scratch:
        from glabench.quality import loading, vocabulary

        asked = vocabulary.file_of(request.tokenizer)
        found = [loading.describe(folder, asked) for folder in request.checkpoints]
        return _Evaluation(request, device, found, _plan(request, scratch), say).run()


@dataclass(slots=True)
class _Plan:
    """One task of the request: the harness's object, or why there is none."""

    name: str
    suite: str
    task: Any = None
    data_sha: str = ""
    documents: int | None = None  # of the published split
    failure: tuple[str, str] | None = None


def _plan(request: Request, scratch: Path) -> list[_Plan]:
    """Every task, its data checked. One that cannot be had is an error where it was named, else a row."""
    from glabench.quality import records, tasks

    if request.data is not None and not request.data.is_dir():
        raise UsageError(f"no folder {str(request.data)!r}", where="--tasks-from", fix="check the path")
    chosen = records.select(request.tasks, request.data)
    known = records.specs(request.data)
    plans: list[_Plan] = []
    for name, suite in chosen:
        try:
            local = records.find(known[name], request.data) if request.data else None
            found = {name: tasks.local_task(local, scratch)} if local else tasks.hub_tasks(name)
        except UnavailableError as err:
            if not suite:
                raise
            plans.append(_Plan(name, suite, failure=("unavailable", f"{err.what}; {err.fix}")))
            continue
        for title, task in found.items():
            plan = _Plan(title, suite, task, local.digest[:12] if local else "hub")
            plan.documents = known[title].rows if title in known else None
            reason = tasks.set_shots(task, request.shots, local)
            plan.failure = ("unsupported", reason) if reason else None
            plans.append(plan)
    return plans


class _Evaluation:
    """Owns the result files of one command."""

    def __init__(
        self,
        request: Request,
        device: str,
        checkpoints: list[Any],
        plans: list[_Plan],
        say: Callable[[str], None],
    ) -> None:
        self.request, self.device, self.plans, self.say = request, device, plans, say
        self.checkpoints = checkpoints
        self.slug = env.device_slug(env.gpu_name(device))
        self.out = request.out or Path("results") / "lm-eval" / self.slug
        self.file = RowFile(self.out / FILE, ScoreRow)
        self.harness_version = installed_version("lm_eval")
        self.rows: list[ScoreRow] = []

    def run(self) -> tuple[Path, list[ScoreRow]]:
        if torn := self.file.torn("task"):
            self.say(torn)
        env.read_runs(self.out)
        self.entry = env.make_run(
            described=_describe(self.device),
            argv=list(self.request.argv),
            suite="lm-eval",
            suite_digest=env.digest({p.name: p.data_sha for p in self.plans}),
            regime={"batch": self._batch(), "limit": self.request.limit, "shots": self.request.shots},
        )
        self.entry["measured"] = {"data": {p.name: p.data_sha for p in self.plans}, "tokenizers": {}}
        self.replicate = self.file.replicate(self.request.resume)
        self.done = self.file.settled(self.replicate)
        env.write_run(self.out, self.entry)
        for checkpoint in self.checkpoints:
            self._checkpoint(checkpoint)
            _release(self.device)
        self.entry["finished_utc"] = env.now_utc()
        env.write_run(self.out, self.entry)
        return self.out, latest(self.rows)

    def _batch(self) -> int:
        return self.request.batch or BATCH[self.device.partition(":")[0]]

    def _checkpoint(self, checkpoint: Any) -> None:
        from glabench.quality import harness, loading, vocabulary

        dtype = self.request.dtype or ("bf16" if self.device.startswith("cuda") else "fp32")
        length = self.request.max_length or checkpoint.train_len or WINDOW
        self.say(f"loading {checkpoint.name}")
        tokenizer, adds_special = vocabulary.for_harness(checkpoint, self.request.tokenizer)
        model = loading.load(checkpoint, self.device, dtype)
        self.entry["measured"]["tokenizers"][checkpoint.name] = checkpoint.tokenizer.digest
        options = {"adds_special": adds_special, "batch": self._batch(), "max_length": length}
        lm = harness.StateLM(model, tokenizer, **options)
        plain = harness.PlainLM(model, tokenizer, **options) if self.request.compare_hf else None
        about = {
            "impl": getattr(model.config, "implementation", "transformers"),
            "model_type": model.config.model_type,
            "parameters": loading.parameters(model),
            "special_tokens": "no" if adds_special is False else "tokenizer",
        }
        for plan in self.plans:
            keys = {**self._keys(checkpoint, plan, dtype, length), **about}
            if RowFile.key(keys) in self.done:
                self.rows += self._stored(keys)
                self.say(f"{checkpoint.name} {plan.name}: done before")
            else:
                self._task(keys, plan, lm, plain)

    def _keys(self, checkpoint: Any, plan: _Plan, dtype: str, length: int) -> dict[str, Any]:
        """The columns that say which score this is; `case` is the digest of those that decide it."""
        decides = {
            "checkpoint_digest": checkpoint.digest,
            "task": plan.name,
            "num_fewshot": self.request.shots,
            "limit": self.request.limit,
            "max_length": length,
            "data_sha": plan.data_sha,
            "dtype": dtype,
            "harness_version": self.harness_version,
        }
        generation = plan.task.config.generation_kwargs if plan.task is not None else None
        case = env.digest({**decides, "tokenizer": checkpoint.tokenizer.digest, "generation": generation})
        return {
            **KEYS,
            **decides,
            "case": case,
            "suite": plan.suite or "lm-eval",
            "impl_version": self.entry["glabench"],
            "family": checkpoint.family,
            "device": self.slug,
            "device_index": env.device_index(self.device),
            "env": self.entry["id"],
            "replicate": self.replicate,
            "seed": 0,
            "checkpoint": checkpoint.name,
            "batch": self._batch(),
        }

    def _stored(self, keys: dict[str, Any]) -> list[ScoreRow]:
        from glabench.rows import typed

        wanted = RowFile.key(keys)
        mine = (
            r for r in self.file.rows if RowFile.key(r) == wanted and int(r["replicate"]) == self.replicate
        )
        return [typed(ScoreRow, r) for r in mine]

    def _task(self, keys: dict[str, Any], plan: _Plan, lm: Any, plain: Any) -> None:
        """Check, evaluate and write one task of one checkpoint; whatever fails costs this task only."""
        self.say(f"{keys['checkpoint']} {plan.name} ...")
        keys, started = {**keys, "started_utc": env.now_utc()}, time.perf_counter()
        try:
            made = self._score(keys, plan, lm, plain)
        except GlabenchError as err:
            made = [self._failed(keys, "error", f"{err.what}; {err.fix}")]
        except Exception as err:  # noqa: BLE001  the harness's, a kernel's or memory's: a row, not the end
            oom = "OutOfMemory" in type(err).__name__ or isinstance(err, MemoryError)
            made = [self._failed(keys, "oom" if oom else "crashed", f"{type(err).__name__}: {err}"[:300])]
        wall = time.perf_counter() - started
        rows = [ScoreRow(**{**row, "wall_s": wall}) for row in made]
        self.file.append(*rows)
        self.rows += rows
        self.say(f"{rows[0].checkpoint} {plan.name}: {_in_words(rows)}")

    @staticmethod
    def _failed(keys: dict[str, Any], status: str, reason: str) -> dict[str, Any]:
        return {**keys, "status": status, "reason": reason}

    def _score(self, keys: dict[str, Any], plan: _Plan, lm: Any, plain: Any) -> list[dict[str, Any]]:
        from glabench.quality import harness, tasks

        if plan.failure is not None:
            return [self._failed(keys, *plan.failure)]
        error, limit = harness.padding_error(lm, plan.task), harness.padding_limit(lm)
        keys["padding_err_nats"] = error
        if not error <= limit:
            reason = f"a request changes by {error:.3g} nats a token in a padded batch (limit {limit})"
            return [self._failed(keys, "wrong", reason)]
        found = harness.evaluate(lm, plan.task, self.request.limit)
        theirs = harness.evaluate(plain, plan.task, self.request.limit) if plain else None
        keys |= {
            "task_version": found.version,
            "requests_digest": tasks.requests_digest(plan.task),
            "n": found.n,
            "subset": "" if plan.documents is None else "no" if found.n == plan.documents else "yes",
            "answer_s": found.seconds,
            "shared_contexts": "yes" if found.shared else "no",
        }
        if theirs is not None:
            keys |= {"hf_answer_s": theirs.seconds, "hf_ratio": theirs.seconds / found.seconds}
        self._keep_documents(keys, found)
        beside = {(s.metric, s.filter): s.value for s in theirs.scores} if theirs else {}
        return [
            {
                **keys,
                "metric": s.metric,
                "filter": s.filter,
                "value": s.value,
                "stderr": s.stderr,
                "stderr_from": s.stderr_from,
                "unit": unit(s.metric),
                "hf_value": beside.get((s.metric, s.filter)),
            }
            for s in found.scores
        ]

    def _keep_documents(self, keys: dict[str, Any], found: Any) -> None:
        """Each document's outcome, for paired comparisons."""
        record = {name: keys[name] for name in ("case", "checkpoint", "task", "replicate", "env")}
        record["documents"] = {f"{s.metric},{s.filter}": s.documents for s in found.scores}
        append_json(self.out / DOCUMENTS, record)


def _in_words(rows: list[ScoreRow]) -> str:
    if rows[0].status != "ok":
        return f"{rows[0].status}: {rows[0].reason}"
    return ", ".join(f"{r.metric} {tables.number(r.value)}" for r in rows)


def _release(device: str) -> None:
    """Give a checkpoint's memory back before the next one is loaded."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _describe(device: str) -> dict[str, Any]:
    """What may change a score's last digits; a GPU's name is enough where nothing is timed."""
    import torch

    name = env.gpu_name(device)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpu": {"name": name} if name else None,
    }


@contextmanager
def _scratch(*, offline: bool) -> Iterator[Path]:
    """A folder for converted data, gone afterwards; libraries kept quiet and, with local files, offline."""
    words = dict.fromkeys(("DISABLE_MULTIPROC", "TQDM_DISABLE", *(OFFLINE if offline else ())), "1")
    before = {name: os.environ.get(name) for name in words}
    os.environ.update(words)
    folder = Path(tempfile.mkdtemp(prefix="glabench-lm-eval-"))
    try:
        _hush()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _hush() -> None:
    import datasets
    import transformers

    for name in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def went_well(rows: list[ScoreRow]) -> bool:
    return not any(row.status in BAD for row in rows)


def show(out: Path, rows: list[ScoreRow]) -> None:
    """The scores, then the paper's tables beside them, where a task of theirs was run."""
    headings = ("checkpoint", "task", "metric", "value", "stderr", "n", "version", "status")
    tables.show(
        headings,
        (
            (
                r.checkpoint,
                r.task,
                r.metric,
                tables.number(r.value),
                tables.number(r.stderr, 2),
                r.n,
                r.task_version,
                r.status if r.status == "ok" else f"{r.status}: {r.reason}",
            )
            for r in rows
        ),
        right=("value", "stderr", "n"),
    )
    for sheet in map(paper_tables.transposed, paper_tables.sheets(rows)):
        tables.say(f"\n{sheet.title}")
        tables.show(sheet.headings, sheet.lines, right=sheet.headings[1:])
    for note in paper_tables.notes(rows):
        tables.say(note)
    tables.say(f"in {out / FILE}")
