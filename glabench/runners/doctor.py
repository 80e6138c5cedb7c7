"""`glabench doctor`: what this machine is, what it reaches, and what would spoil a timing here."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glabench import env, tables
from glabench.installed import (
    DISTRIBUTIONS,
    INSTALL,
    cuda_device_count,
    installed_version,
    is_installed,
    ptxas_version,
    torch_cuda_version,
)
from glabench.kernels import plan_files
from glabench.pool import Worker

GOOD, WARN, BAD = "ok", "warn", "bad"
SAFE_PTXAS = (13, 3)  # older assemblers have miscompiled kernels with several products on sm_90
BUSY_LOAD = 0.5  # of the cores, before we add ours
LIMIT_S = 120.0


def examine(device: str) -> dict[str, Any]:
    """Findings {"name", "value", "level", "fix"}; `ok` is false where one is bad."""
    device = env.pick_device(device)
    worker = Worker("doctor")
    try:
        outcome = worker.call(
            "glabench.runners.cells:describe",
            {"device": device, "threads": env.usable_cores(), "seconds": 1.0},
            limits={"other": LIMIT_S},
        )
    finally:
        worker.close()
    described = outcome.value if outcome.status == "ok" else {}
    findings = [*_host(), *_software(), *_ceilings(outcome, described)]
    findings += _gpu(described) if device.startswith("cuda") else _no_gpu()
    return {"device": device, "ok": all(f["level"] != BAD for f in findings), "findings": findings}


def _finding(name: str, value: Any, level: str = GOOD, fix: str = "") -> dict[str, str]:
    return {"name": name, "value": str(value), "level": level, "fix": fix}


def _host() -> Iterator[dict[str, str]]:
    import psutil

    cores = env.usable_cores()
    yield _finding("cpu", f"{env.cpu_model()}, {cores} cores for this process")
    if cores < 2:
        yield _finding("cores", cores, WARN, "one core times and waits at once: expect wide intervals")
    load = os.getloadavg()[0]
    level = WARN if load > BUSY_LOAD * cores else GOOD
    yield _finding(
        "load average", f"{load:.2f}", level, "wait until other work is done" if level == WARN else ""
    )
    memory = psutil.virtual_memory()
    low = memory.available < 2 * 2**30
    yield _finding(
        "free memory",
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB",
        WARN if low else GOOD,
        "the oracle needs about 1 GiB: close something" if low else "",
    )
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        slow = governor in ("powersave", "conservative", "ondemand")
        yield _finding(
            "cpu governor",
            governor,
            WARN if slow else GOOD,
            "CPU timings drift with the clock; 'performance' is steadier" if slow else "",
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _software() -> Iterator[dict[str, str]]:
    cuda = torch_cuda_version()
    yield _finding("torch", f"{installed_version('torch')}, {'CUDA ' + cuda if cuda else 'CPU build'}")
    for module in ("triton", *DISTRIBUTIONS):
        if is_installed(module) and installed_version(module) != "none":
            yield _finding(module, installed_version(module))
        else:
            yield _finding(module, "not installed", GOOD, INSTALL.get(module, ""))


def _ceilings(outcome: Any, described: dict[str, Any]) -> Iterator[dict[str, str]]:
    if outcome.status != "ok":
        yield _finding(
            "device", f"{outcome.status}: {outcome.reason}", BAD, "nothing can be measured here; see --debug"
        )
        return
    reached = described["ceilings"]
    yield _finding("copy bandwidth", f"{reached['copy_gb_s']:.0f} GB/s, read and write")
    for dtype, rate in reached["matmul_tflop_s"].items():
        yield _finding(f"matrix product {dtype}", f"{rate:.4g} TFLOP/s")


def _no_gpu() -> Iterator[dict[str, str]]:
    if cuda_device_count() and torch_cuda_version() is None:
        yield _finding("gpu", "there is one, but torch is a CPU build", WARN, "install a CUDA build of torch")
    else:
        yield _finding(
            "gpu", "none", GOOD, "GPU implementations are listed as unavailable; --device cpu is the default"
        )


def _gpu(described: dict[str, Any]) -> Iterator[dict[str, str]]:
    gpu = described.get("gpu") or {}
    yield _finding(
        "gpu",
        f"{gpu.get('name')}, {gpu.get('sm_count')} multiprocessors, {gpu.get('memory_mib')} MiB, "
        f"driver {gpu.get('driver')}",
    )
    slug = env.device_slug(gpu.get("name"))
    plans = plan_files.digest(slug)
    made = f"measured ones for {slug} ({plans})" if plans else f"none for {slug}: the rule's"
    yield _finding("kernel plans", made, GOOD, "" if plans else "glabench tune")
    state = described.get("state") or {}
    if state.get("sm_mhz"):
        yield _finding(
            "clocks", f"{state['sm_mhz']:.0f} MHz SM, {state.get('temp_c')} C, {state.get('power_w')} W"
        )
    else:
        fix = "NVML does not answer: rows will lack clock, temperature and throttling"
        yield _finding("clocks", "unknown", WARN, fix)
    if state.get("throttle"):
        yield _finding(
            "throttling",
            state["throttle"],
            WARN,
            "let the GPU cool; rows say when it throttles",
        )
    if state.get("shared_device") == "yes":
        yield _finding("other processes", "on this GPU", WARN, "stop them: a shared GPU spoils every timing")
    version = ptxas_version()
    if version and _as_tuple(version) < SAFE_PTXAS and str(gpu.get("capability")) == "9.0":
        yield _finding(
            "ptxas",
            version,
            WARN,
            "below 13.3 it has assembled wrong code here: install nvidia-cuda-nvcc, set TRITON_PTXAS_PATH",
        )
    elif version:
        yield _finding("ptxas", version)


def _as_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def show(found: dict[str, Any]) -> None:
    tables.show(
        ("", "what", "value", "what to do"),
        (
            (f["level"] if f["level"] != GOOD else "", f["name"], f["value"], f["fix"])
            for f in found["findings"]
        ),
    )
    bad = sum(f["level"] == BAD for f in found["findings"])
    warned = sum(f["level"] == WARN for f in found["findings"])
    tables.say(f"{found['device']}: {bad} bad, {warned} to mind")
