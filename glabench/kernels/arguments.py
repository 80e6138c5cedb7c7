"""What the linear forms share before they compute: argument checks, and packed sequences."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from glabench.errors import ShapeError


def check_linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Check q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, K] or [B, T, H], state [rows, H, K, V].

    Raises: ShapeError naming the argument that does not fit.
    """
    check_qkv(q, k, v)
    if g is not None and g.shape not in (q.shape, q.shape[:3]):
        raise ShapeError(f"g {_of(g)} does not fit q {_of(q)}")
    rows = check_rows(q.shape[0], q.shape[1], cu_seqlens)
    wanted = (rows, q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != wanted:
        raise ShapeError(f"initial_state {_of(state)} is not {list(wanted)}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ShapeError where the three do not belong together."""
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ShapeError(f"q {_of(q)}, k {_of(k)} and v {_of(v)} do not fit [B, T, H, K], same, [B, T, H, V]")


def check_bounds(bounds: list[int], length: int) -> None:
    """Raises ShapeError where cu_seqlens, read, does not cover one packed row."""
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
        raise ShapeError(f"cu_seqlens {bounds} does not rise from 0 to {length}")


def check_rows(batch: int, length: int, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences. Raises ShapeError where cu_seqlens does not cover one packed row."""
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ShapeError(f"packed sequences need a batch of 1, not {batch}")
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, length)
    return len(bounds) - 1


def over_sequences(
    run: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call `run(*tensors, state)` once, or once for each packed sequence, and put the parts together."""
    if cu_seqlens is None:
        return run(*tensors, state)
    bounds = cu_seqlens.tolist()  # a loop: packed rows are for checking here, not for speed
    parts = [
        run(*(x[:, lo:hi] for x in tensors), None if state is None else state[i : i + 1])
        for i, (lo, hi) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit inputs; wider inputs keep their own type."""
    return torch.promote_types(dtype, torch.float32)


def chunk_length(length: int, limit: int) -> int:
    """The least power of two that holds `length`, at most `limit`."""
    return min(limit, 1 << max(0, length - 1).bit_length())


def _of(x: Tensor) -> str:
    return str(list(x.shape))
