"""Bootstrap over documents: what a mean over other documents of the same kind would have been."""

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
LEAST = 2  # documents; one says nothing about others


def bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> list[tuple[float, float] | None]:
    """The 95% interval of sum(sums) / sum(counts) for each column, documents drawn with replacement.

    Shapes: sums [documents] or [documents, columns], counts alike. Every column, and every call with as many
    documents, sees the same draws: differences between lines are paired. None under two documents.
    Source: Efron and Tibshirani, percentile interval; with under ten documents it is too narrow.
    """
    sums, counts = (np.asarray(x, float).reshape(len(x), -1) for x in (sums, counts))
    documents = len(sums)
    if documents < LEAST:
        return [None] * sums.shape[1]
    drawn = np.random.default_rng(seed).multinomial(documents, [1 / documents] * documents, size=DRAWS)
    means = (drawn @ sums) / (drawn @ counts)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
