"""Retention, one token with the state in place: own Triton kernel (RetNet §2.1)."""

from glabench.impls.gla_step import limits
from glabench.registry import implementation


@implementation(
    label="Retention step (ours)",
    passes=("decode",),
    dtypes=("fp32", "bf16", "fp16"),
    needs=("torch", "triton", "cuda"),
    limits=limits,
    preference=20,
    note="one launch: the state is read and written once",
)
def load():
    from glabench.kernels.gla_step import retention_recurrent_step

    return retention_recurrent_step
