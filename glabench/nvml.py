"""Clocks, temperature, power and neighbours of an NVIDIA GPU, read from the driver's own library.

Only reads; no setting is ever changed. Where the library or a value is missing, the field is empty.
"""

import ctypes
import functools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SM_CLOCK, GPU_TEMPERATURE = 1, 0  # NVML_CLOCK_SM, NVML_TEMPERATURE_GPU
TOO_SMALL = 7  # NVML_ERROR_INSUFFICIENT_SIZE
MAX_PROCESSES = 128
READ_EVERY_S = 0.05
OTHER_CLOCK = 0.03  # a sample taken at a clock this far from the median one counts as throttled
MIB = 2**20
# nvmlClocksThrottleReasons; an idle GPU (1) is not throttled
THROTTLE = {
    0x2: "clocks_set",
    0x4: "power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One look: MHz, degrees Celsius, watts, and the throttle reasons as bits."""

    sm_mhz: int | None
    temp_c: int | None
    power_w: float | None
    throttle: int


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


@functools.cache
def open_library() -> Any:
    """The driver's NVML, initialised, or None."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


class Gpu:
    """One GPU by its UUID ("GPU-..."); every answer may be None."""

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._library = library or open_library()
        self._handle = ctypes.c_void_p()
        if self._library is not None and self._library.nvmlDeviceGetHandleByUUID(
            uuid.encode(), ctypes.byref(self._handle)
        ):
            self._library = None

    def _number(self, function: str, *more: int, kind: Any = ctypes.c_uint) -> int | None:
        if self._library is None:
            return None
        value = kind(0)
        try:
            code = getattr(self._library, function)(self._handle, *more, ctypes.byref(value))
        except AttributeError:  # an older driver
            return None
        return value.value if code == 0 else None

    def read(self) -> Reading:
        milliwatts = self._number("nvmlDeviceGetPowerUsage")
        return Reading(
            self._number("nvmlDeviceGetClockInfo", SM_CLOCK),
            self._number("nvmlDeviceGetTemperature", GPU_TEMPERATURE),
            None if milliwatts is None else milliwatts / 1e3,
            self._number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong) or 0,
        )

    def power_limit_w(self) -> float | None:
        milliwatts = self._number("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1e3

    def driver(self) -> str | None:
        if self._library is None:
            return None
        text = ctypes.create_string_buffer(96)
        code = self._library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        return text.value.decode() if code == 0 else None

    def processes(self) -> dict[int, int] | None:
        """Process id -> bytes held, of all compute processes; ids may be another namespace's."""
        if self._library is None:
            return None
        infos = (_Process * MAX_PROCESSES)()
        count = ctypes.c_uint(MAX_PROCESSES)
        try:
            code = self._library.nvmlDeviceGetComputeRunningProcesses_v3(
                self._handle, ctypes.byref(count), infos
            )
        except AttributeError:
            return None
        if code not in (0, TOO_SMALL):
            return None
        return {info.pid: info.used_bytes for info in infos[: min(count.value, MAX_PROCESSES)]}

    def own_mib(self) -> float | None:
        """What this process holds on the GPU, as the driver sees it."""
        held = (self.processes() or {}).get(os.getpid())
        return held / MIB if held and held < 2**63 else None  # all bits set: not known

    def shared(self) -> str:
        """Whether processes that are neither we nor our siblings use the GPU; "" where ids mean nothing."""
        processes = self.processes()
        if processes is None or (processes and os.getpid() not in processes):
            return ""
        parent = os.getppid()
        foreign = [p for p in processes if p != os.getpid() and _parent_of(p) != parent]
        return "yes" if foreign else "no"


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def throttle_words(bits: int) -> str:
    return " ".join(word for bit, word in THROTTLE.items() if bits & bit)


class Watch:
    """Readings between samples, at most one each 50 ms, and the clock each sample was taken at."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.readings: list[Reading] = []
        self.clocks: list[int] = []  # one a sample
        self._read_at = -1.0

    def look(self) -> None:
        """Read if the last reading is old; never inside a timed window."""
        now = time.monotonic()
        if now - self._read_at >= READ_EVERY_S:
            self.readings.append(self.gpu.read())
            self._read_at = time.monotonic()

    def note_sample(self) -> None:
        self.look()
        clock = self.readings[-1].sm_mhz
        if clock is not None:
            self.clocks.append(clock)

    def throttled(self) -> int | None:
        """Samples taken at another clock than the median one; None without clocks."""
        if not self.clocks:
            return None
        middle = statistics.median(self.clocks)
        return sum(abs(clock - middle) > OTHER_CLOCK * middle for clock in self.clocks)

    def summary(self) -> dict[str, Any]:
        """The row's fields: median clock, temperature and power, every throttle reason seen."""
        bits = 0
        for reading in self.readings:
            bits |= reading.throttle
        return {
            "sm_mhz": _median([r.sm_mhz for r in self.readings]),
            "temp_c": _median([r.temp_c for r in self.readings]),
            "power_w": _median([r.power_w for r in self.readings]),
            "throttle": throttle_words(bits),
            "throttled": self.throttled(),
            "shared_device": self.gpu.shared(),
        }


def _median(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None
