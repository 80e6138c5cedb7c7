"""Ranges, sizes and the grid's product."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glabench.cases import SHAPES, arm_of, make_cases, parse_range, parse_size, split_names
from glabench.errors import UsageError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1k..16k", (1024, 2048, 4096, 8192, 16384)),
        ("512..32k", (512, 1024, 2048, 4096, 8192, 16384, 32768)),
        ("1k,2k,8k", (1024, 2048, 8192)),
        ("1000", (1000,)),
        ("512,1k..4k", (512, 1024, 2048, 4096)),
        ("4K..4k", (4096,)),
        ("3..12", (3, 6, 12)),
    ],
)
def test_range_means(text, want):
    assert parse_range(text, "--seqlen") == want


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("16k..1k", "runs backwards", "1k..16k"),
        ("0", "not a length", "positive"),
        ("1k..", "has no end", "both ends"),
        ("..1k", "has no end", "both ends"),
        ("", "not a length", "positive"),
        ("1k,", "not a length", "positive"),
        ("-1k", "not a length", "positive"),
        ("1.5k", "not a length", "positive"),
        ("k", "not a length", "positive"),
        ("1k..12k", "doublings", "end at 8192"),
        ("1k,1024", "stands twice", "once"),
        ("1k..4k,2k", "2048 stands twice", "once"),
    ],
)
def test_bad_range_says_what_where_and_what_to_do(text, what, fix):
    with pytest.raises(UsageError) as caught:
        parse_range(text, "--seqlen")
    assert what in caught.value.what and caught.value.where == "--seqlen" and fix in caught.value.fix


@given(st.integers(1, 10_000), st.integers(0, 12))
@settings(derandomize=True, deadline=None)
def test_doubling_range_is_complete_and_ordered(first, doublings):
    values = parse_range(f"{first}..{first << doublings}", "x")
    assert values[0] == first and values[-1] == first << doublings and len(values) == doublings + 1
    assert all(b == 2 * a for a, b in itertools.pairwise(values))


def test_sizes_accept_binary_units():
    assert [parse_size(t, "x") for t in ("7", "2k", "3K", "1m")] == [7, 2048, 3072, 1024**2]


def test_names_are_unique_and_not_empty():
    assert split_names("a, b", "impl", "--impl") == ("a", "b")
    with pytest.raises(UsageError, match="twice"):
        split_names("a,b,a", "impl", "--impl")
    with pytest.raises(UsageError, match="empty"):
        split_names("a,,b", "impl", "--impl")


def grid(**changes):
    base = {
        "shapes": (SHAPES["340m"],),
        "seqlens": (1024, 16384),
        "passes": ("fwd", "fwd_bwd"),
        "dtypes": ("bf16",),
        "tokens": 32768,
        "batch": None,
        "where": "x",
    }
    return make_cases(**(base | changes))


def test_tokens_fix_the_batch():
    assert [(c.batch, c.seqlen, c.passes) for c in grid()] == [
        (32, 1024, "fwd"),
        (32, 1024, "fwd_bwd"),
        (2, 16384, "fwd"),
        (2, 16384, "fwd_bwd"),
    ]


def test_batch_fixes_the_batch():
    assert {c.batch for c in grid(tokens=None, batch=3)} == {3}


def test_a_sequence_longer_than_the_tokens_is_an_error():
    with pytest.raises(UsageError, match="does not fit in 8192 tokens"):
        grid(tokens=8192)


def test_case_key_depends_on_every_field_but_the_checks_do_not_depend_on_the_pass():
    fwd, both = grid(seqlens=(1024,))
    assert fwd.key() != both.key() and fwd.without_passes() == both.without_passes()
    assert fwd.key() != grid(seqlens=(2048,))[0].key()


def test_arms_share_the_model_width_which_mamba_expands():
    case = grid()[0]
    arms = {f: arm_of(f, case) for f in ("gla", "attention", "mamba", "mamba2", "retention")}
    widths = {f: a.heads * a.d_v for f, a in arms.items()}
    assert widths == {"gla": 1024, "attention": 1024, "retention": 1024, "mamba": 2048, "mamba2": 2048}
    assert (arms["attention"].heads, arms["attention"].d_k) == (8, 128)
    assert (arms["mamba"].d_k, arms["mamba2"].d_k, arms["mamba2"].d_v) == (16, 128, 64)


def test_a_width_that_does_not_divide_is_named():
    case = make_cases(
        shapes=(SHAPES["340m"].__class__("odd", 3, 32, 32, 64),),
        seqlens=(16,),
        passes=("fwd",),
        dtypes=("fp32",),
        tokens=None,
        batch=1,
        where="x",
    )[0]
    with pytest.raises(UsageError, match="heads of 64 do not divide the width 96"):
        arm_of("attention", case)
