"""The oracle against numbers worked by hand, against itself in two forms, and the judge of errors."""

import math

import pytest
import torch
from family_calls import RECURRENT, call, case, case_of
from tolerances import EXACT, difference

from glabench import oracle, oracle_long
from glabench.errors import ShapeError, UsageError
from glabench.inputs import REGIMES, make_grad_out, make_inputs, make_state

pytestmark = pytest.mark.usefixtures("one_thread")


def tensor(*numbers, shape):
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


# --- definitions, by hand -----------------------------------------------------------------------------------


def test_gla_by_hand():
    # S1 = 3 * 5 + e^-1 * 2 = 15 + 2/e; S2 = e^-2 S1 + 4 * 6; o = 0.5 * q S
    one = (1, 2, 1, 1)
    answer = oracle.reference(
        "gla",
        {
            "q": tensor(1, 2, shape=one),
            "k": tensor(3, 4, shape=one),
            "v": tensor(5, 6, shape=one),
            "g": tensor(-1, -2, shape=one),
        },
        scale=0.5,
        initial_state=tensor(2, shape=(1, 1, 1, 1)),
    )
    first = 15 + 2 * math.exp(-1)
    second = math.exp(-2) * first + 24
    assert answer.out.flatten().tolist() == pytest.approx([0.5 * first, second])
    assert answer.final_state.item() == pytest.approx(second)


def test_retention_decays_head_h_by_1_minus_2_to_the_minus_5_minus_h():
    ones = torch.ones(1, 2, 3, 1, dtype=torch.float64)
    out = oracle.reference("retention", {"q": ones, "k": ones, "v": ones}).out
    assert out[0, 1, :, 0].tolist() == pytest.approx([1 + 31 / 32, 1 + 63 / 64, 1 + 127 / 128])


def test_linear_attention_sums():
    ones = torch.ones(1, 3, 1, 4, dtype=torch.float64)
    out = oracle.reference("linear_attention", {"q": ones, "k": ones, "v": ones}).out
    assert out[0, :, 0, 0].tolist() == pytest.approx([2, 4, 6])  # scale 4 ** -0.5, times t * 4


def test_attention_by_hand():
    # second row: weights e^0 and e^ln3 over 4 = 1/4, 3/4
    q, k = tensor(1, 1, shape=(1, 2, 1, 1)), tensor(0, math.log(3), shape=(1, 2, 1, 1))
    out = oracle.reference("attention", {"q": q, "k": k, "v": tensor(8, 4, shape=(1, 2, 1, 1))}).out
    assert out.flatten().tolist() == pytest.approx([8, 5])


@pytest.mark.parametrize(("family", "x_shape"), [("mamba", (1, 2, 1)), ("mamba2", (1, 2, 1, 1))])
def test_mamba_by_hand(family, x_shape):
    # h1 = 0.5 * 2 * 3 = 3; h2 = e^(-0.25) h1 + 0.25 * 4 * 5; y = C h + 10 x
    group = (1, 2, 1) if family == "mamba" else (1, 2, 1, 1)
    tensors = {
        "x": tensor(2, 4, shape=x_shape),
        "dt": tensor(0.5, 0.25, shape=(1, 2, 1)),
        "A": tensor(-1, shape=(1, 1) if family == "mamba" else (1,)),
        "B": tensor(3, 5, shape=group),
        "C": tensor(7, 9, shape=group),
        "D": tensor(10, shape=(1,)),
    }
    last = math.exp(-0.25) * 3 + 5
    assert oracle.reference(family, tensors).out.flatten().tolist() == pytest.approx([41, 9 * last + 40])


# --- the fast forms are the same functions ------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", RECURRENT)
def test_long_form_is_the_recurrence(family, regime):
    tensors, options = call(family, case_of(family, 150), regime=regime)
    want = oracle.reference(family, tensors, literal=True, **options)
    got = oracle.reference(family, tensors, literal=False, **options)
    assert difference(got, want) <= EXACT


