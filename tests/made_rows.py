"""Rows with made-up numbers for the tests of figures and reports; they are never kept."""

import json
from dataclasses import asdict

from glabench.cases import SHAPES, make_cases
from glabench.results import RowFile
from glabench.rows import MemoryRow, SpeedRow

FEW = {"gla_chunk_torch": "gla", "attention_sdpa": "attention", "mamba_torch": "mamba"}
MANY = {
    "attention_cudnn": "attention", "attention_fa2": "attention", "attention_sdpa": "attention",
    "gla_chunk": "gla", "gla_chunk_fla": "gla", "gla_recurrent": "gla", "mamba_ssm": "mamba",
    "mamba2_ssm": "mamba2", "retention_chunk": "retention", "retention_chunk_fla": "retention",
    "linear_attention_chunk_fla": "linear_attention", "linear_attention_chunk_torch": "linear_attention",
    "simple_gla_chunk": "simple_gla", "simple_gla_chunk_fla": "simple_gla",
}  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192)
RUN = {
    "id": "e1", "glabench": "0.1.0", "argv": ["speed"],
    "comparable": {"gpu": "NVIDIA H200", "torch": "2.11.0", "driver": "580.65", "cuda": "13.0"},
    "measured": {"copy_gb_s": 4012.0, "matmul_tflop_s": {"bf16": 703.0}},
}  # fmt: skip


def cases(seqlens=LENGTHS, passes=("fwd", "fwd_bwd"), batch=2, tokens=None):
    shape = (SHAPES["340m"],)
    where = {"batch": batch, "tokens": tokens, "where": "test"}
    return make_cases(shapes=shape, seqlens=seqlens, passes=passes, dtypes=("bf16",), **where)


def keys(verb, case, impl, family, **changed):
    fixed = {"verb": verb, "suite": "s", "impl_version": "1", "device": "h200", "env": "e1"}
    said = {
        "arm": "4 heads of 128x256",
        "state_mib": 1.5,
        "flop_model": "4 dk dv per token forward, 2x that backward",
    }
    return {**fixed, **said, **asdict(case), "case": case.key(), "impl": impl, "family": family, **changed}


def speed(case, impl, family, status="ok", launch_bound="no", **changed):
    base = keys("speed", case, impl, family, **changed)
    if status != "ok":
        return SpeedRow(**base, status=status, reason=f"{status} here")
    ms = (1 + len(impl) / 7) * (case.seqlen / 1024) ** (2 if family == "attention" else 1)
    times = {
        "time_ms": ms,
        "time_lo_ms": ms * 0.97,
        "time_hi_ms": ms * 1.02,
        "floor_ms": ms / 3,
        "floor_ratio": 3.0,
    }
    return SpeedRow(**base, **times, timer="events", l2="cold", launch_bound=launch_bound)


def memory(case, impl, family, status="ok"):
    base = keys("memory", case, impl, family)
    if status != "ok":
        return MemoryRow(**base, status=status, reason=f"{status} here")
    out = case.tokens / 512.0
    parts = {"outputs_mib": out, "saved_mib": 2 * out, "workspace_mib": len(impl) / 9, "predicted_mib": out}
    return MemoryRow(**base, **parts, extra_mem_mib=3 * out + len(impl) / 9, meter="cuda_allocator")


def write(folder, rows, run=RUN):
    for kind, name in ((SpeedRow, "rows.csv"), (MemoryRow, "memory.csv")):
        file = RowFile(folder / name, kind)
        for row in rows:
            if isinstance(row, kind):
                file.append(row)
    (folder / "run.json").write_text(json.dumps({"schema": 1, "runs": [run]}))
    return folder
