"""What recall does on a GPU that will not capture a step, or has no memory for two models at once."""

import dataclasses
from pathlib import Path

from glabench import env
from glabench.runners import recall, recall_grid, recall_training


def test_a_failed_capture_costs_the_graph_and_exhausted_memory_the_company(tmp_path, monkeypatch):
    """The calls are made up, since there is no GPU; the workers, the rows and the order are real."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RECALL_DEVICE", str(tmp_path))
    monkeypatch.setattr(recall_training, "TRAIN", "recall_calls:train")
    monkeypatch.setattr(env, "gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(recall_training.Training, "_describe", lambda self: {"threads": 1})
    mixers = {"mixers": ("attention", "gla", "mamba"), "dims": (64, 128), "lrs": (1e-3,)}
    options = {
        "impl": "",
        "jobs": 2,
        "out": tmp_path / "out",
        "resume": False,
        "shard": "",
        "argv": ["recall"],
    }
    options |= {"stop_sweep": False, "compiled": False, "cell_limit": None}
    asked = recall_grid.request("a", mixers, device="cpu", **options)
    said = []
    done = recall.run(dataclasses.replace(asked, device="cuda"), said.append)
    rows = {(r["mixer"], r["d_model"]): r for r in done["rows"]}
    assert len(rows) == 6 and {r["status"] for r in rows.values()} == {"ok"}
    assert {m: rows[m, 64]["graphed"] for m in ("attention", "gla", "mamba")} == {
        "attention": "yes",
        "gla": "no",
        "mamba": "yes",
    }
    assert rows["gla", 128]["graphed"] == "no" and rows["gla", 64]["device"] == "h100_sxm"
    told = "\n".join(said)
    assert "it printed: no CUDA graph: operation not permitted; gla goes on without CUDA graphs" in told
    assert "out of memory beside others, runs again alone" in told
