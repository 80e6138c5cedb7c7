"""Is an answer right? Outputs and all gradients of one call against the float64 oracle, on chosen rows.

Runs in a worker. Rows are batch rows, taken whole: a sequence's last token depends on all before it.
"""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glabench import oracle
from glabench.cases import Case
from glabench.worker import CellFailure

WHOLE = ("A", "D")  # parameters, without a batch axis: their gradients sum over all rows
LONG_ATTENTION = 4096  # tokens above which attention is checked at some positions only
POSITIONS = 512


@dataclass(slots=True)
class Tensors:
    """One call's inputs by name, the gradient of its output for a backward pass, and what to derive by.

    `carried` is what a step goes on from and may change: a state, or a key-value cache.
    """

    inputs: dict[str, Any]
    d_out: Any
    wrt: dict[str, Any]
    carried: dict[str, Any] = field(default_factory=dict)

    def all(self) -> list[Any]:
        return [*self.inputs.values(), *([] if self.d_out is None else [self.d_out])]

    @property
    def like_out(self) -> Any:
        """The input whose shape and dtype the output has."""
        return self.inputs["v" if "v" in self.inputs else "x"]


def choose_rows(batch: int, seqlen: int, tokens: int, seed: int) -> list[int]:
    """Batch rows of about `tokens` tokens in all: the first and the last, then random ones."""
    wanted = min(batch, max(2, tokens // seqlen))
    if wanted == batch:
        return list(range(batch))
    between = random.Random(seed).sample(range(1, batch - 1), wanted - 2)
    return sorted([0, *between, batch - 1])


def one_row(batch: int, seed: int) -> int:
    return random.Random(seed).randrange(batch)


def choose_positions(family: str, seqlen: int, seed: int) -> list[int] | None:
    """Query positions for long attention, the last among them; None where all are checked."""
    if family != "attention" or seqlen <= LONG_ATTENTION:
        return None
    return sorted([*random.Random(seed).sample(range(seqlen - 1), POSITIONS - 1), seqlen - 1])


def check(
    forward: Callable[[Tensors], Any],
    build: Callable[[], Tensors],
    *,
    family: str,
    case: Case,
    rows: list[int],
    seed: int,
    poisoned: bool,
) -> dict[str, Any]:
    """Run one call and compare; the row's check fields. Raises CellFailure("wrong", ...).

    `build` makes the inputs, twice the same: the call must not have changed its own. `poisoned` fills
    fresh memory with NaN, so that an element left unwritten shows.
    """
    positions = choose_positions(family, case.seqlen, seed)
    poison = oracle.poisoned_memory if poisoned else contextlib.nullcontext
    tensors = build()
    if tensors.d_out is not None:
        tensors.d_out = _mask(tensors, rows, positions)
    with poison():
        out, gradients = _run(forward, tensors)
    fresh = build()
    for name, tensor in tensors.inputs.items():
        if not tensor.equal(fresh.inputs[name]):
            raise CellFailure("wrong", f"it changes its input {name} in place")
    if tensors.d_out is not None:
        fresh.d_out = _mask(fresh, rows, positions)
        if not tensors.d_out.equal(fresh.d_out):
            raise CellFailure("wrong", "it changes the gradient of its output in place")
    for name, tensor in {"out": out, **gradients}.items():
        if not tensor.isfinite().all():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            raise CellFailure("wrong", f"{name}: NaN or infinity in {bad} of {tensor.numel()} elements")
    errors = _compare(out, gradients, fresh, family=family, dtype=case.dtype, rows=rows, positions=positions)
    worst = max(errors, key=lambda e: (not e.ok, (e.rms_ratio or 0.0) / e.tol_ratio))
    if not worst.ok:
        raise CellFailure("wrong", f"{worst.name}: {worst.reason}")
    share = len(rows) / case.batch * (1.0 if positions is None else len(positions) / case.seqlen)
    return {
        "err_ratio": worst.rms_ratio,
        "tol_ratio": worst.tol_ratio,
        "worst_tensor": worst.name,
        "checked_frac": share,
    }


def must_fit(out: Any, tensors: Tensors) -> None:
    """Raise CellFailure("wrong", ...) for an output that cannot be the answer, whatever stands in it."""
    like = tensors.like_out
    if out.shape != like.shape:
        raise CellFailure("wrong", f"out: shape {list(out.shape)} is not {list(like.shape)}")
    if out.dtype != like.dtype:
        raise CellFailure("wrong", f"out: dtype {out.dtype} is not {like.dtype}".replace("torch.", ""))
    if tensors.wrt and not out.requires_grad:
        raise CellFailure("wrong", "its output carries no gradient")


def _run(forward: Callable[[Tensors], Any], tensors: Tensors) -> tuple[Any, dict[str, Any]]:
    import torch

    with torch.set_grad_enabled(bool(tensors.wrt)):
        out = forward(tensors)
        must_fit(out, tensors)
        if not tensors.wrt:
            return out, {}
        found = torch.autograd.grad(out, list(tensors.wrt.values()), tensors.d_out)
    return out.detach(), dict(zip(tensors.wrt, found, strict=True))


def _mask(tensors: Tensors, rows: list[int], positions: list[int] | None) -> Any:
    """The output's gradient, zero where the oracle does not look and a compared gradient would depend."""
    import torch

    d_out = tensors.d_out
    if positions is not None:
        kept = torch.zeros_like(d_out)
        kept[:, positions] = d_out[:, positions]
        d_out = kept
    if any(name in tensors.wrt for name in WHOLE) and len(rows) < d_out.shape[0]:
        kept = torch.zeros_like(d_out)
        kept[rows] = d_out[rows]
        d_out = kept
    return d_out


def _compare(
    out: Any,
    gradients: dict[str, Any],
    tensors: Tensors,
    *,
    family: str,
    dtype: str,
    rows: list[int],
    positions: list[int] | None,
) -> list[oracle.Error]:
    import torch

    def pick(name: str, tensor: Any) -> Any:
        return tensor if name in WHOLE else tensor[rows]

    want = oracle.reference(
        family,
        {name: pick(name, tensor) for name, tensor in tensors.inputs.items()},
        d_out=None if tensors.d_out is None else tensors.d_out[rows],
        positions=None if positions is None else torch.tensor(positions, device=out.device),
    )
    got = out[rows] if positions is None else out[rows][:, positions]
    errors = [oracle.compare("out", got, want.out, dtype)]
    for name, gradient in gradients.items():
        floor = want.floors.get(name, 0.0)
        errors.append(oracle.compare(name, pick(name, gradient), want.gradients[name], dtype, floor))
    return errors
