"""Retention in chunks of 64 by flash-linear-attention."""

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="Retention chunked (fla)",
    compiles=True,
    needs=("torch", "triton", "fla", "cuda"),
    features=("state", "varlen", "scale"),
    preference=20,
    note="decays 1 - 2^(-5-h); rotary is the model's, not in the op",
)
def load():
    # the packages above import every layer and model of fla, and with them transformers
    return import_leaf("fla.ops.retention").chunk_retention
