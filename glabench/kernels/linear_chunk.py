"""Linear attention in chunks, plain PyTorch: gates per channel, per head, fixed, or none (GLA §4).

Inside a chunk, gates per channel make the decay between two tokens, exp(b_i - b_j), a matter of each
channel, and splitting it into exp(b_i) exp(-b_j) overflows. Here a chunk is halved until single tokens
remain: at each level the queries of a second half meet the keys of the first half, and both decay
towards the border between them. Every exponent is a sum of gates and none is a difference, so nothing
overflows, nothing cancels, and a gate of -1e4 gives the exact limit. (GLA §4.3 halves once, to 16.)
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from glabench.kernels.arguments import accumulator, check_linear, chunk_length, over_sequences

CHUNK = 64  # the fastest of 16, 32, 64, 128 at K 16, V 32, T 16k on 2 CPU cores
Scores = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def gla_chunk_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention, one gate a key channel. Returns (o, final state or None).

    Shapes: q, k, g [B, T, H, K]; v, o [B, T, H, V]; states [rows, H, K, V], fp32; cu_seqlens [rows + 1].
    Units:  g in nats per step, <= 0; scale is K ** -0.5 unless given.
    Raises: ShapeError.
    Source: GLA eq. 3 and §4.
    """
    return _run(_channel_scores, (q, k, v, g), scale, initial_state, output_final_state, cu_seqlens)


def simple_gla_chunk_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one gate a head, g [B, T, H]; the rest as gla_chunk_torch."""
    return _run(_head_scores, (q, k, v, g), scale, initial_state, output_final_state, cu_seqlens)


def retention_chunk_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention: head h decays by 1 - 2 ** (-5 - h) a token (RetNet §2); the rest as gla_chunk_torch."""
    return _run(_retention_scores, (q, k, v), scale, initial_state, output_final_state, cu_seqlens)


def linear_attention_chunk_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with neither gate nor normaliser; the rest as gla_chunk_torch."""
    return _run(_undecayed_scores, (q, k, v), scale, initial_state, output_final_state, cu_seqlens)


def _run(
    scores: Scores,
    tensors: tuple[Tensor, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    q, k, v, *gate = tensors
    check_linear(q, k, v, gate[0] if gate else None, initial_state, cu_seqlens)
    run = functools.partial(_forward, scores, q.shape[-1] ** -0.5 if scale is None else scale)
    o, state = over_sequences(run, tensors, initial_state, cu_seqlens)
    return o, state if output_final_state else None


def _forward(scores: Scores, scale: float, *tensors_and_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores inside the chunks, a state between them: o = A v + (q P) S."""
    *tensors, state = tensors_and_state
    q, _, v = tensors[:3]
    B, T, H, V = v.shape
    wide = accumulator(v.dtype)
    state = v.new_zeros(B, H, q.shape[-1], V, dtype=wide) if state is None else state.to(wide)
    if T == 0:
        return v, state
    C = chunk_length(T, CHUNK)
    cq, ck, cv, *gate = (to_chunks(x.to(wide), C) for x in tensors)
    A, qP, kX, total = scores(cq * scale, ck, *gate, last=(T - 1) % C + 1)
    S, last = StateScan.apply(kX.mT @ cv, total, state)
    return from_chunks(A @ cv + qP @ S, T).to(v.dtype), last


def to_chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...]; the last chunk is filled with zeros, which change no state."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % C))
    return x.unflatten(1, (-1, C)).movedim(3, 1).contiguous()


def from_chunks(x: Tensor, T: int) -> Tensor:
    """[B, H, N, C, V] -> [B, T, H, V]."""
    return x.flatten(2, 3)[:, :, :T].transpose(1, 2).contiguous()


