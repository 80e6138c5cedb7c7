"""What the tests of preparing and training share: the sample text, a small configuration, real processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from glabench.cli import app

SAMPLE = Path(__file__).parent / "data" / "magic_world"
MODEL = """
[model]
kind = "hf"
model_type = "llama"
hidden_size = 64
intermediate_size = 176
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 512
tie_word_embeddings = true
{model}
[train]
"""
TRAIN = {
    "steps": 12,
    "batch_tokens": 8 * 64,
    "seqlen": 64,
    "warmup_steps": 2,
    "lr": 3e-3,
    "lr_end": 3e-4,
    "micro_batch": 4,
    "save_every": 4,
}


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def start(*words, launcher=("-m", "glabench"), **variables):
    """A real process; one thread, as the tests in this process have, so that sums are in the same order."""
    root = Path(__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **variables}
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def kill_when(process, ready, limit_s=60.0):
    """kill -9 as soon as `ready()`; fails where the process ends or the time is over before it."""
    deadline = time.monotonic() + limit_s
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before the signal"


def config(path, model="", **train):
    """A configuration file; `train` overrides TRAIN."""
    keys = {**TRAIN, **train}
    # JSON writes numbers, strings, lists and truth values as TOML does
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path.write_text(MODEL.format(model=model) + "\n".join(lines) + "\n")
    return path


def metrics(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(out):
    """What must not depend on interruptions: everything but speed and memory, as written."""
    names = ("step", "tokens", "loss", "lr", "grad_norm", "valid_loss")
    return [tuple(row[name] for name in names) for row in metrics(out)]
