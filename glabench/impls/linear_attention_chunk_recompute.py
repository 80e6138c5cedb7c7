"""Linear attention without gate, own Triton kernels, chunk states formed again in backward (GLA §4.1)."""

from glabench.registry import implementation


@implementation(
    label="Linear attention chunked, recompute (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=32,
    training_preference=9,
    note="no normaliser; one more pass over k and v in the backward pass",
)
def load():
    from functools import partial

    from glabench.kernels.gla_chunk import linear_attention_chunk

    return partial(linear_attention_chunk, form="recompute")
