"""Training steps: what is asked becomes cells, models are checked before they are timed, faults are rows."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from glabench import cost
from glabench.cases import Arm
from glabench.errors import UsageError
from glabench.pool import Outcome
from glabench.rows import ThroughputRow, columns
from glabench.runners import step_models, steps, throughput, throughput_run
from glabench.worker import CellFailure

pytestmark = pytest.mark.usefixtures("one_thread")


def glabench(*words, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "glabench", "throughput", "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240, env=env)


def rows(folder):
    with (folder / "throughput.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arm(word, size="tiny"):
    (found,) = step_models.plan({"words": [word], "sizes": [size]})["arms"]
    return found


def arguments(word, **changes):
    base = {"arm": arm(word), "condition": "paper", "layer": "auto", "seqlen": 32, "batch": 2}
    return {**base, "device": "cpu", "seed": 0, "threads": 1, "warmup": 1, "steps": 6, **changes}


# --- the grammar ------------------------------------------------------------------------------------------


def test_points_are_lengths_and_batches():
    found = throughput.parse_points("2kx8,16kX1,300x2")
    assert [(p.seqlen, p.batch) for p in found] == [(2048, 8), (16384, 1), (300, 2)]


@pytest.mark.parametrize("text", ["2k", "2kx", "x8", "2kx8,2kx8", "2kx8,2048x8", "0x4", "1x4", "2kx8,"])
def test_a_point_that_makes_no_sense_is_refused(text):
    with pytest.raises(UsageError, match="--points"):
        throughput.parse_points(text)


def test_words_are_families_at_sizes_or_shipped_names():
    found = step_models.plan({"words": ["gla", "gla-fla", "gla-30m-no-gate"], "sizes": ["tiny", "8m"]})[
        "arms"
    ]
    said = [(a["arm"], a["name"], a["model"], a["size"], a["family"]) for a in found]
    assert said == [
        ("gla-tiny", "gla-tiny", "gla", "tiny", "gla"),
        ("gla-8m", "gla-8m", "gla", "8m", "gla"),
        ("gla-fla-tiny", "gla-tiny", "gla-fla", "tiny", "gla"),
        ("gla-fla-8m", "gla-8m", "gla-fla", "8m", "gla"),
        ("gla-30m-no-gate", "gla-30m-no-gate", "gla", "30m", "linear_attention"),
    ]
    assert "did you mean 'gla'" in step_models.plan({"words": ["glaa"], "sizes": ["tiny"]})["error"]["fix"]
    assert "no size '8b'" in step_models.plan({"words": ["gla"], "sizes": ["8b"]})["error"]["what"]


# --- FLOPs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "products", "flop"),
    [
        ("gla-340m", 341_639_168, 2.0876e9),
        ("gla-1.3b", 1_299_841_024, 7.950e9),
    ],  # worked by hand, at any length
)
def test_linear_attention_has_flops_of_its_own(name, products, flop):
    one = arm(name)
    assert one["products"] == products
    for seqlen in (2048, 16384):
        found, formula = cost.training_flop_per_token("gla", Arm(**one["split"]), 24, products, seqlen)
        assert found == pytest.approx(flop, rel=1e-4) and formula.startswith(
            f"6 x {products} + 3 x 24 x 4 x 4"
        )


def test_attention_counts_the_causal_half_and_mamba_its_scan():
    llama, mamba = arm("transformer-1.3b"), arm("mamba-1.3b")
    at = {
        t: cost.training_flop_per_token("attention", Arm(**llama["split"]), 24, 0, t)[0]
        for t in (2048, 16384)
    }
    assert at[2048] == 24 * 6 * 2048 * 2048 and at[16384] == 8 * at[2048]  # 6 T d a layer
    scan, _ = cost.training_flop_per_token("mamba", Arm(**mamba["split"]), 48, 0, 2048)
    assert scan == 48 * 27 * 4096 * 16  # 27 E N a layer


# --- a cell -----------------------------------------------------------------------------------------------


LAYERS = {"gla": "gla_chunk_torch", "mamba": "mamba_torch", "transformer": "attention_sdpa"}


@pytest.mark.parametrize("word", LAYERS)
def test_a_step_is_timed_in_parts_and_really_trains(word):
    given = arguments(word)
    found = steps.measure(given)
    assert found["layer"] == LAYERS[word] and found["compile"] == "no" and found["loss_form"] == "plain"
    assert len(found["step_list_ms"]) == 6 and min(found["step_list_ms"]) > 0
    parts = [found[f"{part}_ms"] for part in steps.PARTS]
    assert min(parts) > 0 and found["backward_ms"] > found["loss_ms"]
    assert abs(found["initial_loss_nats"] - math.log(259)) < 1 and found["peak_mem_mib"] > 0
    names = ("arm", "condition", "layer", "device", "seed")
    trained = step_models.built(json.dumps([given[name] for name in names]))  # the one that was timed
    torch.manual_seed(0)
    fresh = dict(step_models.catalog.build(f"{word}-tiny").named_parameters())
    assert trained.steps == 7
    assert all(not p.equal(fresh[name]) for name, p in trained.model.named_parameters())
    assert (found.get("err_ratio") is None) == (word != "gla")


def test_a_model_that_starts_off_is_wrong_and_not_timed(monkeypatch):
    build = step_models.catalog.build

    def loud(name, **options):
        model = build(name, **options)
        with torch.no_grad():
            model.lm_head.weight.mul_(50)
        return model

    given = arguments("gla", seed=5)  # another seed: a model that passed is kept
    monkeypatch.setattr(step_models.catalog, "build", loud)
    with pytest.raises(CellFailure, match=r"wrong: random weights lose .* nats, not about 5\.557"):
        steps.measure(given)


def test_a_parameter_without_a_gradient_is_wrong(monkeypatch):
    build = step_models.catalog.build

    def cut(name, **options):
        model = build(name, **options)
        model.model.layers[1].mlp.forward = lambda x: x
        return model

    given = arguments("gla", seed=6)
    monkeypatch.setattr(step_models.catalog, "build", cut)
    with pytest.raises(CellFailure, match=r"wrong: model\.layers\.1\.mlp\.\w+\.weight has no gradient"):
        steps.measure(given)


def test_a_model_of_another_size_is_wrong():
    given = arguments("gla", seed=7)
    given["arm"]["params"] *= 2
    with pytest.raises(CellFailure, match="wrong: it has 1,095,552 parameters, not 2,191,104"):
        steps.measure(given)


def test_the_graph_names_what_is_not_pytorchs_own():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    assert step_models.graph_names(Doubled.apply(x.exp()).sum()) == ["Doubled"]


def test_a_rate_above_what_the_device_can_do_is_an_error():
    fields = dict.fromkeys(("verb", "suite", "case", "impl", "impl_version", "family", "device", "env"), "x")
    fields |= {
        "model": "gla",
        "size": "1.3b",
        "condition": "paper",
        "batch": 8,
        "seqlen": 2048,
        "precision": "",
    }
    fields |= {"flop_per_token": 8e9, "flop_model": "f"}
    outcome = Outcome("ok", "", {"step_list_ms": [350.0] * 8, "precision": "bf16", "peak_mem_mib": 1.0})
    row = throughput_run.make_row(fields, outcome, steps=8, peak=989.4, ceiling=700.0)
    assert row.status == "ok" and row.tok_s == pytest.approx(16384 / 0.35)
    assert row.mfu_frac == pytest.approx(16384 / 0.35 * 8e9 / 989.4e12) and row.precision == "bf16"
    row = throughput_run.make_row(fields, outcome, steps=8, peak=989.4, ceiling=300.0)
    assert row.status == "error" and "374 TFLOP/s" in row.reason and row.tok_s is None


# --- the command ------------------------------------------------------------------------------------------


WORDS = ("gla", "gla-fla", "--conditions", "paper,modern", "--steps", "6", "--warmup", "1", "--out", "out")
WORDS += ("--impl", "gla_chunk_torch")


def test_every_cell_is_a_row(tmp_path):
    done = glabench(*WORDS, "--points", "64x2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {(r["impl"], r["condition"]): r for r in rows(tmp_path / "out")}
    assert {key: row["status"] for key, row in made.items()} == {
        ("gla-tiny", "paper"): "ok",
        ("gla-tiny", "modern"): "unsupported",
        ("gla-fla-tiny", "paper"): "unavailable",
        ("gla-fla-tiny", "modern"): "unavailable",
    }
    row = made["gla-tiny", "paper"]
    assert float(row["tok_lo_s"]) <= float(row["tok_s"]) <= float(row["tok_hi_s"])
    assert float(row["tok_s"]) == pytest.approx(128 / float(row["step_ms"]) * 1e3)
    assert row["layer"] == "gla_chunk_torch" and float(row["err_ratio"]) <= float(row["tol_ratio"])
    assert "needs a GPU" in made["gla-tiny", "modern"]["reason"]
    assert [list(r) for r in json.loads(done.stdout)["rows"]] == [columns(ThroughputRow)] * 4
    (run,) = json.loads((tmp_path / "out" / "run.json").read_text())["runs"]
    assert {r["env"] for r in made.values()} == {run["id"]} and run["finished_utc"]


@pytest.mark.slow
def test_resume_redoes_the_torn_cell_and_what_was_unavailable(tmp_path):
    words = (*WORDS, "--points", "64x2,32x2")
    first = glabench(*words, cwd=tmp_path)
    path = tmp_path / "out" / "throughput.csv"
    made = rows(tmp_path / "out")
    assert first.returncode == 0 and len(made) == 8 and made[-1]["status"] == "ok", first.stderr
    path.write_bytes(path.read_bytes()[:-30])  # killed while it wrote
    again = glabench(*words, "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "cut a torn last line" in again.stderr, again.stderr
    found = rows(tmp_path / "out")
    assert len(found) == 7 + 4 + 1 and found[:7] == made[:7]
    assert found[-1]["status"] == "ok" and found[-1]["case"] == made[-1]["case"]


@pytest.mark.slow
def test_misuse_is_one_line(tmp_path):
    done = glabench("glaa", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: no model 'glaa' (MODEL); did you mean 'gla'?" in done.stderr


def test_a_limit_of_no_time_is_refused(tmp_path):
    done = glabench("gla", "--cold-limit", "0", cwd=tmp_path)
    assert done.returncode == 2 and "0 is not a time (--cold-limit); give seconds above 0" in done.stderr


def test_an_implementation_of_no_model_is_refused():
    with pytest.raises(UsageError, match="no model has a layer of mamba"):
        throughput._layers("mamba_torch", [arm("gla")], "cpu")
    assert throughput._layers("gla_recurrent", [arm("gla")], "cpu") == {"gla": "gla_recurrent"}


@pytest.mark.gpu
@pytest.mark.parametrize("word", ["gla", "retnet", "mamba", "transformer"])
@pytest.mark.parametrize("condition", ["paper", "modern"])
def test_on_a_gpu_both_conditions_run_with_the_kernels_they_name(word, condition):
    given = arguments(word, device="cuda", condition=condition, seqlen=256, batch=2)
    given["arm"] = arm(word, "30m")
    found = steps.measure(given)
    want = {"mamba": "mamba_ssm", "transformer": "attention_fa2"}.get(word, word)
    assert found["layer"].startswith(want if word != "retnet" else "retention")
    assert found["compile"] == ("blocks" if condition == "modern" else "no")
    assert ("rms_norm" in found["fused"]) == (condition == "paper")
    assert ("liger-kernel" in found["loss_form"]) == (condition == "modern")
