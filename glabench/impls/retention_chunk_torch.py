"""Retention in chunks of 64 in plain PyTorch (RetNet §2.3)."""

from glabench.registry import implementation


@implementation(
    label="Retention chunked (PyTorch)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("state", "varlen", "scale"),
    preference=40,
    layout_copy=True,
    note="float32 inside; decays 1 - 2^(-5-h), rotary is the model's",
)
def load():
    from glabench.kernels.linear_chunk import retention_chunk_torch

    return retention_chunk_torch
