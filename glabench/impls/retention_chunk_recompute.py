"""Retention, own Triton kernels, chunk states formed again in the backward pass (RetNet §2.1; GLA §4.1)."""

from glabench.registry import implementation


@implementation(
    label="Retention chunked, recompute (ours)",
    dtypes=("fp32", "bf16", "fp16"),
    compiles=True,
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    preference=32,
    training_preference=9,
    note="decays 1 - 2^(-5-h); one more pass over k and v in the backward pass",
)
def load():
    from functools import partial

    from glabench.kernels.gla_chunk import retention_chunk

    return partial(retention_chunk, form="recompute")
