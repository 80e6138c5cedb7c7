"""Retention, one token with the state in place, in plain PyTorch (RetNet §2.1)."""

from glabench.registry import implementation


@implementation(
    label="Retention step (PyTorch)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=40,
)
def load():
    from glabench.kernels.step_torch import retention_step_torch

    return retention_step_torch
