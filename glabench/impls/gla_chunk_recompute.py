"""GLA in chunks of 64, own Triton kernels, chunk states formed again in the backward pass (GLA §4.1)."""

from glabench.registry import implementation


@implementation(
    label="GLA chunked, recompute (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=32,
    training_preference=9,
    note="one more pass over k, v and g in the backward pass",
)
def load():
    from glabench.kernels.gla_chunk import gla_chunk_recompute

    return gla_chunk_recompute
