"""GLA in chunks of 64 in plain PyTorch (GLA §4)."""

from glabench.registry import implementation


@implementation(
    label="GLA chunked (PyTorch)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("state", "varlen", "scale"),
    preference=40,
    layout_copy=True,
    note="float32 inside, whatever the inputs are",
)
def load():
    from glabench.kernels.linear_chunk import gla_chunk_torch

    return gla_chunk_torch
