"""lm-evaluation-harness over a ready model; contexts that several requests share are computed once.

Scoring, prompts, batching and generation are the harness's own. Ours is one method: where several
continuations follow one context, and the model carries a recurrent state, the context runs once, and each
continuation goes on from its state.
"""

import contextlib
import io
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from glabench.errors import GlabenchError
from glabench.models import RecurrentState
from glabench.models.language import CACHE, LinearAttentionForCausalLM
from glabench.quality.tasks import SEED

LOGITS_BYTES = 4 << 30  # of one batch's log-probabilities in float32: whole windows of text keep them all
CHECK_DOCUMENTS, CHECK_BATCH, CHECK_TOKENS = 4, 8, 8
# nats a token between a request alone and in a batch: rounding stays below, padding read as text does not
PADDING_NATS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.25}
BOOTSTRAPS = 1000
Request = tuple[Any, list[int], list[int]]  # (its text or None, context, continuation)


class NotFiniteError(GlabenchError):
    """A model that answers with NaN or infinity."""


class WindowError(GlabenchError):
    """A request that the model's window does not hold; the harness would only fail an assertion."""


class PlainLM(HFLM):
    """The harness's own model class over a loaded checkpoint; counts the seconds it answers in."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, adds_special: bool | None, batch: int, max_length: int
    ) -> None:
        head = model.get_output_embeddings()
        weight = head.weight
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch,
            max_length=max_length,
            softmax_dtype="float32" if model.dtype != torch.float64 else "float64",
            add_bos_token=adds_special,
        )
        head.weight = weight  # it ties them again; beside 16-bit embeddings the head is float32 (loading)
        self.seconds = 0.0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        started = time.perf_counter()
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - started
        return _finite(answers, [value for value, _ in answers])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        started = time.perf_counter()
        answers = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - started
        return _finite(answers, answers)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        started = time.perf_counter()
        answers = super().generate_until(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - started
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise WindowError(
                f"an answer of {longest:,} tokens is longer than the window of {self.max_length:,}",
                where="--max-length",
                fix="raise --max-length",
            )
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)


class StateLM(PlainLM):
    """The same answers from less work: one pass over a context that several continuations share."""

    shares = True  # False: the harness's own path
    shared = 0  # requests answered from a carried state so far

    @property
    def carries_state(self) -> bool:
        return isinstance(self.model, LinearAttentionForCausalLM)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        row = self.max_length * self.model.config.get_text_config().vocab_size * 4
        asked = self.batch_size_per_gpu
        self.batch_size_per_gpu = max(1, min(asked, LOGITS_BYTES // row))
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = asked

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        groups = self._shared(requests) if self.carries_state and self.shares else {}
        answers: dict[int, tuple[float, bool]] = {}
        contexts = sorted(groups, key=lambda c: (-len(c), c))
        for i in range(0, len(contexts), self.batch_size):
            part = contexts[i : i + self.batch_size]
            rows = [(n, at) for n, context in enumerate(part) for at in groups[context]]
            answers |= self._continue(part, rows, [requests[at][2] for _, at in rows])
        self.shared += len(answers)
        rest = [i for i in range(len(requests)) if i not in answers]
        plain = super()._loglikelihood_tokens([requests[i] for i in rest], override_bs=override_bs)
        answers |= dict(zip(rest, plain, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _shared(self, requests: list[Request]) -> dict[tuple[int, ...], list[int]]:
        """Context -> the requests that continue it, where there are several and none must be cut.

        Windows of a whole text have no text of their own, and share no more than a first token.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (text, context, continuation) in enumerate(requests):
            if text is not None and 0 < len(continuation) <= self.max_length + 1 - len(context):
                groups.setdefault(tuple(context), []).append(i)
        return {context: ids for context, ids in groups.items() if len(ids) > 1}

    @torch.no_grad()
    def _continue(
        self, contexts: Sequence[Sequence[int]], rows: list[tuple[int, int]], continuations: list[list[int]]
    ) -> dict[int, tuple[float, bool]]:
        """Scores of (context's number, request's number) rows, each with its continuation."""
        ids, mask = _pad(contexts, left=True, device=self.device)
        out = self.model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        first = self._log_softmax(out.logits[:, -1])  # [contexts, vocabulary]
        order = sorted(range(len(rows)), key=lambda r: -len(continuations[r]))
        found: dict[int, tuple[float, bool]] = {}
        for i in range(0, len(order), self.batch_size):
            chunk = order[i : i + self.batch_size]
            picked = torch.tensor([rows[r][0] for r in chunk], device=self.device)
            scores = self._score(out[CACHE], first, picked, [continuations[r] for r in chunk])
            found |= {rows[r][1]: score for r, score in zip(chunk, scores, strict=True)}
        return found

    def _score(
        self, state: RecurrentState, first: Tensor, picked: Tensor, continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether every token is the greedy one) of each continuation."""
        targets, mask = _pad(continuations, left=False, device=self.device)  # [rows, longest]
        logs = first[picked][:, None]  # [rows, 1, vocabulary]
        if targets.shape[1] > 1:  # what pads at the right is read after everything that is scored
            carried = RecurrentState([s.index_select(0, picked) for s in state.states], state.seen)
            out = self.model(targets[:, :-1], use_cache=False, **{CACHE: carried})
            logs = torch.cat((logs, self._log_softmax(out.logits)), dim=1)
        mask = mask.bool()
        nats = logs.gather(2, targets[..., None])[..., 0].masked_fill(~mask, 0.0).sum(-1)
        greedy = ((logs.argmax(-1) == targets) | ~mask).all(-1)
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)


def _pad(rows: Sequence[Sequence[int]], *, left: bool, device: Any) -> tuple[Tensor, Tensor]:
    """(token ids, 1 where there is one), both [rows, longest]; padded with id 0."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def _finite(answers: Any, values: Sequence[float]) -> Any:
    bad = sum(not math.isfinite(v) for v in values)
    if bad:
        raise NotFiniteError(
            f"{bad} of {len(values)} log-likelihoods are not finite",
            where="the model's logits",
            fix="check the checkpoint, or use --dtype fp32",
        )
    return answers


