"""Checkpoints: fla's layout against float64 forwards by its names, conversion both ways, refusals."""

import json

import pytest
import torch
from reference_models import attention, linear_mixer, logits, mamba_logits
from safetensors.torch import load_file, save_file
from tolerances import EXACT, difference
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM
from typer.testing import CliRunner

from glabench.cli import app
from glabench.errors import UsageError
from glabench.models import catalog, checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
V, D, H, FFN, LAYERS = 40, 32, 2, 256, 2
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_heads": H, "hidden_ratio": 4}
FIELDS = {  # config.json as flash-linear-attention 0.6 writes it, shortened
    "gla": {"expand_k": 0.5, "expand_v": 1, "norm_eps": 1e-6, "attn_mode": "chunk", "use_short_conv": False},
    "retnet": {"expand_k": 1, "expand_v": 2, "norm_eps": 1e-6, "feature_map": None, "num_kv_heads": None},
    "transformer": {"rope_theta": 10000.0, "norm_eps": 1e-6, "qkv_bias": False, "window_size": None},
    "mamba": {"state_size": 16, "expand": 2, "conv_kernel": 4, "time_step_rank": 2, "norm_eps": 1e-5},
}
OPTIONS = {
    "gla": {"mixer": linear_mixer, "heads": H, "gate": "channel", "rope": False, "authors": False},
    "retnet": {"mixer": linear_mixer, "heads": H, "gate": "fixed", "rope": True, "authors": False},
    "transformer": {"mixer": attention, "heads": H},
}
ids = torch.randint(0, V, (2, 21), generator=torch.Generator().manual_seed(1))


