"""Whole models in float64 from tensors by fla's names, token by token: what other tests compare with."""

import math

import torch
from torch.nn.functional import conv1d, logsigmoid, silu, softplus


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x, base=10000.0):
    """x [B, T, H, K] as K / 2 complex numbers, turned by position times base ** (-2 i / K)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * speed)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def recurrence(q, k, v, alpha, scale):
    """S_t = alpha_t S_{t-1} + k_t^T v_t; o_t = scale q_t S_t; alpha [B, T, H, K or 1]."""
    S, outs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, 1)


def decays(gate, x, w, heads):
    """alpha [B, T, H, K or 1] for each kind of gate."""
    B, T = x.shape[:2]
    if gate == "channel":
        low = x @ w["gk_proj.0.weight"].T
        return torch.exp(logsigmoid(low @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]) / 16).view(
            B, T, heads, -1
        )
    if gate == "scalar":
        return torch.sigmoid(x @ w["gk_proj.weight"].T + w["gk_proj.bias"]).pow(1 / 16)[..., None]
    if gate == "fixed":
        return torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=torch.float64).expand(
            B, T, -1
        )[..., None]
    return torch.ones(B, T, heads, 1, dtype=torch.float64)


def linear_mixer(x, w, *, heads, gate, rope, eps, authors):
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).unflatten(-1, (heads, -1)) for n in "qkv")
    if rope:
        q, k = rotary(q), rotary(k)
    width = x.shape[-1] / heads if authors else q.shape[-1]
    o = recurrence(q, k, v, decays(gate, x, w, heads), 1 / math.sqrt(width))
    if authors:
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + eps).sqrt()
    else:
        o = rms(o, w["g_norm_swish_gate.weight"], eps)
    r = x @ w["g_proj.weight"].T + w.get("g_proj.bias", 0)
    return (o.flatten(-2) * silu(r)) @ w["o_proj.weight"].T


def attention(x, w, *, heads, eps):
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).unflatten(-1, (heads, -1)) for n in "qkv")
    scores = torch.einsum("bihd,bjhd->bhij", rotary(q), rotary(k)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(-2) @ w["o_proj.weight"].T


def mamba_mixer(x, w):
    u, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    T, E, N = x.shape[1], u.shape[-1], w["A_log"].shape[-1]
    kernel = w["conv1d.weight"]
    u = conv1d(u.mT, kernel, w["conv1d.bias"], padding=kernel.shape[-1] - 1, groups=E)[..., :T]
    u = silu(u.mT)
    low, B, C = (u @ w["x_proj.weight"].T).split((w["dt_proj.weight"].shape[1], N, N), -1)
    dt = softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    S, outs = torch.zeros(x.shape[0], E, N, dtype=torch.float64), []
    for t in range(T):
        step = dt[:, t, :, None]
        S = torch.exp(step * -torch.exp(w["A_log"])) * S + step * B[:, t, None, :] * u[:, t, :, None]
        outs.append((S * C[:, t, None, :]).sum(-1) + w["D"] * u[:, t])
    return (torch.stack(outs, 1) * silu(z)) @ w["out_proj.weight"].T


def part(tensors, prefix):
    return {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}


def logits(tensors, ids, mixer, eps=1e-6, **options):
    """[B, T, vocabulary] of a model with a feed-forward; `mixer` is linear_mixer or attention."""
    w = part(tensors, "")
    x = w["model.embeddings.weight"][ids]
    for i in range(sum(n.endswith("attn_norm.weight") for n in w)):
        at = f"model.layers.{i}."
        x = x + mixer(rms(x, w[at + "attn_norm.weight"], eps), part(w, at + "attn."), eps=eps, **options)
        y, m = rms(x, w[at + "mlp_norm.weight"], eps), part(w, at + "mlp.")
        gate, up = m["gate_proj.weight"], m.get("up_proj.weight")
        if up is None:
            gate, up = gate.chunk(2)
        x = x + (silu(y @ gate.T) * (y @ up.T)) @ m["down_proj.weight"].T
    return rms(x, w["model.norm.weight"], eps) @ w.get("lm_head.weight", w["model.embeddings.weight"]).T


def mamba_logits(tensors, ids, eps=1e-5):
    w = part(tensors, "")
    x = w["backbone.embeddings.weight"][ids]
    for i in range(sum(n.endswith("A_log") for n in w)):
        at = f"backbone.layers.{i}."
        x = x + mamba_mixer(rms(x, w[at + "norm.weight"], eps), part(w, at + "mixer."))
    return (
        rms(x, w["backbone.norm_f.weight"], eps) @ w.get("lm_head.weight", w["backbone.embeddings.weight"]).T
    )
