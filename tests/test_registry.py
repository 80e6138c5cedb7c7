"""What can be measured and why not: ids, families, files, and third parties' packages."""

import json
import os
import subprocess
import sys

import pytest

from glabench import registry
from glabench.errors import UnavailableError, UsageError
from glabench.installed import has_cuda, is_installed
from glabench.registry import FAMILIES, Implementation, best, family_of, from_file, implementations, resolve

EXPECTED = {
    "gla_recurrent",
    "gla_chunk_torch",
    "retention_chunk_torch",
    "linear_attention_chunk_torch",
    "mamba_torch",
    "mamba2_torch",
    "attention_sdpa",
    "attention_fa2",
    "attention_cudnn",
    "attention_fa4",
    "mamba_ssm",
    "mamba2_ssm",
    "gla_chunk_fla",
    "retention_chunk_fla",
    "linear_attention_chunk_fla",
    "simple_gla_chunk_fla",
}
CASE = {"dtype": "fp32", "passes": "fwd_bwd", "heads": 2, "d_k": 16, "d_v": 32, "head_dim": 64}


def test_the_promised_implementations_are_listed():
    assert set(implementations()) >= EXPECTED


def test_every_implementation_says_why_it_cannot_run_or_runs():
    for impl in implementations().values():
        for device in ("cpu", "cuda"):
            reason = impl.unavailable(device)
            assert reason is None or (reason and "\n" not in reason)
        assert impl.family in FAMILIES and impl.label and set(impl.passes) <= {"fwd", "bwd", "decode"}


@pytest.mark.skipif(is_installed("flash_attn"), reason="flash-attn is installed here")
def test_a_missing_extra_is_named_with_its_install_line():
    reason = implementations()["attention_fa2"].unavailable("cuda")
    assert reason == "flash_attn is not installed: pip install 'glabench[peers]' --no-build-isolation"
    with pytest.raises(UnavailableError) as caught:
        resolve(("attention_fa2",), "cuda")
    assert "glabench[peers]" in caught.value.fix


@pytest.mark.parametrize("family", ["gla", "attention", "mamba", "mamba2", "retention", "linear_attention"])
def test_every_family_runs_on_a_cpu(family):
    assert best(family, "cpu").unavailable("cpu") is None


def test_the_longest_family_name_wins():
    assert family_of("mamba2_ssm") == "mamba2" and family_of("mamba_ssm") == "mamba"
    assert family_of("simple_gla_chunk_fla") == "simple_gla" and family_of("glacier") is None


def test_an_unknown_id_gets_the_nearest():
    with pytest.raises(UsageError) as caught:
        resolve(("gla_chnk_torch",), "cpu")
    assert caught.value.fix == "did you mean 'gla_chunk_torch'?"


def test_a_family_and_its_own_id_are_one_arm_too_many():
    arm = best("gla", "cpu").id
    with pytest.raises(UsageError, match="asked for twice"):
        resolve(("gla", arm), "cpu")


def test_unsupported_cases_have_reasons():
    impl = Implementation(
        id="x", label="x", family="gla", load=lambda: None, dtypes=("bf16",), passes=("fwd",)
    )
    assert impl.unsupported(CASE, "cuda") == "dtype fp32 is not among bf16"
    assert impl.unsupported(CASE | {"dtype": "bf16"}, "cuda") == "no backward pass"
    assert impl.unsupported(CASE | {"dtype": "bf16", "passes": "fwd"}, "cuda") is None


def test_a_step_and_a_sequence_are_different_asks():
    step, layer = implementations()["gla_step_torch"], implementations()["gla_chunk_torch"]
    assert step.unsupported(CASE | {"passes": "decode"}, "cpu") is None
    assert "glabench decode" in step.unsupported(CASE | {"passes": "fwd"}, "cpu")
    assert "single token" in layer.unsupported(CASE | {"passes": "decode"}, "cpu")
    assert best("gla", "cpu", "decode") is step and best("gla", "cpu") is layer
    ((_, found),) = resolve(("attention",), "cpu", passes="decode")
    assert found.id == "attention_cached_sdpa"


def test_the_version_follows_the_source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def gla_mine(q, k, v, g):\n    return v\n")
    before = from_file(f"{path}:gla_mine", None).version()
    path.write_text("def gla_mine(q, k, v, g):\n    return v + 0\n")
    assert from_file(f"{path}:gla_mine", None).version() != before


