"""The environment record: names devices, holds nothing personal, keeps every run."""

import json
import socket
from pathlib import Path

import pytest

from glabench import env
from glabench.errors import ResultsError, UnavailableError, UsageError
from glabench.installed import has_cuda


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        (None, "cpu"),
    ],
)
def test_device_slugs(name, slug):
    assert env.device_slug(name) == slug


def a_run(**changes):
    described = {
        "torch": "2.13.0",
        "threads": 2,
        "ceilings": {"copy_gb_s": 9.0, "matmul_tflop_s": {"fp32": 0.1}},
    }
    how = {"argv": ["speed", "--out", "/secret/place/here"], "suite": "s", "suite_digest": "", "regime": {}}
    return env.make_run(described=described | changes.pop("described", {}), **(how | changes))


def test_the_id_follows_the_comparable_part_only():
    one, same, other = a_run(), a_run(argv=["memory"]), a_run(described={"torch": "2.12.0"})
    assert one["id"] == same["id"] != other["id"]


def test_nothing_personal_is_recorded(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "/somewhere/secret")
    run = a_run()
    text = json.dumps(run)
    assert "/secret" not in text and "/somewhere" not in text and str(Path.home()) not in text
    assert socket.gethostname() not in text
    assert run["argv"] == ["speed", "--out", "here"]
    assert run["comparable"]["variables"]["PYTORCH_CUDA_ALLOC_CONF"] == "set"


def test_runs_are_kept_beside_each_other_and_an_update_replaces_its_own(tmp_path):
    first = a_run() | {"started_utc": "2026-01-01T00:00:00Z"}
    second = a_run() | {"started_utc": "2026-01-02T00:00:00Z"}
    for run in (first, second, second | {"finished_utc": "2026-01-02T01:00:00Z"}):
        env.write_run(tmp_path, run)
    runs = env.read_runs(tmp_path)
    assert [r["started_utc"] for r in runs] == [first["started_utc"], second["started_utc"]]
    assert runs[1]["finished_utc"] == "2026-01-02T01:00:00Z"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": 99, "runs": []}', '{"schema": 1, "runs": [{}]}']
)
def test_a_foreign_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ResultsError, match=r"run\.json is not readable"):
        env.read_runs(tmp_path)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_named(name):
    with pytest.raises(UsageError, match="no device"):
        env.pick_device(name)


@pytest.mark.skipif(has_cuda(), reason="this machine has a GPU")
def test_without_a_gpu_auto_means_cpu_and_cuda_is_unavailable():
    assert env.pick_device("auto") == "cpu"
    with pytest.raises(UnavailableError, match="no usable GPU"):
        env.pick_device("cuda")