def shapes(kind, *, fused=False):
    """Names and shapes as published, written out from the layout's description."""
    if kind == "mamba":
        E, mixer = 2 * D, {"A_log": (2 * D, 16), "D": (2 * D,), "conv1d.weight": (2 * D, 1, 4)}
        mixer |= {"conv1d.bias": (E,), "in_proj.weight": (2 * E, D), "x_proj.weight": (2 + 32, E)}
        mixer |= {"dt_proj.weight": (E, 2), "dt_proj.bias": (E,), "out_proj.weight": (D, E)}
        found = {"backbone.embeddings.weight": (V, D), "backbone.norm_f.weight": (D,)}
        for i in range(LAYERS):
            found |= {f"backbone.layers.{i}.mixer.{n}": s for n, s in mixer.items()}
            found[f"backbone.layers.{i}.norm.weight"] = (D,)
        return found
    keys, values = {"gla": (D // 2, D), "retnet": (D, 2 * D), "transformer": (D, D)}[kind]
    attn = {"q_proj": (keys, D), "k_proj": (keys, D), "v_proj": (values, D), "o_proj": (D, values)}
    if kind != "transformer":
        attn |= {"g_proj": (values, D), "g_norm_swish_gate": (values // H,)}
    if kind == "gla":
        attn |= {"gk_proj.0": (16, D), "gk_proj.1": (keys, 16)}
    mlp = {"gate_proj": (2 * FFN if fused else FFN, D), "up_proj": (FFN, D), "down_proj": (D, FFN)}
    found = {"model.embeddings.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        found |= {f"{at}.attn.{n}.weight": s for n, s in attn.items()}
        found |= {f"{at}.mlp.{n}.weight": s for n, s in mlp.items() if not (fused and n == "up_proj")}
        found |= {f"{at}.attn_norm.weight": (D,), f"{at}.mlp_norm.weight": (D,)}
        if kind == "gla":
            found[f"{at}.attn.gk_proj.1.bias"] = (keys,)
    return found


def write(folder, kind, *, tied=False, fused=False, **fields):
    """A random checkpoint in fla's layout, every tensor of a size that shows in the logits."""
    torch.manual_seed(0)
    named = shapes(kind, fused=fused) | ({} if tied else {"lm_head.weight": (V, D)})
    tensors = {}
    for name, shape in named.items():
        x = torch.randn(shape)
        tensors[name] = 1 + 0.3 * x if len(shape) == 1 and "norm" in name else x * shape[-1] ** -0.5
    folder.mkdir()
    fields = SIZES | FIELDS[kind] | {"model_type": kind, "tie_word_embeddings": tied} | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "absent"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def reference(kind, tensors):
    return mamba_logits(tensors, ids) if kind == "mamba" else logits(tensors, ids, **OPTIONS[kind])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_fla_checkpoints_give_the_logits_of_their_formulas(kind, tied, tmp_path):
    tensors = write(tmp_path / "in", kind, tied=tied)
    model = checkpoints.load(tmp_path / "in")
    assert model.dtype == torch.float32
    limit = {"mamba": 1e-5, "transformer": 1e-6}.get(kind, EXACT)  # transformers' scan and angles are float32
    assert difference(model.double()(ids).logits.detach().double(), reference(kind, tensors)) < limit


@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_conversion_there_and_back_keeps_every_tensor(kind, tmp_path):
    tensors = write(tmp_path / "in", kind)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    for source, target, layout in (("in", "ours", "glabench"), ("ours", "back", "fla")):
        done = CliRunner().invoke(
            app, ["convert", str(tmp_path / source), str(tmp_path / target), "--layout", layout, "--json"]
        )
        assert done.exit_code == 0 and json.loads(done.stdout)["tensors"] == len(tensors)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], t) for n, t in tensors.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    asked = {k: v for k, v in (SIZES | FIELDS[kind]).items() if k in written}
    assert (
        asked.items() <= written.items()
        and written["model_type"] == kind
        and len(asked) >= 8 - (kind == "mamba")
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(ours(ids).logits, checkpoints.load(tmp_path / "back")(ids).logits)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "in", "ours"]


def test_old_files_with_a_fused_gate_and_other_keys(tmp_path):
    """Before 2025-02: gate and up in one tensor, rms_norm_eps, fused_chunk, an unfused norm's name."""
    old = {"norm_eps": "absent", "rms_norm_eps": 1e-5, "attn_mode": "fused_chunk", "share_conv_kernel": True}
    tensors = write(tmp_path / "in", "gla", fused=True, **old)
    want = logits(tensors, ids, eps=1e-5, **OPTIONS["gla"])
    got = checkpoints.load(tmp_path / "in").double()(ids).logits.detach()
    assert difference(got, want) < EXACT
    unfused = {n.replace("g_norm_swish_gate", "g_norm"): t for n, t in tensors.items()}
    save_file(unfused, tmp_path / "in" / "model.safetensors")
    assert difference(checkpoints.load(tmp_path / "in").double()(ids).logits.detach(), want) < EXACT


def test_shards_and_overrides(tmp_path):
    tensors = write(tmp_path / "in", "gla")
    (tmp_path / "in" / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({n: tensors[n] for n in held}, tmp_path / "in" / file)
    index = {"weight_map": {n: file for file, held in parts.items() for n in held}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    model = checkpoints.load(tmp_path / "in", dtype=torch.float64, implementation="gla_recurrent")
    assert model.config.implementation == "gla_recurrent" and model.dtype == torch.float64
    assert difference(model(ids).logits.detach(), reference("gla", tensors)) < EXACT


def test_mamba2_goes_there_and_back(tmp_path):
    torch.manual_seed(0)
    model = catalog.build("mamba2-tiny", num_hidden_layers=1).eval()
    assert isinstance(model, Mamba2ForCausalLM)
    model.save_pretrained(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "fla", "fla")
    assert "layer_norm_epsilon" not in json.loads((tmp_path / "fla" / "config.json").read_text())
    assert torch.equal(checkpoints.load(tmp_path / "fla")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["gla-tiny", "retnet-tiny", "transformer-tiny", "mamba-tiny"])
def test_saved_models_load_and_convert(name, tmp_path):
    torch.manual_seed(0)
    model = catalog.build(name).eval()
    model.save_pretrained(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "fla", "fla")
    for folder in ("in", "fla"):
        assert torch.equal(checkpoints.load(tmp_path / folder)(ids).logits, model(ids).logits)


def test_untied_weights_under_a_tied_configuration(tmp_path):
    """fla's Mamba is untied unless its file says so; transformers' is tied."""
    tensors = write(tmp_path / "silent", "mamba", tie_word_embeddings="absent", layer_norm_epsilon=1e-5)
    got = checkpoints.load(tmp_path / "silent").double()(ids).logits.detach().double()
    assert difference(got, mamba_logits(tensors, ids)) < 1e-5
    write(tmp_path / "said", "gla", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="differs from the embeddings"):
        checkpoints.load(tmp_path / "said")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_short_conv": True}, "use_short_conv = True is not supported"),
        ({"feature_map": "relu"}, "feature_map = 'relu' is not supported"),
        ({"num_kv_heads": 1}, "num_kv_heads = 1 is not supported"),
        ({"clamp_min": -5}, "clamp_min = -5 is not supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "run code of its own (auto_map)"),
        ({"model_type": "glaa"}, "no layout for model_type 'glaa'"),
        ({"num_hidden_layers": 3}, "tensors are missing, model.layers.2"),
        ({"num_hidden_layers": 1}, "tensors have no place, model.layers.1"),
        ({"vocab_size": 41}, "model.embeddings.weight is [40, 32], not [41, 32]"),
        ({"num_heads": 3}, "do not split into 3 heads"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_configurations_that_do_not_fit_are_one_line(fields, message, tmp_path):
    write(tmp_path / "in", "gla", **fields)
    for call in (checkpoints.load, lambda p: checkpoints.convert(p, tmp_path / "out", "glabench")):
        with pytest.raises(UsageError) as caught:
            call(tmp_path / "in")
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def damage(folder, how):
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if how == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how in ("outside", "missing part"):
        weights.unlink()
        name = "../secret.safetensors" if how == "outside" else "part.safetensors"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad json":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickled", "pytorch_model.bin is pickled: reading it could run code"),
        ("torn", "model.safetensors cannot be read"),
        ("outside", "index.json names '../secret.safetensors'"),
        ("missing part", "no part.safetensors"),
        ("no weights", "no model.safetensors"),
        ("no config", "no config.json"),
        ("bad json", "config.json cannot be read"),
    ],
)
def test_damaged_folders_are_one_line(how, message, tmp_path):
    write(tmp_path / "in", "gla")
    damage(tmp_path / "in", how)
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--layout", "fla"]
    )
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_variants_without_a_fla_form_and_targets_in_the_way(tmp_path):
    for i, fields in enumerate(({"layout": "authors"}, {"gate": "scalar"}, {"gate": "none"})):
        catalog.build("gla-tiny", num_hidden_layers=1, **fields).save_pretrained(tmp_path / f"{i}")
        with pytest.raises(UsageError, match="fla's models have no gate"):
            checkpoints.convert(tmp_path / f"{i}", tmp_path / "out", "fla")
        checkpoints.convert(tmp_path / f"{i}", tmp_path / f"again{i}", "glabench")
    with pytest.raises(UsageError, match="exists"):
        checkpoints.convert(tmp_path / "0", tmp_path / "1", "glabench")
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UsageError, match="cannot write"):
        checkpoints.convert(tmp_path / "0", tmp_path / "weights.pt" / "out", "glabench")
    with pytest.raises(UsageError, match=r"weights\.pt is pickled"):
        checkpoints.load(tmp_path / "weights.pt")
