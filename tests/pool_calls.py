"""What the pool's tests run in a real worker."""

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time

from glabench.worker import CellFailure, emit_phase, paused


def echo(args):
    return {"pid": os.getpid(), **args}


def talk(args):
    print("this goes nowhere", args)  # noqa: T201  what the test is about
    os.write(1, b'{"id": 1, "status": "ok"}\n')
    ctypes.CDLL(None).puts(b"nor does this")
    ctypes.CDLL(None).fflush(None)
    return {"said": 3}


def phases(args):
    """Sleep in each phase: {"cold": s, "check": s}."""
    for name, seconds in args.items():
        emit_phase(name)
        time.sleep(seconds)
    return {}


def wait_for_turn(args):
    with paused():
        time.sleep(args["paused_s"])
    time.sleep(args["then_s"])
    return {}


def leave(args):
    print("about to leave", file=sys.stderr)  # noqa: T201  what the test is about
    os._exit(args["code"])


def segfault(args):
    ctypes.string_at(0)


def signal_self(args):
    os.kill(os.getpid(), args["signal"])
    time.sleep(60)


def close_pipes(args):
    os.closerange(3, 64)
    time.sleep(60)


def raise_it(args):
    raise {"key": KeyError, "exit": SystemExit, "runtime": RuntimeError}[args["kind"]](args["text"])


def fail(args):
    raise CellFailure(args["status"], args["reason"])


def return_object(args):
    return {"value": object()}


def eat_memory(args):
    return {"size": len(bytearray(args["bytes"]))}


def eat_with_torch(args):
    import torch

    return {"size": torch.empty(args["bytes"], dtype=torch.uint8).numel()}


def spawn_stray(args):
    """Leave a child, its child, a fork that holds our pipes and a thread behind."""
    child = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300"])
    fork = os.fork()
    if fork == 0:
        time.sleep(300)
        os._exit(0)
    threading.Thread(target=time.sleep, args=(300,)).start()
    if args.get("die"):
        os._exit(7)
    return {"children": [child.pid, fork]}


def hang(args):
    with contextlib.suppress(BaseException):
        time.sleep(300)
    return {}


def block_interpreter(args):
    """Sleep in C with the interpreter lock held: no Python thread of this process runs."""
    ctypes.PyDLL(None).sleep(300)
    return {}


def hold_turn(args):
    """Hold a device's turn for a while, perhaps stepping aside; when, on the common clock."""
    from glabench.runners import turns

    with turns.turn(args["device"]) as turn:
        emit_phase("held")
        begun = time.monotonic()
        with turns.step_aside() if args.get("aside") else contextlib.nullcontext():
            time.sleep(args["seconds"])
        return {"begun": begun, "ended": time.monotonic(), "waited_s": turn.waited_s}
