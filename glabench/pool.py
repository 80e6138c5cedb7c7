"""Long-lived worker processes: a hang, a crash or exhausted memory costs one call, never the caller.

This is the parent's side; glabench.worker is the other. They exchange JSON lines over two pipes of their
own; whatever a call prints, even from C, goes to a file that is read only to say why a worker died.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glabench.worker import CellFailure, emit_phase

__all__ = ("CellFailure", "Outcome", "Worker", "emit_phase", "wait_any")

LOOK_S = 0.2  # a fork of a dead worker can hold its pipe open: look at the process this often
REAP_S = 10.0  # how long a killed process may stay in the kernel
START_LIMIT_S = 180.0  # interpreter and imports before a call begins: never the measured code's fault
PAUSE_LIMIT_S = 3600.0
LOG_LIMIT = 64 * 2**20  # bytes a worker may have printed before its log starts anew


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: a status of results.STATUSES, why it is not ok, and what it returned."""

    status: str
    reason: str = ""
    value: dict[str, Any] | None = None


class Worker:
    """One process, its own session, one call at a time; a dead one is replaced by the next call.

    `preload` names modules to import while nothing is asked yet. `memory_limit_bytes` bounds what the
    process may allocate (not GPU memory). Functions are named "package.module:function"; they take and
    return a dict that JSON can hold. `limits` are seconds a phase, "other" for those it does not name.
    """

    def __init__(
        self,
        name: str,
        *,
        memory_limit_bytes: int | None = None,
        env: Mapping[str, str] | None = None,
        preload: str = "",
    ) -> None:
        self.name, self.phase = name, ""
        self._limit, self._env, self._preload = memory_limit_bytes or 0, dict(env or {}), preload
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._busy = False
        self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the worker; close() ends it
        self._spawn()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id, which is also its group's; None while there is no process."""
        return self._process.pid if self._process else None

    @property
    def is_busy(self) -> bool:
        return self._busy

    def call(
        self,
        function: str,
        args: Mapping[str, Any],
        *,
        limits: Mapping[str, float],
        on_phase: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Run one function and wait for its outcome; never raises for what the function does."""
        self.start(function, args, limits=limits, on_phase=on_phase)
        while True:
            for _, outcome in wait_any([self], timeout=60.0):
                return outcome

    def start(
        self,
        function: str,
        args: Mapping[str, Any],
        *,
        limits: Mapping[str, float],
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        """Begin a call; `poll` or `wait_any` brings its outcome."""
        if self._busy:
            raise RuntimeError(f"worker {self.name} is busy")
        if self._process is None or self._has_exited():
            self._stop()
            self._spawn()
        self._number += 1
        self._busy, self._limits, self._on_phase = True, dict(limits), on_phase
        self._buffer, self._left_s = b"", None
        self._oom_kills = _oom_kills()
        if os.fstat(self._log.fileno()).st_size > LOG_LIMIT:
            self._log.truncate(0)
        self._log_from = os.fstat(self._log.fileno()).st_size
        self._enter("start", limits.get("start", START_LIMIT_S))
        data = json.dumps({"id": self._number, "function": function, "args": args}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it died just now: the next look at it says how
            while data:
                data = data[os.write(self._requests, data) :]

    def poll(self, timeout: float = 0.0) -> Outcome | None:
        """The outcome of the call in flight, or None if it still runs after `timeout` seconds."""
        return dict(wait_any([self], timeout)).get(self)

    def close(self) -> None:
        """End the process and everything it left in its group. May be called twice."""
        self._busy = False
        self._stop()
        self._log.close()

    def _spawn(self) -> None:
        take_requests, self._requests = os.pipe()
        self._replies, give_replies = os.pipe()
        os.set_blocking(self._replies, False)
        root = str(Path(__file__).parent.parent)
        env = {**os.environ, **self._env, "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
        words = (str(take_requests), str(give_replies), str(self._limit), self._preload)
        try:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "glabench.worker", *words),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(take_requests, give_replies),
                env=env,
                start_new_session=True,
            )
        finally:
            os.close(take_requests)
            os.close(give_replies)

    def _has_exited(self) -> bool:
        """Without reaping: its process group keeps its number until `_stop` has swept it."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _stop(self) -> int | None:
        """Kill the whole group and reap the worker; its exit code, as Popen gives it."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        os.close(self._requests)
        os.close(self._replies)
        try:
            return process.wait(REAP_S)
        except subprocess.TimeoutExpired:  # stuck in a driver: nothing more can be done from here
            return None

    def _enter(self, phase: str, limit_s: float) -> None:
        self.phase, self._limit_s = phase, limit_s
        self._deadline = time.monotonic() + limit_s

    def _settle(self) -> Outcome | None:
        """Take what has arrived; an outcome if the call is over in any way."""
        gone = False
        while True:
            try:
                data = os.read(self._replies, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                gone = True
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            outcome = self._hear(json.loads(line))
            if outcome is not None:
                self._busy = False
                return outcome
        if gone or self._has_exited():
            self._busy = False
            return self._died()
        if time.monotonic() >= self._deadline:
            self._busy = False
            self._stop()
            return Outcome("timeout", f"{self.phase} took longer than {self._limit_s:g} s")
        return None

    def _hear(self, message: dict[str, Any]) -> Outcome | None:
        if message.get("id") != self._number:
            return None  # a thread that an earlier call left behind
        if "phase" in message:
            phase = message["phase"]
            self._enter(phase, self._limits.get(phase, self._limits["other"]))
            if self._on_phase is not None:
                self._on_phase(phase)
            return None
        if "paused" in message:
            now = time.monotonic()
            if message["paused"]:
                self._left_s, self._deadline = self._deadline - now, now + PAUSE_LIMIT_S
            else:
                self._deadline = now + (self._left_s or 0.0)
            return None
        if message["leaving"]:
            self._stop()
        return Outcome(message["status"], message["reason"], message.get("value"))

    def _died(self) -> Outcome:
        until = time.monotonic() + 1.0
        while not self._has_exited() and time.monotonic() < until:
            time.sleep(0.005)  # its pipe closes a moment before it is gone
        by_itself = self._has_exited()
        code = self._stop()
        printed = self._last_line()
        said = f"; it printed: {printed}" if printed else ""
        if not by_itself:
            return Outcome("crashed", f"closed the harness's pipe during {self.phase}{said}")
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return Outcome("oom", f"killed by the system's out-of-memory killer during {self.phase}")
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        return Outcome("crashed", f"{how} during {self.phase}{said}")

    def _last_line(self) -> str:
        """Last line printed since the call began; pread leaves the offset shared with the worker alone."""
        size = os.fstat(self._log.fileno()).st_size
        data = os.pread(self._log.fileno(), 4096, max(self._log_from, size - 4096))
        lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""


def wait_any(workers: Iterable[Worker], timeout: float) -> list[tuple[Worker, Outcome]]:
    """Busy workers whose call ended within `timeout` seconds, with the outcomes; empty if none did."""
    until = time.monotonic() + timeout
    while True:
        busy = [worker for worker in workers if worker.is_busy]
        settled = [(worker, worker._settle()) for worker in busy]
        done = [(worker, outcome) for worker, outcome in settled if outcome is not None]
        now = time.monotonic()
        if done or not busy or now >= until:
            return done
        sleep_s = min(until, now + LOOK_S, *(worker._deadline for worker in busy)) - now
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker._replies, selectors.EVENT_READ)
            selector.select(max(0.0, sleep_s))


def _oom_kills() -> int:
    """How often this machine's kernel has killed for want of memory."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(match.group(1)) if match else 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
