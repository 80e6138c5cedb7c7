"""Mamba-2's chunk scan by mamba-ssm's Triton kernels."""

from glabench.installed import import_leaf
from glabench.registry import implementation

CHUNK = 256  # Mamba2's own default


@implementation(
    label="Mamba-2 SSD (mamba-ssm)",
    compiles=True,
    needs=("torch", "triton", "mamba_ssm", "cuda"),
    features=("state",),
    preference=20,
    note="chunks of 256, the package's default; autotunes for a minute and more on a cold cache",
)
def load():
    # its package imports the language models, and with them transformers
    scan = import_leaf("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def mamba2(x, dt, A, B, C, D, initial_state=None, output_final_state=False):
        return scan(
            x,
            dt,
            A,
            B,
            C,
            CHUNK,
            D=D,
            initial_states=initial_state,
            return_final_states=output_final_state,
        )

    return mamba2
