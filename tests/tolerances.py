"""The only place with tolerances: the product's own table, and equality of float64 forms."""

from glabench.oracle import TOLERANCES, WORST, compare

__all__ = (
    "EXACT",
    "PIECES",
    "TOLERANCES",
    "TRAINING",
    "TWO_FP32_FORMS",
    "WORST",
    "assert_close",
    "difference",
)

EXACT = 1e-9  # two float64 forms of one function, relative RMS
TWO_FP32_FORMS = 1e-5  # two float32 forms of one function, relative RMS
PIECES = 1e-4  # nats: a token's loss, float32, read in pieces or whole; measured 2e-6
TRAINING = 2e-6  # a loss of a dozen fp32 steps whose sums run in another order; measured 4e-7


def assert_close(name, got, want, dtype, floor=0.0):
    """`got` is within the product's tolerance of float64 `want`."""
    error = compare(name, got, want, dtype, floor)
    assert error.ok, f"{name} {dtype}: {error.reason}"


def difference(got, want):
    """Relative RMS difference of two tensors, or the largest of two answers'; NaN is never below a limit."""
    if hasattr(want, "gradients"):
        assert got.gradients.keys() == want.gradients.keys()
        pairs = [(got.out, want.out), *((got.gradients[n], want.gradients[n]) for n in want.gradients)]
        pairs += [] if want.final_state is None else [(got.final_state, want.final_state)]
        return max((difference(a, b) for a, b in pairs), key=lambda d: (d != d, d))
    assert got.shape == want.shape
    return ((got - want).double().norm() / want.double().norm().clamp_min(1e-30)).item()
