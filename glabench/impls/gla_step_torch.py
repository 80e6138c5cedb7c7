"""GLA, one token with the state in place, in plain PyTorch (GLA eq. 3)."""

from glabench.registry import implementation


@implementation(
    label="GLA step (PyTorch)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=40,
)
def load():
    from glabench.kernels.step_torch import gla_step_torch

    return gla_step_torch
