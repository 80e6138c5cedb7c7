"""GLA in chunks of 64 by flash-linear-attention."""

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="GLA chunked (fla)",
    compiles=True,
    needs=("torch", "triton", "fla", "cuda"),
    features=("state", "varlen", "scale"),
    preference=20,
    note="autotunes for minutes on a cold cache",
)
def load():
    # the packages above import every layer and model of fla, and with them transformers
    return import_leaf("fla.ops.gla").chunk_gla
