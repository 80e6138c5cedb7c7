"""Linear attention, one token with the state in place, in plain PyTorch (GLA eq. 1)."""

from glabench.registry import implementation


@implementation(
    label="Linear attention step (PyTorch)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=40,
)
def load():
    from glabench.kernels.step_torch import linear_attention_step_torch

    return linear_attention_step_torch
