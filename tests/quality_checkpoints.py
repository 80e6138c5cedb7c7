"""Tiny checkpoints on disk, and what runs the verb on them."""

import csv
import json

import torch
from typer.testing import CliRunner

from glabench.cli import app
from glabench.corpus import tokenizer
from glabench.models import catalog

FAMILIES = ("gla", "retnet", "mamba", "mamba2", "transformer")


def model_of(family, **fields):
    """A tiny model in float32 whose memory matters: weights larger than at the start of a training."""
    torch.manual_seed(0)
    model = catalog.build(f"{family}-tiny", **fields).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "A_log" not in name:
                p.mul_(3)
    return model


def save(model, folder, **state):
    """A checkpoint as `glabench train` leaves it: weights, configuration, and what it was trained with."""
    model.save_pretrained(folder)
    record = {"tokenizer": tokenizer.load("bytes").describe(), "train": {"seqlen": 256, "segments": 1}}
    (folder / "state.json").write_text(json.dumps({**record, **state}))
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def extrapolate(out, *words):
    return run("extrapolate", "--out", out, "--device", "cpu", *words)


def refused(done, *words):
    """Whether it ended with exit code 2 and one line that has all of the words; fails with what there was."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 2 and len(lines) == 1, (done.stderr, done.exception)
    assert all(word in lines[0] for word in words), lines[0]
    return True


def rows(out):
    with (out / "extrapolate.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def documents(out):
    return [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]


def texts(folder, *sizes):
    """A folder of documents of so many bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        text = "".join(chr(97 + (i * i + number) % 26) for i in range(size))
        (folder / f"{number}.txt").write_text(text)
    return folder
