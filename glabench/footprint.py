"""What one call needs of memory beyond its inputs, split into what it is for. MiB = 2**20 bytes.

extra      peak during the call minus what was held just before (inputs and output gradient excluded)
outputs    what the call hands back: the output, and for a backward pass the gradients
saved      held between forward and backward beyond the output: what autograd keeps
workspace  extra - outputs - saved, at least 0: scratch. The peak may come when saved tensors are partly
           freed and gradients partly made, so the parts may exceed the peak; then there is no scratch to see
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glabench import nvml
from glabench.errors import UnavailableError

MIB = 2**20
PARTS = ("extra_mem_mib", "outputs_mib", "saved_mib", "workspace_mib", "peak_mem_mib", "reserved_mib")
CLEAR_REFS = Path("/proc/self/clear_refs")
SETTLE_S, SETTLE_LOOKS = 0.005, 20
RESET_PEAK = "5"  # proc(5): resets VmHWM to what is resident now

Forward = Callable[[], Any]  # -> the output
Backward = Callable[[Any], Any]  # the output -> the gradients


def measure(forward: Forward, backward: Backward | None, inputs: list[Any], device: str) -> dict[str, Any]:
    """A memory row's fields for one call, measured twice after it has run warm.

    `repeats_equal` says whether both agreed to the byte; it is empty on a CPU, where resident pages
    are counted and not allocations. Raises UnavailableError where peak memory cannot be read.
    """
    is_cuda = device.startswith("cuda")
    once = _on_cuda if is_cuda else _on_cpu
    if not is_cuda:
        reset_peak()  # before the warm-up: where it cannot be done there is nothing to wait for
    for _ in range(2):
        out = forward()
        if backward is not None:
            backward(out)
        del out
    runs = [once(forward, backward, inputs, device) for _ in range(2)]
    if is_cuda:  # what is held too long before a call and let go during it hides some of its memory
        chosen = max(reversed(runs), key=lambda run: run["extra_mem_mib"])
        equal = "yes" if _allocated(runs[0]) == _allocated(runs[1]) else "no"
    else:  # other pages come and go with it: the smaller one has less of them
        chosen, equal = min(runs, key=lambda run: run["extra_mem_mib"]), ""
    return {
        "meter": "cuda_allocator" if is_cuda else "peak_rss",
        **chosen,
        "inputs_mib": storage_bytes(inputs, ()) / MIB,
        "device_mem_mib": _device_mib(device) if is_cuda else None,
        "repeats_equal": equal,
    }


def _allocated(run: dict[str, float | None]) -> list[float | None]:
    """Without what the allocator keeps in reserve: that depends on what ran before."""
    return [value for name, value in run.items() if name != "reserved_mib"]


def storage_bytes(tensors: Any, beyond: Any) -> int:
    """Bytes of the distinct storages behind `tensors` that are not also behind `beyond`."""
    known = {t.untyped_storage().data_ptr() for t in beyond}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in found.items() if pointer not in known)


def _split(
    *, extra: float, outputs: float, gradients: float, saved: float, peak: float, reserved: float | None
) -> dict[str, float | None]:
    """Bytes -> MiB, with the workspace as what is left."""
    handed = outputs + gradients
    workspace = max(0.0, extra - handed - saved)
    values = (extra, handed, saved, workspace, peak, reserved)
    return {name: None if value is None else value / MIB for name, value in zip(PARTS, values, strict=True)}


def _on_cuda(
    forward: Forward, backward: Backward | None, inputs: list[Any], device: str
) -> dict[str, float | None]:
    import torch

    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = _settled_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = forward()
    torch.cuda.synchronize(device)
    between = torch.cuda.memory_allocated(device)
    outputs, gradients = storage_bytes([out], inputs), 0
    saved = 0
    if backward is not None:
        saved = max(0, between - before - outputs)
        made = backward(out)
        torch.cuda.synchronize(device)
        gradients = storage_bytes(made, [*inputs, out])
        del made
    peak = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return _split(
        extra=peak - before, outputs=outputs, gradients=gradients, saved=saved, peak=peak, reserved=reserved
    )


def _settled_bytes(device: str) -> int:
    """Allocated, once the thread that ran the last backward pass has let go of its gradients."""
    import torch

    last, now = None, torch.cuda.memory_allocated(device)
    for _ in range(SETTLE_LOOKS):
        if now == last:
            break
        time.sleep(SETTLE_S)
        last, now = now, torch.cuda.memory_allocated(device)
    return now


def _device_mib(device: str) -> float | None:
    """With what the allocator does not see: the context, libraries, their workspaces."""
    import torch

    return nvml.Gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}").own_mib()


def _on_cpu(
    forward: Forward, backward: Backward | None, inputs: list[Any], device: str
) -> dict[str, float | None]:
    _return_free_memory()
    reset_peak()
    before = status_bytes("VmRSS")
    out = forward()
    outputs, gradients, saved = storage_bytes([out], inputs), 0, 0
    if backward is not None:
        _return_free_memory()
        saved = max(0, status_bytes("VmRSS") - before - outputs)
        made = backward(out)
        gradients = storage_bytes(made, [*inputs, out])
        del made
    peak = status_bytes("VmHWM")
    return _split(
        extra=max(0, peak - before),
        outputs=outputs,
        gradients=gradients,
        saved=saved,
        peak=peak,
        reserved=None,
    )


def reset_peak() -> None:
    """Start VmHWM anew at what is resident now. Raises UnavailableError where the system forbids it."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError as err:
        raise UnavailableError(
            f"peak memory cannot be reset: {err.strerror}",
            where=str(CLEAR_REFS),
            fix="run where /proc is writable for its owner, or measure on a GPU",
        ) from err


def _return_free_memory() -> None:
    """Give freed heap pages back, or a later allocation would reuse them and not be seen to grow."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def status_bytes(name: str) -> int:
    """VmRSS or VmHWM of this process. Raises UnavailableError off Linux."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise UnavailableError(f"no {name}", where="/proc/self/status", fix="run on Linux")
