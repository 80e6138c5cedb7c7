"""Timers: one call's device time, host time and wall time.

Knows nothing of families: a call is a function without arguments. Rules and reasons: docs/METHOD.md.
"""

import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from glabench import nvml, stats

Call = Callable[[], Any]

WARM_CALLS, WARM_MS, WARM_AGREE = 5, 25.0, 0.05
WARM_LIMIT_S = {"cuda": 2.0, "cpu": 0.25}  # a slow call is warm after one or two
HARD_STOP = 12  # times max_busy_s, where even min_samples gives way
SHORT_MS = 0.02  # events resolve 0.5 us: shorter calls are timed in batches
BATCH_MS, MAX_BATCH = 0.2, 64
MAX_COPIES = 256  # input copies that a batch rotates through, at most
SPIN_MARGIN, MAX_SPIN_MS = 1.2, 200.0
MAX_LATE, LONGER = 50, 1.1  # samples that are taken again, and how much longer the spin is then
DETECT_SPIN_MS = 1.0  # long against the noise of the host time it is compared with
ASYNC_FRAC, ASYNC_MS = 0.2, 0.05
OTHERS_SHARE, LOAD_WINDOW_S = 0.1, 0.1  # of one core; the system counts in ticks of 10 ms
PLAIN_SHARE, PLAIN_S = 0.5, 0.03  # of one core, and ticks enough, to tell in a shorter window too
THROTTLED_SHARE, FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 0.05, 2.0
WALL_S, WALL_CALLS = 0.05, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When to stop sampling; the busy time counts what the samples measured, not the harness."""

    min_samples: int
    max_samples: int
    min_busy_s: float
    max_busy_s: float
    interval_frac: float

    def enough(self, samples: list[float], busy_s: float) -> bool:
        """Known well enough, or at a limit. `min_samples` is exceeded in cost up to 12 x max_busy_s."""
        if len(samples) >= self.max_samples or busy_s >= HARD_STOP * self.max_busy_s:
            return True
        if len(samples) < self.min_samples:
            return False
        return busy_s >= self.max_busy_s or (
            busy_s >= self.min_busy_s and stats.summarise(samples).converged(self.interval_frac)
        )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, then not again: a collection inside a sample would be timed."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def time_calls(make_call: Callable[[int], Call], call_bytes: int, plan: Plan, device: str) -> dict[str, Any]:
    """Warm up, sample, and tell how: the speed row's fields of one visit, `samples_ms` first.

    `make_call(i)` gives the i-th equivalent call, each on inputs of its own of `call_bytes` bytes; more
    than one is made only for calls too short to time singly.
    """
    with no_garbage_collection():
        if device.startswith("cuda"):
            with torch.cuda.device(device):
                return _CudaTimer(torch.device(device)).measure(make_call, call_bytes, plan)
        return _time_on_cpu(make_call(0), plan)


def is_warm(times_ms: list[float], spent_s: float, limit_s: float) -> bool:
    """5 calls, 25 ms and the last three within 5% of their median; or at least one call at the limit."""
    if times_ms and spent_s >= limit_s:
        return True
    if len(times_ms) < WARM_CALLS or sum(times_ms) < WARM_MS:
        return False
    last = times_ms[-3:]
    return max(last) - min(last) <= WARM_AGREE * statistics.median(last)


# --- CPU --------------------------------------------------------------------------------------------------


def _time_on_cpu(call: Call, plan: Plan) -> dict[str, Any]:
    def once() -> float:
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1e3

    warm, begun = [], time.perf_counter()
    while not is_warm(warm, time.perf_counter() - begun, WARM_LIMIT_S["cpu"]):
        warm.append(once())
    others = _OtherLoad()
    samples: list[float] = []
    while not plan.enough(samples, sum(samples) / 1e3):
        samples.append(once())
    middle = statistics.median(samples)
    return {
        "samples_ms": samples,
        "host_ms": middle,
        "wall_ms": middle,
        "timer": "perf_counter",
        "l2": "warm",
        "calls_per_sample": 1,
        "syncs_inside": "no",
        "async_outside": "no",
        "sm_mhz": None,
        "temp_c": None,
        "power_w": None,
        "throttle": "",
        "throttled": None,
        "shared_device": others.shared(),
    }


class _OtherLoad:
    """How much of the cores this process may use went to other processes since this was made."""

    def __init__(self) -> None:
        self._begun = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Busy seconds of our cores, by anyone; of this process; and the clock."""
        per_core = psutil.cpu_times(percpu=True)
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(per_core))
        cores = [core for i, core in enumerate(per_core) if i in usable]
        # the first eight fields: the two after them are counted in `user` and `nice` already
        busy = sum(sum(core[:8]) - core.idle - getattr(core, "iowait", 0.0) for core in cores)
        return busy, time.process_time(), time.perf_counter()

    def shared(self) -> str:
        """ "yes" where others took over a tenth of a core; "" where the window is too short to tell."""
        return _took_over(*(b - a for a, b in zip(self._begun, self._now(), strict=True)))


