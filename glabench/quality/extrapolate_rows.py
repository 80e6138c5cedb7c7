"""Rows of `glabench extrapolate`, and the losses of single documents that they are made from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from glabench.errors import ResultsError
from glabench.results import append_whole, cut_torn_line
from glabench.rows import Row

VERB, FILE, DOCUMENTS = "extrapolate", "extrapolate.csv", "documents.jsonl"
REPEATS, KINDS = "repeats.csv", ("repeated", "other")
Protocol = Literal["document", "state_passing", "sliding"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRow(Row):
    """What is known of one bucket of positions of one checkpoint under one protocol, over all documents.

    `impl` is the checkpoint's name and `impl_version` the digest of its weights. Bucket b holds the predicted
    positions (b - 1) bucket_tokens up to b bucket_tokens - 1, counted from 0. Intervals are of the mean over
    documents, 95%.
    """

    params: int
    train_len: int | None = None
    train_segments: int | None = None
    dataset: str
    data_digest: str
    tokenizer: str
    protocol: str
    bucket: int
    bucket_tokens: int
    window: int | None = None
    stride: int | None = None
    piece: int | None = None
    dtype: str

    @property
    def end(self) -> int:
        """Where the bucket ends, in tokens: its place on the figure's axis."""
        return self.bucket * self.bucket_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtrapolateRow(BucketRow):
    """A bucket's perplexity."""

    MEASURED: ClassVar[str] = "ppl"

    nll_nats: float | None = None
    ppl: float | None = None
    ppl_lo: float | None = None
    ppl_hi: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_lo: float | None = None
    bits_per_byte_hi: float | None = None
    n_docs: int
    n_tokens: int | None = None
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatRow(BucketRow):
    """The part of a bucket's loss that lies on tokens of one of KINDS: see glabench.quality.repeats."""

    MEASURED: ClassVar[str] = "nll_nats"

    kind: str
    nll_nats: float | None = None
    nll_lo_nats: float | None = None
    nll_hi_nats: float | None = None
    n_docs: int
    n_tokens: int | None = None


class DocumentFile:
    """documents.jsonl: a flushed line a document, checkpoint and protocol, with its summed nats a bucket.

    Opening it cuts a torn last line and names it in `repaired`. Raises: ResultsError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.repaired = path, ""
        self.records: list[dict[str, Any]] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            self.repaired = cut_torn_line(self.path)[:80]
            whole = self.path.read_bytes()
            lines = whole[: whole.rfind(b"\n") + 1].splitlines()  # another process may be writing one
            self.records = [json.loads(line) for line in lines]
            for record in self.records:
                if not {"key", "replicate", "nats"} <= record.keys():
                    raise ValueError("a line is another program's")
        except (OSError, ValueError, AttributeError) as err:
            raise ResultsError(
                f"{self.path.name} is not readable: {err}", where=str(self.path), fix="choose another --out"
            ) from err

    def find(self, key: Sequence[str], replicate: int) -> dict[str, Any] | None:
        """The record of a document, or None."""
        wanted = list(key)
        found = (r for r in self.records if r["key"] == wanted and r["replicate"] == replicate)
        return next(found, None)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and make it durable. Raises: ResultsError; no half line stays behind."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            append_whole(self.path, line)
        except OSError as err:
            raise ResultsError(
                f"cannot write {self.path.name}: {err.strerror}; the lines before it are safe",
                where=str(self.path),
                fix="make room, then run the same command with --resume",
            ) from err
        self.records.append(record)
