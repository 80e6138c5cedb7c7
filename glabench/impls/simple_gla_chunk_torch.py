"""Linear attention with one gate a head, in chunks of 64, in plain PyTorch."""

from glabench.registry import implementation


@implementation(
    label="Simple GLA chunked (PyTorch)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("state", "varlen", "scale"),
    preference=40,
    layout_copy=True,
    note="float32 inside, whatever the inputs are",
)
def load():
    from glabench.kernels.linear_chunk import simple_gla_chunk_torch

    return simple_gla_chunk_torch
