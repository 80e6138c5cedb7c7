"""Mamba's selective scan in plain PyTorch: all chunks step together."""

from glabench.registry import implementation


@implementation(
    label="Mamba scan (PyTorch)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("state",),
    preference=40,
    layout_copy=True,
    note="float32 inside; the backward pass holds every state",
)
def load():
    from glabench.kernels.selective_scan import mamba_torch

    return mamba_torch
