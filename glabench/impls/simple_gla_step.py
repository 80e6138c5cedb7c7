"""Simple GLA, one token with the state in place: own Triton kernel (GLA eq. 3)."""

from glabench.impls.gla_step import limits
from glabench.registry import implementation


@implementation(
    label="Simple GLA step (ours)",
    passes=("decode",),
    dtypes=("fp32", "bf16", "fp16"),
    needs=("torch", "triton", "cuda"),
    limits=limits,
    preference=20,
    note="one launch: the state is read and written once",
)
def load():
    from glabench.kernels.gla_step import gla_recurrent_step

    return gla_recurrent_step
