"""GLA token by token, plain PyTorch: the recurrence as it is written. For checking and short sequences."""

import functools

import torch
from torch import Tensor

from glabench.kernels.arguments import accumulator, check_linear, over_sequences


def gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention by its recurrence. Returns (o, final state or None).

    Shapes: q, k, g [B, T, H, K]; v, o [B, T, H, V]; states [rows, H, K, V], fp32; cu_seqlens [rows + 1].
    Units:  g in nats per step, <= 0; scale is K ** -0.5 unless given.
    Raises: ShapeError.
    Source: GLA eq. 3.
    """
    check_linear(q, k, v, g, initial_state, cu_seqlens)
    run = functools.partial(_forward, q.shape[-1] ** -0.5 if scale is None else scale)
    o, state = over_sequences(run, (q, k, v, g), initial_state, cu_seqlens)
    return o, state if output_final_state else None


def _forward(
    scale: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V, wide = q.shape, v.shape[-1], accumulator(v.dtype)
    S = v.new_zeros(B, H, K, V, dtype=wide) if state is None else state.to(wide)
    if T == 0:
        return v, S
    columns = (x.unsqueeze(-1).unbind(1) for x in (q.to(wide) * scale, k.to(wide), g.to(wide).exp()))
    rows = v.to(wide).unsqueeze(-2).unbind(1)  # [B, H, 1, V] each, against columns [B, H, K, 1]
    outs = []
    for q_t, k_t, a_t, v_t in zip(*columns, rows, strict=True):
        S = torch.addcmul(k_t * v_t, a_t, S)
        outs.append((q_t * S).sum(-2))
    return torch.stack(outs, 1).to(v.dtype), S
