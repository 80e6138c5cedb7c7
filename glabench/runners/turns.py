"""Turns on a GPU among the workers of one sweep: compiling overlaps, what uses the device does not.

A file lock: the kernel gives it back when its holder is killed.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from glabench.worker import paused

LOOK_S = 0.005
_held: dict[str, "Turn"] = {}


class Turn:
    """One worker's hold on a device; `waited_s` is what it has spent queueing for it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.waited_s = 0.0

    def take(self) -> None:
        """Wait for the device with the deadline's clock stopped."""
        begun = time.perf_counter()
        if not self._try():
            with paused():
                while not self._try():
                    time.sleep(LOOK_S)
        self.waited_s += time.perf_counter() - begun

    def leave(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def lock_path(use: str, device: str) -> Path:
    """The file that this user's processes lock `device` with; "cuda" is "cuda:0"."""
    name = "cuda-0" if device == "cuda" else device.replace(":", "-")
    return Path(tempfile.gettempdir()) / f"glabench-{use}-{os.getuid()}-{name}.lock"


@contextlib.contextmanager
def turn(device: str) -> Iterator[Turn]:
    """Hold `device`; on a CPU workers are called one at a time, and nothing is locked."""
    is_cuda = device.startswith("cuda")
    path = lock_path("turn", device) if is_cuda else Path(os.devnull)
    with path.open("ab") as file:
        mine = Turn(file)
        if is_cuda:
            mine.take()
            _held[device] = mine
        try:
            yield mine
        finally:
            _held.pop(device, None)


@contextlib.contextmanager
def step_aside() -> Iterator[None]:
    """Let others have the device for a while, if it is held; nothing may be measured meanwhile."""
    for mine in _held.values():
        mine.leave()
    try:
        yield
    finally:
        for mine in _held.values():
            mine.take()


@contextlib.contextmanager
def device_lock(device: str, say: Callable[[str], None]) -> Iterator[None]:
    """For a whole run: two on one device queue up instead of spoiling each other."""
    with lock_path("sweep", device).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"waiting: another glabench is measuring on {device}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
