"""The mixer's gates: their own kernels and plain forms, and what a layer keeps for the backward pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import small, tokens
from tolerances import EXACT, TWO_FP32_FORMS, difference

from glabench.errors import ShapeError
from glabench.models.mixer import LogGate

HERE = Path(__file__).parent
TAU = 16.0
GLA, RETNET = "gla-tiny", "retnet-tiny"
POINTS = [f"{name} {how}" for name in (GLA, RETNET) for how in ("fused", "compiled")]
D, RANK, FFN = 128, 16, {GLA: 512, RETNET: 256}


def _run(script, *words):
    """Triton's interpreter must be chosen before its import, hence another process."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_kernels_outputs_and_gradients_are_those_of_float64():
    found = _run("gate_points.py")
    assert len(found) == 9
    off = {name: [e for e in errors if not e < 1e-6] for name, errors in found.items()}  # a few roundings
    assert not any(off.values()), off


@pytest.fixture(scope="module")
def kept():
    return _run("saved_bytes.py", *POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_a_layer_keeps_its_inputs_and_no_chunk_states(point, kept):
    (name, how), found = point.split(), kept[point]
    keys, values = found["keys"], found["values"]
    want = 2 * (D + 2 * keys + 4 * values)  # bf16: x, q and k, and v, o, the output gate, its product
    if name == GLA:
        want += 4 * keys + 2 * RANK  # g, and what its second matrix takes
    else:
        want += 2 * 4 * (keys // 2 // 2)  # cos and sin, which all layers share
    if how == "compiled":  # the rest of a block: residuals, what the feed-forward takes, its three products
        want += 4 * D + 2 * D + 2 * D + 3 * 2 * FFN[name]
        want += 4 * (1 + 1 + 2)  # 1 / rms of two norms, and of two heads
    assert found["bytes"] == want
    assert found["layer"] == f"{'gla' if name == GLA else 'retention'}_chunk_recompute"


def test_the_plain_gate_is_log_sigmoid_and_its_gradient():
    x = torch.linspace(-300, 60, 2001, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(2001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g, want = LogGate.apply(x, TAU), F.logsigmoid(x) / TAU
    assert torch.equal(g, want)
    (found,), (wanted,) = (torch.autograd.grad(y, x, d_out) for y in (g, want))
    assert difference(found, wanted) <= EXACT
    assert torch.autograd.gradcheck(
        LogGate.apply, (torch.randn(9, dtype=torch.float64).requires_grad_(), TAU)
    )


def test_gates_of_16_bit_logits_are_float32():
    x = (torch.randn(999) * 8).bfloat16().requires_grad_()
    g, want = LogGate.apply(x, TAU), F.logsigmoid(x.float()) / TAU
    assert g.dtype == torch.float32 and torch.equal(g, want)
    (found,), (wanted,) = (torch.autograd.grad(y.sum(), x) for y in (g, want))
    assert found.dtype == torch.bfloat16
    assert difference(found, wanted) <= 2**-8  # a rounding to bf16, here or there


@pytest.mark.parametrize("gate", ["channel", "scalar"])
def test_a_models_gradients_through_the_gate_are_plain_ones(gate):
    model = small({"gate": gate}).train()
    ids = tokens()

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    found = gradients()
    for block in model.model.layers:
        block.attn.log_gate = lambda x, tau: F.logsigmoid(x) / tau
    wanted = gradients()
    assert all(difference(found[name], g) <= EXACT for name, g in wanted.items())


def test_widths_that_do_not_fit_are_refused():
    pytest.importorskip("triton", reason="the kernels are Triton's")
    from glabench.kernels.norm_gate import norm_gate

    with pytest.raises(ShapeError, match=r"\[2, 16\], \[2, 8\], \[16\]"):
        norm_gate(torch.ones(2, 16), torch.ones(2, 8), torch.ones(16), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_both_kernels_are_the_plain_forms(dtype):
    from glabench.kernels.log_gate import log_gate
    from glabench.kernels.norm_gate import norm_gate

    limit = TWO_FP32_FORMS if dtype == torch.float32 else 2**-8  # one rounding to bf16
    torch.manual_seed(0)
    x, gate = (torch.randn(3, 1000, 4, 512, device="cuda", dtype=dtype) for _ in range(2))
    leaves = x, gate, 1 + 0.3 * torch.randn(512, device="cuda"), 8 * torch.randn_like(x)
    d_out = torch.randn_like(x)

    def gradients(norm, log, made):
        outs = norm(*made[:3]), log(made[3])
        return [*outs, *torch.autograd.grad(outs, made, [d_out.to(y.dtype) for y in outs])]

    def plain(x, gate, weight):
        return F.silu(gate) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    for _ in range(2):  # the second call takes launches from the first
        made = [t.clone().requires_grad_() for t in leaves]
        found = gradients(lambda *t: norm_gate(*t, 1e-6), lambda t: log_gate(t, TAU), made)
    exact = [t.double().requires_grad_() for t in leaves]
    wanted = gradients(plain, lambda t: F.logsigmoid(t) / TAU, exact)
    assert found[1].dtype == torch.float32
    assert all(difference(a, b) <= limit for a, b in zip(found, wanted, strict=True))
