"""One token with a state, plain PyTorch: the recurrences as they are written, the state in place.

For decoding without a GPU. A token has a time axis of 1: q, k [B, 1, H, K], v, o [B, 1, H, V], state [B, H,
K, V]; Mamba's as its families have them, states [B, E, N] and [B, H, P, N]. States are wide, float32 or more.
"""

import torch
from torch import Tensor


def gla_step_torch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """S = diag(exp g) S + k v^T, o = S^T q / sqrt(K); g [B, 1, H, K] in nats (GLA eq. 3)."""
    return _step(q, k, v, state, g[:, 0].to(state.dtype).exp().unsqueeze(-1))


def simple_gla_step_torch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """gla_step_torch with one gate a head, g [B, 1, H]."""
    return gla_step_torch(q, k, v, g.unsqueeze(-1), state)


def retention_step_torch(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """gla_step_torch where head h decays by 1 - 2 ** (-5 - h) (RetNet §2.1)."""
    heads = torch.arange(q.shape[2], device=q.device, dtype=state.dtype)
    return _step(q, k, v, state, (1 - torch.exp2(-5 - heads))[:, None, None])


def linear_attention_step_torch(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """gla_step_torch without a gate."""
    return _step(q, k, v, state, None)


def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None) -> Tensor:
    if decay is not None:
        state.mul_(decay)
    query, key, value = (x[:, 0].to(state.dtype) for x in (q, k, v))
    state.add_(key.unsqueeze(-1) * value.unsqueeze(-2))
    o = (query * q.shape[-1] ** -0.5).unsqueeze(-2) @ state  # [B, H, 1, V]
    return o.transpose(1, 2).to(v.dtype)


def mamba_step_torch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """h = exp(dt A) h + dt x B^T, y = h C + D x (Mamba eq. 2)."""
    return _scan_step(x, dt, dt.to(state.dtype).unsqueeze(-1) * A, B.unsqueeze(2), C.unsqueeze(2), D, state)


def mamba2_step_torch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """h = exp(dt A) h + dt x B^T, y = h C + D x, a head (Mamba-2 eq. 1)."""
    B, C = (z.repeat_interleave(x.shape[2] // z.shape[2], 2).unsqueeze(3) for z in (B, C))
    dt = dt.unsqueeze(-1)
    gate = (dt.to(state.dtype) * A.unsqueeze(-1)).unsqueeze(-1)
    return _scan_step(x, dt, gate, B, C, D.unsqueeze(-1), state)


def _scan_step(x: Tensor, dt: Tensor, gate: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """x, dt [B, 1, ...]; gate, B and C with an axis for the states of a channel."""
    wide = state.dtype
    state.mul_(gate[:, 0].exp()).add_((dt * x.to(wide))[:, 0].unsqueeze(-1) * B[:, 0].to(wide))
    y = (state * C[:, 0].to(wide)).sum(-1) + D * x[:, 0].to(wide)
    return y.unsqueeze(1).to(x.dtype)
