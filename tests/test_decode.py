"""`glabench decode`: right steps are measured, wrong ones never; contexts, states, resume, the figure."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from glabench import registry
from glabench.cases import SHAPES, make_cases
from glabench.figures import rows as figure_rows
from glabench.runners import cells
from glabench.worker import CellFailure

FAULTY = Path(__file__).with_name("faulty_steps.py")
WORDS = ("decode", "--device", "cpu", "--context", "64,128", "--out", "out")


def glabench(*words, cwd):
    command = [sys.executable, "-m", "glabench", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=180)


def rows(folder):
    with (folder / "out" / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arguments(name, family, batch=3, context=40):
    how = {"shapes": (SHAPES["cpu"],), "dtypes": ("fp32",), "tokens": None, "where": "test"}
    (case,) = make_cases(seqlens=(context,), passes=("decode",), batch=batch, **how)
    spec = (
        {"id": name} if name in registry.implementations() else {"file": f"{FAULTY}:{name}", "family": family}
    )
    return {"impl": spec, "case": asdict(case), "device": "cpu", "seed": 0, "threads": 1, "check_tokens": 100}


STEPS = [i for i in registry.implementations().values() if i.passes == ("decode",) and "cpu" in i.devices]


@pytest.mark.parametrize("impl", STEPS, ids=lambda i: i.id)
def test_a_right_step_goes_through_every_station(impl):
    asked = arguments(impl.id, impl.family)
    found = cells.prepare(asked)
    assert 0 < found["err_ratio"] < found["tol_ratio"] and 0 < found["checked_frac"] <= 1
    limits = {"min_samples": 2, "max_samples": 4, "min_busy_s": 0, "max_busy_s": 1, "interval_frac": 1}
    assert len(cells.sample(asked | limits | {"visit": 0})["samples_ms"]) >= 2
    assert cells.recheck(asked | {"visit": 1})["err_ratio"] < found["tol_ratio"]


@pytest.mark.parametrize(("name", "family"), [("gla_good", "gla"), ("attention_good", "attention")])
def test_a_users_function_is_taken(name, family):
    assert cells.prepare(arguments(name, family))["err_ratio"] > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gla_forgets", "final_state: relative RMS error"),
        ("gla_decays_late", "relative RMS error"),
        ("gla_in_place", "changes its input g in place"),
        ("attention_writes_elsewhere", "k_cache is not the cache before with the new token"),
        ("attention_keeps_nothing", "k_cache is not the cache before with the new token"),
        ("attention_sees_not_itself", "out: "),
    ],
)
def test_a_wrong_step_is_never_timed(name, words):
    with pytest.raises(CellFailure, match=words) as caught:
        cells.prepare(arguments(name, name.partition("_")[0]))
    assert caught.value.status == "wrong"


def test_an_answer_kept_from_the_first_call_is_found_after_timing():
    asked = arguments("gla_caches", "gla")
    cells.prepare(asked)
    with pytest.raises(CellFailure, match="on fresh inputs after timing, out"):
        cells.recheck(asked | {"visit": 1})


def test_the_command_measures_resumes_and_draws(tmp_path):
    impls = f"gla,attention,retention_chunk_torch,{FAULTY}:gla_forgets"
    done = glabench(*WORDS, "--impl", impls, "--batch", "1,3", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    made = rows(tmp_path)
    assert len(made) == 4 * 2 * 2 and {r["passes"] for r in made} == {"decode"}
    status = {r["impl"]: r["status"] for r in made}
    assert status["gla_step_torch"] == status["attention_cached_sdpa"] == "ok"
    assert status["retention_chunk_torch"] == "unsupported" and status["faulty_steps:gla_forgets"] == "wrong"
    state = {(r["impl"], r["batch"], r["seqlen"]): float(r["state_mib"]) for r in made}
    assert state["gla_step_torch", "1", "64"] == state["gla_step_torch", "1", "128"]
    assert state["attention_cached_sdpa", "3", "128"] == 6 * state["attention_cached_sdpa", "1", "64"]
    for r in made:
        if r["status"] == "ok":
            assert float(r["tok_s"]) == pytest.approx(int(r["batch"]) / float(r["time_ms"]) * 1e3)
    again = glabench(*WORDS, "--impl", impls, "--batch", "1,3", "--resume", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["rows"] == [] and rows(tmp_path) == made
    drawn = glabench("report", "out", "--out", "page", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    names = {p.name for p in (tmp_path / "page").rglob("*.svg")}
    assert names == {"decode_cpu_fp32_batch_1.svg", "decode_cpu_fp32_batch_3.svg"}
    sheets = figure_rows.sheets(figure_rows.load(tmp_path / "out").speed)
    assert [s.is_decode for s in sheets] == [True, True] and [s.batches for s in sheets] == [
        "batch 1",
        "batch 3",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--context", "1k..3k"), "error: '1k..3k' is not a whole number of doublings (--context)"),
        (("--batch", "0"), "error: '0' is not a length (--batch)"),
        (("--impl", "gla_stap"), "did you mean 'gla_step'?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, told):
    done = glabench("decode", "--device", "cpu", *words, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_plan_counts_the_cache(tmp_path):
    done = glabench(*WORDS, "--impl", "attention", "--shape", "340m", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert [c["seqlen"] for c in plan["cells"]] == [64, 128]
    assert plan["memory_mib"] == round(4 * 1024 * (2 * 128 + 4) / 2**20, 2)  # the caches; q, k, v and o
