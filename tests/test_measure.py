"""When sampling stops, what a timer sees of host and device, and what the driver tells about the clock."""

import dataclasses
import gc
import os
import subprocess
import sys
import time

import pytest
import torch
from fake_gpu import FakeGpu, FakeNvml

from glabench import footprint, measure, nvml
from glabench.errors import UnavailableError

PLAN = measure.Plan(min_samples=6, max_samples=20, min_busy_s=0.010, max_busy_s=0.050, interval_frac=0.02)


@pytest.mark.parametrize(
    ("samples", "is_enough"),
    [
        ([1.0] * 5, False),  # under min_samples
        ([1.0] * 9, False),  # under min_busy_s
        ([1.0] * 10, True),
        ([1.0, 1.1] * 6, False),  # the interval is too wide
        ([1.0, 1.1] * 10, True),  # max_samples
        ([9.0, 11.0] * 3, True),  # max_busy_s
        ([30.0], False),  # max_busy_s gives way to min_samples
        ([300.0, 200.0], False),
        ([310.0, 310.0], True),  # up to twelve times its length
    ],
)
def test_sampling_stops_when_it_knows_enough_or_at_a_limit(samples, is_enough):
    assert PLAN.enough(samples, sum(samples) / 1e3) == is_enough


@pytest.mark.parametrize(
    ("times", "spent_s", "warm"),
    [
        ([], 9.0, False),  # never without a call
        ([10.0] * 4, 0.1, False),
        ([10.0] * 5, 0.1, True),
        ([1.0] * 24, 0.1, False),  # 25 ms
        ([1.0] * 25, 0.1, True),
        ([10.0, 10.0, 10.0, 10.0, 10.6], 0.1, False),  # still moving
        ([90.0, 9.9, 10.0, 10.1, 10.0], 0.1, True),
        ([300.0], 1.0, True),  # slow calls are warm at the limit
    ],
)
def test_warm_is_five_calls_25_ms_and_three_alike(times, spent_s, warm):
    assert measure.is_warm(times, spent_s, 0.5) == warm


def test_a_cpu_call_is_timed_without_garbage_collection():
    seen = []

    def call():
        seen.append(gc.isenabled())
        time.sleep(0.004)

    taken = measure.time_calls(lambda i: call, 1, PLAN, "cpu")
    assert gc.isenabled() and not any(seen)
    assert 6 <= len(taken["samples_ms"]) <= 20 and min(taken["samples_ms"]) >= 4
    assert len(seen) >= len(taken["samples_ms"]) + measure.WARM_CALLS
    assert taken["timer"] == "perf_counter" and taken["sm_mhz"] is None


@pytest.mark.parametrize("samples", [6, 40])  # 0.06 s, a short window, and 0.4 s
def test_work_of_other_processes_on_our_cores_is_told(samples):
    cores = len(os.sched_getaffinity(0))
    spin = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(cores)]
    try:
        plan = dataclasses.replace(PLAN, min_samples=samples, max_samples=samples)
        taken = measure.time_calls(lambda i: lambda: time.sleep(0.01), 1, plan, "cpu")
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert taken["shared_device"] == "yes"


def test_a_short_window_tells_only_what_is_plain():
    assert measure._took_over(0.12, 0.06, 0.06) == "yes"
    assert measure._took_over(0.07, 0.06, 0.06) == measure._took_over(0.02, 0.0, 0.02) == ""
    assert measure._took_over(0.41, 0.4, 0.4) == "no" and measure._took_over(0.5, 0.4, 0.4) == "yes"


def time_on(gpu, call, call_bytes=10**6):
    made = []

    def make(i):
        made.append(i)
        return call

    timer = measure._CudaTimer(torch.device("cpu"))
    return timer.measure(make, call_bytes, PLAN), len(made)


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch, measure)


def test_gaps_between_launches_do_not_enter_the_device_time(gpu):
    """Host 2 ms, device 0.1 ms: unblocked events would say 2 ms."""
    taken, made = time_on(gpu, gpu.call(host_ms=2.0, device_ms=0.1))
    assert taken["samples_ms"] == pytest.approx([0.1] * len(taken["samples_ms"]), rel=1e-6)
    assert taken["host_ms"] == pytest.approx(2.0) and taken["wall_ms"] == pytest.approx(2.0, rel=0.06)
    assert (taken["timer"], taken["syncs_inside"], taken["async_outside"], made) == (
        "cuda_events_blocked",
        "no",
        "no",
        1,
    )
    assert (taken["l2"], taken["calls_per_sample"]) == ("cold", 1)


