"""The plain PyTorch forms as functions: as defined, cut anywhere and resumed, blind to the future."""

import itertools

import pytest
import torch
from family_calls import LINEAR, RECURRENT, call, case, case_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, difference

from glabench.errors import ShapeError
from glabench.inputs import REGIMES
from glabench.kernels.gla_recurrent import gla_recurrent
from glabench.kernels.linear_chunk import (
    gla_chunk_torch,
    linear_attention_chunk_torch,
    retention_chunk_torch,
    simple_gla_chunk_torch,
)
from glabench.kernels.selective_scan import mamba_torch
from glabench.kernels.ssd import mamba2_torch
from glabench.oracle import Answer, reference

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")
FORMS = {
    "gla": gla_chunk_torch,
    "simple_gla": simple_gla_chunk_torch,
    "retention": retention_chunk_torch,
    "linear_attention": linear_attention_chunk_torch,
    "mamba": mamba_torch,
    "mamba2": mamba2_torch,
}
families = st.sampled_from(RECURRENT)
regimes = st.sampled_from(REGIMES)
lengths = st.one_of(st.sampled_from((1, 2, 63, 64, 65, 128, 130)), st.integers(1, 200))
quick = settings(derandomize=True, deadline=None, max_examples=40)


def exact(tensors):
    return {name: x.double() for name, x in tensors.items()}


def answer_of(form, tensors, d_out, initial_state, d_state):
    """Run `form` in float64 and take every gradient, as the oracle does."""
    leaves = {n: x.double().requires_grad_() for n, x in (tensors | {"initial_state": initial_state}).items()}
    *given_tensors, state = leaves.values()
    out, last = form(*given_tensors, initial_state=state, output_final_state=True)
    found = torch.autograd.grad((out, last), list(leaves.values()), (d_out.double(), d_state.double()))
    return Answer(out.detach(), last.detach(), dict(zip(leaves, found, strict=True)))


@quick
@given(family=families, regime=regimes, seqlen=lengths, seed=st.integers(0, 99))
def test_chunks_give_what_the_recurrence_gives(family, regime, seqlen, seed):
    tensors, options = call(family, case_of(family, seqlen, batch=1), regime=regime, seed=seed)
    want = reference(family, tensors, literal=True, **options)
    assert difference(answer_of(FORMS[family], tensors, **options), want) <= EXACT


@pytest.mark.parametrize("regime", REGIMES)
def test_gla_by_its_loop(regime):
    tensors, options = call("gla", case(70), regime=regime)
    want = reference("gla", tensors, literal=True, **options)
    assert difference(answer_of(gla_recurrent, tensors, **options), want) <= EXACT


@quick
@given(family=families, regime=regimes, seqlen=st.integers(2, 150), data=st.data())
def test_a_sequence_cut_anywhere_resumes_from_its_state(family, regime, seqlen, data):
    cut = data.draw(st.integers(1, seqlen - 1))
    tensors, options = call(family, case_of(family, seqlen), regime=regime)
    tensors, state, form = exact(tensors), options["initial_state"].double(), FORMS[family]
    parts = [{n: x if n in ("A", "D") else x[:, at] for n, x in tensors.items()} for at in _halves(cut)]
    whole, last = form(*tensors.values(), initial_state=state, output_final_state=True)
    first, middle = form(*parts[0].values(), initial_state=state, output_final_state=True)
    second, end = form(*parts[1].values(), initial_state=middle, output_final_state=True)
    assert difference(torch.cat((first, second), 1), whole) <= EXACT
    assert difference(end, last) <= EXACT


def _halves(cut):
    return slice(None, cut), slice(cut, None)


@quick
@given(family=families, seqlen=st.integers(2, 150), data=st.data())
def test_outputs_do_not_see_later_inputs(family, seqlen, data):
    t = data.draw(st.integers(0, seqlen - 2))
    tensors, _ = call(family, case_of(family, seqlen))
    other, _ = call(family, case_of(family, seqlen), seed=50)
    changed = {n: x.clone() for n, x in tensors.items()}
    for name in changed.keys() - {"A", "D"}:
        changed[name][:, t + 1 :] = other[name][:, t + 1 :]
    before, after = (FORMS[family](*x.values())[0] for x in (tensors, changed))
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


@pytest.mark.parametrize("family", [*LINEAR, "mamba2"])
def test_packed_sequences_are_separate_calls(family):
    of, bounds = case_of(family, 90, batch=1), (0, 1, 1, 65, 90)
    tensors, _ = call(family, of)
    tensors = exact(tensors)
    states = torch.cat([call(family, of, seed=s)[1]["initial_state"] for s in range(4)]).double()
    out, last = FORMS[family](
        *tensors.values(),
        initial_state=states,
        output_final_state=True,
        cu_seqlens=torch.tensor(bounds),
    )
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        part = {n: x if n in ("A", "D") else x[:, lo:hi] for n, x in tensors.items()}
        alone, end = FORMS[family](*part.values(), initial_state=states[i : i + 1], output_final_state=True)
        assert torch.equal(out[:, lo:hi], alone)
        assert torch.equal(last[i : i + 1], end)
    assert torch.equal(last[1], states[1])  # the empty one


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_inputs_keep_their_dtype_and_float32_states(family, dtype):
    tensors, options = call(family, case_of(family, 70, dtype=dtype))
    out, last = FORMS[family](*tensors.values(), output_final_state=True)
    assert out.dtype == options["d_out"].dtype
    assert out.stride() == options["d_out"].stride()
    assert last.dtype == torch.float32
    assert FORMS[family](*tensors.values())[1] is None


def test_mamba2_heads_share_the_b_and_c_of_their_group():
    tensors, options = call("mamba2", case(70, heads=2, d_v=64))
    for name, seed in (("B", 7), ("C", 8)):
        other = call("mamba2", case(70, heads=2, d_v=64), seed=seed)[0][name]
        tensors[name] = torch.cat((tensors[name], other), 2)  # two groups of two heads
    want = reference("mamba2", tensors, literal=True, **options)
    assert difference(answer_of(mamba2_torch, tensors, **options), want) <= EXACT
    assert difference(reference("mamba2", tensors, literal=False, **options), want) <= EXACT


@pytest.mark.parametrize("family", RECURRENT)
def test_a_kept_graph_gives_the_same_gradients_twice(family):
    tensors, options = call(family, case_of(family, 70))
    leaves = [x.requires_grad_() for x in tensors.values()]
    out, _ = FORMS[family](*leaves)
    first, second = (torch.autograd.grad(out, leaves, options["d_out"], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", RECURRENT)
def test_arguments_that_do_not_fit_are_named(family):
    tensors, options = call(family, case_of(family, 10))
    state = options["initial_state"]
    with pytest.raises(ShapeError, match="initial_state"):
        FORMS[family](*tensors.values(), initial_state=state[:1])
    second = list(tensors)[1]
    with pytest.raises(ShapeError, match=second):
        FORMS[family](*(x[:, :5] if n == second else x for n, x in tensors.items()))


@pytest.mark.parametrize(("bounds", "batch"), [((0, 5, 4, 10), 1), ((0, 5), 1), ((1, 10), 1), ((0, 10), 2)])
def test_packing_that_does_not_cover_one_row_is_refused(bounds, batch):
    tensors, _ = call("gla", case(10, batch=batch))
    with pytest.raises(ShapeError, match=r"cu_seqlens|batch of 1"):
        gla_chunk_torch(*tensors.values(), cu_seqlens=torch.tensor(bounds))
