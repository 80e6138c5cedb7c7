"""Suites are data: every shipped one loads, and each mistake in one is named."""

import pytest

from glabench.errors import UsageError
from glabench.registry import FAMILIES, implementations
from glabench.runners.measuring import from_suite
from glabench.suite import find_suite, load_suite, shipped_suites

GOOD = """
[suite]
verbs = ["speed"]
[[grid]]
impl = ["gla"]
seqlen = "1k..2k"
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_shipped_suite_loads_on_both_kinds_of_device_and_names_known_implementations():
    names = shipped_suites()
    assert {"quick", "fig2"} <= set(names)
    for name in names:
        for device in ("cpu", "cuda"):
            suite = load_suite(name, device)
            assert suite.cases
            assert set(suite.impls) <= set(FAMILIES) | set(implementations())


def test_fig2_is_the_papers_figure_2():
    suite = load_suite("fig2", "cuda")
    assert suite.verbs == ("speed", "memory")
    assert {(c.batch, c.heads, c.d_k, c.d_v, c.dtype) for c in suite.cases} == {(32, 16, 64, 64, "bf16")}
    assert sorted({c.seqlen for c in suite.cases}) == [512 << i for i in range(7)]
    assert {"attention_fa2", "linear_attention"} <= set(suite.impls)


def test_defaults_follow_the_device(tmp_path):
    cpu, cuda = (load_suite(write(tmp_path, GOOD), d).cases[0] for d in ("cpu", "cuda"))
    assert (cpu.shape, cpu.dtype, cpu.batch) == ("cpu", "fp32", 1)
    assert (cuda.shape, cuda.dtype, cuda.batch) == ("340m", "bf16", 32)


def test_a_suite_is_found_by_name_by_its_repository_path_and_by_its_own_path(tmp_path):
    mine = write(tmp_path, GOOD)
    shipped = shipped_suites()["quick"]
    assert find_suite("quick") == shipped
    assert find_suite("suites/quick.toml").resolve() == shipped.resolve()
    assert str(find_suite(mine)) == mine


def test_own_shapes_and_regime(tmp_path):
    text = """
[[grid]]
impl = ["gla", "retention"]
shape = { name = "mine", heads = 2, d_k = 48, d_v = 96, head_dim = 64 }
seqlen = [1000, "2k"]
passes = ["fwd"]
dtype = ["fp32", "bf16"]
tokens = 4096
[measure]
visits = 3
max_busy_s = 1
"""
    suite = load_suite(write(tmp_path, text), "cpu")
    assert [(c.seqlen, c.batch, c.d_k, c.dtype) for c in suite.cases] == [
        (1000, 4, 48, "fp32"),
        (2048, 2, 48, "fp32"),
        (1000, 4, 48, "bf16"),
        (2048, 2, 48, "bf16"),
    ]
    assert suite.regime.visits == 3 and suite.regime.max_busy_s == 1.0


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        (("verbs", "verb"), "unknown key 'verb'", "suite"),
        (("seqlen =", "seqlens ="), "unknown key 'seqlens'", "grid 1"),
        (("[[grid]]", "[[grids]]"), "unknown key 'grids'", "mine.toml"),
        (('"1k..2k"', '"16k..1k"'), "runs backwards", "grid 1: seqlen"),
        (('"1k..2k"', '"0"'), "not a length", "grid 1: seqlen"),
        (('"1k..2k"', '"1k.."'), "has no end", "grid 1: seqlen"),
        (('"1k..2k"', '["1k", 1024]'), "1024 stands twice", "grid 1: seqlen"),
        (('["gla"]', '["gla", "gla"]'), "'gla' stands twice", "grid 1: impl"),
        (('["gla"]', '["mine.py:fn"]'), "cannot name code", "grid 1: impl"),
        (('["gla"]', "[]"), "an empty list", "grid 1: impl"),
        (('["speed"]', '["fast"]'), "no verb 'fast'", "verbs"),
        (('"1k..2k"', '"1k"\nshape = "341m"'), "no shape '341m'", "grid 1: shape"),
        (('"1k..2k"', '"1k"\npasses = ["back"]'), "no pass 'back'", "grid 1: passes"),
        (('"1k..2k"', '"1k"\nbatch = 0'), "not a whole number", "grid 1: batch"),
        (('"1k..2k"', '"1k"\nbatch = true'), "not a whole number", "grid 1: batch"),
        (('"1k..2k"', '"1k"\nbatch = 1\ntokens = 9'), "both tokens and batch", "grid 1"),
        (('"1k..2k"', '"1k"\n[measure]\nvisits = 1.5'), "not a int", "measure"),
        (('"1k..2k"', '"1k"\n[measure]\nvisit = 1'), "unknown key 'visit'", "measure"),
        (('seqlen = "1k..2k"', ""), "no seqlen", "grid 1"),
        (("[suite]", "[suite"), "cannot read the suite", "mine.toml"),
        (('"1k..2k"', '"1k"\n[[grid]]\nseqlen = "1k"'), "stands twice", "mine.toml"),
    ],
)
def test_each_mistake_is_named_with_its_place(tmp_path, change, what, where):
    text = GOOD.replace(*change)
    assert text != GOOD
    with pytest.raises(UsageError) as caught:
        load_suite(write(tmp_path, text), "cpu")
    assert what in caught.value.what
    assert where in caught.value.where


def test_an_unknown_suite_gets_the_nearest_name():
    with pytest.raises(UsageError) as caught:
        load_suite("fig3", "cpu")
    assert "did you mean 'fig2'" in caught.value.fix


def test_a_run_can_be_limited_to_some_of_the_suites_shapes(tmp_path):
    path = write(tmp_path, GOOD.replace('"1k..2k"', '"1k..2k"\nshape = ["340m", "fig2"]'))
    options = {"argv": (), "impl": "", "family": None, "device": "cpu", "limits": {}, "out": None}
    kept = from_suite(str(path), shape="fig2", resume=False, **options).suite.cases
    assert {case.shape for case in kept} == {"fig2"} and {case.seqlen for case in kept} == {1024, 2048}
    with pytest.raises(UsageError, match=r"no shape in the suite '1\.3b'"):
        from_suite(str(path), shape="1.3b", resume=False, **options)
