"""Mamba-2's state-space duality in chunks, plain PyTorch (Mamba-2 §6).

The recurrence is linear attention with one gate a head: q = C, k = B, v = dt x, g = dt A. B and C are
shared by the heads of a group, so their products are formed once a group and decays multiply after.
"""

import functools

from torch import Tensor

from glabench.errors import ShapeError
from glabench.kernels.arguments import accumulator, check_rows, chunk_length, over_sequences
from glabench.kernels.linear_chunk import StateScan, from_chunks, head_decays, to_chunks

CHUNK = 64


def mamba2_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T, y_t = h_t C_t + D x_t; returns (y, last h or None).

    Shapes: x, y [B, T, H, P]; dt [B, T, H]; A, D [H]; B, C [B, T, G, N]; states [rows, H, P, N], fp32.
    Units:  dt > 0 and A < 0, so that dt A is a log decay in nats.
    Raises: ShapeError.
    Source: Mamba-2 eq. 1-2 and §6.
    """
    _check(x, dt, A, B, C, D, initial_state, cu_seqlens)
    run = functools.partial(_forward, A)
    y, state = over_sequences(run, (x, dt, B, C), initial_state, cu_seqlens)
    wide = accumulator(x.dtype)
    y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), state if output_final_state else None


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if x.dim() != 4 or B.dim() != 4 or x.shape[2] % B.shape[2]:
        raise ShapeError(f"x {list(x.shape)} and B {list(B.shape)} do not fit [B, T, H, P], [B, T, G, N]")
    rows, (heads, width) = check_rows(x.shape[0], x.shape[1], cu_seqlens), x.shape[2:]
    wanted = {"dt": (dt, x.shape[:3]), "A": (A, (heads,)), "D": (D, (heads,)), "C": (C, B.shape)}
    wanted["B"] = (B, (*x.shape[:2], *B.shape[2:]))
    if state is not None:
        wanted["initial_state"] = (state, (rows, heads, width, B.shape[3]))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ShapeError(f"{name} {list(tensor.shape)} is not {list(shape)}")


def _forward(
    A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, T, H, P), N, wide = x.shape, B.shape[3], accumulator(x.dtype)
    state = x.new_zeros(batch, H, P, N, dtype=wide) if state is None else state.to(wide)
    if T == 0:
        return x.to(wide), state
    L = chunk_length(T, CHUNK)
    dt, B, C = dt.to(wide), to_chunks(B.to(wide), L), to_chunks(C.to(wide), L)  # [batch, G, n, L, N]
    u = to_chunks(dt.unsqueeze(-1) * x.to(wide), L)  # [batch, H, n, L, P]
    between, before, after, total = head_decays(to_chunks(dt * A.to(wide), L))
    scores = _to_heads(C @ B.mT, H) * between
    added = _to_heads(B.mT, H) @ (u * after)
    S, last = StateScan.apply(added, total, state.mT)  # states are [N, P] here
    y = scores @ u + (_to_heads(C, H) @ S) * before
    return from_chunks(y, T), last.mT


def _to_heads(z: Tensor, H: int) -> Tensor:
    """[batch, G, ...] -> [batch, H, ...]; a view where all heads share one group."""
    G = z.shape[1]
    return z.repeat_interleave(H // G, 1) if G > 1 else z.expand(-1, H, *z.shape[2:])
