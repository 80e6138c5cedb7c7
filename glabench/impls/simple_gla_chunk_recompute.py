"""Linear attention, one gate a head, own Triton kernels, chunk states formed again in backward (GLA §4.1)."""

from glabench.registry import implementation


@implementation(
    label="Simple GLA chunked, recompute (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=32,
    training_preference=9,
    note="one more pass over k and v in the backward pass",
)
def load():
    from functools import partial

    from glabench.kernels.gla_chunk import simple_gla_chunk

    return partial(simple_gla_chunk, form="recompute")
