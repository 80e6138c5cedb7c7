"""Mamba-2's state-space duality in chunks of 64 in plain PyTorch (Mamba-2 §6)."""

from glabench.registry import implementation


@implementation(
    label="Mamba-2 SSD (PyTorch)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("state", "varlen"),
    preference=40,
    layout_copy=True,
    note="float32 inside, whatever the inputs are",
)
def load():
    from glabench.kernels.ssd import mamba2_torch

    return mamba2_torch
