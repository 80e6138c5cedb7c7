"""Runs in a process of its own, as on a GPU but for the launches: what a layer keeps for its backward pass.

Prints one JSON object, {point: {"layer": what computes it, "bytes": a token, without weights}}.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # the kernels take tensors of a CPU; none is launched

import torch

from glabench.kernels import ahead
from glabench.models import catalog, fused, mixer
from glabench.models.compiling import compile_blocks
from glabench.registry import Implementation

T = 192
SHAPE = {"hidden_size": 128, "num_hidden_layers": 1, "vocab_size": 259, "num_heads": 2}


def saved(module, call):
    """Bytes a token of the storages that call() keeps, without parameters and copies of them."""
    weights = {p.shape for p in module.parameters()} | {
        p.mT.shape for p in module.parameters() if p.dim() > 1
    }
    kept = {}

    def pack(x):
        if x.shape not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, or its place is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in kept.values()) / T


def point(name, how):
    """A mixer, eager with fused operations, or in a compiled block."""
    torch.manual_seed(0)
    model = catalog.build(name, **SHAPE).train()
    module = model.model.layers[0]
    x = torch.randn(1, T, SHAPE["hidden_size"], requires_grad=True)
    if how == "compiled":
        compile_blocks(model, backend="aot_eager_decomp_partition")
    else:
        fused.fuse(model, loss=False)
        module = module.attn
        x = x.bfloat16().detach().requires_grad_()  # as the norm before it gives it
    rotary = mixer.rotary_angles(model.config, 0, T, x)
    with torch.autocast("cpu", torch.bfloat16), ahead.noting(torch.device("cpu")):
        args = (None, rotary, None, False)
        found = saved(module, lambda: module(x, *args))
    config = model.config
    layer = mixer.layer_id(config, "cuda", torch.bfloat16, True)
    return {"layer": layer, "bytes": found, "keys": config.key_width, "values": config.value_width}


def main():
    """Every point that is asked for, as "model how"."""
    torch.set_num_threads(1)
    Implementation.unavailable = lambda self, device: None if "fla" not in self.id else "not asked for"
    chosen = mixer.layer_id
    mixer.layer_id = lambda config, _, *rest: chosen(config, "cuda", *rest)
    found = {words: point(*words.split()) for words in sys.argv[1:]}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
