"""Order statistics against exact binomial coverage and hand-worked samples."""

import math

import pytest

from glabench.stats import interval_ranks, quantile, summarise


@pytest.mark.parametrize(
    ("n", "ranks"),
    [
        (6, (1, 6)),
        (8, (1, 8)),
        (10, (2, 9)),
        (15, (4, 12)),
        (20, (6, 15)),
        (30, (10, 21)),
        (50, (18, 33)),
        (100, (40, 61)),
        (200, (86, 115)),
    ],
)
def test_ranks_are_the_published_ones(n, ranks):
    assert interval_ranks(n) == ranks


@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_interval_exists_under_six_samples(n):
    assert interval_ranks(n) is None


@pytest.mark.parametrize("n", [6, 7, 23, 64])
def test_ranks_are_the_narrowest_that_cover(n):
    def coverage(k):
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    low, high = interval_ranks(n)
    assert low + high == n + 1
    assert coverage(low) >= 0.95 > coverage(low + 1)


def test_summary_of_known_samples():
    s = summarise([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert (s.median, s.low, s.high, s.least, s.count, s.outliers) == (5.5, 2.0, 9.0, 1.0, 10, 0)
    assert (s.p20, s.p80) == (pytest.approx(2.8), pytest.approx(8.2))


def test_outliers_are_counted_and_kept():
    s = summarise([1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 9.0])
    assert s.outliers == 1 and s.count == 7 and s.high == 9.0


def test_converged_needs_both_ends_near_the_median():
    near = summarise([1.0, 1.0, 1.01, 1.01, 1.02, 1.02])
    far = summarise([1.0, 1.0, 1.01, 1.01, 1.02, 1.2])
    few = summarise([1.0] * 5)
    assert [s.converged(0.02) for s in (near, far, few)] == [True, False, False]


def test_quantile_is_linear_between_order_statistics():
    assert [quantile([1.0, 2.0, 4.0], q) for q in (0, 0.25, 0.5, 0.75, 1)] == [1.0, 1.5, 2.0, 3.0, 4.0]
