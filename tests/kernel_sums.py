"""Runs in a process of its own, under Triton's interpreter: the running sums of one gate a head.

Prints a JSON object: the largest error of each kind against float64, in base 2, over packed rows.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from glabench import oracle
from glabench.kernels import gla_chunks, gla_launch

BOUNDS = (0, 1, 64, 129, 200)
GATES = (-1e4, -20.0, -1.7, -1e-4, 0.0)
LIMIT, UNIT = -256.0, 2.0**-17  # below 2 ** LIMIT a decay is 0 in float32
HEADS = 3


def main():
    """Compare what sums_kernel writes for gates of all sizes, in any order."""
    T, heads = BOUNDS[-1], HEADS
    g = torch.tensor(GATES)[torch.randint(len(GATES), (1, T, heads))] * torch.rand(1, T, heads)
    q, v = torch.randn(1, T, heads, 16), torch.randn(1, T, heads, 16)
    chunks = gla_chunks.chunks_of(1, T, torch.tensor(BOUNDS), gla_launch.chunk_size(q, v, gla_launch.HEAD))
    with oracle.poisoned_memory():
        kept = gla_launch.scaled(q, q, v, g, chunks, scale=1.0, gate=gla_launch.HEAD, has_scores=False)
    worst = {"NaN": int(kept.totals.isnan().sum()), "before": 0.0, "after": 0.0, "between": 0.0}
    for (start, count), sums, units in zip(chunks.table.tolist(), kept.totals, kept.reach, strict=True):
        gates = (g[0, start : start + count].double() / torch.log(torch.tensor(2.0).double())).clamp(
            min=LIMIT
        )
        before = gates.cumsum(0).T
        after = gates.sum(0)[:, None] - before
        for name, got, want in zip(
            ("before", "after"), sums.double().unbind(1), (before, after), strict=True
        ):
            off = (got[:, :count] - want).abs() / want.abs().clamp(min=1e-4)
            worst[name] = max(worst[name], off.max().item())
        found, want = units[:, :count].double() * UNIT, before
        apart = (found[:, :, None] - found[:, None]) - (want[:, :, None] - want[:, None])
        worst["between"] = max(worst["between"], apart.abs().max().item())
    print(json.dumps(worst))  # noqa: T201


if __name__ == "__main__":
    main()
