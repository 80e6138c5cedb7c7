"""What implementation files say of themselves, and how they reach their peers."""

import sys

import pytest

from glabench import installed, registry
from glabench.installed import import_leaf

OURS = {
    "gla": ["gla_chunk_torch", "gla_recurrent"],
    "simple_gla": ["simple_gla_chunk_torch"],
    "retention": ["retention_chunk_torch"],
    "linear_attention": ["linear_attention_chunk_torch"],
    "attention": ["attention_sdpa"],
    "mamba": ["mamba_torch"],
    "mamba2": ["mamba2_torch"],
}
STEPS = {
    **{f: [f"{f}_step_torch"] for f in ("gla", "simple_gla", "retention", "linear_attention")},
    **{f: [f"{f}_step_torch"] for f in ("mamba", "mamba2")},
    "attention": ["attention_cached_sdpa"],
}
PEERS = {
    "gla": {"gla_chunk_fla"},
    "simple_gla": {"simple_gla_chunk_fla"},
    "retention": {"retention_chunk_fla"},
    "linear_attention": {"linear_attention_chunk_fla"},
    "attention": {"attention_fa2", "attention_cudnn", "attention_fa4"},
    "mamba": {"mamba_ssm"},
    "mamba2": {"mamba2_ssm"},
}


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_family_runs_on_a_cpu_and_lists_its_peers(family):
    known = [i for i in registry.implementations().values() if i.family == family and i.source == "glabench"]
    on_cpu = sorted((i for i in known if i.unavailable("cpu") is None), key=lambda i: i.preference)
    assert [i.id for i in on_cpu if "fwd" in i.passes] == OURS[family]
    assert [i.id for i in on_cpu if "decode" in i.passes] == STEPS[family]
    assert {i.id for i in known} >= PEERS[family]
    for impl in known:
        assert impl.label
        assert impl.unavailable("cpu") is None or impl.unavailable("cuda")


@pytest.mark.parametrize(
    ("capability", "triton", "passes", "is_refused"),
    [
        ((9, 0), "3.6.0", "fwd_bwd", True),
        ((9, 0), "3.6.0", "fwd", False),
        ((9, 0), "3.4.0+git1", "bwd", True),
        ((9, 0), "3.3.1", "fwd_bwd", False),
        ((9, 0), "3.7.1", "fwd_bwd", False),
        ((8, 0), "3.6.0", "fwd_bwd", False),
        (None, "none", "fwd_bwd", False),
    ],
)
def test_flas_gated_backward_is_unsupported_where_fla_refuses_it(
    monkeypatch, capability, triton, passes, is_refused
):
    from glabench.impls import simple_gla_chunk_fla as module

    monkeypatch.setattr(module, "cuda_capability", lambda: capability)
    monkeypatch.setattr(module, "installed_version", lambda name: triton)
    reason = module.limits({"passes": passes}, "cuda")
    assert bool(reason) == is_refused
    assert not is_refused or triton in reason


def test_attention_peers_say_which_heads_they_take():
    known = registry.implementations()
    case = {"passes": "fwd_bwd", "dtype": "bf16", "head_dim": 128, "seqlen": 1024}
    assert known["attention_fa2"].unsupported(case, "cuda") is None
    assert "up to 256" in known["attention_fa2"].unsupported(case | {"head_dim": 512}, "cuda")
    assert "multiples of 8" in known["attention_cudnn"].unsupported(case | {"head_dim": 36}, "cuda")
    assert "64, 96 and 128" in known["attention_fa4"].unsupported(case | {"head_dim": 256}, "cuda")
    assert known["attention_sdpa"].unsupported(case | {"dtype": "fp32"}, "cpu") is None
    assert "bf16 and fp16" in known["attention_sdpa"].unsupported(case | {"dtype": "fp32"}, "cuda")


def test_a_leaf_is_imported_past_a_package_that_does_not_import(tmp_path, monkeypatch):
    inner = tmp_path / "heavy_peer" / "ops"
    inner.mkdir(parents=True)
    (tmp_path / "heavy_peer" / "__init__.py").write_text("raise ImportError('wants another transformers')\n")
    (inner / "__init__.py").write_text("raise ImportError('every op')\n")
    (inner / "leaf.py").write_text("from heavy_peer.ops.beside import ANSWER\n")
    (inner / "beside.py").write_text("ANSWER = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_leaf("heavy_peer.ops.leaf").ANSWER == 42
    assert installed.is_installed("heavy_peer")
    for name in [n for n in sys.modules if n.startswith("heavy_peer")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_missing_package_is_a_module_not_found():
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        import_leaf("no_such_peer.ops.leaf")
