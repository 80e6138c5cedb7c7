"""Checkpoints: written beside, then renamed into place; a few are kept; safetensors and JSON only.

A checkpoint is also a Hugging Face folder: `from_pretrained` takes it. The random generators need no
state: the loop seeds them anew for each step from the run's seed.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glabench.errors import ResultsError, UsageError
from glabench.training import optimizer as optimizers
from glabench.training.processes import fill, named_tensors, whole

FOLDER = "checkpoints"
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"step-(\d{8})")
SCHEMA = 1


def find(out: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, oldest first, as (step, folder)."""
    folder = out / FOLDER
    if not folder.is_dir():
        return []
    return sorted((int(m.group(1)), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name)))


def newest(folder: Path) -> Path:
    """The newest checkpoint of a training run; any other folder as it is."""
    steps = [] if (folder / "config.json").is_file() else find(folder)
    return steps[-1][1] if steps else folder


def sweep(out: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    folder = out / FOLDER
    if folder.is_dir():
        for path in folder.glob(".*"):
            shutil.rmtree(path)


def save(
    out: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    is_main: bool,
) -> None:
    """Write checkpoint `state["step"]` in one step. Every process calls it; the first one writes.

    Raises: ResultsError where the disk does not take it; the checkpoints before it stay.
    """
    parts = {WEIGHTS: named_tensors(model), MOMENTS: optimizers.moments(model, optimizer)}
    gathered: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in parts.items():
        gathered[name] = {}
        for key, tensor in tensors.items():
            full = whole(tensor)  # a collective: every process takes part, the first one keeps
            if is_main:
                gathered[name][key] = full.contiguous()
    if not is_main:
        return
    final = out / FOLDER / f"step-{state['step']:08d}"
    draft = final.with_name("." + final.name)
    try:
        draft.mkdir(parents=True)
        for name, tensors in gathered.items():
            save_file(tensors, draft / name, metadata={"format": "pt"})
        model.config.save_pretrained(draft)
        (draft / STATE).write_text(json.dumps({"schema": SCHEMA, **state}, indent=1) + "\n", encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            _make_durable(path)
        draft.rename(final)
        _make_durable(final.parent)
    except (OSError, SafetensorError) as err:
        shutil.rmtree(draft, ignore_errors=True)
        raise ResultsError(
            f"cannot write checkpoint {final.name}: {err}",
            where=str(out),
            fix="make room; the same command goes on",
        ) from err


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for _, old in find(out)[:-keep]:
        remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint; never is half of one left under a checkpoint's name."""
    condemned = folder.with_name("." + folder.name)
    folder.rename(condemned)
    shutil.rmtree(condemned)


def _make_durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill the model and the optimiser from a checkpoint and return its state; every process reads it.

    Raises: UsageError where a file is damaged or does not fit the model.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}")
        optimizers.start_at(model, optimizer, state["step"])
        _fill_from(folder / WEIGHTS, named_tensors(model))
        _fill_from(folder / MOMENTS, optimizers.moments(model, optimizer))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        raise UsageError(
            f"checkpoint {folder.name} is damaged: {err}",
            where=str(folder),
            fix="remove that folder to go on from the one before",
        ) from err
    return state


def _fill_from(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(tensors):
            raise KeyError(f"{path.name} and the model differ in {sorted(names ^ set(tensors))[0]}")
        for name, tensor in tensors.items():
            fill(tensor, file.get_tensor(name))
