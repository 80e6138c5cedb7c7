"""transformers' Mamba with our scan on a CPU computes what it computes with its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import TWO_FP32_FORMS, difference

from glabench.models import catalog, mamba

modeling_mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")


@pytest.fixture
def scans(monkeypatch):
    """(transformers' own scan, ours); the module has its own again afterwards."""
    theirs = getattr(modeling_mamba, mamba.NAME)
    monkeypatch.setattr(modeling_mamba, mamba.NAME, getattr(theirs, "__wrapped__", theirs))
    theirs = getattr(modeling_mamba, mamba.NAME)
    mamba.use_chunked_scan()
    return theirs, getattr(modeling_mamba, mamba.NAME)


def call(scan, length, **options):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {
        "hidden_states": draw(2, 6, length),
        "dt": draw(2, 6, length),
        "A": -draw(6, 4).exp(),
        "B": draw(2, 4, length),
        "C": draw(2, 4, length),
        "D": draw(6),
        "z": draw(2, 6, length),
        "delta_bias": draw(6),
    }
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    found = scan(**leaves, delta_softplus=True, **options)
    y, *last = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    return [y, *last, *gradients]


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("last", [False, True])
def test_both_scans_give_the_same_outputs_states_and_gradients(scans, length, last):
    theirs, ours = (call(scan, length, return_last_state=last) for scan in scans)
    assert len(theirs) == len(ours) == 9 + last
    for want, got in zip(theirs, ours, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert difference(got, want) <= TWO_FP32_FORMS


def test_shipped_mambas_use_it():
    model = catalog.build("mamba-tiny")
    assert hasattr(getattr(modeling_mamba, mamba.NAME), "glabench")
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        half = model(ids[:, :20], use_cache=True)
        name = "cache" if hasattr(half, "cache") else "past_key_values"
        rest = model(ids[:, 20:21], **{name: half[name]}, use_cache=True).logits
    assert difference(rest[:, 0], whole[:, 20]) <= TWO_FP32_FORMS


STAND_INS = {
    "mamba_ssm/__init__.py": "raise ImportError('cannot import a class that transformers no longer has')",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/selective_scan_interface.py": """
        def selective_scan_fn(u, delta, A, B, C): return "scan"
        def mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, *more): return "inner"
    """,
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/selective_state_update.py": "def selective_state_update(state): return 'update'",
    "mamba_ssm/ops/triton/ssd_combined.py": """
        def mamba_chunk_scan_combined(x): return "chunk"
        def mamba_split_conv1d_scan_combined(zxbcdt): return "split"
    """,
    "causal_conv1d/__init__.py": """
        def causal_conv1d_fn(x, weight): return "conv"
        def causal_conv1d_update(x, conv_state, weight): return "conv"
    """,
}


def test_mamba_ssm_is_found_though_its_package_cannot_be_imported(tmp_path):
    """And it serves tensors on a GPU alone: the model here computes on."""
    import textwrap

    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    script = Path(__file__).with_name("mamba_packages.py")
    path = os.pathsep.join((str(tmp_path), str(script.parents[1])))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run((sys.executable, str(script)), capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("loss") == pytest.approx(5.557, abs=0.5)
    assert found == {"used": True, "inner": "inner", "conv": "conv", "walked": "chunk"}
