"""What a device reaches at its best: copy bandwidth and matrix products, the roof over every floor."""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CPU_BUFFER, L3_FACTOR = 256 * 2**20, 8
PRODUCT = {"cpu": 1024, "cuda": 8192}  # side of the square matrix product
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and matrix products, `seconds` of each; event overhead.

    Medians at today's clocks and TF32 flag, on random normal data: constants draw less power.
    """
    is_cuda = device.startswith("cuda")
    if is_cuda:  # events are of the current device's stream, whatever device the tensors are on
        torch.cuda.set_device(torch.device(device) if ":" in device else 0)
    reached: dict[str, Any] = {"copy_gb_s": _copy_gb_s(device, seconds), "matmul_tflop_s": {}}
    side = PRODUCT["cuda" if is_cuda else "cpu"]
    for name in ("fp32", "bf16", "fp16") if is_cuda else ("fp32",):  # a CPU's half products are emulated
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        ms = _median_ms(functools.partial(torch.mm, a, b, out=out), device, seconds)
        reached["matmul_tflop_s"][name] = 2 * side**3 / ms / 1e9
    if is_cuda:
        reached["event_overhead_ms"] = _event_overhead_ms()
        torch.cuda.empty_cache()
    return reached


def _copy_gb_s(device: str, seconds: float) -> float:
    source = torch.randn(_buffer_bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    ms = _median_ms(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() * source.element_size() / ms / 1e6


def _buffer_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return 8 * torch.cuda.get_device_properties(device).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()
        wanted = L3_FACTOR * int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return CPU_BUFFER
    return min(CPU_BUFFER, max(wanted, CPU_BUFFER // 4))  # a server's whole L3 is shared by many


def _median_ms(call: Callable[[], Any], device: str, seconds: float) -> float:
    is_cuda = device.startswith("cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if is_cuda else (None, None)
    times: list[float] = []
    call()
    call()
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        if is_cuda:
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            at = time.perf_counter()
            call()
            times.append((time.perf_counter() - at) * 1e3)
    return statistics.median(times)


def _event_overhead_ms() -> float:
    """Time between two events with nothing between them, enqueued behind a spin."""
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
