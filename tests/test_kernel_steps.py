"""The token-by-token Triton kernel under Triton's interpreter, against the float64 oracle.

It has no matrix products, so the interpreter is right in 16 bits as well.
"""

import json

import pytest
import torch
from test_kernels import FAMILIES, GATED, REGIMES, _point, _run

from glabench.errors import GlabenchError, ShapeError

pytest.importorskip("triton", reason="the kernels are Triton's")

PACKED = [0, 1, 1, 40, 70]  # lengths 1, 0, 39, 30
SETS = {
    "steps": [_point(f, 4, K, V, heads=3, batch=2) for f in FAMILIES for K, V in ((16, 16), (80, 48))]
    + [_point("gla", 2, 512, 32, heads=1), _point("retention", 2, 16, 512, heads=1)]
    + [_point(f, 3, 16, 32, multiprocessors=64) for f in FAMILIES]
    + [_point(f, 9, 16, 16, chunked=True, seed=7) for f in FAMILIES]
    + [_point(f, 4, 32, 16, regime=r) for f in GATED for r in REGIMES]
    + [_point(f, 3, 48, 32, dtype=d, regime="mixed") for f in GATED for d in ("bf16", "fp16")]
    + [_point(f, 3, 48, 32, dtype=d) for f in FAMILIES[2:] for d in ("bf16", "fp16")]
    + [
        _point(f, 3, 16, 48, batch=2, heads=3, state=s, strided=s == "rows")
        for f in FAMILIES
        for s in ("rows", "transposed")
    ]
    + [_point(f, 3, 32, 16, batch=2, projected=True, scale=0.3) for f in FAMILIES],
    "short sequences": [
        _point(f, T, 48, 32, call="fused", batch=2, state=s, strided=T == 7)
        for f in FAMILIES
        for T, s in ((1, "plain"), (7, "transposed"), (20, "none"))
    ]
    + [_point(f, 70, 16, 32, bounds=PACKED, call="fused", heads=1) for f in FAMILIES]
    + [_point("gla", 70, 16, 32, bounds=PACKED, call="fused", heads=1, regime="mixed")],
}


@pytest.mark.parametrize("name", SETS)
def test_outputs_and_states_are_the_oracles(name):
    found = _run("step_points.py", given=json.dumps(SETS[name]))
    assert [answer["point"] for answer in found] == SETS[name]
    assert not [answer for answer in found if answer["errors"]]


def test_compilers_give_what_eager_gives_and_gradients_are_refused():
    (found,) = _run("step_operators.py")
    assert len(found) == 4
    assert all(found.values()), found


def _arguments(K=16, V=16):
    q, k, g = (torch.zeros(2, 3, K) for _ in range(3))
    return {"q": q, "k": k, "v": torch.zeros(2, 3, V), "g": g, "state": torch.zeros(2, 3, K, V)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 4, 16)}, "do not fit"),
        ({"v": torch.zeros(2, 1, 3, 16)}, "do not fit"),
        ({"g": torch.zeros(2, 3, 32)}, "g .* does not fit"),
        ({"g": torch.zeros(2)}, "g .* does not fit"),
        ({"g": torch.zeros(2, 3, 16).double()}, "float64"),
        ({"q": torch.zeros(2, 3, 16).half()}, "are not one of"),
        ({"state": torch.zeros(2, 3, 16, 32)}, "^state .* is not"),
        ({"state": torch.zeros(2, 3, 16, 16).half()}, "not float32"),
        ({"q": torch.zeros(2, 2, 3, 16)}, "one token, not 2"),
        ({"state": None}, "the state is not a tensor"),
        ({"state": torch.zeros(1, 3, 16, 16).expand(2, 3, 16, 16)}, "share memory"),
        (_arguments(K=24), "d_k 24 is not a multiple of 16"),
        (_arguments(V=528), "d_v 528"),
    ],
)
def test_what_does_not_fit_is_told_before_a_launch(change, words):
    from glabench.kernels.gla_step import gla_recurrent_step

    with pytest.raises(ShapeError, match=words):
        gla_recurrent_step(**(_arguments() | change))


def test_without_a_gpu_it_says_so():
    from glabench.kernels.gla_step import gla_recurrent_step

    with pytest.raises(GlabenchError, match="no kernels for cpu"):
        gla_recurrent_step(**_arguments())