def test_our_versions_follow_the_kernels_they_import():
    path = implementations()["gla_chunk_torch"].path
    names = {p.name for p in registry._sources(path)}
    assert path.name in names and len(names) > 1


@pytest.mark.parametrize(
    ("spec", "family", "what"),
    [
        ("nowhere.py:f", "gla", "no file"),
        ("{file}:g", "gla", "no 'g' in mine.py"),
        ("{file}:f", None, "no family for"),
        ("{file}:f", "glas", "no family 'glas'"),
        ("{file}:", "gla", "not FILE.py:FUNCTION"),
        ("{broken}:f", "gla", "cannot read broken.py"),
    ],
)
def test_a_bad_file_spec_is_named(tmp_path, spec, family, what):
    (tmp_path / "mine.py").write_text("def f(q, k, v, g):\n    return v\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(UsageError) as caught:
        from_file(spec.format(file=tmp_path / "mine.py", broken=tmp_path / "broken.py"), family)
    assert what in caught.value.what


def test_a_spec_names_the_same_implementation_in_another_process(tmp_path):
    (tmp_path / "mine.py").write_text("def f(q, k, v, g):\n    return v\n")
    mine = from_file(f"{tmp_path / 'mine.py'}:f", "gla")
    again = registry.from_spec(json.loads(json.dumps(mine.spec())))
    assert (again.id, again.family, again.load()(1, 2, 3, 4)) == ("mine:f", "gla", 3)
    ours = implementations()["gla_chunk_torch"]
    assert registry.from_spec(ours.spec()) is ours


PLUGIN = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "my-mixer"
version = "1.2.3"
[project.entry-points."glabench.impls"]
gla_mine = "my_mixer:load"
""",
    "my_mixer.py": '''
"""A third party's GLA: the recurrence, a token at a time."""
from glabench.registry import implementation


@implementation(label="GLA of a third party", devices=("cpu",), dtypes=("fp32",))
def load():
    import torch

    def gla_mine(q, k, v, g):
        S, out = 0.0, []
        for t in range(q.shape[1]):
            S = S * g[:, t].exp().unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            out.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2) * q.shape[-1] ** -0.5)
        return torch.stack(out, 1)

    return gla_mine
''',
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A real package, built and installed into a folder of its own; yields the environment to see it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in PLUGIN.items():
        (source / name).write_text(text)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True, timeout=120)
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def glabench(*words, env, cwd):
    command = [sys.executable, "-m", "glabench", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=120)


def test_a_third_partys_package_is_listed_with_its_source(plugin, tmp_path):
    done = glabench("list", "--json", env=plugin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine = next(i for i in json.loads(done.stdout)["implementations"] if i["id"] == "gla_mine")
    assert mine["source"] == "my-mixer" and mine["runs"] and mine["family"] == "gla"


def test_a_third_partys_package_is_checked_and_measured(plugin, tmp_path):
    words = ("--impl", "gla_mine", "--seqlen", "64", "--passes", "fwd", "--device", "cpu", "--json")
    done = glabench("speed", *words, env=plugin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["status"] == "ok" and row["time_ms"] > 0 and row["err_ratio"] <= row["tol_ratio"]


def test_a_third_party_that_does_not_import_takes_nothing_else_down(plugin, tmp_path):
    broken = tmp_path / "site"
    (broken / "bad-1.0.dist-info").mkdir(parents=True)
    (broken / "bad-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (broken / "bad-1.0.dist-info" / "entry_points.txt").write_text("[glabench.impls]\ngla_bad = bad:load\n")
    (broken / "bad.py").write_text("import nothing_of_this_name\n")
    env = plugin | {"PYTHONPATH": f"{broken}{os.pathsep}{plugin['PYTHONPATH']}"}
    done = glabench("list", "--json", env=env, cwd=tmp_path)
    bad = next(i for i in json.loads(done.stdout)["implementations"] if i["id"] == "gla_bad")
    assert not bad["runs"] and "nothing_of_this_name" in bad["reason"]


@pytest.mark.skipif(has_cuda(), reason="this machine has a GPU")
def test_a_gpu_only_arm_says_so_on_a_cpu():
    assert "GPU" in implementations()["attention_cudnn"].unavailable("cuda")
