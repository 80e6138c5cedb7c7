"""torch.compile for a language model, block by block."""

import torch
import torch._dynamo
from torch import nn
from transformers import Mamba2Config, MambaConfig

from glabench.models.fused import is_rms_norm

RECOMPILES = 256  # every shape compiles anew; past dynamo's own limit it would go on eagerly, and say nothing


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each block, and the norm after the last, in place: at its first call, anew for each shape.

    One block's graph serves all, and a layer that cannot be traced stays eager alone. A model whose base
    has no `layers` is compiled as a whole.
    """
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a layer's number is no reason to compile anew
    if not hasattr(model.base_model, "layers"):
        model.compile(backend=backend)
        return
    for block in model.base_model.layers:
        if isinstance(model.config, MambaConfig | Mamba2Config):  # mamba-ssm's call is the whole mixer
            block.mixer.forward = torch.compiler.disable(block.mixer.forward)
        block.compile(dynamic=False, backend=backend)
    for part in filter(is_rms_norm, model.base_model.children()):
        part.compile(dynamic=False, backend=backend)
