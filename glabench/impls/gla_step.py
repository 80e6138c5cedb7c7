"""GLA, one token with the state in place: own Triton kernel (GLA eq. 3)."""

from glabench.registry import implementation


def limits(case, device):
    if any(case[name] % 16 or case[name] > 512 for name in ("d_k", "d_v")):
        return "d_k and d_v must be multiples of 16, up to 512"
    return None


@implementation(
    label="GLA step (ours)",
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
