"""Linear attention without gate or normaliser, in chunks of 64, own Triton kernels (GLA §4)."""

from glabench.registry import implementation


@implementation(
    label="Linear attention chunked (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=10,
    note="no normaliser",
)
def load():
    from glabench.kernels.gla_chunk import linear_attention_chunk

    return linear_attention_chunk