def test_wall_time_of_a_device_bound_call_is_the_devices(gpu):
    taken, _ = time_on(gpu, gpu.call(host_ms=0.1, device_ms=3.0))
    assert taken["wall_ms"] == pytest.approx(3.0, rel=0.05) and taken["host_ms"] == pytest.approx(0.1)


def test_a_call_that_waits_for_the_stream_is_timed_unblocked_and_says_so(gpu):
    taken, _ = time_on(gpu, gpu.call(host_ms=0.5, device_ms=0.5, waits=True))
    assert (taken["timer"], taken["syncs_inside"]) == ("cuda_events", "yes")
    assert 0.5 <= min(taken["samples_ms"]) <= 1.1, "the spin is not in it"


def test_work_on_another_stream_is_timed_by_the_wall(gpu):
    taken, _ = time_on(gpu, gpu.call(host_ms=0.1, device_ms=0.2, elsewhere_ms=2.0))
    assert (taken["timer"], taken["async_outside"]) == ("wall", "yes")
    assert min(taken["samples_ms"]) >= 2.0


def test_a_short_call_is_timed_in_batches_over_rotating_inputs(gpu):
    taken, made = time_on(gpu, gpu.call(host_ms=0.003, device_ms=0.004), call_bytes=100)
    assert taken["calls_per_sample"] in (50, 51), "0.2 ms of calls"
    assert made == 21, "twice 1000 bytes of L2, and one more"
    assert taken["samples_ms"] == pytest.approx([0.004] * len(taken["samples_ms"]), rel=1e-3)
    assert taken["l2"] == "cold"


def test_a_batch_whose_inputs_fit_in_l2_is_called_warm(gpu):
    taken, made = time_on(gpu, gpu.call(host_ms=0.003, device_ms=0.004), call_bytes=1)
    assert made == measure.MAX_COPIES and taken["l2"] == "warm"


def test_a_host_that_needs_longer_than_in_warm_up_gets_a_longer_spin(gpu):
    slow_from = 39  # calls: warm-up (24), looks for streams, syncs and length (5 each) are over
    calls = []

    def call():
        calls.append(gpu.now)
        gpu.call(host_ms=1.0 if len(calls) < slow_from else 2.5, device_ms=0.5)()

    taken, _ = time_on(gpu, call)
    assert len(calls) > slow_from and taken["host_ms"] == pytest.approx(2.5)
    assert taken["samples_ms"] == pytest.approx([0.5] * len(taken["samples_ms"]), rel=1e-6)


@pytest.mark.parametrize("every", [2, 7])
def test_a_host_that_is_held_up_now_and_then_neither_waits_nor_spoils_a_sample(gpu, every):
    calls = []

    def call():
        calls.append(gpu.now)
        gpu.call(host_ms=0.3 if len(calls) % every else 8.0, device_ms=0.5)()

    taken, _ = time_on(gpu, call)
    assert (taken["timer"], taken["syncs_inside"]) == ("cuda_events_blocked", "no")
    assert taken["samples_ms"] == pytest.approx([0.5] * len(taken["samples_ms"]), rel=1e-6)


# --- clocks -----------------------------------------------------------------------------------------------


def test_samples_at_another_clock_are_counted(monkeypatch):
    monkeypatch.setattr(nvml, "READ_EVERY_S", 0.0)
    library = FakeNvml(clocks=[1980, 1980, 1755, 1980, 1950, 1980], throttle=0x4 | 0x1)
    watch = nvml.Watch(nvml.Gpu("GPU-1", library))
    for _ in range(6):
        watch.note_sample()
    found = watch.summary()
    assert found["throttled"] == 1, "1755 is 11% off, 1950 is 1.5% off"
    assert (found["sm_mhz"], found["temp_c"], found["power_w"]) == (1980.0, 55.0, 412.5)
    assert found["throttle"] == "power_cap", "an idle GPU is not throttled"


