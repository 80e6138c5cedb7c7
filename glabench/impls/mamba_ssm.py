"""Mamba's selective scan by mamba-ssm's CUDA kernel."""

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="Mamba scan (mamba-ssm)",
    dtypes=("bf16", "fp16", "fp32"),
    needs=("torch", "mamba_ssm", "cuda"),
    preference=20,
    note="without the gate z and the softplus of dt, which the Mamba block fuses",
)
def load():
    # its package imports the language models, and with them transformers
    scan = import_leaf("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def mamba(x, dt, A, B, C, D):
        # the kernel wants channels first, as these tensors are stored: views, no copies
        channels_first = (z.transpose(1, 2) for z in (x, dt))
        y = scan(*channels_first, A, B.transpose(1, 2), C.transpose(1, 2), D, delta_softplus=False)
        return y.transpose(1, 2)

    return mamba
