"""Statistics of one cell's samples: order statistics only, nothing assumed of their distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_FOR_INTERVAL = 6  # below it no 95% interval of the median exists: 1 - 2 * 0.5**5 = 93.75%


@dataclass(frozen=True, slots=True)
class Summary:
    """Of samples in milliseconds: median, its 95% interval (None under 6 samples), spread, counts."""

    median: float
    low: float | None
    high: float | None
    p20: float
    p80: float
    least: float
    count: int
    outliers: int

    def converged(self, interval_frac: float) -> bool:
        """Whether both ends of the interval lie within `interval_frac` of the median."""
        if self.low is None or self.high is None:
            return False
        return max(self.high - self.median, self.median - self.low) <= interval_frac * self.median


def interval_ranks(n: int, level: float = 0.95) -> tuple[int, int] | None:
    """1-based ranks (low, high) whose order statistics cover the median with >= `level`, narrowest.

    Exact: coverage of [k, n+1-k] is 1 - 2 P(Binomial(n, 1/2) < k). None where even [1, n] falls short.
    """
    tail, rank = 0.0, 0
    while rank < n // 2:
        more = tail + math.comb(n, rank) / 2**n
        if 1 - 2 * more < level:
            break
        tail, rank = more, rank + 1
    return (rank, n + 1 - rank) if rank else None


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between order statistics; `ordered` is sorted and not empty."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarise(samples: Sequence[float]) -> Summary:
    """Summary of at least one sample; outliers (beyond 1.5 IQR) are counted, never removed."""
    ordered = sorted(samples)
    ranks = interval_ranks(len(ordered))
    q1, q3 = quantile(ordered, 0.25), quantile(ordered, 0.75)
    reach = 1.5 * (q3 - q1)
    return Summary(
        median=statistics.median(ordered),
        low=ordered[ranks[0] - 1] if ranks else None,
        high=ordered[ranks[1] - 1] if ranks else None,
        p20=quantile(ordered, 0.2),
        p80=quantile(ordered, 0.8),
        least=ordered[0],
        count=len(ordered),
        outliers=sum(x < q1 - reach or x > q3 + reach for x in ordered),
    )
