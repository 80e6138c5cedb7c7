"""The command line: exit codes, one-line errors, JSON, and how fast it answers."""

import json
import subprocess
import sys
import time

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from glabench import __version__
from glabench.cli import app
from glabench.cli.shared import _what_now
from glabench.errors import UsageError

runner = CliRunner()


def run(*words):
    return runner.invoke(app, list(words))


def glabench(*words, cwd=None):
    command = [sys.executable, "-m", "glabench", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speed", "--seqlen", "16k..1k"), "error: '16k..1k' runs backwards (--seqlen); write 1k..16k"),
        (("speed", "--seqlen", "0"), "error: '0' is not a length (--seqlen)"),
        (("speed", "--seqlen", "1k.."), "error: '1k..' has no end (--seqlen)"),
        (("speed", "--seqlen", "1k,1k"), "error: 1024 stands twice"),
        (("memory", "--passes", "back"), "error: no pass 'back' (--passes)"),
        (("speed", "--shape", "341m"), "did you mean '340m'?"),
        (("speed", "--dtype", "fp8"), "error: no dtype 'fp8' (--dtype)"),
        (("speed", "--impl", "gla_chnk"), "error: no implementation 'gla_chnk' (--impl)"),
        (("speed", "--impl", "gla,gla"), "error: implementation 'gla' stands twice (--impl)"),
        (("speed", "--tokens", "1k", "--batch", "2"), "error: both --tokens and --batch are given"),
        (("speed", "--cell-limit", "0"), "error: 0 is not a time (--cell-limit)"),
        (("memory", "--cold-limit", "nan"), "error: nan is not a time (--cold-limit)"),
        (("tune", "--dry-run", "--limit", "inf"), "error: inf is not a time (--limit)"),
        (("speed", "--device", "gpu"), "error: no device 'gpu' (--device)"),
        (("speed", "--impl", "nowhere.py:f", "--family", "gla"), "error: no file 'nowhere.py' (--impl)"),
        (("run", "quikc"), "did you mean 'quick'"),
        (("list", "--family", "glaa"), "error: no family 'glaa' (--family)"),
        (("verify", "gla_nothing"), "error: no implementation 'gla_nothing'"),
        (("report", "no/such/folder"), "error: "),
        (("convert", "no/such", "out", "--layout", "fla"), "error: no folder 'no/such' (checkpoint)"),
        (("convert", "no/such", "out", "--layout", "flaa"), "did you mean 'fla'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_an_error_is_json_where_json_was_asked_for():
    done = glabench("speed", "--seqlen", "0", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == {
        "what": "'0' is not a length",
        "where": "--seqlen",
        "fix": "write a positive number such as 512, 1k or 16k",
    }


def test_debug_keeps_the_traceback():
    done = run("--debug", "speed", "--seqlen", "0")
    assert isinstance(done.exception, UsageError)


def test_typers_own_usage_errors_are_exit_code_2():
    assert run("speed", "--no-such-option").exit_code == 2 and run("nonsense").exit_code == 2


@pytest.mark.parametrize("verb", [command.name for command in get_command(app).commands.values()])
def test_an_interrupted_verb_names_options_that_it_has(verb):
    said = _what_now(verb)
    helped = run(verb, "--help").stdout
    assert ("--resume" in said) == ("--resume" in helped)
    assert said.startswith("what is written is safe") == ("--resume" in helped or verb in ("data", "train"))


def test_version():
    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "verb",
    [
        "list",
        "verify",
        "speed",
        "memory",
        "run",
        "report",
        "tune",
        "doctor",
        "models",
        "convert",
        "data",
        "train",
    ],
)
def test_every_help_ends_with_one_example_that_names_the_verb(verb):
    done = run(verb, "--help")
    assert done.exit_code == 0
    assert done.stdout.strip().splitlines()[-1].strip().startswith(f"Example: glabench {verb}")


def best_of(count, *words):
    spent = []
    for _ in range(count):
        started = time.perf_counter()
        assert glabench(*words).returncode == 0
        spent.append(time.perf_counter() - started)
    return min(spent)


def test_help_and_list_answer_at_once():
    assert best_of(5, "--help") < 0.3
    assert best_of(3, "list") < 1.5


@pytest.mark.parametrize(
    "words",
    [("--help",), ("list",), ("speed", "--dry-run"), ("run", "quick", "--dry-run"), ("tune", "--dry-run")],
)
def test_nothing_heavy_is_imported_before_something_is_measured(words, tmp_path):
    code = (
        "import sys\nfrom glabench.cli import app\n"
        f"try:\n    app({list(words)!r})\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'triton', 'transformers', 'matplotlib')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_list_shows_every_implementation_and_what_families_resolve_to():
    entries = json.loads(run("list", "--device", "cpu", "--json").stdout)
    assert (
        entries["families"]["gla"] == "gla_chunk_torch"
        and entries["families"]["attention"] == "attention_sdpa"
    )
    text = run("list", "--device", "cpu").stdout
    assert "gla_chunk_torch *" in text and "attention_fa2" in text and "glabench[peers]" in text


def test_dry_run_prints_cells_memory_and_time_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("speed", "--device", "cpu", "--seqlen", "1k..4k", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert len(plan["cells"]) == 3 * 2 * 4 and plan["time_s"] > 0 and plan["memory_mib"] > 0
    assert {c["status"] for c in plan["cells"]} == {"planned"} and list(tmp_path.iterdir()) == []
    assert "gla -> gla_chunk_torch" in done.stderr


def test_dry_run_says_what_cannot_run():
    done = run("run", "fig2", "--device", "cpu", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    reasons = {c["impl"]: (c["status"], c["reason"]) for c in plan["cells"]}
    assert reasons["attention_fa2"][0] == "unavailable" and "pip install" in reasons["attention_fa2"][1]
