"""Mamba, one token with the state in place, in plain PyTorch (Mamba eq. 2)."""

from glabench.registry import implementation


@implementation(
    label="Mamba step (PyTorch)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=40,
)
def load():
    from glabench.kernels.step_torch import mamba_step_torch

    return mamba_step_torch
