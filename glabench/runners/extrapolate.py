"""`glabench extrapolate`: from what was typed to rows of perplexity by position."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glabench import cases, env, tables
from glabench.errors import UnavailableError, UsageError
from glabench.installed import INSTALL, is_installed
from glabench.meter import meter
from glabench.quality.extrapolate_rows import (
    DOCUMENTS,
    FILE,
    REPEATS,
    VERB,
    DocumentFile,
    ExtrapolateRow,
    RepeatRow,
)
from glabench.results import RowFile
from glabench.rows import BAD
from glabench.worker import classify

DEFAULT_WINDOW = 2048  # of a sliding window, where the training length is not known: the paper's
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked. `ends` are the buckets to report, by their ends; documents are cut at the last."""

    checkpoints: tuple[Path, ...]
    data: Path | None
    ends: tuple[int, ...]
    bucket: int
    docs: int | None
    window: int | None
    state_passing: bool
    tokenizer: str | None
    device: str
    dtype: str
    out: Path | None
    resume: bool
    argv: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.ends[-1]


def parse_lengths(lengths: str, bucket: str) -> tuple[tuple[int, ...], int]:
    """`2k..24k` -> the ends of every bucket from 2k to 24k; `2k,8k,24k` -> these; and the bucket's tokens.

    Raises: UsageError for an end that is no whole number of buckets, or a range that runs backwards.
    """
    size, ends = cases.parse_size(bucket, "--bucket"), list[int]()
    for part in lengths.split(","):
        low, dots, high = part.partition("..")
        first = cases.parse_size(low, "--lengths")
        last = cases.parse_size(high, "--lengths") if dots else first
        for end in (first, last):
            if end % size:
                raise UsageError(
                    f"{end:,} tokens are no whole number of buckets of {size:,}",
                    where="--lengths",
                    fix=f"write a multiple of {size}, or change --bucket",
                )
        if first > last:
            raise UsageError(f"{part!r} runs backwards", where="--lengths", fix=f"write {high}..{low}")
        ends += range(first, last + 1, size)
    return tuple(sorted(set(ends))), size


def run(request: Request, say: Say) -> dict[str, Any]:
    """Evaluate every checkpoint and return {"folder", "device", "rows", "skipped", "bad"}; the keys are API.

    Raises: UsageError for a checkpoint, tokenizer or text that does not fit, before anything is evaluated.
    """
    for package in ("transformers", "safetensors"):
        if not is_installed(package):
            raise UnavailableError(f"{package} is not installed", where=VERB, fix=INSTALL[package])
    return Evaluation(request, say).run()


