"""Rows of `glabench lm-eval`: one metric of one task on one checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from glabench.results import read_rows
from glabench.rows import Row, typed

FILE = "lm-eval.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow(Row):
    """A score, or why a task has none (then `metric` is empty).

    `case` names checkpoint, task, data, tokenizer, examples, limit and window; `subset` is "yes" where fewer
    documents were scored than the published split has. `stderr_from`: "harness", or "documents" where it
    gives none.
    """

    MEASURED: ClassVar[str] = "value"

    checkpoint: str
    checkpoint_digest: str
    model_type: str
    parameters: int
    dtype: str
    task: str
    task_version: str = ""
    harness_version: str
    metric: str = ""
    filter: str = ""
    num_fewshot: int = 0
    limit: int | None = None
    subset: str = ""
    batch: int
    max_length: int
    special_tokens: str = ""  # "no": text is encoded without any; "tokenizer": as its files say
    data_sha: str = ""
    requests_digest: str = ""
    n: int | None = None
    value: float | None = None
    stderr: float | None = None
    stderr_from: str = ""
    unit: str = ""
    shared_contexts: str = ""  # "yes": contexts of several requests were computed once
    padding_err_nats: float | None = None  # a token, between batch 1 and a padded batch
    answer_s: float | None = None  # seconds the model took for the task's requests
    hf_value: float | None = None  # the same metric by the harness's own model class
    hf_answer_s: float | None = None
    hf_ratio: float | None = None  # its seconds over ours


def unit(metric: str) -> str:
    """ "ppl", "bits", or "frac" for what lies between 0 and 1."""
    return "ppl" if metric.endswith("perplexity") else "bits" if metric == "bits_per_byte" else "frac"


def load(folder: Path) -> list[ScoreRow]:
    """The latest rows of every case. Raises: ResultsError for a file that is not ours."""
    return latest(typed(ScoreRow, record) for record in read_rows(folder / FILE, ScoreRow))


def latest(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """Of each case the rows of its last replicate, and of those the last of each metric."""
    found: dict[tuple[str, str], dict[str, ScoreRow]] = {}
    for row in rows:
        place = (row.device, row.case)
        mine = found.setdefault(place, {})
        if mine and (row.replicate, row.env) != next((r.replicate, r.env) for r in mine.values()):
            mine.clear()
        if (row.status == "ok") != all(r.status == "ok" for r in mine.values()):
            mine.clear()  # a case that failed first and was done later, or the other way round
        mine[row.metric] = row
    return [row for mine in found.values() for row in mine.values()]
