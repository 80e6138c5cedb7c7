"""What made a number: hardware, driver, versions, git state; written as run.json beside the rows.

No host name, user name, absolute path or serial number goes into it.
"""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from glabench import __version__
from glabench.errors import ResultsError, UnavailableError, UsageError
from glabench.installed import (
    INSTALL,
    cuda_device_count,
    cuda_device_name,
    device_slug,
    has_cuda,
    installed_version,
    ptxas_version,
)
from glabench.kernels import plan_files
from glabench.results import write_whole
from glabench.rows import SCHEMA

PEERS = ("flash_attn", "mamba_ssm", "causal_conv1d", "fla")
PACKAGES = ("numpy", "pandas", "matplotlib", "typer", "transformers", "accelerate", "liger-kernel")
# variables that change what is measured; the value of one that holds a path is stored as "set"
VARIABLES = (
    "GLABENCH_TUNE_MS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES",
    "FLA_CACHE_RESULTS",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_AUTOTUNING",
    "TRITON_INTERPRET",
    "TRITON_PTXAS_PATH",
)


def now_utc() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def pick_device(asked: str) -> str:
    """ "auto" -> "cuda" where a GPU can be used, else "cpu"; "cuda:1" is kept. Raises UsageError."""
    if asked == "auto":
        return "cuda" if has_cuda() else "cpu"
    kind, colon, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise UsageError(f"no device {asked!r}", where="--device", fix="use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not has_cuda():
        raise UnavailableError(
            "no usable GPU", where="--device", fix=f"use {INSTALL['cuda']}, or --device cpu"
        )
    if kind == "cuda" and int(index or 0) >= cuda_device_count():
        raise UsageError(f"no GPU {index}", where="--device", fix=f"there are {cuda_device_count()}")
    return asked


def gpu_name(device: str) -> str | None:
    """Name of the GPU that `device` means, from the driver; None for a CPU."""
    return cuda_device_name(device_index(device)) if device.startswith("cuda") else None


def device_index(device: str) -> int:
    """N of "cuda:N"; 0 for "cuda" and for a CPU."""
    return int(device.partition(":")[2] or 0)


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirtiness of the checkout that `folder` is in; empty outside one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ("git", "-C", str(folder), *words), capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "--short=12", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def source_digest() -> str:
    """Digest of the package's own files: names the code where there is no git checkout."""
    whole = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def comparable(described: dict[str, Any]) -> dict[str, Any]:
    """The part that decides whether two runs may be compared: its digest is the environment id."""
    gpu = described.get("gpu") or {}
    variables = {
        name: ("set" if "/" in os.environ[name] else os.environ[name])
        for name in VARIABLES
        if name in os.environ
    }
    plans = plan_files.digest(device_slug(gpu["name"])) if gpu.get("name") else None
    if plans:  # what our kernels' launches are taken from, whichever folder that is
        variables[plan_files.FOLDER] = plans
    return {
        "gpu": gpu.get("name"),
        "capability": gpu.get("capability"),
        "gpu_memory_mib": gpu.get("memory_mib"),
        "sm_count": gpu.get("sm_count"),
        "l2_bytes": gpu.get("l2_bytes"),
        "driver": gpu.get("driver"),
        "power_limit_w": gpu.get("power_limit_w"),
        "uuid_digest": gpu.get("uuid_digest"),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": described.get("threads"),
        "torch": described.get("torch"),
        "cuda": described.get("cuda"),
        "cudnn": described.get("cudnn"),
        "triton": installed_version("triton"),
        "ptxas": ptxas_version() if gpu else None,
        "peers": {name: installed_version(name) for name in PEERS},
        "python": ".".join(platform.python_version_tuple()[:2]),
        "tf32": described.get("tf32"),
        "variables": variables,
    }


def digest(part: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:12]


def relative_argv(argv: list[str]) -> list[str]:
    """The command as typed, absolute paths cut to their last part."""
    return [Path(word).name if word.startswith(("/", "~")) else word for word in argv]


def make_run(
    *, described: dict[str, Any], argv: list[str], suite: str, suite_digest: str, regime: dict
) -> dict:
    """One entry of run.json; `id` is the digest of its comparable part."""
    part = comparable(described)
    return {
        "id": digest(part),
        "glabench": __version__,
        **git_state(Path(__file__).parent),
        "source_digest": source_digest(),
        "suite": suite,
        "suite_digest": suite_digest,
        "argv": relative_argv(argv),
        "started_utc": now_utc(),
        "finished_utc": None,
        "regime": regime,
        "comparable": part,
        "noted": {
            "os": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "packages": {n: _version(n) for n in PACKAGES},
        },
        "measured": described.get("ceilings", {}),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a results folder, oldest first. Raises ResultsError for a file that is not ours."""
    path = folder / "run.json"
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = data["runs"]
        if data["schema"] != SCHEMA or not all("id" in run for run in runs):
            raise ValueError(f"schema {data['schema']}")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ResultsError(
            f"run.json is not readable: {err}", where=str(path), fix="choose another folder"
        ) from err
    return runs


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what makes the environments of two runs differ."""
    a, b = one.get("comparable", {}), other.get("comparable", {})
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Add `run`, or replace the entry that started at the same second with the same command and id."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["id"], entry.get("started_utc"), entry.get("argv")

    lock = os.open(folder, os.O_RDONLY)  # sweeps of two GPUs may share a folder
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [r for r in read_runs(folder) if key(r) != key(run)]
        write_whole(
            folder / "run.json", json.dumps({"schema": SCHEMA, "runs": [*runs, run]}, indent=1) + "\n"
        )
    finally:
        os.close(lock)
