"""Simple GLA, one token with the state in place, in plain PyTorch (GLA eq. 3)."""

from glabench.registry import implementation


@implementation(
    label="Simple GLA step (PyTorch)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=40,
)
def load():
    from glabench.kernels.step_torch import simple_gla_step_torch

    return simple_gla_step_torch
