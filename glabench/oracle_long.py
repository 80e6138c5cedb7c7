"""The oracle at benchmark length: the same functions in float64, in forms that take seconds, not hours.

Linear families run in chunks whose blocks are joined two by two, so that decays are only ever
multiplied and any gate is exact; Mamba steps through all its chunks at once; attention goes by blocks of
query rows over the keys before them. Memory is bounded by taking pieces of rows and of heads.
"""

from collections.abc import Callable

import torch  # noqa: TID253  heavy, as the oracle that it serves
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor  # noqa: TID253

CHUNK = 64
CPU_BUDGET_BYTES = 2**28  # beyond, a CPU spends its time on fresh pages
GPU_SHARE = 0.3  # of the free memory: larger pieces are fewer launches
ROWS = {"cpu": 256, "cuda": 1024}  # query rows of attention at once; the fastest on 2 CPU cores


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """GLA in chunks: q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, K or 1], states [B, H, K, V]."""
    T = q.shape[1]
    q, k, v, g = (_chunks(x) for x in (scale * q, k, v, g))  # [B, H, N, C, ...]
    # blocks of one token: their scores, q decayed from the block's start, k to its end, and all its decay
    q, k, decay = (x.unsqueeze(-2) for x in (q, k, g.exp()))  # [B, H, N, blocks, tokens, ...]
    A, q = (q * k).sum(-1, keepdim=True), q * decay
    while A.shape[3] > 1:
        (Aa, Ab), (qa, qb), (ka, kb), (da, db) = (x.unflatten(3, (-1, 2)).unbind(4) for x in (A, q, k, decay))
        A = torch.cat((F.pad(Aa, (0, Aa.shape[-1])), torch.cat((qb @ ka.mT, Ab), -1)), -2)
        q, k, decay = torch.cat((qa, qb * da), -2), torch.cat((ka * db, kb), -2), da * db
    A, q, k, decay = (x.squeeze(3) for x in (A, q, k, decay))
    before = []
    for added, kept in zip((k.mT @ v).unbind(2), decay.mT.unbind(2), strict=True):
        before.append(state)
        state = kept * state + added
    o = A @ v + q @ torch.stack(before, 2)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), state


def simple_gla(q, k, v, g, *, scale, state) -> tuple[Tensor, Tensor]:
    """One gate a head, g [B, T, H]."""
    return gla(q, k, v, g.unsqueeze(-1), scale=scale, state=state)


def linear_attention(q, k, v, *, scale, state) -> tuple[Tensor, Tensor]:
    """No gates."""
    return gla(q, k, v, torch.zeros_like(q[..., :1]), scale=scale, state=state)


def mamba2(x, dt, A, B, C, D, *, state) -> tuple[Tensor, Tensor]:
    """Linear attention with q = C, k = B, v = dt x and the gate dt A; states [B, H, P, N]."""
    C, B = (z.repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (C, B))
    gate = (dt * A).unsqueeze(-1)
    y, last = gla(C, B, dt.unsqueeze(-1) * x, gate, scale=1.0, state=state.mT)
    return y + D.unsqueeze(-1) * x, last.mT


def mamba(x, dt, A, B, C, D, *, state) -> tuple[Tensor, Tensor]:
    """All chunks step together from nothing; then each gets the state before it, decayed."""
    T = x.shape[1]
    L = 1 << (T.bit_length() // 2)  # as many steps inside chunks as between them
    dts, xs, Bs, Cs = (F.pad(z.mT, (0, -T % L)).mT.unflatten(1, (-1, L)) for z in (dt, x, B, C))
    decay = (dts.unsqueeze(-1) * A).exp()  # [B, n, L, E, N]
    added = (dts * xs).unsqueeze(-1) * Bs.unsqueeze(-2)
    h, steps = torch.zeros_like(added[:, :, 0]), []
    for a, u in zip(decay.unbind(2), added.unbind(2), strict=True):
        h = torch.addcmul(u, a, h)
        steps.append(h)
    reach = (dts.cumsum(2).unsqueeze(-1) * A).exp()
    before = []
    for kept, u in zip(reach[:, :, -1].unbind(1), h.unbind(1), strict=True):
        before.append(state)
        state = kept * state + u
    h = torch.addcmul(torch.stack(steps, 2), reach, torch.stack(before, 1).unsqueeze(2))
    y = (h @ Cs.unsqueeze(-1)).squeeze(-1).flatten(1, 2)[:, :T]
    return y + D * x, state


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gla": gla,
    "simple_gla": simple_gla,
    "retention": gla,  # with the gates of `constants`
    "linear_attention": linear_attention,
    "mamba": mamba,
    "mamba2": mamba2,
}


