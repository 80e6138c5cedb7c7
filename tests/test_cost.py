"""Costs against numbers worked by hand and against the paper's and the field's known sizes."""

from dataclasses import replace

import pytest

from glabench import cost
from glabench.cases import SHAPES, make_cases
from glabench.errors import UsageError

N = 32768  # tokens


def case(shape, seqlen=1024, passes="fwd", dtype="bf16"):
    return make_cases(
        shapes=(SHAPES[shape],),
        seqlens=(seqlen,),
        passes=(passes,),
        dtypes=(dtype,),
        tokens=N,
        batch=None,
        where="x",
    )[0]


@pytest.mark.parametrize(
    ("shape", "fwd_mb", "bwd_mb"),
    [("340m", 234.9, 402.7), ("1.3b", 469.8, 805.3), ("fig2", 335.5, 604.0)],  # 2 N H (3K+2V), 2 N H (6K+3V)
)
def test_gla_bytes_are_the_known_floors(shape, fwd_mb, bwd_mb):
    fwd, bwd, both = (cost.unavoidable_bytes("gla", case(shape, passes=p)) for p in ("fwd", "bwd", "fwd_bwd"))
    assert fwd / 1e6 == pytest.approx(fwd_mb, abs=0.06)
    assert bwd / 1e6 == pytest.approx(bwd_mb, abs=0.06)
    assert both == fwd + bwd


def test_without_a_gate_the_gate_term_goes():
    gated, plain = (cost.unavoidable_bytes(f, case("fig2", passes="fwd_bwd")) for f in ("gla", "retention"))
    assert gated - plain == N * 16 * 64 * 2 * 3  # g read twice, dg written
    assert cost.unavoidable_bytes("linear_attention", case("fig2")) == N * 16 * 2 * (2 * 64 + 2 * 64)


def test_attention_bytes_count_the_row_statistic():
    assert cost.unavoidable_bytes("attention", case("fig2")) == N * 16 * (4 * 2 * 64 + 4)
    assert cost.unavoidable_bytes("attention", case("fig2", passes="bwd")) == N * 16 * (8 * 2 * 64 + 4)


def test_flop_of_linear_and_softmax_attention():
    assert cost.flop_count("gla", case("340m")) == 4 * 128 * 256 * 4 * N
    assert cost.flop_count("gla", case("340m", passes="fwd_bwd")) == 3 * 4 * 128 * 256 * 4 * N
    assert cost.flop_count("attention", case("340m")) == 2 * 1024 * 1024 * N  # 2 T d, d = 1024
    assert cost.flop_count("attention", case("340m", passes="fwd_bwd")) == 3.5 * 2 * 1024 * 1024 * N
    assert cost.unavoidable_flop("attention", case("340m", passes="fwd_bwd")) == 3 * 2 * 1024 * 1024 * N
    assert cost.flop_count("mamba", case("340m")) == 9 * 2048 * 16 * N
    assert cost.flop_count("mamba2", case("340m")) == 4 * 2048 * 128 * N


def test_floor_is_the_larger_of_the_two_limits():
    ceilings = cost.Ceilings(3000.0, {"bf16": 700.0})
    by_bytes = cost.floor("gla", case("340m", passes="fwd_bwd"), ceilings)
    assert by_bytes.kind == "bytes" and by_bytes.time_ms == pytest.approx((234.9 + 402.7) / 3000, rel=1e-3)
    by_flop = cost.floor("attention", case("340m", seqlen=16384), ceilings)
    assert by_flop.kind == "flops" and by_flop.time_ms == pytest.approx(2 * 16384 * 1024 * N / 700e12 * 1e3)


def test_a_dtype_without_a_matrix_rate_is_floored_by_bytes():
    assert (
        cost.floor("attention", case("340m", seqlen=16384, dtype="fp16"), cost.Ceilings(3000.0, {})).kind
        == "bytes"
    )


def test_states():
    assert cost.state_mib("gla", case("340m")) == 32 * 4 * 128 * 256 * 4 / 2**20
    assert cost.state_mib("attention", case("340m")) == 2 * N * 1024 * 2 / 2**20
    assert cost.state_mib("mamba", case("340m")) == 32 * 2048 * 16 * 4 / 2**20
    assert cost.state_mib("mamba2", case("340m")) == 32 * 2048 * 128 * 4 / 2**20


def test_memory_of_inputs_and_of_what_must_be_returned():
    fwd, both = case("340m"), case("340m", passes="fwd_bwd")
    inputs = N * 4 * (3 * 128 + 256) * 2 / 2**20
    out = N * 1024 * 2 / 2**20
    assert cost.inputs_mib("gla", fwd) == inputs
    assert cost.inputs_mib("gla", both) == inputs + out
    assert cost.predicted_mib("gla", fwd) == out
    assert cost.predicted_mib("gla", both) == inputs + out


def test_every_family_has_costs_that_grow_with_the_work():
    for family in cost.FLOP_MODELS:
        small, large = case("fig2", passes="fwd_bwd"), replace(case("fig2", passes="fwd_bwd"), batch=64)
        for function in (
            cost.unavoidable_bytes,
            cost.flop_count,
            cost.inputs_mib,
            cost.predicted_mib,
            cost.state_mib,
        ):
            assert function(family, large) == pytest.approx(2 * function(family, small))


def test_an_unknown_pass_is_an_error():
    with pytest.raises(UsageError, match="no cost is known"):
        cost.unavoidable_bytes("gla", replace(case("340m"), passes="backwards"))


def step(shape, context, batch=64):
    return replace(case(shape, passes="decode"), batch=batch, seqlen=context)


def test_a_step_reads_and_writes_a_state_or_reads_a_cache():
    state = 64 * 4 * 128 * 256 * 4
    tokens = 64 * 4 * (3 * 128 + 2 * 256) * 2
    assert cost.unavoidable_bytes("gla", step("340m", 1024)) == 2 * state + tokens
    assert cost.unavoidable_bytes("gla", step("340m", 65536)) == 2 * state + tokens
    cache = 64 * 4096 * 2 * 1024 * 2
    assert cost.unavoidable_bytes("attention", step("340m", 4096)) == cache + 64 * 4 * 1024 * 2
    assert cost.state_mib("attention", step("340m", 4096)) == cache / 2**20
    assert cost.flop_count("gla", step("340m", 4096)) == 64 * 4 * 4 * 128 * 256
    assert cost.flop_count("attention", step("340m", 4096)) == 64 * 4 * 4096 * 1024
    assert cost.predicted_mib("attention", step("340m", 4096)) == 64 * 1024 * 2 / 2**20
    assert cost.inputs_mib("attention", step("340m", 4096)) == (cache + 64 * 3 * 1024 * 2) / 2**20
    assert cost.flop_model("attention", step("340m", 4096)) == "4 T d per token and head"
    assert cost.flop_model("gla", step("340m", 4096)) == "4 dk dv per token and head"


def test_mambas_step_reads_its_rates_as_well():
    once = 2048 * 16 * 4
    per_row = 2 * once + 2 * (3 * 2048 + 2 * 16)
    assert cost.unavoidable_bytes("mamba", step("340m", 1024)) == 64 * per_row + once
