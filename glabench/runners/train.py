"""`glabench train`: from what was typed to a run in its folder."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from glabench import __version__, env, tables
from glabench.errors import UnavailableError
from glabench.installed import is_installed


def train(
    name: str,
    data: Path,
    out: Path,
    *,
    steps: int | None,
    seed: int,
    micro_batch: int | None,
    fused: bool,
    compiled: bool,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Train, or go on training, and return where the run stands; None in processes but the first.

    Raises: UsageError for a configuration, data or a folder that does not fit; TrainingError for a loss
    that is not finite.
    """
    for package in ("accelerate", "transformers", "safetensors"):
        if not is_installed(package):
            raise UnavailableError(
                f"{package} is not installed", where="glabench train", fix="pip install 'glabench[train]'"
            )
    from glabench.corpus import manifest as corpus
    from glabench.training import folder, settings

    device = env.pick_device(device)
    config = settings.load(name, steps=steps, micro_batch=micro_batch, fused=fused, compiled=compiled)
    config = settings.resolve_precision(config, device)
    made = corpus.read_manifest(data)
    is_main = int(os.environ.get("RANK", 0)) == 0
    corpus.verify(data, made, contents=is_main)  # one process reads it all; the others look at the sizes
    identity = {**config.identity(), "data": made["digest"], "seed": seed}
    with folder.claim(out, identity) if is_main else nullcontext():
        return _run(config, data, made, out, identity, seed, device, say)


def _run(
    config: Any,
    data: Path,
    manifest: dict[str, Any],
    out: Path,
    identity: dict[str, Any],
    seed: int,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    import torch

    from glabench.training import checkpoint, folder, loop, processes
    from glabench.training.model import build_model

    state = processes.join(device)
    torch.manual_seed(seed)  # every process makes the same weights
    model = build_model(config.model, manifest["tokenizer"]["vocabulary"])
    trainer = loop.Trainer(model, config.settings, data, manifest, seed, state)
    if state.is_main_process:
        folder.note(out, identity, _describe_run(torch.__version__, device, state.num_processes))
        checkpoint.sweep(out)
    state.wait_for_everyone()
    trainer.resume(out)
    if trainer.step >= config.settings.steps and state.is_main_process:
        say(f"already finished: {out}")
    extra = {"tokenizer": manifest["tokenizer"], "data": manifest["digest"], "config": config.digest()}
    extra["train"] = {"seqlen": config.settings.seqlen, "segments": config.settings.segments}
    done = loop.fit(trainer, out, extra)
    return {"folder": str(out), **done, **_last_line(out)} if state.is_main_process else None


def _describe_run(torch_version: str, device: str, processes: int) -> dict[str, Any]:
    return {
        "started_utc": env.now_utc(),
        "glabench": __version__,
        **env.git_state(Path(__file__).parent),
        "torch": torch_version,
        "device": env.gpu_name(device) or env.cpu_model(),
        "processes": processes,
    }


def _last_line(out: Path) -> dict[str, Any]:
    import csv

    with (out / "metrics.csv").open(encoding="utf-8", newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: float(last[name]) for name in ("loss", "valid_loss") if last[name]}


def show(done: dict[str, Any]) -> None:
    losses = ", ".join(
        f"{name.replace('_', ' ')} {done[name]:.4f}" for name in ("loss", "valid_loss") if name in done
    )
    ending = "" if done["finished"] else "; stopped early, the same command goes on"
    tables.say(f"step {done['step']}: {losses} nats a token, in {done['folder']}{ending}")
