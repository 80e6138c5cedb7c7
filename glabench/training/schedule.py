"""The learning rate: linear warm-up from the final rate, then a cosine down to it (GLA §5.1)."""

import math

from glabench.training.settings import Settings


def learning_rate(step: int, settings: Settings) -> float:
    """Rate of optimiser step `step`, from 0: `lr` after the warm-up, `lr_end` at both ends."""
    low, high, warmup = settings.lr_end, settings.lr, settings.warmup_steps
    if step < warmup:
        return low + (high - low) * step / warmup
    done = (step - warmup) / max(1, settings.steps - 1 - warmup)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
