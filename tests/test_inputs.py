"""Inputs: shapes, layouts and dtypes that the contract names, gates that regimes name, nothing constant."""

import pytest
import torch
from family_calls import RECURRENT, case

from glabench.errors import UsageError
from glabench.inputs import GATES, REGIMES, make_grad_out, make_inputs, make_state
from glabench.registry import FAMILIES

SHAPES = {  # at batch 2, seqlen 5, 2 heads of 6 x 64; Mamba expands the width of 128 by two
    "gla": {"q": (2, 5, 2, 6), "k": (2, 5, 2, 6), "v": (2, 5, 2, 64), "g": (2, 5, 2, 6)},
    "simple_gla": {"q": (2, 5, 2, 6), "k": (2, 5, 2, 6), "v": (2, 5, 2, 64), "g": (2, 5, 2)},
    "retention": {"q": (2, 5, 2, 6), "k": (2, 5, 2, 6), "v": (2, 5, 2, 64)},
    "linear_attention": {"q": (2, 5, 2, 6), "k": (2, 5, 2, 6), "v": (2, 5, 2, 64)},
    "attention": {"q": (2, 5, 2, 64), "k": (2, 5, 2, 64), "v": (2, 5, 2, 64)},
    "mamba": {
        "x": (2, 5, 256),
        "dt": (2, 5, 256),
        "A": (256, 16),
        "B": (2, 5, 16),
        "C": (2, 5, 16),
        "D": (256,),
    },
    "mamba2": {
        "x": (2, 5, 4, 64),
        "dt": (2, 5, 4),
        "A": (4,),
        "B": (2, 5, 1, 128),
        "C": (2, 5, 1, 128),
        "D": (4,),
    },
}
STATES = {"mamba": (2, 256, 16), "mamba2": (2, 4, 64, 128)}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_order_and_dtypes(family):
    made = make_inputs(family, case(5, heads=2, d_v=64, dtype="bf16"), "cpu", 0)
    assert tuple(made) == FAMILIES[family].tensors
    assert {name: tuple(x.shape) for name, x in made.items()} == SHAPES[family]
    for name, x in made.items():
        assert x.dtype == (torch.float32 if name in ("A", "D") else torch.bfloat16)
        assert not x.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_zero_or_repeated(family):
    of = case(64, heads=2, d_v=64)
    for name, x in make_inputs(family, of, "cpu", 0).items():
        assert x.isfinite().all()
        assert not (x == 0).any(), name
        assert x.unique().numel() > 0.9 * x.numel(), name
    assert make_grad_out(family, of, "cpu", 0).std() > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_decide(family):
    of = case(5, heads=2, d_v=64)
    one, same, other = (make_inputs(family, of, "cpu", seed) for seed in (1, 1, 2))
    for name in one:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_mamba_is_stored_channel_by_channel():
    of = case(5, heads=2, d_v=64)
    made = make_inputs("mamba", of, "cpu", 0)
    for name in ("x", "dt", "B", "C"):
        assert made[name].mT.is_contiguous()
    assert make_grad_out("mamba", of, "cpu", 0).mT.is_contiguous()
    assert (made["A"] < 0).all()
    assert made["dt"].min() >= 1e-3 and made["dt"].max() <= 1e-1


@pytest.mark.parametrize("family", FAMILIES)
def test_output_gradients_are_dense_and_like_the_output(family):
    of = case(5, heads=2, d_v=64, dtype="fp16")
    like = make_inputs(family, of, "cpu", 0)["x" if "mamba" in family else "v"]
    d_out = make_grad_out(family, of, "cpu", 1)
    assert (d_out.shape, d_out.dtype, d_out.stride()) == (like.shape, like.dtype, like.stride())
    assert 0 not in d_out.stride()


@pytest.mark.parametrize("family", RECURRENT)
def test_states(family):
    of = case(5, heads=2, d_v=64, dtype="bf16")
    state = make_state(family, of, "cpu", 0)
    assert tuple(state.shape) == STATES.get(family, (2, 2, 6, 64))
    assert state.dtype == torch.float32
    assert make_state(family, of, "cpu", 0, rows=7).shape[0] == 7


@pytest.mark.parametrize("regime", GATES)
def test_constant_gates(regime):
    g = make_inputs("gla", case(5), "cpu", 0, regime=regime)["g"]
    assert g.unique().tolist() == [pytest.approx(GATES[regime])]


def test_trained_gates_are_small_and_mixed_ones_are_all_of_them():
    trained = make_inputs("gla", case(500), "cpu", 0)["g"]
    assert trained.min() > -0.5 and trained.max() < 0
    assert trained.mean().item() == pytest.approx(-0.0504, abs=2e-3)  # E logsigmoid(randn) / 16
    mixed = make_inputs("gla", case(500), "cpu", 0, regime="mixed")["g"]
    for value in GATES.values():
        assert (mixed == value).any()
    assert ((mixed < -1e-3) & (mixed > -1)).float().mean() > 0.5


def test_refuses_an_unknown_regime_and_a_state_for_attention():
    with pytest.raises(UsageError, match="did you mean 'mixed'"):
        make_inputs("gla", case(5), "cpu", 0, regime="mixt")
    with pytest.raises(UsageError, match="carries no state"):
        make_state("attention", case(5), "cpu", 0)
    assert "trained" in REGIMES
