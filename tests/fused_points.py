"""Run in Triton's interpreter by test_fused.py: the fused loss beside transformers' own."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import json
import sys

import torch

from glabench.models import catalog, fused

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2}
MORE = {
    "gla": {"num_heads": 2},
    "transformer": {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2},
    "mamba": {},
}


def step(model, ids):
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(family):
    torch.manual_seed(0)
    model = catalog.build(f"{family}-tiny", **SHAPE, **MORE[family]).train()
    ids = torch.randint(256, (2, 9))
    plain, wanted = step(model, ids)
    replaced = fused.fuse(model, operations=False)
    mine, found = step(model, ids)
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=ids, labels=ids, use_cache=False)
    worst = max(((found[n] - g).norm() / g.norm().clamp_min(1e-12)).item() for n, g in wanted.items())
    return {
        "replaced": replaced,
        "loss": [plain.loss.item(), mine.loss.item(), evaluated.loss.item()],
        "worst_gradient": worst,
        "logits": [list(out.logits.shape) for out in (plain, mine, evaluated)],
        "node": mine.loss.grad_fn.name(),
    }


sys.stdout.write(json.dumps({family: compare(family) for family in sys.argv[1:]}))
