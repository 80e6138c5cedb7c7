"""GLA in chunks of 64, own Triton kernels; keeps chunk states or not, by its own choice (GLA §4)."""

from glabench.registry import implementation


@implementation(
    label="GLA chunked (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=10,
    note="exact for any gate; deterministic",
)
def load():
    from glabench.kernels.gla_chunk import gla_chunk

    return gla_chunk
