"""Run by test_tuning.py in its own process: tune a Triton kernel for sm_90 that is launched nowhere."""

import contextlib
import json
import sys
import threading

import torch
import triton
import triton.compiler
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from glabench.runners import tuning

launched, compiling, aside = [], set(), []


class NoGpu:
    """The driver's part: a target to compile for, and a launcher that only counts."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *args, **kwargs: launched.append((source.fn.__name__, args[:3], args[9:]))

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return 0, 1, 32, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448}


def time_by_block(call, quantiles):
    call()
    return [1.0 / len(launched)] * 3  # the last configuration looks fastest


def spread(function):
    """Note how many threads compile."""

    def compile_and_count(*args, **kwargs):
        compiling.add(threading.get_ident())
        return function(*args, **kwargs)

    return compile_and_count


@contextlib.contextmanager
def step_aside():
    aside.append(len(launched))
    yield


CONFIGS = [triton.Config({"N": 64 * 2**i}, num_warps=w) for i in range(3) for w in (1, 2)]
CONFIGS.insert(0, triton.Config({"N": 512}, num_warps=1))  # the kernel refuses it when compiled


@triton.autotune(configs=CONFIGS, key=["size"], do_bench=time_by_block)
@triton.jit
def double_kernel(x, y, size, N: tl.constexpr):
    tl.static_assert(N < 512)
    at = tl.arange(0, N)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def copy_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))


def plain():
    """Compile a kernel that is not tuned, twice with other constants, stepping aside; when that was."""
    tuning.install(step_aside)
    tuning.compile_aside()
    tuning.compile_aside()  # a second time changes nothing
    for width in (64, 128, 128):
        copy_kernel[(1,)](torch.zeros(width), torch.zeros(width), width)
    print(json.dumps({"aside": aside, "launched": len(launched)}))  # noqa: T201


def main():
    """Print what `recording` saw, with "ahead" as argument after `install`."""
    is_ahead = sys.argv[1] == "ahead" and tuning.install(step_aside)
    if is_ahead:
        tuning.install(step_aside)  # a second time changes nothing
    triton.compiler.compile = spread(triton.compiler.compile)
    x = torch.zeros(256)
    with tuning.recording() as record:
        double_kernel[(1,)](x, x, 256)
    with tuning.recording() as again:
        double_kernel[(1,)](x, x, 256)
    found = {
        "is_ahead": is_ahead,
        "again": [again.tried, again.compiled, again.config],
        "tried": record.tried,
        "compiled": record.compiled,
        "launched": len(launched),
    }
    found |= {"config": record.config, "cache": record.cache, "threads": len(compiling), "aside": aside}
    print(json.dumps(found))  # noqa: T201  the answer to the test


if __name__ == "__main__":
    driver.set_active(NoGpu())
    if sys.argv[1] == "aside":
        plain()
    else:
        main()
