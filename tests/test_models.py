"""Language models: sizes, gates, forms that agree, losses, saving, errors."""

import json

import pytest
import torch
from reference_models import linear_mixer, logits
from small_models import KINDS, SMALL, small, tokens
from tolerances import EXACT, difference
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from glabench.cli import app
from glabench.errors import UnavailableError, UsageError
from glabench.models import (
    GLAConfig,
    catalog,
)
from glabench.models.language import CACHE
from glabench.models.mixer import in_parts, layer_for, step_for

pytestmark = pytest.mark.usefixtures("one_thread")
PAPER = {  # the released configurations' counts; Mamba's and RetNet's at 340M as the paper's tables call them
    "gla-340m": 341_707_776,
    "gla-1.3b": 1_365_514_240,
    "retnet-340m": 350e6,
    "retnet-1.3b": 1_351_727_104,
    "transformer-340m": 341e6,
    "transformer-1.3b": 1_364_297_728,
    "mamba-340m": 350e6,
    "mamba-1.3b": 1_335e6,  # 48 x 26.4M and one table of 65.5M
}


def named_by_fla(model):
    return {n.replace("g_norm", "g_norm_swish_gate"): p.detach() for n, p in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_the_recurrence_written_out(kind):
    model, ids = small(kind), tokens()
    c = model.config
    want = logits(
        named_by_fla(model),
        ids,
        linear_mixer,
        eps=c.norm_eps,
        heads=c.num_heads,
        gate=c.gate,
        rope=kind == "retnet",
        authors=c.layout == "authors",
    ).detach()
    assert difference(model(ids).logits.detach(), want) < EXACT


def test_the_gates_differ():
    """A gate that is not computed would pass for no gate: same weights, other decays, other logits."""
    base, ids = small({"gate": "channel"}), tokens()
    for gate in ("scalar", "fixed", "none"):
        other = small({"gate": gate})
        other.load_state_dict(base.state_dict(), strict=False)
        assert difference(other(ids).logits.detach(), base(ids).logits.detach()) > 1e-3


def test_recurrent_and_chunked_forms_agree():
    model, ids = small(), tokens()
    chunked = model(ids).logits.detach()
    model.config.implementation = "gla_recurrent"
    assert layer_for(model.config, torch.empty(1, 1, 2, 8), False).__name__ == "gla_recurrent"
    assert difference(model(ids).logits.detach(), chunked) < EXACT


def test_the_loss_is_the_shifted_cross_entropy():
    model, ids = small(), tokens()
    labels = ids.masked_fill(ids == 3, -100)
    logp = model(ids).logits[:, :-1].detach().log_softmax(-1)
    picked = logp.gather(-1, ids[:, 1:, None])[..., 0][labels[:, 1:] != -100]
    assert (
        abs(model(ids, labels=labels).loss.item() + picked.mean().item()) < 1e-6
    )  # transformers' is float32
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 40)


def test_a_compiler_sees_one_graph():
    """The registry is asked once, outside the graph; the layer itself is traced."""
    model, ids = small(num_hidden_layers=1, implementation="gla_recurrent"), tokens(length=5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert difference(compiled(ids, use_cache=False).logits.detach(), model(ids).logits.detach()) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [{"layout": "authors"}, {"gate": "scalar"}, "retnet"], ids=str)
def test_half_precision_and_autocast_stay_near(kind, dtype):
    model, ids = small(kind), tokens()
    want = model(ids).logits.detach()
    model = model.to(dtype).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and 1e-4 < difference(out.logits.detach(), want) < 0.1
    assert {s.dtype for s in getattr(out, CACHE).states} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["gla-tiny", "retnet-tiny", "mamba-tiny", "mamba2-tiny", "transformer-tiny"])
def test_saved_models_load_with_the_same_logits(name, tmp_path):
    torch.manual_seed(0)
    model, ids = catalog.build(name).eval(), tokens(length=9)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and torch.equal(again(ids).logits, model(ids).logits)
    assert ("implementation" in (tmp_path / "config.json").read_text()) is False
    if name == "gla-tiny":
        other = AutoModelForCausalLM.from_pretrained(tmp_path, implementation="gla_recurrent")
        assert other.config.implementation == "gla_recurrent"


@pytest.mark.parametrize("name", sorted(PAPER))
def test_parameters_are_the_papers(name):
    assert abs(catalog.parameters(name) / PAPER[name] - 1) < 0.01


def test_every_name_builds_on_the_meta_device_at_its_size():
    sizes = {"tiny": (0.9e6, 1.2e6), "8m": (7.5e6, 8.5e6), "30m": (29e6, 31e6)}
    sizes |= {"340m": (338e6, 353e6), "1.3b": (1.3e9, 1.4e9)}
    for name in catalog.names():
        low, high = sizes[name.split("-")[1]]
        assert low < catalog.parameters(name) < high, name
    assert len(catalog.names()) == 35
    assert (
        catalog.config("gla-30m-1-head").num_heads == 1 and catalog.config("gla-340m-8-heads").num_heads == 8
    )
    gates = [catalog.config(f"gla-340m-{a}").gate for a in ("no-gate", "fixed-decay", "scalar-gate")]
    assert gates == ["none", "fixed", "scalar"]


def test_state_bytes_are_those_of_the_state():
    for name in ("gla-tiny", "retnet-tiny", "gla-30m-8-heads"):
        model = catalog.build(name)
        state = model(tokens(1), use_cache=True).past_key_values
        assert sum(s.nbytes for s in state.states) == catalog.state_bytes(model.config)
    per_layer = {"gla-340m": 128, "retnet-340m": 512, "gla-1.3b": 256, "retnet-1.3b": 512}  # times d, fp32
    for name, factor in per_layer.items():
        c = catalog.config(name)
        assert catalog.state_bytes(c) == 4 * factor * c.hidden_size * c.num_hidden_layers