@pytest.mark.parametrize("seqlen", [1, 64, 65])
@pytest.mark.parametrize("family", [*RECURRENT, "attention"])
def test_long_form_at_awkward_lengths(family, seqlen):
    tensors, options = call(family, case_of(family, seqlen, d_k=4))
    want = oracle.reference(family, tensors, literal=True, **options)
    got = oracle.reference(family, tensors, literal=False, **options)
    for name, floor in want.floors.items():  # a single token's dq and dk are zero, up to rounding
        least = 1e-12 * torch.as_tensor(floor).max()
        if want.gradients[name].norm() < least:
            assert got.gradients.pop(name).norm() < least
            want.gradients.pop(name)
    assert difference(got, want) <= EXACT


def test_attention_in_several_blocks_of_rows(monkeypatch):
    monkeypatch.setitem(oracle_long.ROWS, "cpu", 16)
    tensors, options = call("attention", case(75, d_k=4))
    want = oracle.reference("attention", tensors, literal=True, **options)
    got = oracle.reference("attention", tensors, literal=False, **options)
    assert difference(got, want) <= EXACT


@pytest.mark.parametrize("family", RECURRENT)
def test_pieces_make_the_whole(family, monkeypatch):
    tensors, options = call(family, case_of(family, 70))
    want = oracle.reference(family, tensors, literal=False, **options)
    monkeypatch.setattr(oracle_long, "CPU_BUDGET_BYTES", 1)
    exact = {name: x.double() for name, x in tensors.items()}
    heads = want.final_state.shape[1]
    assert len(oracle_long.pieces(exact, want.final_state)) == 2 * heads
    got = oracle.reference(family, tensors, literal=False, **options)
    assert difference(got, want) <= EXACT


def test_short_sequences_with_large_states_take_the_long_form(monkeypatch):
    tensors, options = call("gla", case(20))
    taken = []
    monkeypatch.setitem(oracle_long.FORMS, "gla", lambda *a, **k: taken.append(1) or oracle_long.gla(*a, **k))
    oracle.reference("gla", tensors, **options)
    assert taken == []
    monkeypatch.setattr(oracle_long, "CPU_BUDGET_BYTES", 4 * 8 * 20 * 2 * 3 * 6 * 4 - 1)
    oracle.reference("gla", tensors, **options)
    assert taken


def test_attention_at_chosen_positions():
    tensors, options = call("attention", case(40, d_k=4))
    at = torch.tensor([3, 17, 39])
    masked = torch.zeros_like(options["d_out"])
    masked[:, at] = options["d_out"][:, at]
    want = oracle.reference("attention", tensors, d_out=masked)
    got = oracle.reference("attention", tensors, d_out=masked, positions=at)
    assert difference(got.out, want.out[:, at]) <= EXACT
    for name in "qkv":
        assert difference(got.gradients[name], want.gradients[name]) <= EXACT


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_packed_sequences_do_not_see_each_other(family):
    of = case_of(family, 30, batch=1)
    tensors = make_inputs(family, of, "cpu", 0)
    d_out, state = make_grad_out(family, of, "cpu", 1), make_state(family, of, "cpu", 2, rows=3)
    bounds = torch.tensor([0, 12, 12, 30])
    packed = oracle.reference(family, tensors, initial_state=state, cu_seqlens=bounds, d_out=d_out)
    second = {n: x if n in ("A", "D") else x[:, 12:] for n, x in tensors.items()}
    alone = oracle.reference(family, second, initial_state=state[2:], d_out=d_out[:, 12:])
    assert difference(packed.out[:, 12:], alone.out) <= EXACT
    assert difference(packed.final_state[2:], alone.final_state) <= EXACT
    assert difference(packed.final_state[1], state[1].double()) <= EXACT
    assert difference(packed.gradients["initial_state"][2:], alone.gradients["initial_state"]) <= EXACT


def test_no_gradients_unless_asked():
    tensors, _ = call("gla", case(5))
    assert oracle.reference("gla", tensors).gradients == {}


def test_refuses_what_makes_no_sense():
    tensors, options = call("attention", case(5, d_k=4))
    with pytest.raises(UsageError, match="did you mean 'gla'"):
        oracle.reference("glaa", tensors)
    with pytest.raises(ShapeError, match="neither states nor packed"):
        oracle.reference("attention", tensors, initial_state=options["d_out"])
    with pytest.raises(ShapeError, match="positions are for attention"):
        oracle.reference("gla", call("gla", case(5))[0], positions=torch.tensor([0]))
