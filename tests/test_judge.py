"""How errors are judged, and that memory is poisoned: what must not slip through."""

import pytest
import torch
from family_calls import case
from torch.nn.functional import scaled_dot_product_attention

from glabench.inputs import make_grad_out, make_inputs
from glabench.oracle import TOLERANCES, WORST, compare, poisoned_memory, reference, rms


@pytest.fixture
def want():
    return torch.randn(2, 500, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_rounding_alone_is_ok(want, dtype, torch_dtype):
    error = compare("out", want.to(torch_dtype), want, dtype)
    assert error.ok and error.reason == ""
    assert 0 < error.rms_ratio < error.tol_ratio == TOLERANCES["out", dtype]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: x[:, :-1], "shape [2, 499, 3, 8] is not [2, 500, 3, 8]"),
        (lambda x: x.half(), "dtype float16 is not float32"),
        (lambda x: None, "no tensor but NoneType"),
        (lambda x: x * 1.01, "relative RMS error 1.0e-02 is above 2e-05"),
        (lambda x: x.index_fill(1, torch.tensor([7]), torch.nan), "NaN or infinity in 48 of 24000 elements"),
        (lambda x: x.index_fill(1, torch.tensor([7]), torch.inf), "NaN or infinity in 48 of 24000 elements"),
    ],
    ids=["shape", "dtype", "missing", "scaled", "nan", "inf"],
)
def test_faults_are_named(want, spoil, reason):
    error = compare("out", spoil(want.float()), want, "fp32")
    assert not error.ok
    assert error.reason == reason


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_wrong_token_shows_at_any_length(dtype):
    want = torch.randn(1, 32768, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = want.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    got[:, -1] = 0
    error = compare("out", got, want, dtype)
    assert not error.ok
    assert error.worst_ratio > WORST[dtype]


def test_a_small_row_is_judged_by_the_tensors_size(want):
    want[:, 0] = 1e-12  # where exact terms cancel, rounding of the rest is no error
    got = want.float()
    got[:, 0] = 1e-9
    assert compare("out", got, want, "fp32").ok


def test_the_floor_stands_in_for_a_vanishing_gradient():
    want = torch.zeros(4, 4, dtype=torch.float64)
    got = torch.full((4, 4), 1e-7)
    assert not compare("g", got, want, "fp32").ok
    assert compare("g", got, want, "fp32", floor=1.0).ok


def test_states_stay_float32_for_16_bit_inputs(want):
    assert compare("final_state", want.float(), want, "bf16").ok
    assert not compare("final_state", want.bfloat16(), want, "bf16").ok


def test_no_elements_are_no_error():
    assert compare("out", torch.zeros(1, 0, 2, 3), torch.zeros(1, 0, 2, 3, dtype=torch.float64), "fp32").ok


def test_poison_fills_fresh_memory_and_goes_away():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.ones(10, dtype=torch.float64)).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
    assert not torch.full((3,), 1.0).isnan().any()


def test_a_query_with_one_heavy_key_is_judged_by_the_terms_that_cancel():
    of = case(4096, batch=1, heads=1, d_v=128, dtype="bf16")
    tensors = make_inputs("attention", of, "cpu", seed=0)
    d_out = make_grad_out("attention", of, "cpu", seed=1)
    tensors["q"][:, 1] = 0.45 * tensors["k"][:, 0]  # nearly all its weight: its gradient vanishes,
    positions = torch.tensor([1, *range(2048, 4096, 64)])  # the rounding of its output does not
    looked_at = torch.zeros(4096, dtype=torch.bool).index_fill_(0, positions, True)
    d_out[:, ~looked_at] = 0
    want = reference("attention", tensors, d_out=d_out, positions=positions)
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in tensors.values()]
    out = scaled_dot_product_attention(*leaves, is_causal=True)
    found = torch.autograd.grad(out, leaves[:2], d_out.transpose(1, 2))
    for name, gradient in zip("qk", found, strict=True):
        gradient = gradient.transpose(1, 2)
        right, floor = want.gradients[name], want.floors[name]
        assert compare(name, gradient, right, "bf16", floor).ok
        assert not compare(name, gradient, right, "bf16", rms(floor)).ok  # of the tensor alone
        wrong = gradient.clone()
        wrong[:, 2048] = wrong[:, 2112]
        assert not compare(name, wrong, right, "bf16", floor).ok
