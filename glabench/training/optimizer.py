"""AdamW with weight decay on the matrices, and its moments by the names of the parameters."""

from typing import Any

import torch

from glabench.training.settings import Settings

MOMENTS = ("exp_avg", "exp_avg_sq")


def make(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Decay acts on tensors of two dimensions or more, embeddings among them, and not on norms and biases.

    The paper states 0.01 and no exclusions; this is the field's habit. A parameter that its model marks
    `_no_weight_decay` (Mamba's A and D) has none either.
    """
    decayed, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    is_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=is_cuda,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's two moments as `exp_avg.NAME` and `exp_avg_sq.NAME`; sharded as the parameter is."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def start_at(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the state that AdamW has after `step` steps, with moments of zero to be filled."""
    on_device = bool(optimizer.defaults["fused"])
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        device = parameter.device if on_device else "cpu"
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        optimizer.state[parameter] = state