class Evaluation:
    """One call of the verb."""

    def __init__(self, request: Request, say: Say) -> None:
        from glabench.quality import documents, loading

        self.request, self.say = request, say
        self.device = env.pick_device(request.device)
        self.dtype = request.dtype or ("fp32" if self.device == "cpu" else "bf16")
        cases.choose(self.dtype, tuple(loading.DTYPES), "dtype", "--dtype")
        self.checkpoints = [loading.describe(path, request.tokenizer) for path in request.checkpoints]
        _check_names(self.checkpoints)
        self.texts: dict[str, documents.Documents] = {}
        for one in self.checkpoints:
            if one.tokenizer.digest not in self.texts:
                self.texts[one.tokenizer.digest] = documents.read(
                    request.data, one.tokenizer, request.tokens, request.bucket, request.docs
                )
        for one in self.checkpoints[1:]:  # the last one's faults are told before hours go into the first
            loading.load(one, "cpu", "fp32")
        self.first = [loading.load(self.checkpoints[0], self.device, self.dtype)]

    def run(self) -> dict[str, Any]:
        self._open()
        started = time.perf_counter()
        skipped = dict.fromkeys(t.skipped(self.request.tokens) for t in self.texts.values())
        for words in filter(None, skipped):
            self.say(words)
        for one in self.checkpoints:
            self._evaluate(one)
        self.entry["finished_utc"] = env.now_utc()
        self.entry["measured"]["run_s"] = round(time.perf_counter() - started, 3)
        env.write_run(self.out, self.entry)
        rows = [r for r in self.rows.rows if int(r["replicate"]) == self.replicate]
        return {
            "folder": str(self.out),
            "device": self.slug,
            "rows": rows,
            "skipped": [words for words in skipped if words],
            "bad": sum(r["status"] in BAD for r in rows),
        }

    def _open(self) -> None:
        """The files, what they already hold, and run.json. Raises ResultsError."""
        from glabench.runners.cells import describe_device

        self.slug = env.device_slug(env.gpu_name(self.device))
        self.out = self.request.out or Path("results") / VERB / self.slug
        self.rows = RowFile(self.out / FILE, ExtrapolateRow)
        self.repeats = RowFile(self.out / REPEATS, RepeatRow)
        self.documents = DocumentFile(self.out / DOCUMENTS)
        for file in (self.rows, self.repeats, self.documents):
            if file.repaired:
                self.say(f"{file.path.name}: cut a torn last line ({file.repaired!r}); it runs again")
        env.read_runs(self.out)
        regime = {"buckets": self.request.bucket, "tokens": self.request.tokens, "dtype": self.dtype}
        self.entry = env.make_run(
            described=describe_device(self.device),
            argv=list(self.request.argv),
            suite=VERB,
            suite_digest=env.digest(regime),
            regime=regime | {"data": {t.dataset: t.digest for t in self.texts.values()}},
        )
        seen = [int(r["replicate"]) for r in (*self.rows.rows, *self.documents.records)]
        self.replicate = max(0, max(seen, default=-1) + (not self.request.resume))
        env.write_run(self.out, self.entry)

    def _evaluate(self, one: Any) -> None:
        from glabench.quality import loading, scoring

        model = self.first.pop() if self.first else loading.load(one, self.device, self.dtype)
        scorer = scoring.Scorer(model)
        params = loading.parameters(model)
        protocols = ["document", *(["state_passing"] if scorer.is_recurrent else ["sliding"])]
        if not self.request.state_passing and scorer.is_recurrent:
            protocols.remove("state_passing")
        if self.request.state_passing and not scorer.is_recurrent:
            self.say(f"{one.name}: attention has no state to pass; its other rows are made")
        for protocol in protocols:
            Arm(self, one, scorer, params, protocol).run()


def _check_names(found: list[Any]) -> None:
    names = [one.name for one in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two checkpoints are called {twice!r}", where="--ckpt", fix="rename one of the folders"
        )