def constants(family: str, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a form takes beside the family's tensors, with no gradient: retention's gates."""
    return {"g": retention_gates(exact["q"])} if family == "retention" else {}


def retention_gates(q: Tensor) -> Tensor:
    """Log decay of each head, log(1 - 2 ** (-5 - h)), as [B, T, H, 1] for q [B, T, H, K]."""
    h = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    return torch.log1p(-(2.0 ** (-5 - h)))[:, None].expand(*q.shape[:2], -1, 1)


def budget_bytes(device: torch.device) -> int:
    """What a piece may keep for autograd at its peak."""
    if device.type == "cpu":
        return CPU_BUDGET_BYTES
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])


def tokens(exact: dict[str, Tensor]) -> int:
    """Length of the sequences."""
    return exact["q" if "q" in exact else "x"].shape[1]


def pieces(exact: dict[str, Tensor], state: Tensor) -> list[tuple[slice, slice]]:
    """Slices of rows and of heads (channels) that stay within the device's budget, at least one of each."""
    rows, heads, *size = state.shape  # size: [K, V], [P, N] or [N]
    # float64 numbers a token and head that autograd keeps, counted at the peak
    kept = 12 * size[0] if len(size) == 1 else 20 * sum(size) + 8 * size[0] * size[1] // CHUNK
    per_head = 8 * tokens(exact) * kept
    room = max(1, budget_bytes(state.device) // per_head)
    one_group = "B" not in exact or exact["B"].dim() == 3 or exact["B"].shape[2] == 1
    step = min(heads, room) if one_group else heads
    at_once = max(1, room // heads) if step == heads else 1
    return [
        (slice(r, r + at_once), slice(h, h + step))
        for r in range(0, rows, at_once)
        for h in range(0, heads, step)
    ]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    d_out: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Causal softmax attention and, with d_out, its gradients; only query rows `positions` if given.

    Shapes: q, k, v, d_out [B, T, H, D]; out [B, T or len(positions), H, D]; gradients as q, k, v.
    Last come the sizes [B, T, H, 1] of the terms that cancel in dq and dk: scores' gradients are
    p (dp - o . do), and it is the sum o . do that 16-bit rounding of o blurs.
    """
    B, T, H, D = q.shape
    at = torch.arange(T, device=q.device) if positions is None else positions.to(q.device)
    qs, ks, vs = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    ds = None if d_out is None else d_out.transpose(1, 2).reshape(B * H, T, D)
    out = q.new_empty(B * H, len(at), D)
    dq, dk, dv = (torch.zeros_like(x) for x in (qs, ks, vs))
    to_q, to_k = (q.new_zeros(B * H, T, 1) for _ in range(2))
    R = max(1, min(ROWS[q.device.type], budget_bytes(q.device) // (3 * 8 * B * H * T)))
    buffers = q.new_empty(3, B * H * min(R, len(at)) * T)  # reused: fresh pages cost more than the products
    for lo in range(0, len(at), R):
        rows = at[lo : lo + R]
        first, end = int(rows.min()), int(rows.max()) + 1
        scores, weights, d_weights = (b[: B * H * len(rows) * end].view(B * H, -1, end) for b in buffers)
        query = qs[:, rows] * scale
        torch.bmm(query, ks[:, :end].mT, out=scores)
        later = torch.arange(first, end, device=q.device) > rows[:, None]
        scores[:, :, first:].masked_fill_(later, -torch.inf)
        torch.softmax(scores, -1, out=weights)
        out[:, lo : lo + R] = o = torch.bmm(weights, vs[:, :end])
        if ds is None:
            continue
        d_o = ds[:, rows]
        torch.bmm(d_o, vs[:, :end].mT, out=d_weights)
        blurred = (d_o * o).square_().sum(-1, keepdim=True)
        to_q[:, rows] = blurred
        d_scores = d_weights.sub_((d_o * o).sum(-1, keepdim=True)).mul_(weights)
        dq[:, rows] = torch.bmm(d_scores, ks[:, :end]).mul_(scale)
        dk[:, :end].baddbmm_(d_scores.mT, query)
        dv[:, :end].baddbmm_(weights.mT, d_o)
        to_k[:, :end].baddbmm_(weights.square_().mT, blurred)
    shaped = [x.unflatten(0, (B, H)).transpose(1, 2) for x in (out, dq, dk, dv, to_q, to_k)]
    if ds is None:
        return shaped[0], (), ()
    rms_k, rms_q = (x.square().mean().sqrt() for x in (k, q))
    floors = (scale * rms_k * shaped[4].sqrt(), scale * rms_q * shaped[5].sqrt())
    return shaped[0], tuple(shaped[1:4]), floors


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, H, N, C, D]; zeros fill the last chunk and change no state."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).movedim(3, 1)
