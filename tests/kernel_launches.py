"""Runs in a process of its own, under Triton's interpreter: is what is compiled ahead what is launched?

Prints a JSON object, {point: the launches asked for but not made, and made but not asked for}.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from glabench.kernels import ahead, gla_chunks, gla_configs, gla_launch

POINTS = {  # gate, T, whether one kernel carries the state, whether a state comes in, whether states are kept
    "channel": (3, 130, False, True, True),
    "channel, carried": (3, 130, True, False, True),
    "channel, carried, no gradients": (3, 70, True, True, False),
    "channel, segments": (3, 260, False, False, True),
    "channel, wide": (3, 130, "wide", True, False),
    "channel, wide, no gradients": (3, 70, "wide", False, False),
    "head, wide, no gradients": (2, 130, "wide", True, False),
    "none, carried": (0, 130, True, False, True),
    "fixed, carried": (1, 70, True, True, True),
    "head": (2, 70, False, False, True),
    "head, carried": (2, 130, True, True, True),
}


def tensors(gate, T, K, has_state):
    """q, k, v, g and a state."""
    q, k = torch.randn(1, T, 1, K), torch.randn(1, T, 1, K)
    g = {3: -torch.rand(1, T, 1, K), 2: -torch.rand(1, T, 1), 1: -torch.rand(1)}.get(gate)
    return q, k, torch.randn(1, T, 1, 16), g, torch.randn(1, 1, K, 16) if has_state else None, None


def kind(asked):
    """What Triton compiles for: the kernel, the types, what is absent, and the constants."""
    types = [None if x is None else str(x.dtype) for x in asked.tensors]
    return json.dumps([asked.kernel.fn.__name__, types, asked.constants, asked.tile.options()], default=str)


def main():
    """Compare the two lists of each point."""
    found, made = {}, []

    class Watched:
        def __init__(self, kernel):
            self.fn, self.kernel = kernel.fn, kernel

        def __getitem__(self, grid):
            def run(*args, **more):
                made.append((self.fn.__name__, args, more))
                return self.kernel[grid](*args, **more)

            return run

    for name in ("scale", "carry", "state", "output", "gradient", "exact", "sums", "scores", "wide"):
        setattr(gla_launch, f"{name}_kernel", Watched(getattr(gla_launch, f"{name}_kernel")))
    gla_configs.WIDEST_STATE[True] = 256
    for name, (gate, T, is_carried, has_state, keep) in POINTS.items():
        gla_launch.CARRY_PROGRAMS = 0 if is_carried else 1e9
        gla_chunks.SEGMENT = 64 if "segments" in name else 4096
        given = tensors(gate, T, 80 if is_carried == "wide" else 16, has_state)
        how = {"scale": 0.25, "gate": gate, "output_final_state": False, "keep": keep}
        planned = ahead.launches(torch.device("cpu"), lambda: gla_launch._whole(*given, **how))  # noqa: B023
        made.clear()
        o, _, kept = gla_launch.forward(*given, **how)
        if keep:
            options = {"scale": 0.25, "gate": gate, "wants_d_initial": has_state}
            gla_launch.backward(torch.randn_like(o), None, *given[:4], kept, None, **options)
        did = []
        for fn, args, more in made:
            types = [
                None if x is None else str(x.dtype) for x in args if x is None or isinstance(x, torch.Tensor)
            ]
            did.append(json.dumps([fn, types, more], default=str))
        want = [
            json.dumps([a, b, {**c, **d}], default=str) for a, b, c, d in map(json.loads, map(kind, planned))
        ]
        found[name] = {"launches": len(did), "differ": sorted(set(want) ^ set(did))}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