def test_initialisation_is_the_authors():
    """Xavier with gain 2^-2.5 for q, k and the gate: a uniform law, so its edge and its spread are known."""
    torch.manual_seed(0)
    attn = catalog.build("gla-tiny").model.layers[0].attn
    for weight in (attn.q_proj.weight, attn.k_proj.weight, attn.gk_proj[0].weight, attn.gk_proj[1].weight):
        edge = 2**-2.5 * (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * edge < weight.abs().max() <= edge and abs(weight.std() * 3**0.5 / edge - 1) < 0.05
    assert abs(attn.v_proj.weight.std() / 0.02 - 1) < 0.05 and not attn.gk_proj[1].bias.any()
    plain = catalog.build("gla-tiny", initialisation="normal").model.layers[0].attn
    assert abs(plain.q_proj.weight.std() / 0.02 - 1) < 0.05


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_mambas_outputs_start_small(name):
    """Kaiming's uniform law over the square root of the layers, as in the authors' code."""
    torch.manual_seed(0)
    model = catalog.build(name)
    weight = model.backbone.layers[3].mixer.out_proj.weight
    edge = weight.shape[1] ** -0.5 / 8**0.5
    assert 0.99 * edge < weight.abs().max() <= edge
    assert abs(model.get_input_embeddings().weight.std() / 0.02 - 1) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{"gate": g} for g in ("channel", "scalar", "none")] + ["retnet"], ids=str)
def test_our_kernels_give_the_plain_forms_logits(kind):
    model = small(kind, hidden_size=128, intermediate_size=256).to("cuda", torch.bfloat16)
    ids, family = tokens(length=200).cuda(), model.config.family
    found = {}
    for form in ("chunk", "chunk_torch"):
        model.config.implementation = f"{family}_{form}"
        out = model(ids, labels=ids, use_cache=True)
        out.loss.backward()
        found[form] = out.logits.detach(), getattr(out, CACHE).states[-1].detach()
    for got, want in zip(found["chunk"], found["chunk_torch"], strict=True):
        assert difference(got, want) < 0.03  # bf16 through two layers


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{"gate": g} for g in ("channel", "scalar", "none")] + ["retnet"], ids=str)
def test_our_step_gives_the_whole_sequences_logits(kind):
    model = small(kind, hidden_size=128, intermediate_size=256).to("cuda", torch.bfloat16)
    model.config.implementation = f"{model.config.family}_chunk_torch"
    ids = tokens(length=20).cuda()
    with torch.no_grad():
        state, parts = getattr(model(ids[:, :10], use_cache=True), CACHE), []
        assert step_for(model.config, model.lm_head.weight, state.states[0]) is not None
        for t in range(10, 20):
            before = state.states[0].clone()
            out = model(ids[:, t : t + 1], past_key_values=state, use_cache=True)
            assert torch.equal(before, state.states[0])
            parts.append(out.logits)
            state = getattr(out, CACHE)
        want = model(ids).logits[:, 10:]
    assert difference(torch.cat(parts, 1), want) < 0.03  # bf16 through two layers


def test_a_step_goes_to_the_kernel_on_a_gpu_alone():
    config = GLAConfig(**SMALL)
    with torch.no_grad():
        assert step_for(config, torch.zeros(1), torch.zeros(1)) is None


def test_wide_values_in_parts_are_the_whole():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 9, 3, 4, dtype=torch.float64)
    v, g = torch.randn(2, 9, 3, 24).double(), -torch.rand(2, 9, 3, 4).double()
    state = torch.randn(2, 3, 4, 24).double()
    layer = layer_for(GLAConfig(**SMALL), q, False)
    want = in_parts(layer, q, k, v, g, 0.5, state, True)
    got = in_parts(layer, q, k, v, g, 0.5, state, True, widest=10)
    assert all(difference(a, b) < EXACT for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalog.build("gla-341m"), "no model 'gla-341m' (model); did you mean 'gla-340m'?"),
        (lambda: catalog.build("gla-tiny", num_head=2), "no field 'num_head' in GLAConfig"),
        (lambda: catalog.build("mamba-tiny", gate="none"), "no field 'gate' in MambaConfig"),
        (lambda: GLAConfig(gate="chanel"), "no gate 'chanel' (configuration); did you mean 'channel'?"),
        (lambda: GLAConfig(num_heads=3), "keys of width 512 do not split into 3 heads"),
        (lambda: small(implementation="gla_chnk")(tokens()), "no implementation 'gla_chnk'"),
        (lambda: small(implementation="tests/faulty_impls.py:nan")(tokens()), "is no id (implementation)"),
        (lambda: small(implementation="retention_chunk_torch")(tokens()), "computes retention, not gla"),
        (lambda: small()(tokens(), past_key_values=[1]), "a state of list"),
        (lambda: small()(tokens(1), past_key_values=small()(tokens()).past_key_values), "a state of (2, 2, "),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_implementation_that_cannot_run_says_why():
    with pytest.raises(UnavailableError) as caught:
        small(implementation="gla_chunk")(tokens())
    assert "gla_chunk cannot run on cpu" in str(caught.value)


def test_models_verb_lists_the_catalog():
    done = CliRunner().invoke(app, ["models", "--json"])
    listed = json.loads(done.stdout)["models"]
    assert [m["name"] for m in listed] == list(catalog.names())
    gla = next(m for m in listed if m["name"] == "gla-340m")
    assert (gla["parameters"], gla["layers"], gla["width"]) == (341_707_776, 24, 1024)
    assert "341,707,776" in CliRunner().invoke(app, ["models"]).stdout
