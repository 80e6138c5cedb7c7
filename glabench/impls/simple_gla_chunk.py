"""Linear attention with one gate a head, in chunks of 64, own Triton kernels."""

from glabench.registry import implementation


@implementation(
    label="Simple GLA chunked (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=10,
    note="exact for any gate; deterministic",
)
def load():
    from glabench.kernels.gla_chunk import simple_gla_chunk

    return simple_gla_chunk
