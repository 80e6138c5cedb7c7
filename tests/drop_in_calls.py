"""Runs in a process of its own, under Triton's interpreter: calls as flash-linear-attention takes them.

Prints one JSON object, {"check": whether it held}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from tolerances import TWO_FP32_FORMS, difference

from glabench import oracle
from glabench.errors import UsageError
from glabench.kernels import gla_chunk as kernels
from glabench.kernels import gla_chunks, gla_configs, gla_launch, plan_files
from glabench.kernels.gla_recurrent import gla_recurrent
from glabench.kernels.gla_step import gla_recurrent_fused

T, BOUNDS = 70, [0, 30, 41, 70]
FUNCTIONS = {
    "retention": kernels.retention_chunk,
    "linear attention": kernels.linear_attention_chunk,
    "simple GLA": lambda q, k, v, *rest: kernels.simple_gla_chunk(q, k, v, v[..., 0] / 9, *rest),
}


def leaves(length=T, rows=1, K=16):
    """q, k, v, g and a state that want gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 2, width) for width in (K, K, 16))
    made = q, k, v, -torch.rand(1, length, 2, K), torch.randn(rows, 2, K, 16)
    return [x.requires_grad_() for x in made]


def results(call, made, **how):
    """Output, final state and every gradient of one call."""
    *tensors, state = made
    o, final = call(*tensors, initial_state=state, output_final_state=True, **how)
    return [o, final, *torch.autograd.grad(o.sin().sum() + final.cos().sum(), made)]


def equal(found, wanted):
    """Whether all are, bit for bit."""
    return all(map(torch.equal, found, wanted))


def cut_off(form, chunk, carried, K=48):
    """Gates of -inf among others: outputs, states and gradients beside float64's."""
    made = leaves(130, K=K)
    with torch.no_grad():
        made[3][torch.rand(made[3].shape) < 0.05] = -torch.inf
        made[3][:, 66] = -torch.inf  # a token at which all is forgotten
    exact = [x.detach().double().requires_grad_() for x in made]
    wanted = results(gla_recurrent, exact)
    point = plan_files.Point(K, 16, gla_launch.CHANNEL, wide=True)
    gla_launch.CARRY_PROGRAMS = 0 if carried else 1e9
    with oracle.poisoned_memory(), gla_configs.in_force(point, gla_configs.rule(point, chunk)):
        found = results(kernels.gla_chunk, made, form=form)
    return all(difference(a, b) <= TWO_FP32_FORMS for a, b in zip(found, wanted, strict=True))


def packed(cu_seqlens, form="auto", **how):
    """results of gla_chunk on three packed rows."""
    return results(kernels.gla_chunk, leaves(rows=3), cu_seqlens=cu_seqlens, form=form, **how)


def strided(carried):
    """Bounds that lie apart in memory."""
    gla_launch.CARRY_PROGRAMS = 0 if carried else 1e9
    apart = torch.tensor([[n, 9] for n in BOUNDS])[:, 0]
    forms = ("materialised", "recompute")
    return all(equal(packed(apart, f), packed(torch.tensor(BOUNDS), f)) for f in forms)


def inferred():
    """Bounds made in inference mode, and changed in place there."""
    *tensors, state = (x.detach() for x in leaves(rows=3))
    with torch.inference_mode():
        bounds = torch.tensor([0, 10, 20, T])
        kernels.gla_chunk(*tensors, initial_state=state, cu_seqlens=bounds)
        bounds.copy_(torch.tensor(BOUNDS))
        found = kernels.gla_chunk(*tensors, initial_state=state, cu_seqlens=bounds)[0]
    return torch.equal(found, kernels.gla_chunk(*tensors, initial_state=state, cu_seqlens=bounds.clone())[0])


def compiled_packed():
    """Packed rows without gradients, compiled whole."""
    tensors = [x.detach() for x in leaves()[:4]]
    compiled = torch.compile(kernels.gla_chunk, backend="aot_eager", fullgraph=True)
    how = {"cu_seqlens": torch.tensor(BOUNDS)}
    with torch.no_grad():
        return torch.equal(compiled(*tensors, **how)[0], kernels.gla_chunk(*tensors, **how)[0])


class Layer(torch.nn.Module):
    """The least that can be exported."""

    def forward(self, q, k, v, g):
        return kernels.gla_chunk(q, k, v, g)[0]


def exported():
    """For any length, of one chunk or several, with gradients on, as they are unless turned off."""
    made, lengths = [x.detach() for x in leaves()[:4]], {1: torch.export.Dim("T", min=1, max=9999)}
    graph = torch.export.export(Layer(), tuple(made), dynamic_shapes=(lengths,) * 4).module()
    shorter = [x[:, :33].contiguous() for x in made]
    return all(torch.equal(graph(*x), kernels.gla_chunk(*x, form="recompute")[0]) for x in (made, shorter))


