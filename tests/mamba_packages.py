"""Run by test_models_mamba.py beside stand-ins for mamba-ssm: what transformers then calls."""

import json
import sys

import torch

from glabench import installed

installed.has_cuda = lambda: True  # the packages are looked for on machines with a GPU only

from glabench.models import catalog, mamba  # noqa: E402

model = catalog.build("mamba-tiny", hidden_size=32, num_hidden_layers=1).train()
modeling = sys.modules["transformers.models.mamba.modeling_mamba"]


class OnGpu:
    """Says that it lies on a GPU, and is handed to the kernels."""

    is_cuda = True


ids = torch.randint(256, (1, 9))
loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # on a CPU, where stand-ins give no tensors
sys.stdout.write(
    json.dumps(
        {
            "used": mamba.use_installed_kernels(),
            "inner": modeling.mamba_inner_fn(OnGpu(), *[None] * 9),
            "conv": modeling.causal_conv1d_fn(OnGpu(), None),
            "walked": sys.modules["mamba_ssm"].ops.triton.ssd_combined.mamba_chunk_scan_combined(0),
            "loss": loss.item(),
        }
    )
)
