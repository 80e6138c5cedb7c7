"""Compiling what a call will launch, all at once, when its first kernel is not compiled yet."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

WORKERS = min(8, os.cpu_count() or 1)
_here = threading.local()  # a backward pass runs in a thread of its own


class Asked(NamedTuple):
    """One launch as it was asked for; `tile` has its options(), and is None where a function is called."""

    kernel: object
    programs: int
    tensors: tuple[Tensor | None, ...]
    numbers: tuple
    constants: dict
    tile: Any


def asked() -> list[Asked] | None:
    """Where this thread's launches are noted in place of being made; None where they are made."""
    return getattr(_here, "asked", None)


def device_of(device: torch.device) -> torch.device:
    """`device`; while launches are noted, the one they are for."""
    return device if asked() is None else _here.device


@contextmanager
def during(call: Callable[[], object] | None):
    """Until the end of the block, `call` asks for all that is to be launched, if it comes to compiling."""
    _here.call = call
    try:
        yield
    finally:
        _here.call = None


def compile_rest(device: torch.device) -> None:
    """A kernel is about to be compiled: compile all that the call in progress launches, once."""
    call, _here.call = getattr(_here, "call", None), None
    if call is not None:
        compile_all(launches(device, call))


@contextmanager
def noting(device: torch.device):
    """Note what is launched inside, from tensors without memory, instead of launching it."""
    _here.asked, _here.device = [], device
    try:
        yield _here.asked
    finally:
        _here.asked = None


def launches(device: torch.device, call: Callable[[], object]) -> list[Asked]:
    """What `call`, on meta tensors, would launch on `device`."""
    with noting(device) as found:
        call()
    return [launch for launch in found if launch.tile is not None]


def compile_all(found: list[Asked]) -> None:
    """Compile them side by side; they stay in Triton's cache. Does nothing where Triton cannot (before 3.5).

    What fails to compile here fails again, and is told, when it is launched.
    """
    if not hasattr(triton, "AsyncCompileMode") or len(found) < 2:
        return
    with ThreadPoolExecutor(WORKERS) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for kernel, _, tensors, numbers, constants, tile in found:
            types = (None if x is None else x.dtype for x in tensors)
            kernel.warmup(*types, *numbers, grid=(1,), **constants, **tile.options())