def from_16_bits(function, dtype):
    """A state of 16 bits is taken in float32, and has its gradient in its own type."""

    def call(state):
        q, k, v = (x.detach() for x in leaves()[:3])
        o, final = function(q, k, v, None, state, True)
        return o, final, *torch.autograd.grad(o.sum() + final.sum(), state)

    state = leaves()[4].detach().to(dtype)
    *found, gradient = call(state.clone().requires_grad_())
    *wanted, exact = call(state.float().requires_grad_())
    return equal(found, wanted) and torch.equal(gradient, exact.to(dtype))


def fused_from_16_bits():
    """The same of the token-by-token form."""
    *tensors, state = (x.detach() for x in leaves())
    found, wanted = (
        gla_recurrent_fused(*tensors, initial_state=x)[0] for x in (state.half(), state.half().float())
    )
    return torch.equal(found, wanted)


def values_first(function):
    """States [rows, H, V, K], as gradients flow through them."""
    wanted, made = results(function, leaves()), leaves()
    made[4] = made[4].detach().mT.contiguous().requires_grad_()
    found = results(function, made, state_v_first=True)
    contiguous = found[1].is_contiguous()
    return contiguous and equal([x.mT if i in (1, 6) else x for i, x in enumerate(found)], wanted)


def told():
    """Bounds on the CPU beside the device's: these are not waited for."""
    bounds, read, plain = torch.tensor(BOUNDS), [], torch.Tensor.tolist
    gla_chunks._last_packed.clear()
    torch.Tensor.tolist = lambda x: read.append(x is bounds) or plain(x)
    found = packed(bounds, cu_seqlens_cpu=torch.tensor(BOUNDS))
    torch.Tensor.tolist = plain
    return read == [False] and equal(found, packed(bounds))


def own_decays():
    """Retention's decays by g_gamma, with a gradient."""
    q, k, v = leaves()[:3]
    g_gamma = torch.log1p(-(2.0 ** (-5 - torch.arange(2)))).requires_grad_()
    o = kernels.simple_gla_chunk(q, k, v, g_gamma=g_gamma)[0]
    (found,) = torch.autograd.grad(o.sum(), g_gamma)
    g = g_gamma.detach().expand(1, T, 2).contiguous().requires_grad_()
    (wanted,) = torch.autograd.grad(kernels.simple_gla_chunk(q, k, v, g)[0].sum(), g)
    same = difference(o, kernels.retention_chunk(q, k, v)[0]) <= TWO_FP32_FORMS
    return same and difference(found, wanted.sum((0, 1))) <= TWO_FP32_FORMS


def ungated():
    """One gate a head that is not given: none."""
    q, k, v = leaves()[:3]
    o = kernels.simple_gla_chunk(q, k, v)[0]
    return torch.equal(o, kernels.linear_attention_chunk(q, k, v, normalize=False)[0])


def penalised():
    """A gradient of a gradient whose first loss is linear in the output must not be left out in silence."""
    made = leaves()
    o, _ = kernels.gla_chunk(*made[:4])
    (first,) = torch.autograd.grad(o.sum(), made[0], create_graph=True)
    try:
        (o.sum() + first.square().sum()).backward()
    except RuntimeError as err:
        return "once_differentiable" in str(err)
    return False


def no_scale(scale, says):
    """A scale that is a tensor of more than a number."""
    try:
        kernels.gla_chunk(*leaves()[:4], scale)
    except UsageError as err:
        return says in str(err)
    return False


def no_heads():
    """Nothing to do is done."""
    made = [x.detach()[:, :, :0] for x in leaves()[:4]]
    outs = [kernels.gla_chunk(*made), kernels.simple_gla_chunk(*made[:3], made[3][..., 0])]
    return all(o.shape == (1, T, 0, 16) for o, _ in outs)


def main():
    """Every check, by name."""
    torch.set_num_threads(1)
    found = {
        f"gates of -inf, {form}, chunks of {chunk}": cut_off(form, chunk, carried)
        for form, chunk, carried in (
            ("materialised", 64, False),
            ("recompute", 64, True),
            ("recompute", 128, True),
        )
    }
    found |= {f"strided bounds, carried: {carried}": strided(carried) for carried in (False, True)}
    dtypes = (torch.float16, torch.bfloat16, torch.float16)
    for dtype, (name, function) in zip(dtypes, FUNCTIONS.items(), strict=True):
        found[f"a state of 16 bits, {name}"] = from_16_bits(function, dtype)
    found |= {
        "a state of 16 bits, token by token": fused_from_16_bits(),
        "states with values first": values_first(kernels.gla_chunk_recompute),
        "bounds on the CPU": told(),
        "bounds made in inference mode": inferred(),
        "packed rows compiled without gradients": compiled_packed(),
        "exported for any length": exported(),
        "decays a head": own_decays(),
        "no gate": ungated(),
        "a second derivative of a linear loss is refused": penalised(),
        "no heads": no_heads(),
        "a scale of one element, as a gate a head": no_scale(torch.ones(1), "is [1], not a number"),
        "a scale that wants a gradient": no_scale(torch.ones((), requires_grad=True), "wants a gradient"),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