class Arm:
    """One checkpoint under one protocol: a line of the figure."""

    def __init__(self, parent: Evaluation, one: Any, scorer: Any, params: int, protocol: str) -> None:
        self.parent, self.one, self.scorer, self.protocol = parent, one, scorer, protocol
        self.request, self.texts = parent.request, parent.texts[one.tokenizer.digest]
        self.window = self.stride = None
        if protocol == "sliding":
            whole = self.request.window or one.train_len or DEFAULT_WINDOW
            self.window = min(whole, scorer.limit or whole)
            self.stride = max(1, self.window // 2)
        limit = scorer.limit if protocol == "document" else None
        size = self.request.bucket
        self.tokens = self.request.tokens if limit is None else min(self.request.tokens, limit // size * size)
        is_passing = protocol == "state_passing"
        self.how = [
            protocol,
            one.tokenizer.digest[:12],
            *map(str, (size, self.window or 0, self.stride or 0, parent.dtype)),
            self.texts.digest if is_passing else "",  # what it starts from depends on those before it
            parent.entry["id"],
        ]
        self.common = {
            "verb": VERB,
            "suite": VERB,
            "impl": one.name,
            "impl_version": one.digest,
            "family": one.family,
            "device": parent.slug,
            "device_index": env.device_index(parent.device),
            "env": parent.entry["id"],
            "replicate": parent.replicate,
            "params": params,
            "train_len": one.train_len,
            "train_segments": one.segments,
            "dataset": self.texts.dataset,
            "data_digest": self.texts.digest,
            "tokenizer": one.tokenizer.name,
            "protocol": protocol,
            "bucket_tokens": size,
            "window": self.window,
            "stride": self.stride,
            "piece": scorer.piece if protocol != "sliding" else None,
            "dtype": parent.dtype,
            "n_docs": len(self.texts.kept),
        }

    def run(self) -> None:
        """Score what is still missing, then write a row a bucket."""
        self.common["started_utc"], started = env.now_utc(), time.perf_counter()
        settled = self.parent.rows.settled(self.parent.replicate)
        wanted = [end // self.request.bucket for end in self.request.ends]
        wanted = [b for b in wanted if RowFile.key(self._key_fields(b)) not in settled]
        if not wanted:
            return
        failure, records = None, list[dict[str, Any]]()
        if self.protocol == "state_passing" and not self.scorer.piece:
            failure = ("unsupported", "this model reads a document whole: its state cannot be passed on")
        elif self.tokens:
            try:
                records = list(self._records())
            except Exception as err:  # noqa: BLE001  the one place: whatever a model raises costs its arm
                found = classify(err)
                failure = (found["status"], found["reason"])
        self.common["wall_s"] = round(time.perf_counter() - started, 3)
        intervals = _intervals(records)
        for bucket in wanted:
            row = self._row(bucket, records, intervals, failure)
            for part in self._repeats(bucket, records) if row.status == "ok" else ():
                self.parent.repeats.append(part)
            self.parent.rows.append(row)

    def _records(self) -> Iterator[dict[str, Any]]:
        """The losses of every document, from documents.jsonl where they are there."""
        found = [self.parent.documents.find(self._key(d), self.parent.replicate) for d in self.texts.kept]
        if all(found):
            yield from found
            return
        state = None
        with meter(len(found), "document") as bar:
            for number, document in enumerate(self.texts.kept):
                if found[number] is not None and self.protocol != "state_passing":
                    yield found[number]
                    continue
                started = time.perf_counter()
                nats, state = self._score(document, state)
                record = found[number] or self._record(document, nats, time.perf_counter() - started)
                if found[number] is None:
                    self.parent.documents.append(record)
                bar.update(number + 1, f"{self.one.name} {self.protocol} {document.name}")
                yield record

    def _score(self, document: Any, state: Any) -> tuple[Any, Any]:
        import numpy as np

        ids = np.concatenate([[self.one.begin], document.ids[: self.tokens]])
        if self.protocol == "sliding":
            return self.scorer.through_windows(ids, self.window, self.stride), None
        nats, state = self.scorer.in_pieces(ids, state)
        return nats, state if self.protocol == "state_passing" else None

    def _record(self, document: Any, nats: Any, wall_s: float) -> dict[str, Any]:
        import numpy as np

        from glabench.quality import repeats

        parts = nats.astype(np.float64).reshape(-1, self.request.bucket).sum(1)
        bad = np.flatnonzero(~np.isfinite(nats))
        return {
            "key": self._key(document),
            "replicate": self.parent.replicate,
            "ckpt": self.one.name,
            "protocol": self.protocol,
            "document": document.name,
            "bucket_tokens": self.request.bucket,
            "nats": [float(x) if math.isfinite(x) else None for x in parts],
            "bytes": document.bytes[: len(parts)],
            **repeats.sums(nats, document.ids[: len(nats)], self.request.bucket),
            "first_bad": int(bad[0]) if len(bad) else None,
            "wall_s": round(wall_s, 3),
        }

    def _key(self, document: Any) -> list[str]:
        return [self.one.digest, document.digest, *self.how]

    def _key_fields(self, bucket: int) -> dict[str, Any]:
        case = env.digest({"how": self.how, "data": self.texts.digest, "bucket": bucket})
        return {**self.common, "case": case, "seed": 0, "bucket": bucket}

    def _row(
        self, bucket: int, records: list[dict[str, Any]], intervals: Any, failure: tuple[str, str] | None
    ) -> ExtrapolateRow:
        fields = self._key_fields(bucket)
        failure = failure or self._failed(bucket, records)
        if failure:
            return ExtrapolateRow(**fields, status=failure[0], reason=failure[1])
        size, at = self.request.bucket, bucket - 1
        nats, width = sum(r["nats"][at] for r in records), sum(r["bytes"][at] for r in records)
        mean = nats / (size * len(records))
        loss, bits = intervals(at)
        return ExtrapolateRow(
            **fields,
            nll_nats=mean,
            ppl=math.exp(mean),
            ppl_lo=loss and math.exp(loss[0]),
            ppl_hi=loss and math.exp(loss[1]),
            bits_per_byte=nats / width / math.log(2) if width else None,
            bits_per_byte_lo=bits and bits[0],
            bits_per_byte_hi=bits and bits[1],
            n_tokens=size * len(records),
            n_bytes=width,
        )

    def _repeats(self, bucket: int, records: list[dict[str, Any]]) -> Iterator[RepeatRow]:
        """A row each for the bucket's tokens that were seen before and for the others."""
        from glabench.quality import repeats

        if not all("repeated_nats" in r for r in records):
            return  # documents of an earlier version are not told apart
        settled = self.parent.repeats.settled(self.parent.replicate)
        for kind, mean, interval, tokens in repeats.means(bucket, records):
            fields = self._key_fields(bucket)
            fields["case"] = env.digest({"case": fields["case"], "kind": kind})
            low, high = interval or (None, None)
            measured = {"nll_nats": mean, "nll_lo_nats": low, "nll_hi_nats": high, "n_tokens": tokens}
            if RowFile.key(fields) not in settled:
                yield RepeatRow(**fields, kind=kind, **measured)

    def _failed(self, bucket: int, records: list[dict[str, Any]]) -> tuple[str, str] | None:
        if bucket * self.request.bucket > self.tokens:
            return "unsupported", f"positions are learned, up to {self.scorer.limit:,} tokens"
        bad = next((r for r in records if r["nats"][bucket - 1] is None), None)
        if bad:
            return "error", f"non-finite loss at position {bad['first_bad']:,} of {bad['document']}"
        if sum(r["nats"][bucket - 1] for r in records) > 700 * self.request.bucket * len(records):
            return "error", "the perplexity is over e^700"
        return None


def _intervals(records: list[dict[str, Any]]) -> Callable[[int], tuple[Any, Any]]:
    """bucket index -> (interval of nats a token, of bits a byte); None where there are too few documents."""
    import numpy as np

    from glabench.quality.intervals import bootstrap

    def of(at: int) -> tuple[Any, Any]:
        nats = np.array([r["nats"][at] for r in records])
        size, widths = records[0]["bucket_tokens"], np.array([r["bytes"][at] for r in records])
        loss = bootstrap(nats, np.full(len(nats), size))[0]
        return loss, bootstrap(nats / math.log(2), widths)[0] if widths.all() else None

    return of


def show(done: dict[str, Any]) -> None:
    """A line a checkpoint and protocol, a column a bucket; what has no perplexity below."""
    rows = done["rows"]
    ends = sorted({int(r["bucket"]) * int(r["bucket_tokens"]) for r in rows})
    sizes = {r["bucket_tokens"] for r in rows}  # a resumed folder may hold several
    lines: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for r in rows:
        protocol = r["protocol"] + (f", buckets of {r['bucket_tokens']}" if len(sizes) > 1 else "")
        lines.setdefault((r["impl"], protocol), {})[int(r["bucket"]) * int(r["bucket_tokens"])] = r
    headings = [f"{e // 1024}k" if e % 1024 == 0 else str(e) for e in ends]
    body = []
    for (name, protocol), cells in lines.items():
        values = [tables.number(cells[e]["ppl"]) or cells[e]["status"] if e in cells else "" for e in ends]
        last = next((r for r in reversed(cells.values()) if r["status"] == "ok"), None)
        bits = tables.number(last["bits_per_byte"]) if last else ""
        body.append((name, protocol, *values, bits, next(iter(cells.values()))["n_docs"]))
    tables.show(
        ("checkpoint", "protocol", *headings, "bits/byte", "docs"),
        body,
        right=(*headings, "bits/byte", "docs"),
    )
    for reason in dict.fromkeys(f"{r['impl']} {r['protocol']}: {r['reason']}" for r in rows if r["reason"]):
        tables.say(reason)
    tables.say(f"perplexity by position, bits a byte of the last bucket, in {done['folder']}")
