"""tools/quality.py: the runs it plans are runs that `glabench train` takes, at the rate that tuning found."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from glabench.models import catalog, checkpoints
from glabench.training import settings

ROOT = Path(__file__).parents[1]
HEADER = "step,tokens,loss,lr,grad_norm,tokens_per_s,peak_mem_mib,valid_loss"


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("quality", ROOT / "tools" / "quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "tools"))
    del sys.modules["quality"], sys.modules["quality_site"]


@pytest.fixture
def site(quality, tmp_path, monkeypatch):
    words = ["quality.py", "all", "--site", str(tmp_path / "site"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu"])
    return quality.Site(quality.arguments())


@pytest.mark.parametrize("option", ["--corpus", "--data", "--books", "--tasks-from"])
def test_a_folder_that_is_not_there_is_refused_before_anything_runs(
    option, quality, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["quality.py", "all", option, str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as left:
        quality.arguments()
    assert left.value.code == 2 and "no folder" in capsys.readouterr().err


def checkpoint(site, name, step):
    folder = site.runs / name / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    return folder


def asked_of(work):
    """The checkpoints that a command names."""
    return [Path(b).name for a, b in zip(work.words, work.words[1:], strict=False) if a == "--ckpt"]


def trained(quality, site, name, model, lr, valid):
    """What a finished run leaves behind."""
    run = site.runs / name
    run.mkdir()
    (run / "metrics.csv").write_text(
        f"{HEADER}\n1,10,5.0,0.1,1.0,5.0,9.0,\n2,20,4.0,0.1,1.0,5.0,9.0,{valid}\n"
    )
    identity = {"model": {"name": model}, "seed": 0, "train": {"lr": lr, "steps": 2}}
    (run / "train.json").write_text(json.dumps({"identity": identity}))


def test_every_planned_run_is_one_that_train_takes(quality, site, tmp_path):
    planned = [job for step in quality.STEPS[1:-1] for job in quality.jobs(site, step)]
    assert len({job.name for job in planned}) == len(planned) == 12 + 4 + 1 + 12
    for job in planned:
        path = tmp_path / "c.toml"
        path.write_text(job.toml())
        found = settings.load(str(path))
        assert found.model["name"] in catalog.names() and found.settings.sequences >= 1
        budgets = {"tune": site.args.tune_tokens, "ablation": site.args.ablation_tokens}
        budget = budgets.get(job.name.split("-")[0], site.args.tokens)
        assert 0 <= budget - found.settings.steps * found.settings.batch_tokens < found.settings.batch_tokens
    (carried,) = quality.jobs(site, "tbptt")
    assert (carried.train["segments"], carried.train["batch_tokens"]) == (12, 5 * 12 * 2048)  # near 64 x 2048
    assert {job.seed for job in quality.jobs(site, "ablations")} == {0, 1}


def test_the_rate_is_the_best_tuned_one_unless_one_is_given(quality, site):
    assert quality.rate(site, "gla") == quality.RATE
    for lr, valid in ((1e-3, 4.2), (2e-3, 3.9), (4e-3, 4.0)):
        trained(quality, site, f"tune-gla-{lr}", "gla-30m", lr, valid)
    assert quality.rate(site, "gla") == 2e-3 and quality.rate(site, "mamba") == quality.RATE
    site.args.lr = "gla=5e-4"
    assert quality.rate(site, "gla") == 5e-4


def test_a_run_is_finished_when_its_last_step_was_evaluated(quality, site):
    (job,) = [job for job in quality.jobs(site, "main") if job.name == "main-gla"]
    assert not quality.finished(site, job)
    trained(quality, site, "main-gla", "gla-30m", 1e-3, 3.5)
    assert not quality.finished(site, job)
    job.train["steps"] = 2
    assert quality.finished(site, job)


def test_what_is_packed_has_the_curves_and_no_weights(quality, site):
    trained(quality, site, "main-gla", "gla-30m", 1e-3, 3.5)
    (checkpoint(site, "main-gla", 2) / "model.safetensors").write_bytes(b"x")
    quality.pack(site)
    with tarfile.open(site.args.out / "quality.tar.gz") as tar:
        names = tar.getnames()
    assert {"summary.csv", "runs/main-gla/metrics.csv", "runs/main-gla/train.json"} <= set(names)
    assert not any("checkpoint" in name for name in names) and not list(site.args.out.glob("*.tar.0*"))
    assert "main-gla,gla-30m,0,0.001,2,2,20,3.5,4.50000,5" in (site.args.site / "summary.csv").read_text()


def test_weights_come_back_in_parts_that_make_a_checkpoint_again(quality, site, tmp_path, monkeypatch):
    model = catalog.build("gla-tiny")
    model.save_pretrained(checkpoint(site, "main-gla", 2))
    site.args.weights = "main-gla,main-retnet"  # one of them has no checkpoint yet
    (site.runs / "main-retnet").mkdir()
    monkeypatch.setattr("quality_site.PART", 500_000)
    quality.weights(site)
    parts = sorted(site.args.out.glob("main-gla.tar.*"))
    assert len(parts) > 2 and all(part.stat().st_size <= 500_000 for part in parts)
    assert not list(site.args.out.glob("main-retnet*"))
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
        tar.extractall(tmp_path, filter="data")
    found = checkpoints.load(tmp_path / "main-gla").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(found[name].bfloat16(), x.bfloat16()), name


def test_evaluation_shares_the_checkpoints_out_and_leaves_what_went_through(quality, site, tmp_path):
    for name in ("main-gla", "main-mamba", "tbptt-gla-12x2048", "tune-gla-1e-3", "ablation-gla-s0"):
        checkpoint(site, name, 2)
    (site.runs / "main-retnet").mkdir()  # no checkpoint yet
    assert [w.words[0] for w in quality.evaluations(site)] == ["extrapolate"]  # no tasks, no lm-eval
    site.args.tasks_from, site.workers = tmp_path, [None, None]
    found = quality.evaluations(site)
    assert [(w.words[0], asked_of(w)) for w in found] == [
        ("extrapolate", ["main-gla", "tbptt-gla-12x2048"]),
        ("extrapolate", ["main-mamba"]),
        ("lm-eval", ["main-gla"]),
        ("lm-eval", ["main-mamba"]),
    ]
    found[0].when_done()
    assert [asked_of(w) for w in quality.evaluations(site)] == [["main-mamba"], ["main-gla"], ["main-mamba"]]
    checkpoint(site, "main-gla", 4)  # trained on: it is another checkpoint now
    assert "main-gla" in asked_of(quality.evaluations(site)[0])
    site.args.lengths = "2k..8k"  # asked for something else
    assert sum(len(asked_of(w)) for w in quality.evaluations(site) if w.words[0] == "extrapolate") == 3


def test_evaluation_scores_a_run_of_glabench_train(quality, site, tmp_path, monkeypatch):
    """The whole step on a checkpoint of one training step, its tokens prepared beforehand."""
    text, texts = tmp_path / "text", tmp_path / "books"
    for folder, number in ((text, 2), (texts, 1)):
        folder.mkdir()
        for n in range(number):
            (folder / f"{n}.txt").write_text("The cat sat on the mat, and said nothing of it. " * 120)
    run = ["-m", "glabench", "data", "prepare", str(text), "--out", str(tmp_path / "data")]
    subprocess.run([sys.executable, *run, "--tokenizer", "bytes"], check=True, capture_output=True)
    words = ["quality.py", "main", "evaluate", "--site", str(tmp_path / "s"), "--out", str(tmp_path / "out")]
    words += ["--data", str(tmp_path / "data"), "--families", "gla", "--size", "tiny", "--device", "cpu"]
    words += ["--seqlen", "64", "--batch-tokens", "64", "--micro-batch", "1", "--tokens", "128"]
    monkeypatch.setattr(sys, "argv", [*words, "--books", str(texts), "--lengths", "2k,4k"])
    quality.main()
    with tarfile.open(tmp_path / "out" / "quality.tar.gz") as tar:
        lines = tar.extractfile("evaluation/extrapolate/extrapolate.csv").read().decode().splitlines()
        assert "figures/evaluation/index.html" in tar.getnames()
    rows = list(csv.DictReader(lines))
    assert [(r["impl"], r["bucket"], r["status"]) for r in rows] == [
        ("main-gla", "1", "ok"),
        ("main-gla", "2", "ok"),
    ]
