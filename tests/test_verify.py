"""`glabench verify`'s grid and check: right implementations pass, each kind of wrong one is told."""

import json

import pytest

from glabench import registry
from glabench.errors import UsageError
from glabench.runners import verify, verifying

pytestmark = pytest.mark.usefixtures("one_thread")
RIGHT = [i.id for i in registry.implementations().values() if "cpu" in i.devices]

WRONG = """
import torch
from glabench.kernels.linear_chunk import gla_chunk_torch


def right(q, k, v, g):
    return gla_chunk_torch(q, k, v, g)


def last_token(q, k, v, g):
    o, _ = gla_chunk_torch(q, k, v, g)
    return torch.cat((o[:, :-1], 1.5 * o[:, -1:]), 1)


def not_causal(q, k, v, g):
    return gla_chunk_torch(*(x.flip(1) for x in (q, k, v, g)))[0].flip(1)


def no_gate_gradient(q, k, v, g):
    return gla_chunk_torch(q, k, v, g.detach())[0]


def gate_after_the_token(q, k, v, g):
    later = torch.cat((torch.zeros_like(g[:, :1]), g[:, :-1]), 1)
    return gla_chunk_torch(q, k, v, later)[0]


def partly_unwritten(q, k, v, g):
    o, _ = gla_chunk_torch(q, k, v, g)
    out = torch.empty_like(o)
    out[:, 1:] = o[:, 1:]
    return out


def in_place(q, k, v, g):
    o, _ = gla_chunk_torch(q, k, v, g)
    with torch.no_grad():
        v.mul_(2)
    return o


def wide(q, k, v, g):
    return gla_chunk_torch(q, k, v, g)[0].double()


def nothing(q, k, v, g):
    return None


def no_tensors(q, k, v, g):
    return ()


def detached(q, k, v, g):
    return gla_chunk_torch(q, k, v, g)[0].detach()


def other_arguments(q, k, v):
    return v
"""


@pytest.fixture
def user_file(tmp_path):
    """A user's file of implementations, one right and the others not."""
    path = tmp_path / "mine.py"
    path.write_text(WRONG)
    return path


def run(impl, point):
    arguments = {"impl": impl.spec(), "point": point, "device": "cpu", "threads": 1}
    return json.loads(json.dumps(verify.check(arguments)))


def small(points):
    """The points that take little: a word of each kind, not the whole grid."""
    return [p for p in points if p["case"]["seqlen"] <= 70 or p["cu_seqlens"] or p["regime"] == "mixed"]


@pytest.mark.parametrize("impl_id", RIGHT)
def test_right_implementations_pass(impl_id):
    impl = registry.implementations()[impl_id]
    for point in small(verify.points(impl, "cpu")):
        found = run(impl, point)
        assert found["reason"] == "", verify.describe(point)
        assert all(e["ok"] for e in found["errors"])
        compared = {e["tensor"] for e in found["errors"]}
        if point["case"]["passes"] == "decode":
            assert compared == ({"out"} if impl.family == "attention" else {"out", "final_state"})
        else:
            assert {"out", *registry.FAMILIES[impl.family].gradients} <= compared


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("last_token", "out", "out: relative RMS error"),
        ("not_causal", "out", "out: relative RMS error"),
        ("no_gate_gradient", "g", "g: no tensor but NoneType"),
        ("gate_after_the_token", "out", "out: relative RMS error"),
        ("partly_unwritten", "out", "out: NaN or infinity"),
        ("in_place", "inputs", "it changes its input v in place"),
        ("wide", "out", "out: dtype float64 is not float32"),
        ("nothing", "out", "out: no tensor but NoneType"),
        ("no_tensors", "out", "out: no tensor but NoneType"),
        ("detached", "q", "q: no tensor but NoneType"),
    ],
)
def test_wrong_implementations_are_told(user_file, name, tensor, reason):
    impl = registry.from_file(f"{user_file}:{name}", "gla")
    point = next(p for p in verify.points(impl, "cpu") if p["case"]["seqlen"] == 65)
    found = run(impl, point)
    assert found["reason"].startswith(reason)
    assert tensor in {e["tensor"] for e in found["errors"] if not e["ok"]}


def test_a_right_file_passes_every_point(user_file):
    impl = registry.from_file(f"{user_file}:right", "gla")
    for point in small(verify.points(impl, "cpu")):
        assert run(impl, point)["reason"] == ""


def test_other_arguments_raise(user_file):
    impl = registry.from_file(f"{user_file}:other_arguments", "gla")
    with pytest.raises(TypeError, match="positional argument"):
        run(impl, verify.points(impl, "cpu")[0])


@pytest.mark.parametrize("impl_id", RIGHT)
def test_the_grid_hurts_and_stays_small(impl_id):
    impl = registry.implementations()[impl_id]
    points = verify.points(impl, "cpu")
    assert 20 <= len(points) <= 40
    assert json.loads(json.dumps(points)) == points
    assert len({verify.describe(p) for p in points}) == len(points)
    assert {p["case"]["seqlen"] for p in points} >= {1, 63, 64, 65, 200, 509}
    assert {p["case"]["batch"] for p in points} == {1, 2}
    assert {p["case"]["dtype"] for p in points} == set(impl.dtypes)
    assert any(p["state"] for p in points) == ("state" in impl.features)
    assert any(p["cu_seqlens"] for p in points) == ("varlen" in impl.features)
    if impl.family in verify.GATED:
        assert {p["regime"] for p in points} == {"trained", *verify.HARD_GATES}


def test_packed_points_have_an_empty_and_a_single_token_sequence():
    lengths = [hi - lo for lo, hi in zip(verify.PACKED, verify.PACKED[1:], strict=False)]
    assert {0, 1} <= set(lengths)


def test_only_what_an_implementation_supports():
    gpu = verify.points(registry.implementations()["attention_cudnn"], "cuda")
    assert gpu
    for point in gpu:
        assert point["case"]["dtype"] in ("bf16", "fp16")
        assert point["case"]["seqlen"] > 1
        assert point["case"]["head_dim"] in (64, 128)


def test_without_a_backward_pass_the_forward_one_is_checked(user_file):
    forward_only = registry.Implementation(
        id="a", label="a", family="gla", load=lambda: None, passes=("fwd",), dtypes=("fp32",)
    )
    assert {p["case"]["passes"] for p in verify.points(forward_only, "cpu")} == {"fwd"}
    impl = registry.from_file(f"{user_file}:no_gate_gradient", "gla")
    found = run(impl, verify.points(forward_only, "cpu")[1])
    assert [e["tensor"] for e in found["errors"]] == ["out"]
    assert found["reason"] == ""


def test_an_unknown_implementation_is_misuse():
    with pytest.raises(UsageError, match="no file"):
        verify.check(
            {"impl": {"file": "none.py:f", "family": "gla"}, "point": {}, "device": "cpu", "threads": 1}
        )


def test_several_processes_find_what_one_finds():
    names = ("linear_attention_chunk_torch", "gla_step_torch")
    one, four = (
        verifying.verify(names, device="cpu", family=None, say=lambda _: None, jobs=jobs) for jobs in (1, 4)
    )
    assert one["ok"] and four == one
