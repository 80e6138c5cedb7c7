"""The worker's side of `glabench throughput`: whole training steps, timed in parts."""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from glabench import cost, footprint
from glabench.errors import UnavailableError
from glabench.runners.step_models import Built, built
from glabench.training import optimizer
from glabench.training.schedule import learning_rate
from glabench.worker import CellFailure, emit_phase

PARTS = ("forward", "loss", "backward", "optimizer")
RING = 8  # batches of random tokens that lie ready on the device
SAME_LOSS = 0.02  # nats between a compiled model's loss and its eager one's, in bf16


def measure(args: dict[str, Any]) -> dict[str, Any]:
    """One cell: build and check (once a process), warm up, time. The row's measured fields, "step_list_ms".

    args: arm (of `plan`), condition, layer (an implementation's id, or "auto"), batch, seqlen, device, seed,
    threads, warmup, steps. Phases: build, check, warm-up, sample. Raises CellFailure.
    """
    emit_phase("build")
    torch.set_num_threads(args["threads"])
    if args["device"].startswith("cuda"):
        torch.cuda.set_device(torch.device(args["device"]) if ":" in args["device"] else 0)
    chosen = json.dumps([args[name] for name in ("arm", "condition", "layer", "device", "seed")])
    model = built(chosen)
    generator = torch.Generator(args["device"]).manual_seed(args["seed"])
    shape = (RING, args["batch"], args["seqlen"])
    ring = torch.randint(args["arm"]["vocabulary"], shape, generator=generator, device=args["device"])
    emit_phase("warm-up")
    cold_ms = _warm_up(model, ring, args["warmup"])
    _start_peak(model)
    emit_phase("sample")
    parts, losses = _timed(model, ring, args["steps"])
    loss = losses[-1].item()
    if not all(map(math.isfinite, torch.stack(losses).tolist())):
        raise CellFailure("wrong", f"the loss became {loss}")
    found = model.facts | _peak(model) | {"cold_start_ms": cold_ms, "loss_nats": loss}
    steps_ms = [sum(step) for step in parts]
    medians = (statistics.median(column) for column in zip(*parts, strict=True))
    found |= {f"{part}_ms": ms for part, ms in zip(PARTS, medians, strict=True)}
    _clear(model)
    return found | {"step_list_ms": steps_ms, "timer": "events" if model.is_cuda else "monotonic"}


def _marker(built: Built) -> Callable[[], Any]:
    if not built.is_cuda:
        return time.perf_counter

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark


def _step(built: Built, ids: torch.Tensor, mark: Callable[[], Any]) -> tuple[list[Any], torch.Tensor]:
    """One training step: marks at its start and after each of PARTS but the last, and the loss."""
    marks = [mark()]
    hook = built.model.base_model.register_forward_hook(lambda *_: marks.append(mark()))
    try:
        loss = built.losses(ids)
    finally:
        hook.remove()
    marks.append(mark())
    loss.backward()
    marks.append(mark())
    nn.utils.clip_grad_norm_(built.model.parameters(), built.settings.clip)
    optimizer.set_rate(built.optimizer, learning_rate(built.steps, built.settings))
    built.optimizer.step()
    built.optimizer.zero_grad(set_to_none=True)
    built.steps += 1
    return marks, loss.detach()


def _warm_up(built: Built, ring: torch.Tensor, count: int) -> float:
    """Compile and tune; the first one's ms. Raises CellFailure where compiling changes the loss."""
    _clear(built)
    is_compiled = built.facts["compile"] == "blocks"
    eager = None
    if is_compiled:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            eager = built.losses(ring[0]).item()
    begun = time.perf_counter()
    _, first = _step(built, ring[0], _marker(built))
    loss = first.item()  # waits for the device
    cold_ms = (time.perf_counter() - begun) * 1e3
    if eager is not None and not abs(loss - eager) < SAME_LOSS:
        raise CellFailure("wrong", f"compiled it loses {loss:.4f} nats, eagerly {eager:.4f}")
    for number in range(1, count):
        _step(built, ring[number % RING], _marker(built))
    return cold_ms


def _timed(built: Built, ring: torch.Tensor, count: int) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Milliseconds of each part of `count` steps, and their losses; nothing synchronises in between."""
    mark, all_marks, losses = _marker(built), [], []
    _synchronize(built)
    for number in range(count):
        marks, loss = _step(built, ring[number % RING], mark)
        all_marks.append(marks)
        losses.append(loss)
    end = mark()
    _synchronize(built)
    ends = [marks[0] for marks in all_marks[1:]] + [end]
    return [_spans([*marks, after]) for marks, after in zip(all_marks, ends, strict=True)], losses


def _spans(marks: list[Any]) -> list[float]:
    pairs = itertools.pairwise(marks)
    return [(b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b) for a, b in pairs]


def _synchronize(built: Built) -> None:
    if built.is_cuda:
        torch.cuda.synchronize()


def _clear(built: Built) -> None:
    built.optimizer.zero_grad(set_to_none=True)
    if built.is_cuda:
        torch.cuda.empty_cache()


def _start_peak(built: Built) -> None:
    if built.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        footprint.reset_peak()
    except UnavailableError as err:
        raise CellFailure("unsupported", err.what) from err


def _peak(built: Built) -> dict[str, Any]:
    """Weights, moments, gradients and activations: the whole of what a step holds."""
    if built.is_cuda:
        return {
            "meter": "cuda_allocator",
            "peak_mem_mib": torch.cuda.max_memory_allocated() / cost.MIB,
            "reserved_mib": torch.cuda.max_memory_reserved() / cost.MIB,
        }
    return {"meter": "peak_rss", "peak_mem_mib": footprint.status_bytes("VmHWM") / cost.MIB}
