"""GLA token by token in plain PyTorch (GLA eq. 3): for checking and short sequences."""

from glabench.registry import implementation


@implementation(
    label="GLA recurrent (PyTorch)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("state", "varlen", "scale"),
    preference=90,
    layout_copy=False,
    note="a Python loop over tokens: keeps a state a token for the backward pass",
)
def load():
    from glabench.kernels.gla_recurrent import gla_recurrent

    return gla_recurrent
