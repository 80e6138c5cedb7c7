"""Linear attention with one gate a head, in chunks of 64, by flash-linear-attention."""

import re

from glabench.installed import cuda_capability, import_leaf, installed_version, is_installed
from glabench.registry import implementation

REFUSED = (3, 4, 0), (3, 7, 1)  # Triton versions from, and up to but not including


def limits(case, device):
    """fla refuses a gated backward pass it knows to be wrong on Hopper, unless tilelang replaces it."""
    capability, version = cuda_capability(), installed_version("triton")
    triton = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    is_refused = capability is not None and capability[0] == 9 and REFUSED[0] <= triton < REFUSED[1]
    if case["passes"] != "fwd" and is_refused and not is_installed("tilelang"):
        return f"fla refuses its gated backward pass on Hopper with Triton {version} (its issue 640)"
    return None


@implementation(
    label="Simple GLA chunked (fla)",
    compiles=True,
    needs=("torch", "triton", "fla", "cuda"),
    features=("state", "varlen", "scale"),
    preference=20,
    limits=limits,
    note="autotunes for minutes on a cold cache",
)
def load():
    # the packages above import every layer and model of fla, and with them transformers
    return import_leaf("fla.ops.simple_gla").chunk_simple_gla