def head_decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays inside chunks from one log gate a token, g [..., C].

    Returns L [..., C, C] (from after token j through token i, 0 above the diagonal), P and X
    [..., C, 1] and the chunk's total [..., 1, 1]. Each is a sum of gates before it is exponentiated.
    """
    C = g.shape[-1]
    ones = torch.ones(C, C, dtype=g.dtype, device=g.device)
    between = (g[..., :, None] * ones.tril(-1)).cumsum(-2)  # [i, j]: sum of g over j < s <= i
    P = (between[..., :, 0] + g[..., :1])[..., None]
    L = between.masked_fill(ones.triu(1).bool(), -torch.inf).exp()
    return L, P.exp(), between[..., -1, :, None].exp(), P[..., -1:, :].exp()


# Scores of q, k [B, H, N, C, K] (and gates): A [B, H, N, C, C], q P, k X, total [B, H, N, K or 1, 1].
# `last` is the number of tokens in the last chunk; what fills it up has no keys, and must not decay.


def _channel_scores(q: Tensor, k: Tensor, g: Tensor, *, last: int) -> tuple[Tensor, ...]:
    return ChannelScores.apply(q, k, g)


def _head_scores(q: Tensor, k: Tensor, g: Tensor, *, last: int) -> tuple[Tensor, ...]:
    L, P, X, total = head_decays(g)
    return (q @ k.mT) * L, q * P, k * X, total


def _retention_scores(q: Tensor, k: Tensor, *, last: int) -> tuple[Tensor, ...]:
    H, N, C = q.shape[1:4]
    heads = torch.arange(H, dtype=torch.float64, device=q.device)
    gates = torch.log1p(-(2.0 ** (-5 - heads)))[:, None, None].repeat(1, 2, C)  # of a full chunk, of the last
    gates[:, 1, last:] = 0
    L, P, X, total = (
        torch.cat((x[:, :1].expand(-1, N - 1, -1, -1), x[:, 1:]), 1).to(q.dtype) for x in head_decays(gates)
    )
    return (q @ k.mT) * L, q * P, k * X, total.expand(q.shape[0], -1, -1, -1, -1)


def _undecayed_scores(q: Tensor, k: Tensor, *, last: int) -> tuple[Tensor, ...]:
    return (q @ k.mT).tril(), q, k, q.new_ones(()).expand(*q.shape[:3], 1, 1)


class ChannelScores(torch.autograd.Function):
    """q, k, g [..., C, K] -> scores A [..., C, C], q P, k X, and the total decay [..., K, 1].

    Only q, k and g are kept for the backward pass; the decays are formed again there.
    """

    @staticmethod
    def forward(ctx, q, k, g):
        P, X, levels = _halving_decays(g)
        A = torch.diag_embed((q * k).sum(-1))  # a token meets itself undecayed
        for m, p, x in levels:
            _crossing(A, m).copy_((_second(q, m) * p) @ (_first(k, m) * x).mT)
        ctx.save_for_backward(q, k, g)
        return A, q * P, k * X, P[..., -1, :, None].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dA, dqP, dkX, dtotal):
        q, k, g = ctx.saved_tensors
        P, X, levels = _halving_decays(g)
        dq, dk = dqP * P, dkX * X
        dP, dX = dq * q, dk * k  # of the exponents, and of ever smaller halves below
        dP[..., -1, :] += dtotal.squeeze(-1) * P[..., -1, :]
        diagonal = dA.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq.addcmul_(diagonal, k)
        dk.addcmul_(diagonal, q)
        for m, p, x in reversed(levels):
            # a half's exponents were joined from two quarters': undo that before using this level's
            _first(dP, m)[..., -1, :] += _second(dP, m).sum(-2)
            _second(dP, m)[..., -1, :] += _first(dX, m).sum(-2)
            block, half_q, half_k = _crossing(dA, m), _second(q, m), _first(k, m)
            to_q = (block @ (half_k * x)).mul_(p)
            to_k = (block.mT @ (half_q * p)).mul_(x)
            _second(dq, m).add_(to_q)
            _first(dk, m).add_(to_k)
            _second(dP, m).addcmul_(to_q, half_q)
            _first(dX, m).addcmul_(to_k, half_k)
        return dq, dk, dP


def _halving_decays(g: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, Tensor, Tensor]]]:
    """P and X of whole chunks, and (m, decay of second halves, of first halves) for m = 1, 2 .. C / 2."""
    P, X = g.clone(), torch.zeros_like(g)  # of blocks of one token: through it, after it
    levels, m = [], 1
    while m < g.shape[-2]:
        levels.append((m, _second(P, m).exp(), _first(X, m).exp()))
        total = _second(P, m)[..., -1:, :].clone()
        _second(P, m).add_(_first(P, m)[..., -1:, :])
        _first(X, m).add_(total)
        m *= 2
    return P.exp_(), X.exp_(), levels


def _first(x: Tensor, m: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, m))[..., 0, :, :]


def _second(x: Tensor, m: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, m))[..., 1, :, :]


def _crossing(A: Tensor, m: int) -> Tensor:
    """View [..., C / 2m, m, m] of A [..., C, C]: rows of each second half, columns of its first half."""
    blocks = A.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m))  # [..., i, 2, m, j, 2, m]
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class StateScan(torch.autograd.Function):
    """S_n+1 = total_n S_n + U_n over chunks: U [B, H, N, K, V], total [B, H, N, K or 1, 1], S_0 [B, H, K, V].

    Returns the states before each chunk, in U's shape, and the last one.
    """

    @staticmethod
    def forward(ctx, U, total, first):
        S = U.new_empty(*U.shape[:2], U.shape[2] + 1, *U.shape[3:])
        S[:, :, 0] = first
        for n in range(U.shape[2]):
            torch.addcmul(U[:, :, n], total[:, :, n], S[:, :, n], out=S[:, :, n + 1])
        ctx.save_for_backward(total, S)
        return S[:, :, :-1], S[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dS, dlast):
        total, S = ctx.saved_tensors
        G = torch.empty_like(S)
        G[:, :, -1] = dlast
        for n in reversed(range(dS.shape[2])):
            torch.addcmul(dS[:, :, n], total[:, :, n], G[:, :, n + 1], out=G[:, :, n])
        dtotal = (G[:, :, 1:] * S[:, :, :-1]).sum_to_size(*total.shape) if ctx.needs_input_grad[1] else None
        return G[:, :, 1:], dtotal, G[:, :, 0]