def test_without_a_driver_every_field_is_empty(monkeypatch):
    monkeypatch.setattr(nvml, "open_library", lambda: None)
    watch = nvml.Watch(nvml.Gpu("GPU-1"))
    watch.note_sample()
    assert watch.summary() == {
        "sm_mhz": None,
        "temp_c": None,
        "power_w": None,
        "throttle": "",
        "throttled": None,
        "shared_device": "",
    }
    assert nvml.Gpu("GPU-1").driver() is None and nvml.Gpu("GPU-1").own_mib() is None
    assert nvml.Gpu("MIG-1", FakeNvml(clocks=[1])).read().sm_mhz is None, "an unknown device"


def test_a_stranger_on_the_gpu_is_told_from_ourselves_and_from_other_namespaces():
    mine, sibling_free = os.getpid(), {os.getpid(): 3 * 2**20}
    assert nvml.Gpu("GPU-1", FakeNvml(clocks=[1], processes=sibling_free)).shared() == "no"
    assert nvml.Gpu("GPU-1", FakeNvml(clocks=[1], processes={**sibling_free, 1: 5})).shared() == "yes"
    assert nvml.Gpu("GPU-1", FakeNvml(clocks=[1], processes={10**7: 5})).shared() == "", "foreign ids"
    gpu = nvml.Gpu("GPU-1", FakeNvml(clocks=[1], processes=sibling_free))
    assert (gpu.own_mib(), gpu.driver()) == (3.0, "570.1") and mine in gpu.processes()
    broken = FakeNvml(clocks=[1], missing=("nvmlDeviceGetPowerUsage",))
    assert nvml.Gpu("GPU-1", broken).read().power_w is None


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_of_a_forward_call_is_its_output_and_its_scratch():
    x = torch.ones(2 * 2**20)  # 8 MiB

    def forward():
        scratch = x.repeat(6)
        return scratch[: x.numel()].clone()

    found = footprint.measure(forward, None, [x], "cpu")
    assert found["inputs_mib"] == found["outputs_mib"] == 8.0 and found["saved_mib"] == 0.0
    assert found["workspace_mib"] == pytest.approx(48, abs=2) and found["extra_mem_mib"] == pytest.approx(
        56, abs=2
    )


def test_memory_that_only_the_first_call_needs_is_not_counted():
    calls = []

    def forward():
        calls.append(torch.ones(4 * 2**20 if not calls else 1).sum())  # 16 MiB, as tuning might take
        return torch.ones(2**20)

    assert footprint.measure(forward, None, [], "cpu")["extra_mem_mib"] == pytest.approx(4, abs=1)


def test_memory_of_a_backward_call_shows_what_autograd_keeps():
    x, d_out = torch.ones(2 * 2**20, requires_grad=True), torch.ones(2 * 2**20)

    def backward(out):
        return torch.autograd.grad(out, [x], d_out)

    found = footprint.measure(lambda: (x.exp() * x).sin(), backward, [x, d_out], "cpu")
    assert found["outputs_mib"] == 16.0, "the output and one gradient"
    assert found["saved_mib"] == pytest.approx(16, abs=2), "exp(x) and the product"
    assert found["repeats_equal"] == "", "resident pages are no count of allocations"


def test_memory_is_unavailable_where_the_peak_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(footprint, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    with pytest.raises(UnavailableError, match="peak memory cannot be reset"):
        footprint.measure(lambda: None, None, [], "cpu")
    assert (
        footprint._split(extra=10, outputs=8, gradients=8, saved=0, peak=1, reserved=None)["workspace_mib"]
        == 0.0
    ), "parts that never stood together leave no negative scratch"


@pytest.mark.gpu
def test_memory_of_a_call_on_a_gpu_is_the_same_every_time():
    """Autograd's own thread lets go of gradients a little after the call: that must not be missed."""
    x = torch.randn(64, 2**20, device="cuda", requires_grad=True)
    d_out = torch.randn_like(x)

    def backward(out):
        return torch.autograd.grad(out, [x], d_out)

    found = [footprint.measure(lambda: (x * x).sin(), backward, [x, d_out], "cuda") for _ in range(20)]
    assert {f["extra_mem_mib"] for f in found} == {found[0]["extra_mem_mib"]}
    assert found[0]["extra_mem_mib"] >= 2 * 256 and {f["repeats_equal"] for f in found} == {"yes"}
