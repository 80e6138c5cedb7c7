"""Steps of gla and of attention with one fault each: --impl tests/faulty_steps.py:NAME."""

import torch

from glabench.impls.attention_cached_sdpa import load
from glabench.kernels.step_torch import gla_step_torch


def gla_good(q, k, v, g, state):
    """Right, with a new state in place of a changed one."""
    new = state.clone()
    return gla_step_torch(q, k, v, g, new), new


def gla_forgets(q, k, v, g, state):
    """The output is right; the state stays as it was."""
    return gla_step_torch(q, k, v, g, state.clone())


def gla_decays_late(q, k, v, g, state):
    """Decays the new token as well."""
    o = gla_step_torch(q, k, v, torch.zeros_like(g), state)
    state.mul_(g[:, 0].exp().unsqueeze(-1))
    return o


def gla_in_place(q, k, v, g, state):
    """Right, but the gate is changed."""
    o = gla_step_torch(q, k, v, g, state)
    g.zero_()
    return o


_answers = {}


def gla_caches(q, k, v, g, state):
    """Gives its first answer again; the state goes on."""
    o = gla_step_torch(q, k, v, g, state)
    return _answers.setdefault(q.shape, o)


def attention_good(q, k, v, k_cache, v_cache):
    return load.load()(q, k, v, k_cache, v_cache)


def attention_writes_elsewhere(q, k, v, k_cache, v_cache):
    """The output is right; the cache's first token is lost."""
    o = load.load()(q, k, v, k_cache, v_cache)
    k_cache[:, 0] = 0
    return o


def attention_keeps_nothing(q, k, v, k_cache, v_cache):
    """The output is right; the token is not in the cache."""
    return load.load()(q, k, v, k_cache.clone(), v_cache.clone())


def attention_sees_not_itself(q, k, v, k_cache, v_cache):
    o = load.load()(q, k, v, k_cache[:, :-1].clone(), v_cache[:, :-1].clone())
    k_cache[:, -1:], v_cache[:, -1:] = k, v
    return o
