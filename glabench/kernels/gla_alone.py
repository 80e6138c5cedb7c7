"""Each kernel of a call on its own, as tuning tries it: what is launched, and the tensors it fills."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from glabench.kernels import gla_launch
from glabench.kernels.gla_chunks import Chunks, chunks_of
from glabench.kernels.gla_configs import WIDE
from glabench.kernels.gla_launch import CHANNEL, FIXED, HEAD, Kept

LOSS = -0.05  # of a state made up, in nats: what the values are does not change what is launched


class Alone(NamedTuple):
    """One use of a kernel: `run` launches it; `filled` gives what it fills, from what `run` returned."""

    run: Callable[[], object]
    filled: Callable[[object], list[Tensor]]


def uses_of(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gate: int, *, scaled: bool
) -> dict[str, Alone]:
    """Every use of a kernel in forward and backward passes under the plan in force, by name.

    Shapes: as gla_chunk. Chunk states and gradients are random, so that no use depends on another. Unless
    `scaled`, nothing is launched here, and q and k stand for q and k times their decays.
    """
    if gate == FIXED:
        g = gla_launch.retention_gates(q.shape[2], q.device)
    chunks = chunks_of(*q.shape[:2], None, gla_launch.chunk_size(q, v, gate))
    how = {"scale": q.shape[3] ** -0.5, "gate": gate}

    def make() -> Kept:
        return gla_launch.scaled(q, k, v, g, chunks, **how, has_scores=_has_scores(q, v, gate))

    kept = make() if scaled else _unscaled(q, k, v, chunks, gate)
    draw = functools.partial(torch.randn, generator=torch.Generator(q.device).manual_seed(0), device=q.device)
    size, dtype = (chunks.total, q.shape[2], v.shape[3], q.shape[3]), gla_launch.state_dtype(q.dtype)
    kept = kept._replace(states=draw(size, dtype=dtype))
    two = kept if gla_launch.keeps_scores(q, v, gate) else kept._replace(scores=None)
    do, dh = draw(v.shape, dtype=v.dtype), draw(size, dtype=dtype)
    h, o = torch.empty_like(dh), torch.empty_like(v)
    dq, dk, dg = torch.empty_like(q), torch.empty_like(k), gla_launch.empty_dg(g, gate, q, v)
    ends, on, back = (None, None, None, chunks), how | {"reverse": False}, how | {"reverse": True}
    xs, ys, run = kept.q, kept.k, gla_launch

    def gradient():
        run.run_gradient(xs, ys, v, g, do, kept, dh, dq, dk, dg, chunks, **how)

    def calls(*filled: Tensor | None):
        return lambda _: [x for x in filled if x is not None]

    states = calls(h)
    outputs, both, grads = calls(o), calls(h, o), calls(dq, dk, dg)
    return {
        "scale": Alone(make, lambda made: [x for x in made if x is not None and x is not q and x is not k]),
        "carry": Alone(lambda: run.run_carry(xs, ys, v, g, kept, h, o, *ends, **on), both),
        "carry back": Alone(lambda: run.run_carry(ys, xs, do, g, kept, h, o, *ends, **back), both),
        "carry alone": Alone(lambda: run.run_carry(xs, ys, v, g, kept, None, o, *ends, **on), outputs),
        "wide": Alone(lambda: run.run_wide(xs, ys, v, g, kept, o, *ends, **how), outputs),
        "state": Alone(lambda: run.run_state(ys, v, g, kept, h, *ends, **on), states),
        "state back": Alone(lambda: run.run_state(xs, do, g, kept, h, *ends, **back), states),
        "output": Alone(lambda: run.run_output(xs, ys, v, g, two, two.states, o, chunks, **on), outputs),
        "output back": Alone(lambda: run.run_output(ys, xs, do, g, two, dh, o, chunks, **back), outputs),
        "gradient": Alone(gradient, grads),
    }


def _has_scores(q: Tensor, v: Tensor, gate: int) -> bool:
    """Whether a call of these widths may make scores once."""
    return gla_launch.keeps_scores(q, v, gate) or WIDE in gla_launch.carriers(q, v, gate, keep=False)


def _unscaled(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, gate: int) -> Kept:
    H, K = q.shape[2:]
    like, dtype = {"dtype": torch.float32, "device": q.device}, gla_launch.state_dtype(q.dtype)
    scores = None
    if _has_scores(q, v, gate):
        scores = torch.zeros(chunks.total, H, chunks.size, chunks.size, dtype=dtype, device=q.device)
    if gate == HEAD:
        sums = torch.full((chunks.total, H, 2, chunks.size), LOSS, **like)
        return Kept(None, sums, torch.zeros_like(sums[:, :, 0], dtype=torch.int32), q, k, scores)
    if gate != CHANNEL:
        return Kept(None, None, None, q, k, scores)
    blocks = gla_launch.key_blocks(q, v, gate)
    totals = torch.full((chunks.total, H, K), LOSS, **like)
    reach = torch.full((chunks.total, H, blocks), LOSS, **like)
    return Kept(None, totals, reach, q.to(dtype), k.to(dtype), scores)
