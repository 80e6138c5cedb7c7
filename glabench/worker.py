"""The inside of a worker process: answer calls, turn whatever they raise into a status.

Code that runs in a worker says what it does with `emit_phase`, stops the clock with `paused` and ends its
call with `CellFailure`. glabench.pool is the parent's side.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

MIB = 2**20
# A worker whose CUDA context is lost can only leave; CUDA says so in words.
FATAL = (
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "uncorrectable ecc",
    "hardware stack error",
    "invalid program counter",
    "launch timed out",
    "cudaerrorlaunchfailure",
)
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cudaerrormemoryallocation",
    "cublas_status_alloc_failed",
    "std::bad_alloc",
)
SIZE = r"([\d.]+) ?(bytes|[KMGT]iB)"
UNITS_MIB = {"bytes": 1 / MIB, "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0, "TiB": 1024.0**2}


class CellFailure(Exception):
    """Raised in a worker to end the call with this status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


_channel: dict[str, Any] = {}
_channel_lock = threading.Lock()


def emit_phase(name: str) -> None:
    """Tell the parent what the call does now: the deadline starts again. Does nothing outside a worker."""
    _send({"phase": name})


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Stop the deadline's clock while waiting for somebody else, such as another worker's turn."""
    _send({"paused": True})
    try:
        yield
    finally:
        _send({"paused": False})


def settle_garbage() -> None:
    """Collect, and spare what is left from later collections: with torch and Triton in, each takes 0.1 s."""
    gc.collect()
    gc.freeze()


def one_line(text: str, limit: int = 500) -> str:
    """`text` with its lines joined by " / ", cut at `limit` characters."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _send(message: dict[str, Any]) -> None:
    if _channel:
        with _channel_lock:
            data = json.dumps({"id": _channel["id"], **message}).encode() + b"\n"
            while data:
                data = data[os.write(_channel["fd"], data) :]


def classify(err: BaseException) -> dict[str, Any]:
    """Status, reason and whether the process must leave, for an exception that ended a call."""
    text = one_line(str(err))
    lower = text.lower()
    if isinstance(err, CellFailure):
        return {"status": err.status, "reason": one_line(err.reason), "leaving": False}
    if any(words in lower for words in FATAL):
        return {"status": "crashed", "reason": f"the CUDA context is lost: {text}", "leaving": True}
    if isinstance(err, MemoryError) or any(words in lower for words in OUT_OF_MEMORY):
        return {"status": "oom", "reason": _oom_reason(text), "leaving": bool(_channel.get("limit"))}
    reason = f"{type(err).__name__}: {text}" if text else type(err).__name__
    return {"status": "error", "reason": reason, "leaving": False}


def _oom_reason(text: str) -> str:
    asked = re.search(rf"tried to allocate {SIZE}", text, re.IGNORECASE)
    free = re.search(rf"of which {SIZE} is free", text)
    if not asked:
        return f"out of memory: {text}" if text else "out of memory"
    words = f"out of memory: asked for {_mib(asked)} MiB"
    if free:
        return f"{words}, {_mib(free)} MiB free"
    limit = _channel.get("limit")
    return f"{words}, limit {limit // MIB} MiB" if limit else words


def _mib(match: re.Match[str]) -> str:
    return f"{float(match.group(1)) * UNITS_MIB[match.group(2)]:.0f}"


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request; whatever it raises becomes a status."""
    try:
        module, _, function = request["function"].partition(":")
        target = getattr(importlib.import_module(module), function)
        emit_phase("call")
        value = target(request["args"])
        json.dumps(value)  # here, where it can still be the call's own fault
        reply = {"status": "ok", "reason": "", "leaving": False, "value": value}
    except BaseException as err:  # noqa: BLE001  measured code may raise anything, SystemExit too
        reply = classify(err)
    if reply["status"] != "ok":  # out here the exception is gone, and with it the frames that held tensors
        _release()
    return reply


def _release() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _guard(requests: int, replies: int) -> None:
    """Fork a process that ends this group once the parent's end of the request pipe is gone.

    Not PR_SET_PDEATHSIG: that follows the thread that spawned us rather than the process, and spares
    what the measured code has started. Not a thread: measured code may never let go of the GIL.
    """
    if os.fork():
        return
    os.close(replies)
    poll = select.poll()
    poll.register(requests, 0)  # a hang-up is reported whatever is asked for
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def serve(requests: int, replies: int, limit: int, preload: str) -> None:
    """A worker's life: answer requests one after the other until the parent closes the pipe."""
    _guard(requests, replies)
    for fd in (requests, replies):
        os.set_inheritable(fd, False)
    if limit:
        # DATA counts private writable memory, that is what an allocation takes. AS would also count
        # mapped libraries and reserved address space, gigabytes in a process that imported torch.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    _channel.update(fd=replies, id=0, limit=limit)
    for name in preload.split():
        with contextlib.suppress(Exception):  # the call that needs it will say what is wrong
            importlib.import_module(name)
    if preload:
        settle_garbage()
    with os.fdopen(requests, "rb", closefd=False) as lines:
        for line in lines:
            request = json.loads(line)
            _channel["id"] = request["id"]
            reply = _answer(request)
            _send(reply)
            if reply["leaving"]:
                break
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # a thread left behind by measured code would keep a plain exit waiting


if __name__ == "__main__":
    from glabench.worker import serve as serve_as_imported  # one CellFailure, not __main__'s second copy

    serve_as_imported(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
