"""Retention in chunks of 64, own Triton kernels (RetNet §2.1)."""

from glabench.registry import implementation


@implementation(
    label="Retention chunked (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=10,
    note="decays 1 - 2^(-5-h); rotary is the model's, not in the op",
)
def load():
    from glabench.kernels.gla_chunk import retention_chunk

    return retention_chunk
