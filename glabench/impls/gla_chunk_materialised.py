"""GLA in chunks of 64, own Triton kernels, chunk states kept for the backward pass (GLA §4.1)."""

from glabench.registry import implementation


@implementation(
    label="GLA chunked, materialised (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=31,
    note="keeps a state of d_k x d_v a chunk and head",
)
def load():
    from glabench.kernels.gla_chunk import gla_chunk_materialised

    return gla_chunk_materialised
