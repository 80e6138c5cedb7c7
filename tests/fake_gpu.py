"""A GPU made of two clocks: the host's, and the time each stream has work until. Milliseconds."""

import ctypes
from types import SimpleNamespace

CYCLES_PER_MS = 1_000_000
LAUNCH_MS = 0.004  # the device sees a launch this long after the host made it


class FakeGpu:
    """Stands in for torch.cuda and the host's clock; a `call` costs what it says."""

    def __init__(self, monkeypatch, measure, *, l2_bytes=1000):
        self.now = 0.0
        self.stream = self.other = 0.0
        properties = SimpleNamespace(L2_cache_size=l2_bytes, uuid="fake")
        cuda = {
            "Event": lambda enable_timing: FakeEvent(self),
            "_sleep": lambda cycles: self.launch(cycles / CYCLES_PER_MS),
            "synchronize": lambda: self.synchronize(),
            "current_device": lambda: 0,
            "get_device_properties": lambda index: properties,
        }
        for name, value in cuda.items():
            monkeypatch.setattr(measure.torch.cuda, name, value)
        clock = SimpleNamespace(perf_counter=lambda: self.now / 1e3, sleep=self.pause)
        monkeypatch.setattr(measure, "time", clock)
        measure._spin_cycles_per_ms.cache_clear()

    def pause(self, seconds):
        self.now += seconds * 1e3

    def launch(self, device_ms):
        self.stream = max(self.stream, self.now + LAUNCH_MS) + device_ms

    def synchronize(self):
        self.now = max(self.now, self.stream, self.other)

    def call(self, *, host_ms, device_ms, launches=5, waits=False, elsewhere_ms=0.0):
        """A call of several kernels; it may wait for the stream halfway, or use a stream of its own."""

        def run():
            for i in range(launches):
                self.now += host_ms / launches
                self.launch(device_ms / launches)
                if waits and i == launches // 2:
                    self.synchronize()
            self.other = max(self.other, self.now) + elsewhere_ms

        return run


class FakeEvent:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, 0.0

    def record(self):
        self.at = max(self.gpu.stream, self.gpu.now + LAUNCH_MS)

    def query(self):
        return self.gpu.now >= self.at

    def synchronize(self):
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end):
        return end.at - self.at


class FakeNvml:
    """The few functions of the driver's library that are used; fields are what they answer."""

    def __init__(self, *, clocks, processes=None, throttle=0, missing=()):
        self.clocks, self.processes, self.throttle = list(clocks), processes or {}, throttle
        for name in missing:
            setattr(self, name, lambda *args: 3)  # NVML_ERROR_NOT_SUPPORTED

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        return 0 if uuid.startswith(b"GPU-") else 6

    def nvmlDeviceGetClockInfo(self, handle, kind, value):
        value._obj.value = self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]
        return 0

    def nvmlDeviceGetTemperature(self, handle, sensor, value):
        value._obj.value = 55
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, value):
        value._obj.value = 412_500
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, value):
        value._obj.value = self.throttle
        return 0

    def nvmlSystemGetDriverVersion(self, text, length):
        ctypes.memmove(text, b"570.1", 6)
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, infos):
        count._obj.value = len(self.processes)
        for info, (pid, used) in zip(infos, self.processes.items(), strict=False):
            info.pid, info.used_bytes = pid, used
        return 0
