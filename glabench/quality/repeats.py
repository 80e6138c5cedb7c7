"""Tokens that a text gave away before: what recall from the context is worth to a model."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from glabench.quality.extrapolate_rows import KINDS
from glabench.quality.intervals import bootstrap


def is_repeated(ids: np.ndarray) -> np.ndarray:
    """Whether each of `ids` [tokens] ends a pair of tokens that stood exactly once before in them.

    A model that recalls its context knows such a token. Pairs that stand more often are left out: most are of
    frequent words, which any model has learned.
    Source: Zoology (Arora et al. 2024), section 3, which tells frequent pairs by their training data.
    """
    pairs = ids[:-1].astype(np.int64) * (int(ids.max(initial=0)) + 1) + ids[1:]
    order = np.argsort(pairs, kind="stable")
    ordered = pairs[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    lengths = np.diff(np.append(begins, len(ordered)))
    earlier = np.empty(len(pairs), np.int64)
    earlier[order] = np.arange(len(pairs)) - np.repeat(begins, lengths)
    return np.concatenate([[False], earlier == 1])[: len(ids)]


def sums(nats: np.ndarray, ids: np.ndarray, bucket: int) -> dict[str, list[Any]]:
    """Of each bucket of one document the nats [buckets] on repeated tokens, and how many these are."""
    hit = is_repeated(ids).reshape(-1, bucket)
    losses = np.where(hit, nats.astype(np.float64).reshape(-1, bucket), 0.0).sum(1)
    return {
        "repeated_nats": [float(x) if np.isfinite(x) else None for x in losses],
        "repeated_tokens": hit.sum(1).tolist(),
    }


def means(bucket: int, records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float, Any, int]]:
    """(kind, mean nats, interval or None, tokens) of a bucket over documents, where there are tokens."""
    at, size = bucket - 1, records[0]["bucket_tokens"]
    nats, hits = (
        np.array([r[f"repeated_{what}"][at] for r in records], float) for what in ("nats", "tokens")
    )
    whole = np.array([r["nats"][at] for r in records], float)
    for kind, losses, counts in zip(KINDS, (nats, whole - nats), (hits, size - hits), strict=True):
        if counts.sum():
            interval = bootstrap(losses, counts)[0] if counts.all() else None
            yield kind, float(losses.sum() / counts.sum()), interval, int(counts.sum())
