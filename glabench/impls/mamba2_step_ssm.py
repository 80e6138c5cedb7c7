"""Mamba-2, one token with the state in place, by mamba-ssm's Triton kernel."""

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="Mamba-2 step (mamba-ssm)",
    passes=("decode",),
    dtypes=("bf16", "fp16", "fp32"),
    needs=("torch", "triton", "mamba_ssm", "cuda"),
    preference=20,
    note="A, dt and D are expanded over a head's channels by strides, as the Mamba-2 block does",
)
def load():
    # its package imports the language models, and with them transformers
    step = import_leaf("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    bias = {}  # the kernel cannot do without one

    def mamba2(x, dt, A, B, C, D, state):
        H, P, N = state.shape[1:]
        if D.device not in bias or bias[D.device].shape != D.shape:
            bias[D.device] = D.new_zeros(D.shape)
        x, dt, B, C = (z.squeeze(1) for z in (x, dt, B, C))
        wide = (z[:, None].expand(H, P) for z in (D, bias[D.device]))
        A = A[:, None, None].expand(H, P, N)
        D, dt_bias = wide
        return step(state, x, dt[..., None].expand_as(x), A, B, C, D, dt_bias=dt_bias).unsqueeze(1)

    return mamba2
