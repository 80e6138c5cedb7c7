"""Run by test_kernels.py in its own process: calls planned and played back, for sm_90, launched nowhere.

For each kind of call: the launches of its second call, which is planned, and of its fourth, which is played.
A tensor is told by when it first appeared in the call: kernels are given addresses, and until the call's end
all its tensors are kept, so that none takes the place of another.
"""

import json
from contextlib import nullcontext

import torch
import triton
import tune_without_gpu
from triton.runtime import driver

from glabench.kernels import gla_chunks, gla_launch, launching

GATES = {"none": 0, "fixed": 1, "head": 2, "channel": 3}
by_address = {}
addresses_of = launching.addresses_of


class Driver(tune_without_gpu.NoGpu):
    """Its launcher also tells which stream it was given, and whether metadata and a hook."""

    def get_current_stream(self, device):
        return 17

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, about, before, after, *args):
            told = [stream, packed is not None, about is not None, getattr(before, "calls", before) == watch]
            tune_without_gpu.launched.append((source.fn.__name__, (x, y, z, *told), args))

        return run


def watch(metadata):
    """A profiler's hook."""


def remembered(tensors):
    """As launching.addresses_of."""
    by_address.update((x.data_ptr(), x) for x in tensors if x is not None)
    return addresses_of(tensors)


def shifted(x):
    """The same at an address that is not a multiple of 16."""
    return torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape)


def call(gate, K, keep, has_state, aligned):
    """One call and its backward pass, on fresh tensors of a head of K and 16 channels; all that came out."""
    q, k, v = (torch.zeros(2, 130, 1, width, dtype=torch.bfloat16) for width in (K, K, 16))
    g = {0: None, 1: torch.zeros(1), 2: q[..., 0].clone(), 3: q.clone()}[gate]
    if not aligned:
        q, v = shifted(q), shifted(v)
    state = torch.zeros(2, 1, K, 16) if has_state else None
    how = {"scale": 0.25, "gate": gate}
    o, final, kept = gla_launch.forward(
        q, k, v, g, state, None, **how, output_final_state=has_state, keep=keep
    )
    kept = kept or gla_launch.states_before(q, k, v, g, state, None, **how)
    d_final = torch.zeros_like(final) if has_state else None
    grads = gla_launch.backward(v, d_final, q, k, v, g, kept, None, **how, wants_d_initial=has_state)
    return [q, k, v, g, state, o, final, *kept, *grads]


def listed(*how):
    """The launches of one call, with its tensors by place and kind."""
    tune_without_gpu.launched.clear()
    by_address.clear()
    outs, places = call(*how), {}

    def plain(x):
        x = by_address.get(x, x) if isinstance(x, int) else x
        if not isinstance(x, torch.Tensor):
            return x
        return [places.setdefault(x.data_ptr(), len(places)), list(x.shape), str(x.dtype)]

    launches = [[name, grid, [plain(x) for x in args]] for name, grid, args in tune_without_gpu.launched]
    return {"launches": launches, "outs": [plain(x) for x in outs]}


def compare(gate, K, keep, has_state, *, aligned=True, **kind):
    """Print what was planned and what was played of one kind of call, and how many tapes it made."""
    launching._tapes.clear()
    every = [listed(GATES[gate], K, keep, has_state, aligned) for _ in range(4)]
    found = {"planned": every[1], "played": every[3], "tapes": sum(map(bool, launching._tapes.values()))}
    said = {"gate": gate, "K": K, "keep": keep, "aligned": aligned, **kind}
    print(json.dumps({"kind": said, **found}))  # noqa: T201


def main():
    """Every gate, carried and not; rows in segments; tensors that are not aligned."""
    driver.set_active(Driver())
    launching._on = lambda device: nullcontext()
    launching.addresses_of = remembered
    for gla_launch.CARRY_PROGRAMS in (0, 1e9):
        for gate in GATES:
            for how in ((16, True, False), (144, True, True), (144, False, False)):
                compare(gate, *how, carried=gla_launch.CARRY_PROGRAMS == 0)
    compare("channel", 16, True, False, aligned=False)
    gla_chunks.SEGMENT = 64
    compare("channel", 16, True, False, segments=True)
    triton.knobs.runtime.launch_enter_hook = watch
    compare("channel", 16, True, False, watched=True)


if __name__ == "__main__":
    main()
