"""Mamba's selective scan, plain PyTorch: all chunks step together (Mamba §3.3, algorithm 2).

Each channel has its own decay a state, so no matrix product does the work of several tokens. Instead
the sequence is cut into chunks of L: one sweep over the L positions, each step taking every chunk at
once, gives what a chunk adds to the state; a short chain over chunks gives the state before each; a
second sweep starts there and reads the outputs. The backward pass does the same in reverse.

Arrays in a sweep are [L, N or 1, E or 1, R]: positions first, rows R = batch x chunks last, so that
each step works on contiguous memory and sums run over leading axes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from glabench.errors import ShapeError
from glabench.kernels.arguments import accumulator


def mamba_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t, y_t = C_t h_t + D x_t; (y, last h or None).

    Shapes: x, dt, y [B, T, E]; A [E, N]; B, C [B, T, N]; D [E]; states [B, E, N], fp32.
    Units:  dt > 0 and A < 0, so that dt A is a log decay in nats. y is stored channel by channel.
    Raises: ShapeError.
    Source: Mamba eq. 2a-2b with the simplified discretisation of B.
    """
    check_mamba(x, dt, A, B, C, D, initial_state)
    wide, (rows, T, E), N = accumulator(x.dtype), x.shape, A.shape[1]
    state = x.new_zeros(rows, E, N, dtype=wide) if initial_state is None else initial_state.to(wide)
    if T == 0:
        return x, state if output_final_state else None
    L = chunk_length_of(T)
    full = [F.pad(z.to(wide).mT, (0, -T % L)).mT for z in (x, dt, B, C)]  # dt = 0 changes no state
    y, last = SelectiveScan.apply(*full[:2], A.to(wide), *full[2:], state, L)
    y = y[:, :T] + D.to(wide) * full[0][:, :T]
    return y.to(x.dtype), last if output_final_state else None


def chunk_length_of(T: int) -> int:
    """About sqrt(T) / 2: as few steps as leave each one enough work (measured at T 1k..16k on 2 cores)."""
    return 1 << max(0, T.bit_length() // 2 - 1)


def check_mamba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> None:
    """Raises ShapeError where the tensors do not fit mamba_torch's shapes."""
    if x.dim() != 3 or dt.shape != x.shape or A.dim() != 2:
        raise ShapeError(f"x {list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)} do not fit")
    E, N = A.shape
    wanted = {"B": (B, (*x.shape[:2], N)), "C": (C, (*x.shape[:2], N)), "D": (D, (x.shape[2],))}
    wanted |= {"A": (A, (x.shape[2], N))}
    if state is not None:
        wanted |= {"initial_state": (state, (x.shape[0], E, N))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ShapeError(f"{name} {list(tensor.shape)} is not {list(shape)}")


class SelectiveScan(torch.autograd.Function):
    """The scan without its D term; T is a multiple of L. Keeps the inputs and a state a chunk."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, first, L):
        At = A.mT.unsqueeze(-1).contiguous()  # [N, E, 1]
        dts, Bs, Cs = _by_position(dt, L), _by_position(B, L)[:, :, None], _by_position(C, L)[:, :, None]
        u = dts * _by_position(x, L)
        a = u.new_empty(*At.shape[:2], u.shape[-1])  # [N, E, R]: decays of one position
        h = torch.zeros_like(a)
        for i in range(L):
            _decays(dts[i], At, a)
            h.mul_(a).addcmul_(u[i], Bs[i])
        S = _chain(h, _decays(dts.sum(0), At, a), first, reverse=False)
        h = _rows(S[:-1])
        y = torch.empty_like(u)
        for i in range(L):
            _decays(dts[i], At, a)
            h.mul_(a).addcmul_(u[i], Bs[i])
            torch.sum(torch.mul(h, Cs[i], out=a), 0, out=y[i])
        ctx.save_for_backward(x, dt, A, B, C, S)
        ctx.L = L
        return _by_time(y, x.shape[0]), S[-1].permute(2, 1, 0).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, S = ctx.saved_tensors
        L, batch = ctx.L, x.shape[0]
        At = A.mT.unsqueeze(-1).contiguous()
        xs, dts, dys = (_by_position(z, L) for z in (x, dt, dy))
        Bs, Cs = _by_position(B, L)[:, :, None], _by_position(C, L)[:, :, None]
        u = dts * xs
        a = u.new_empty(*At.shape[:2], u.shape[-1])
        G = torch.zeros_like(a)  # gradient of h, first as if nothing came after the chunk
        for i in reversed(range(L)):
            _decays(dts[i], At, a)
            G.addcmul_(dys[i], Cs[i]).mul_(a)
        GS = _chain(G, _decays(dts.sum(0), At, a), dlast, reverse=True)
        G = _rows(GS[1:])
        h = a.new_empty(L + 1, *a.shape)
        h[0] = _rows(S[:-1])
        for i in range(L):
            _decays(dts[i], At, a)
            torch.mul(h[i], a, out=h[i + 1]).addcmul_(u[i], Bs[i])
        du, ddt, dA = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(At)
        dB, dC = torch.empty_like(Bs[:, :, 0]), torch.empty_like(Cs[:, :, 0])
        w = torch.empty_like(a)
        for i in reversed(range(L)):
            G.addcmul_(dys[i], Cs[i])
            torch.sum(torch.mul(h[i + 1], dys[i], out=w), 1, out=dC[i])
            torch.sum(torch.mul(G, u[i], out=w), 1, out=dB[i])
            torch.sum(torch.mul(G, Bs[i], out=w), 0, out=du[i])
            G.mul_(_decays(dts[i], At, a))
            torch.mul(G, h[i], out=w)  # of the log decay dt A
            torch.sum(torch.mul(w, At, out=a), 0, out=ddt[i])
            dA += torch.sum(w.mul_(dts[i]), -1, keepdim=True)
        ddt.addcmul_(du, xs)
        back = [_by_time(z, batch) for z in (du.mul_(dts), ddt, dB, dC)]
        return *back[:2], dA.squeeze(-1).mT, *back[2:], GS[0].permute(2, 1, 0), None


def _by_position(z: Tensor, L: int) -> Tensor:
    """[B, T, D] -> [L, D, R]."""
    return z.unflatten(1, (-1, L)).permute(2, 3, 0, 1).flatten(2).contiguous()


def _by_time(z: Tensor, batch: int) -> Tensor:
    """[L, D, R] -> [B, T, D], stored [B, D, T] as the Mamba block keeps it."""
    return z.unflatten(-1, (batch, -1)).permute(2, 1, 3, 0).flatten(2).mT


def _decays(dt: Tensor, At: Tensor, out: Tensor) -> Tensor:
    return torch.mul(dt, At, out=out).exp_()


def _chain(added: Tensor, decay: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """States before each chunk, and after the last: [chunks + 1, N, E, B] from [N, E, R] and [B, E, N]."""
    added, decay = (
        z.unflatten(-1, (start.shape[0], -1)).permute(3, 0, 1, 2).contiguous() for z in (added, decay)
    )
    n = len(added)
    S = added.new_empty(n + 1, *added.shape[1:])
    S[n if reverse else 0] = start.permute(2, 1, 0)
    for i in reversed(range(n)) if reverse else range(n):
        torch.addcmul(added[i], decay[i], S[i + reverse], out=S[i + 1 - reverse])
    return S


def _rows(S: Tensor) -> Tensor:
    """[chunks, N, E, B] -> [N, E, R], a copy."""
    return S.permute(1, 2, 3, 0).flatten(2).clone(memory_format=torch.contiguous_format)