# --- is a request's answer its own, whatever stands beside it in a batch? --------------------------------


def padding_error(lm: StateLM, task: Any) -> float:
    """Nats a token by which a few of the task's requests change between batch 1 and a padded batch.

    Raises: NotFiniteError.
    """
    task.build_all_requests(limit=CHECK_DOCUMENTS, rank=0, world_size=1)
    asked = {kind: [r for r in task.instances if r.request_type == kind] for kind in _CHECKS}
    return max(check(lm, requests) for kind, check in _CHECKS.items() if (requests := asked[kind]))


def padding_limit(lm: PlainLM) -> float:
    return PADDING_NATS[lm.model.dtype]


def _likelihoods(lm: StateLM, requests: list[Instance]) -> float:
    """The harness's own path alone, against ours in a batch."""
    alone, together = _both(lm, lambda: [nats for nats, _ in lm.loglikelihood(requests, disable_tqdm=True)])
    tokens = [len(lm.tok_encode(r.args[1], add_special_tokens=False)) for r in requests]
    return _worst(alone, together, tokens)


def _whole_texts(lm: StateLM, requests: list[Instance]) -> float:
    """Beginnings of the texts, of different lengths, so that a batch of them has padding."""
    texts = [r.args[0][: 100 * (i + 1)] for i in range(CHECK_DOCUMENTS) for r in requests[:1]]
    asked = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts
    ]
    alone, together = _both(lm, lambda: lm.loglikelihood_rolling(asked, disable_tqdm=True))
    return _worst(alone, together, [len(lm.tok_encode(text)) for text in texts])


@torch.no_grad()
def _generated(lm: StateLM, requests: list[Instance]) -> float:
    """Of each chosen token, its likelihood in the padded batch against the one read without padding."""
    prompts = [r.args[0] for r in requests]
    ids, mask = lm.tok_batch_encode(prompts, left_truncate_len=lm.max_length - CHECK_TOKENS)
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    longest = ids.shape[1]
    kept = {"output_logits": True, "return_dict_in_generate": True}
    out = lm._model_generate(ids, longest + CHECK_TOKENS, [], attention_mask=mask, **kept)
    batched = lm._log_softmax(torch.stack(out.logits, dim=1))  # [rows, steps, vocabulary]
    worst = 0.0
    for row, logs, attended in zip(out.sequences, batched, mask, strict=True):
        start, chosen = longest - int(attended.sum()), row[longest:, None]
        alone = lm._log_softmax(lm.model(row[None, start:-1]).logits[0, longest - start - 1 :])
        apart = (alone.gather(1, chosen) - logs.gather(1, chosen))[:, 0].abs()
        ended = (chosen[:, 0] == lm.eot_token_id).cumsum(0)  # generation pads what follows its end
        worst = max(worst, *_finite(apart, apart.tolist()).masked_fill(ended > 1, 0.0).tolist())
    return worst


