"""Models small enough to compare with a recurrence written out, in float64."""

import torch

from glabench.models import GLAConfig, GLAForCausalLM, RetNetConfig, RetNetForCausalLM

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
GATES = ("channel", "scalar", "fixed", "none")
KINDS = [*({"gate": g} for g in GATES), {"layout": "authors"}, {"num_heads": 1}, {"num_heads": 8}, "retnet"]


def small(kind=None, **fields):
    """A model in float64 whose every parameter matters: gates and norms are random too."""
    torch.manual_seed(0)
    config = RetNetConfig if kind == "retnet" else GLAConfig
    fields = SMALL | (kind if isinstance(kind, dict) else {}) | fields
    model = (RetNetForCausalLM if kind == "retnet" else GLAForCausalLM)(config(**fields)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                1 + 0.3 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * p.shape[-1] ** -0.5
            )
    return model


def tokens(batch=2, length=70):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(1))
