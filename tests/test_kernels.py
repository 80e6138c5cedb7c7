"""The Triton kernels under Triton's interpreter, in float32, against the float64 oracle.

The interpreter runs in a process of its own: it is chosen when Triton is imported, for good. Its bf16
products are wrong, so what only 16-bit tensors do is left to `glabench verify` on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glabench.errors import GlabenchError, ShapeError, UsageError
from glabench.kernels import linear_chunk

pytest.importorskip("triton", reason="the kernels are Triton's")

HERE = Path(__file__).parent
FAMILIES = ("gla", "simple_gla", "retention", "linear_attention")
GATED = FAMILIES[:2]
REGIMES = ("zero", "vanishing", "strong", "extreme", "mixed")
PACKED = [0, 1, 1, 64, 129, 200]  # lengths 1, 0, 63, 65, 71


def _point(family, T, d_k=16, d_v=16, **how):
    return {"family": family, "T": T, "d_k": d_k, "d_v": d_v, **how}


SETS = {
    "lengths": [_point(f, T) for f in FAMILIES for T in (1, 63, 64, 65, 130)],
    "gates": [_point(f, 130, 32, 16, regime=r, heads=1) for f in GATED for r in REGIMES],
    "widths": [_point(f, 65, K, V, heads=1) for f in FAMILIES for K, V in ((80, 48), (16, 96), (64, 16))],
    "hard tiles beside others": [_point("gla", 65, 80, 48, regime="mixed", heads=1)],
    "packed": [_point(f, 200, bounds=PACKED, regime=r) for f in GATED for r in ("trained", "mixed")]
    + [_point(f, 200, bounds=PACKED) for f in FAMILIES[2:]],
    "batches and heads": [_point(f, 70, batch=2, heads=3) for f in FAMILIES],
    "without states": [_point(f, 70, states=False) for f in FAMILIES],
    "strides and scale": [_point(f, 70, strided=True, scale=0.3, heads=3) for f in FAMILIES],
    "float16 gates": [_point(f, 130, regime="mixed", gate_dtype="fp16") for f in GATED],
    "segments": [_point(f, 290, regime=r, segment=1, heads=1) for f in GATED for r in ("trained", "mixed")]
    + [_point(f, 300, segment=2, batch=2, states=f == "retention") for f in FAMILIES],
    "carried": [
        _point(f, T, 48, 32, form=form, regime=r, states=T != 65, carried=True)
        for f in ("gla", "linear_attention", "retention", "simple_gla")
        for T, r, form in (
            (1, "trained", "materialised"),
            (65, "trained", "recompute"),
            (130, "mixed", "materialised"),
            (130, "mixed", "recompute"),
            (130, "extreme", "recompute"),
        )
    ]
    + [
        _point(f, 200, bounds=PACKED, regime="mixed", form=form, carried=True)
        for f in ("gla", "retention", "simple_gla")
        for form in ("materialised", "recompute")
    ],
    "carried in segments": [
        _point(f, T, segment=1, regime=r, heads=1, carried=True, states=T != 300)
        for f, T, r in (
            ("gla", 290, "trained"),
            ("gla", 290, "mixed"),
            ("linear_attention", 300, "trained"),
            ("retention", 290, "trained"),
            ("simple_gla", 300, "mixed"),
        )
    ],
    "carried in two blocks of keys": [
        _point(f, 130, 64, 16, heads=1, regime=r, carried=True)
        for f, r in (
            ("gla", "trained"),
            ("gla", "mixed"),
            ("retention", "trained"),
            ("simple_gla", "trained"),
            ("simple_gla", "mixed"),
        )
    ],
    "wide states": [
        _point(f, T, K, V, heads=1, form=form, regime=r, states=T != 65, carried=True, wide=True)
        for f, T, K, V, form, r in (
            ("gla", 65, 96, 48, "recompute", "trained"),
            ("gla", 130, 96, 48, "recompute", "extreme"),
            ("gla", 130, 64, 32, "recompute", "mixed"),
            ("gla", 65, 64, 96, "recompute", "trained"),
            ("linear_attention", 130, 96, 48, "recompute", "trained"),
            ("retention", 65, 80, 16, "recompute", "trained"),
            ("simple_gla", 130, 96, 16, "recompute", "trained"),
            ("simple_gla", 130, 80, 16, "recompute", "mixed"),
        )
    ]
    + [
        _point(f, 200, 80, 16, heads=1, bounds=PACKED, regime="mixed", form=form, carried=True, wide=True)
        for f, form in (("gla", "recompute"), ("simple_gla", "recompute"))
    ],
    "scans in place of products": [
        _point("gla", T, 48, 32, heads=1, regime=r, scans=True)
        for T, r in ((130, "trained"), (65, "mixed"), (130, "extreme"))
    ],
    "scores from memory": [_point("gla", 130, 96, 48, heads=1, regime=r) for r in ("trained", "mixed")],
    "longer chunks": [
        _point(f, 200, 48, 32, heads=1, carried=carried, chunk=128)
        for f in FAMILIES
        for carried in (True, False)
    ]
    + [
        _point("gla", 200, 96, 48, heads=1, regime=r, chunk=128, scans=scans)
        for r, scans in (("trained", False), ("trained", True), ("mixed", False), ("extreme", True))
    ]
    + [_point("gla", 200, 48, 32, heads=1, bounds=PACKED, regime="strong", chunk=128, form="recompute")],
    "forms": [_point(f, 70, form=form) for f in FAMILIES for form in ("materialised", "recompute")],
}


@pytest.mark.parametrize("name", SETS)
def test_outputs_states_and_gradients_are_the_oracles(name):
    found = _interpreted(SETS[name])
    assert [answer["point"] for answer in found] == SETS[name]
    assert not [answer for answer in found if answer["errors"]]


def _interpreted(points):
    return _run("kernel_points.py", given=json.dumps(points))


def _run(script, *words, given="", **variables):
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words],
        input=given,
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_heads_decays_are_exact_between_gates_of_any_size():
    (found,) = _run("kernel_sums.py")
    assert found["NaN"] == 0
    assert found["before"] < 1e-7  # float32, relative
    assert found["after"] < 1e-7
    assert found["between"] <= 2**-17  # one unit in a chunk of 64, whatever lies beside it


def test_what_is_compiled_ahead_is_what_a_call_launches():
    (found,) = _run("kernel_launches.py")
    assert all(point["launches"] >= 3 for point in found.values()), found
    assert not {name: point["differ"] for name, point in found.items() if point["differ"]}


def test_a_first_call_compiles_all_its_kernels_side_by_side_and_once(tmp_path):
    (found,) = _run("compile_without_gpu.py", TRITON_CACHE_DIR=str(tmp_path))
    assert found == {"here": 0, "elsewhere": 3, "launches": 6}


def test_every_kernel_of_every_gate_compiles_for_hopper_as_calls_launch_it(tmp_path):
    (found,) = _run("compile_without_gpu.py", "all", TRITON_CACHE_DIR=str(tmp_path))
    both = {"scale_kernel", "sums_kernel", "state_kernel", "output_kernel", "carry_kernel", "gradient_kernel"}
    both |= {"scores_kernel", "wide_kernel", "exact_kernel"}
    assert set(found["kernels"]) == both
    assert not found["imports_sympy"]  # seconds, on a machine with a slow disk
    assert found["launches"] > 30


def test_a_call_played_back_launches_what_it_did_when_it_was_planned(tmp_path):
    found = _run("played_calls.py", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 27
    for one in found:
        kind = one["kind"]
        assert one["played"] == one["planned"] and one["planned"]["launches"], kind
        is_watched = kind.get("watched", False)
        told = {tuple(grid[3:]) for _, grid, _ in one["played"]["launches"]}  # stream, metadata, hook
        assert told == {(17, True, is_watched, is_watched)}, kind
        calls = 2 if kind["keep"] else 3
        assert one["tapes"] == (calls if kind["aligned"] else 0), kind


@pytest.mark.gpu
@pytest.mark.parametrize("T", [300, 9000])  # the longer in segments
@pytest.mark.parametrize("form", ["materialised", "recompute"])
def test_a_call_played_back_gives_what_it_gave_when_it_was_planned(form, T):
    from glabench.kernels import gla_chunk, launching

    def results(seed):
        torch.manual_seed(seed)
        q, k, v, g = (torch.randn(1, T, 4, n, device="cuda").bfloat16() for n in (128, 128, 256, 128))
        leaves = [x.requires_grad_() for x in (q, k, v, torch.nn.functional.logsigmoid(g) / 16)]
        o, _ = gla_chunk.gla_chunk(*leaves, form=form)
        return o, *torch.autograd.grad(o.square().sum(), [x for x in leaves if x.is_leaf])

    planned = []
    for seed in range(4):
        launching._tapes.clear()
        planned.append(results(seed))
    played = [results(seed) for seed in range(4)]
    assert sum(map(bool, launching._tapes.values())) == (2 if form == "materialised" else 3)
    for want, got in zip(planned, played, strict=True):
        assert all(x.equal(y) for x, y in zip(want, got, strict=True))


def test_compilers_exporters_checkpoints_and_autograd_give_what_eager_gives():
    (found,) = _run("kernel_operators.py")
    assert len(found) == 14
    assert all(found.values()), found


def test_calls_are_taken_as_flash_linear_attention_takes_them():
    (found,) = _run("drop_in_calls.py")
    assert len(found) == 20
    assert all(found.values()), found


@pytest.mark.gpu
def test_a_gate_that_is_not_a_number_is_no_gate():
    from glabench.kernels.gla_chunk import simple_gla_chunk

    q, k, v = (torch.randn(1, 70, 2, 16, device="cuda") for _ in range(3))
    g = torch.zeros(1, 70, 2, device="cuda")
    g[0, 66, 1] = torch.nan
    o, final = simple_gla_chunk(q, k, v, g, output_final_state=True)
    assert o[:, 66:, 1].isnan().all() and final[:, 1].isnan().all()
    assert o[:, :, 0].isfinite().all() and o[:, :64].isfinite().all()


def _arguments(T=4, K=16, V=16, dtype=torch.float32):
    q, k, g = (torch.zeros(1, T, 2, K, dtype=dtype) for _ in range(3))
    return {"q": q, "k": k, "v": torch.zeros(1, T, 2, V, dtype=dtype), "g": g}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(1, 5, 2, 16)}, "do not fit"),
        ({"g": torch.zeros(1, 4, 2)}, "g .* does not fit"),
        ({"q": torch.zeros(1, 4, 2, 16).half()}, "are not one of"),
        ({"g": torch.zeros(1, 4, 2, 16).double()}, "float64"),
        ({"initial_state": torch.zeros(1, 2, 16, 32)}, "initial_state"),
        ({"initial_state": torch.zeros(1, 2, 16, 16).half()}, "not float32"),
        ({"cu_seqlens": torch.tensor([4])}, "cu_seqlens"),
        ({"cu_seqlens": False}, "cu_seqlens is of type bool, not a tensor .*give it by name"),
        ({"initial_state": [0.0]}, "initial_state is of type list"),
        ({"g": None}, "one of q, k, v and g is None"),
        ({"v": [0.0]}, "is of type list, not a tensor"),
        (_arguments(K=24), "d_k 24 is not a multiple of 16"),
        (_arguments(V=528), "d_v 528"),
    ],
)
def test_what_does_not_fit_is_told_before_a_launch(change, words):
    from glabench.kernels.gla_chunk import gla_chunk

    with pytest.raises(ShapeError, match=words):
        gla_chunk(**(_arguments() | change))


def test_what_means_nothing_here_is_told():
    from glabench.kernels.gla_chunk import linear_attention_chunk, simple_gla_chunk

    q, k, v, g = _arguments().values()
    with pytest.raises(UsageError, match="no normaliser"):
        linear_attention_chunk(q, k, v, normalize=True)
    with pytest.raises(UsageError, match="both g and g_gamma"):
        simple_gla_chunk(q, k, v, g[..., 0], g_gamma=torch.zeros(2))
    with pytest.raises(ShapeError, match="g_gamma"):
        simple_gla_chunk(q, k, v, g_gamma=torch.zeros(3))


def test_an_unknown_form_is_told():
    from glabench.kernels.gla_chunk import gla_chunk

    with pytest.raises(UsageError, match="did you mean 'recompute'"):
        gla_chunk(**_arguments(), form="recomputed")


def test_without_a_gpu_it_says_so():
    from glabench.kernels.gla_chunk import gla_chunk

    with pytest.raises(GlabenchError, match="gla_chunk_torch"):
        gla_chunk(**_arguments())
    assert linear_chunk.gla_chunk_torch(**_arguments())[0].shape == (1, 4, 2, 16)