_CHECKS = {
    "loglikelihood": _likelihoods,
    "loglikelihood_rolling": _whole_texts,
    "generate_until": _generated,
}


def _both(lm: StateLM, ask: Callable[[], list[float]]) -> tuple[list[float], list[float]]:
    """Answers of the harness's own path one by one, and of ours in a padded batch."""
    batch = lm.batch_size_per_gpu
    try:
        lm.batch_size_per_gpu, lm.shares = 1, False
        alone = ask()
        lm.batch_size_per_gpu, lm.shares = max(batch, CHECK_BATCH), True
        return alone, ask()
    finally:
        lm.batch_size_per_gpu, lm.shares = batch, True


def _worst(alone: list[float], together: list[float], tokens: list[int]) -> float:
    return max(abs(a - b) / max(1, n) for a, b, n in zip(alone, together, tokens, strict=True))


# --- scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task; `stderr_from` says whose standard error it is, over documents."""

    metric: str
    filter: str
    value: float
    stderr: float | None
    stderr_from: str
    documents: list[Any]  # a value a document, or (nats, weight) for a perplexity


@dataclass(frozen=True, slots=True)
class Scores:
    """What the harness says of one task, over `n` documents; the seconds that the model took."""

    scores: list[Score]
    n: int
    version: str
    seconds: float
    shared: int  # requests answered from a carried state


def evaluate(lm: PlainLM, task: Any, limit: int | None) -> Scores:
    """Run one task. Raises: NotFiniteError; torch.OutOfMemoryError."""
    random.seed(0)  # the harness's own defaults: its bootstrap and examples draw from these
    np.random.seed(SEED)
    name, before, shared = task.task_name, lm.seconds, getattr(lm, "shared", 0)
    with contextlib.redirect_stdout(io.StringIO()):  # its bootstrap prints
        found = lm_eval.evaluate(
            lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=BOOTSTRAPS
        )
    scores = [
        _score(key, value, found["results"][name], found["samples"][name])
        for key, value in found["results"][name].items()
        if "," in key and "_stderr" not in key
    ]
    n = int(found["n-samples"][name]["effective"])
    return Scores(
        scores,
        n,
        str(found["versions"].get(name, "")),
        lm.seconds - before,
        getattr(lm, "shared", 0) - shared,
    )


def _score(key: str, value: Any, results: dict[str, Any], samples: list[dict[str, Any]]) -> Score:
    metric, _, chosen = key.partition(",")
    documents = [_plain(s[metric]) for s in samples if s["filter"] == chosen and metric in s]
    documents = [] if None in documents else documents
    theirs = results.get(f"{metric}_stderr,{chosen}")
    if isinstance(theirs, int | float) and math.isfinite(theirs):
        return Score(metric, chosen, float(value), float(theirs), "harness", documents)
    own = _stderr(metric, float(value), documents)
    return Score(metric, chosen, float(value), own, "" if own is None else "documents", documents)


def _plain(value: Any) -> Any:
    """A document's value as JSON has it; None where it is neither a number nor a tuple of them."""
    try:
        return [float(part) for part in value] if isinstance(value, tuple | list) else float(value)
    except (TypeError, ValueError):
        return None


def _stderr(metric: str, value: float, documents: list[Any]) -> float | None:
    """Where the harness gives none: of a mean, or of a ratio of sums over documents, linearised."""
    n = len(documents)
    if n < 2:
        return None
    if not isinstance(documents[0], list):
        mean = sum(documents) / n
        return math.sqrt(sum((v - mean) ** 2 for v in documents) / (n - 1) / n)
    nats, weight = (sum(column) for column in zip(*documents, strict=True))
    rate = nats / weight
    spread = sum((a - rate * w) ** 2 for a, w in documents) * n / (n - 1)
    return math.sqrt(spread) / abs(weight) * (value if "perplexity" in metric else 1 / math.log(2))
