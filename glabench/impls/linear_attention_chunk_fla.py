"""Linear attention in chunks of 64 by flash-linear-attention, without its normaliser."""

import functools

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="Linear attention chunked (fla)",
    compiles=True,
    needs=("torch", "triton", "fla", "cuda"),
    features=("state", "varlen", "scale"),
    preference=20,
    note="called with normalize=False: the family has no normaliser",
)
def load():
    # the packages above import every layer and model of fla, and with them transformers
    chunk = import_leaf("fla.ops.linear_attn").chunk_linear_attn
    return functools.partial(chunk, normalize=False)
