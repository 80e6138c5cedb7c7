"""Faulty implementations of gla, one fault each: --impl tests/faulty_impls.py:NAME."""

import ctypes
import os
import subprocess
import sys
import threading
import time

import torch


def gla_good(q, k, v, g):
    """Right: token by token in float64, a custom backward left to autograd."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float64)
    outs = []
    for q_t, k_t, v_t, g_t in zip(*(x.double().unbind(1) for x in (q, k, v, g)), strict=True):
        state = g_t.exp().unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return (torch.stack(outs, 1) * q.shape[-1] ** -0.5).to(v.dtype)


def gla_wrong(q, k, v, g):
    return gla_good(q, k, v, g) * 1.1


def gla_wrong_last_token(q, k, v, g):
    out = gla_good(q, k, v, g)
    return torch.cat([out[:, :-1], out[:, -1:] * 1.5], 1)


def gla_wrong_gradient(q, k, v, g):
    """The forward pass is right; only the gate's gradient is off."""
    return gla_good(q, k, v, g * 1.0 - 0.2 * (g - g.detach()))


def gla_nan(q, k, v, g):
    out = gla_good(q, k, v, g).clone()
    out[0, out.shape[1] // 2, 0, 0] = float("nan")
    return out


def gla_unwritten(q, k, v, g):
    """Fills fresh memory, except for one element that it happens to leave as it was."""
    right = gla_good(q, k, v, g)
    out = torch.empty_like(right)
    flat, values = out.view(-1), right.reshape(-1)
    flat[: values.numel() // 3] = values[: values.numel() // 3]
    flat[values.numel() // 3 + 1 :] = values[values.numel() // 3 + 1 :]
    return out


def gla_in_place(q, k, v, g):
    """Scales q where it stands; the answer is right."""
    scale = q.shape[-1] ** -0.5
    out = gla_good(q, k, v, g)
    q.mul_(scale)
    return out


def gla_in_place_hidden(q, k, v, g):
    """The same behind autograd's back."""
    out = gla_good(q, k, v, g)
    q.data[:, -1] += 1
    return out


def gla_wrong_shape(q, k, v, g):
    return gla_good(q, k, v, g).transpose(1, 2)


def gla_wrong_dtype(q, k, v, g):
    return gla_good(q, k, v, g).double()


def gla_none(q, k, v, g):
    return None


def gla_detached(q, k, v, g):
    return gla_good(q, k, v, g).detach()


_answers = {}


def gla_caches(q, k, v, g):
    """Gives its first answer again for every later call of a shape; the gradients are right."""
    out = gla_good(q, k, v, g)
    first = _answers.setdefault(q.shape, out.detach())
    return out + (first - out.detach())


def gla_sleeps(q, k, v, g):
    while True:
        time.sleep(60)


def gla_exits(q, k, v, g):
    os._exit(5)


def gla_segfaults(q, k, v, g):
    ctypes.string_at(0)


def gla_exhausts_memory(q, k, v, g):
    kept = []
    while True:
        kept.append(torch.ones(64 * 2**20, dtype=torch.uint8))


def gla_raises(q, k, v, g):
    raise ValueError('a, b; "quoted", and\n  on two lines,\r\nthree even')


def gla_prints(q, k, v, g):
    print('{"id": 1, "status": "ok"}')  # noqa: T201  what the test is about
    print("complaint", file=sys.stderr)  # noqa: T201  what the test is about
    ctypes.CDLL(None).puts(b"from C")
    return gla_good(q, k, v, g)


def gla_other_arguments(q, k, v, *, decay):
    return v


def gla_leaves_strays(q, k, v, g):
    """Right, but a child process and a thread go on after the call."""
    subprocess.Popen(["sleep", "300"])
    threading.Thread(target=time.sleep, args=(300,)).start()
    return gla_good(q, k, v, g)


class _Once(torch.autograd.Function):
    """Adds nothing; its backward scribbles on what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.ones_like(x))
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        (ones,) = ctx.saved_tensors
        result = d_x * ones
        ones.data.mul_(2)
        return result


def gla_backward_once(q, k, v, g):
    return _Once.apply(gla_good(q, k, v, g))
