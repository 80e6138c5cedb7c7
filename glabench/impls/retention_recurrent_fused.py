"""Retention, token by token in one own Triton kernel (RetNet §2.1): for short sequences, at inference."""

from glabench.impls.gla_step import limits
from glabench.registry import implementation


@implementation(
    label="Retention recurrent, fused (ours)",
    passes=("fwd",),
    dtypes=("fp32", "bf16", "fp16"),
    needs=("torch", "triton", "cuda"),
    features=("state", "varlen", "scale"),
    limits=limits,
    preference=80,
    note="sequential over tokens: slow for long sequences; no backward pass",
)
def load():
    from glabench.kernels.gla_step import retention_recurrent_fused

    return retention_recurrent_fused
