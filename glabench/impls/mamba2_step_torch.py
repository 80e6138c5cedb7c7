"""Mamba-2, one token with the state in place, in plain PyTorch (Mamba-2 eq. 1)."""

from glabench.registry import implementation


@implementation(
    label="Mamba-2 step (PyTorch)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=40,
)
def load():
    from glabench.kernels.step_torch import mamba2_step_torch

    return mamba2_step_torch
