"""Mamba, one token with the state in place, by mamba-ssm's Triton kernel."""

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="Mamba step (mamba-ssm)",
    passes=("decode",),
    dtypes=("bf16", "fp16", "fp32"),
    needs=("torch", "triton", "mamba_ssm", "cuda"),
    preference=20,
    note="without the gate z and the softplus of dt, which the Mamba block fuses",
)
def load():
    # its package imports the language models, and with them transformers
    step = import_leaf("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    bias = {}  # the kernel cannot do without one

    def mamba(x, dt, A, B, C, D, state):
        if D.device not in bias or bias[D.device].shape != D.shape:
            bias[D.device] = D.new_zeros(D.shape)
        x, dt, B, C = (z.squeeze(1) for z in (x, dt, B, C))
        return step(state, x, dt, A, B, C, D, dt_bias=bias[D.device]).unsqueeze(1)

    return mamba