def _took_over(busy_s: float, own_s: float, window_s: float) -> str:
    others = busy_s - own_s
    if window_s < LOAD_WINDOW_S:
        return "yes" if others > max(PLAIN_SHARE * window_s, PLAIN_S) else ""
    return "yes" if others > OTHERS_SHARE * window_s else "no"


# --- CUDA -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sample:
    """One timed batch: device and host time of one call, and whether the device caught up with the host."""

    ms: float
    host_ms: float
    was_late: bool


@functools.cache
def _spin_cycles_per_ms(index: int) -> float:
    """How many cycles of torch's sleep kernel last a millisecond at this GPU's present clock."""
    cycles = 2_000_000
    torch.cuda._sleep(cycles)
    rates = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        rates.append(cycles / start.elapsed_time(end))
    return statistics.median(rates)


class _CudaTimer:
    """Times on one device; the flush buffer lives as long as the timer does."""

    def __init__(self, device: torch.device) -> None:
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(self.index)
        self.l2_bytes = properties.L2_cache_size
        self.buffer = torch.empty(2 * self.l2_bytes, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.watch = nvml.Watch(nvml.Gpu(f"GPU-{properties.uuid}"))
        self.mode, self.spin_ms, self.at = "cuda_events", 0.0, 0

    def sample(self, calls: list[Call], count: int = 1) -> Sample:
        """Flush L2, hold the stream while the host enqueues, time `count` calls; per call.

        The three modes: events behind a spin ("cuda_events_blocked"), events alone ("cuda_events"), and
        the host's clock around a full synchronisation ("wall").
        """
        self.buffer.zero_()
        if self.mode == "cuda_events_blocked":
            torch.cuda._sleep(int(self.spin_ms * _spin_cycles_per_ms(self.index)))
        elif self.mode == "wall":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        self.start.record()
        enqueued = time.perf_counter()
        for i in range(count):
            calls[(self.at + i) % len(calls)]()
        host_ms = (time.perf_counter() - enqueued) * 1e3
        self.end.record()
        was_late = self.mode == "cuda_events_blocked" and self.start.query()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - begun) * 1e3
        ms = wall_ms if self.mode == "wall" else self.start.elapsed_time(self.end)
        self.at = (self.at + count) % len(calls)
        return Sample(ms / count, host_ms / count, was_late)

    def measure(self, make_call: Callable[[int], Call], call_bytes: int, plan: Plan) -> dict[str, Any]:
        calls = [make_call(0)]
        self.watch.look()
        host_ms = self._warm_up(calls)
        is_async = self._escapes_the_stream(calls[0])
        syncs = not is_async and self._waits_inside(calls, host_ms)
        count = 1
        if is_async:
            self.mode = "wall"
        elif not syncs:
            self.mode = "cuda_events_blocked"
            count = self._batch(calls, make_call, call_bytes, host_ms)
            self.spin_ms = min(MAX_SPIN_MS, SPIN_MARGIN * host_ms * count + 0.02)
        samples, hosts = self._samples(calls, count, plan)
        rotated = call_bytes * len(calls) > 2 * self.l2_bytes
        return {
            "samples_ms": samples,
            "host_ms": host_ms if self.mode == "wall" else statistics.median(hosts),
            "wall_ms": self._wall_ms(calls, statistics.median(samples)),
            "timer": self.mode,
            "l2": "cold" if count == 1 or rotated else "warm",
            "calls_per_sample": count,
            "syncs_inside": "yes" if syncs else "no",
            "async_outside": "yes" if is_async else "no",
            **self.watch.summary(),
        }

    def _warm_up(self, calls: list[Call]) -> float:
        """Flushed like the samples, so that they run at the same clock; the host time of a warm call."""
        times, hosts, begun = [], [], time.perf_counter()
        while not is_warm(times, time.perf_counter() - begun, WARM_LIMIT_S["cuda"]):
            taken = self.sample(calls)
            times.append(taken.ms)
            hosts.append(taken.host_ms)
        return statistics.median(hosts[-5:])

    def _escapes_the_stream(self, call: Call) -> bool:
        """Whether work runs on a stream that events do not see: the device is busy after the last one."""
        walls, extras = [], []
        for _ in range(5):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            self.end.record()
            self.end.synchronize()
            seen = time.perf_counter()
            torch.cuda.synchronize()
            extras.append((time.perf_counter() - seen) * 1e3)
            walls.append((time.perf_counter() - begun) * 1e3)
            if sum(walls) > 1e3:
                break
        extra = min(extras)  # the host was late in the others
        return extra > ASYNC_MS and extra > ASYNC_FRAC * statistics.median(walls)

    def _waits_inside(self, calls: list[Call], host_ms: float) -> bool:
        """Whether the host waits for the stream: it synchronises, or launches more than the queue holds."""
        self.mode = "cuda_events_blocked"
        self.spin_ms = min(MAX_SPIN_MS, max(DETECT_SPIN_MS, 2 * host_ms))
        held = min(self.sample(calls).host_ms for _ in range(5))  # one that waits does so every time
        self.mode = "cuda_events"
        return held - host_ms > self.spin_ms / 2

    def _batch(
        self, calls: list[Call], make_call: Callable[[int], Call], call_bytes: int, host_ms: float
    ) -> int:
        """Calls a sample; a short call gets copies of its inputs, together more than L2 holds twice."""
        self.spin_ms = SPIN_MARGIN * host_ms + 0.02
        one_ms = max(1e-4, statistics.median(self.sample(calls).ms for _ in range(5)))
        if one_ms >= SHORT_MS:
            return 1
        copies = min(MAX_COPIES, 1 + 2 * self.l2_bytes // max(1, call_bytes))
        calls += [make_call(i) for i in range(1, copies)]
        for call in calls[1:]:
            call()
        return min(MAX_BATCH, math.ceil(BATCH_MS / one_ms))

    def _samples(self, calls: list[Call], count: int, plan: Plan) -> tuple[list[float], list[float]]:
        """Samples and host times; while the clock wanders, pause and take more, within the plan's limits.

        Where the host was late the device stood idle inside the sample: taken again, behind a longer spin.
        """
        samples: list[float] = []
        hosts: list[float] = []
        pause_s, wanted, retries = FIRST_PAUSE_S, 0, MAX_LATE
        while True:
            taken = self.sample(calls, count)
            if taken.was_late and retries and self.spin_ms < MAX_SPIN_MS:
                retries -= 1
                self.spin_ms = min(MAX_SPIN_MS, LONGER * self.spin_ms)
                continue
            self.watch.note_sample()
            samples.append(taken.ms)
            hosts.append(taken.host_ms)
            busy_s = sum(samples) * count / 1e3
            if len(samples) < wanted or not plan.enough(samples, busy_s):
                continue
            throttled = self.watch.throttled() or 0
            at_limit = len(samples) >= plan.max_samples or busy_s >= plan.max_busy_s
            if throttled <= THROTTLED_SHARE * len(samples) or pause_s > MAX_PAUSE_S or at_limit:
                return samples, hosts
            time.sleep(pause_s)
            pause_s, wanted = 2 * pause_s, len(samples) + plan.min_samples

    def _wall_ms(self, calls: list[Call], one_ms: float) -> float:
        """What a caller waits a call, back to back: one synchronisation before, one after."""
        count = max(1, min(WALL_CALLS, int(WALL_S * 1e3 / max(one_ms, 1e-3))))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count * 1e3
