"""What tools/quality.py runs on: folders that outlive a call, a clock, and workers that run glabench."""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PART = 15 * 2**20  # bytes of a file that comes back
WEIGHTS = ("config.json", "state.json")  # with model.safetensors the folder is a checkpoint
GRACE_S = 20.0  # from the notice to a training run's checkpoint on disk


def say(text: str) -> None:
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Work:
    """One command of glabench. `is_done` is asked before it starts; `grace_s` is its time to end in."""

    name: str
    words: tuple[str, ...]
    is_done: Callable[[], bool]
    when_done: Callable[[], None] = lambda: None
    grace_s: float = GRACE_S


class Site:
    """Runs, evaluations and logs below one folder, and the clock of this call."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begun = args, time.monotonic()
        self.kept_s = 0.0  # of the time left, for a later step
        self.runs, self.logs, self.evaluation = (args.site / n for n in ("runs", "logs", "evaluation"))
        self.data = args.data or args.site / "data"
        for folder in (args.out, self.runs, self.logs, self.evaluation):
            folder.mkdir(parents=True, exist_ok=True)
        self.gpus = self._gpus()
        self.workers = (self.gpus or [None]) * args.jobs
        self.fused = bool(self.gpus) and not args.plain

    def _gpus(self) -> list[str]:
        """Their indices, those of CUDA_VISIBLE_DEVICES where it is set; none on a CPU."""
        if self.args.device == "cpu" or not shutil.which("nvidia-smi"):
            return []
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            return visible.split(",")  # nvidia-smi lists them all
        listed = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, check=False).stdout
        return [str(n) for n in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]

    def left_s(self) -> float:
        return self.args.total - self.kept_s - (time.monotonic() - self.begun)

    def command(
        self, log: str, limit_s: float, *words: str, gpu: str | None = None, grace_s: float = GRACE_S
    ) -> str:
        """Run glabench; "done", "cut" where the time ran out, or "failed"."""
        limit_s = min(limit_s, self.left_s() - grace_s)
        if limit_s <= 0:
            return "cut"
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_AUTOTUNING": "1"}
        env |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with (self.logs / f"{log}.log").open("a") as file:
            command = (sys.executable, "-m", "glabench", *words)
            process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
            try:
                return "done" if process.wait(limit_s) == 0 else "failed"
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # training ends its step and saves
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return "cut"

    def run_all(self, found: Iterable[Work]) -> None:
        """Each worker takes the next command until none is left or the time is over."""
        waiting: queue.SimpleQueue[Work] = queue.SimpleQueue()
        for work in found:
            waiting.put(work)
        threads = [threading.Thread(target=self._work, args=(waiting, gpu)) for gpu in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, waiting: "queue.SimpleQueue[Work]", gpu: str | None) -> None:
        while True:
            try:
                work = waiting.get_nowait()
            except queue.Empty:
                return
            if work.is_done():
                continue
            words = (*work.words, "--device", self.args.device if gpu is None else "cuda")
            begun = time.monotonic()
            ended = self.command(work.name, self.args.limit, *words, gpu=gpu, grace_s=work.grace_s)
            if ended == "done":
                work.when_done()
            took = f"{ended} after {time.monotonic() - begun:.0f} s"
            say(f"{work.name}: {took}{self._last_words(work.name) if ended == 'failed' else ''}")

    def _last_words(self, name: str) -> str:
        lines = (self.logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def bring_weights(checkpoint: Path, name: str, out: Path) -> None:
    """A checkpoint in bf16 as out/NAME.tar.00 and on, parts of PART bytes: to evaluate, not to go on from."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    narrow = {key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        weights, whole = Path(folder) / "model.safetensors", Path(folder) / "whole.tar"
        save_file(narrow, weights, metadata={"format": "pt"})
        with tarfile.open(whole, "w") as tar:
            for path in (
                weights,
                *(checkpoint / other for other in WEIGHTS if (checkpoint / other).exists()),
            ):
                tar.add(path, f"{name}/{path.name}")
        with whole.open("rb") as file:
            for number, part in enumerate(iter(lambda: file.read(PART), b"")):
                (out / f"{name}.tar.{number:02d}").write_bytes(part)
