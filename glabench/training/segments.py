"""Truncated back-propagation through time: a sequence in segments, the state carried, the gradient not."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from glabench.errors import UsageError

STATE_NAMES = ("cache", "past_key_values", "cache_params")


def segment_losses(
    model: Any, ids: torch.Tensor, segments: int, autocast: Callable[[], Any]
) -> Iterator[torch.Tensor]:
    """Yield the mean loss of each segment in turn; the caller runs its backward before it takes the next.

    Shapes: ids [batch, segments * seqlen], int64. With one segment the model keeps no state.
    Raises: UsageError where the model gives no state to carry.
    Source: GLA §5.2, "12 x 2K": no gradient across segments.
    """
    name, carried = cache_name(model), None
    for part in ids.chunk(segments, dim=1):
        state = {} if carried is None else {name: carried}
        with autocast():
            out = model(input_ids=part, labels=part, use_cache=segments > 1, **state)
        yield out.loss
        if segments == 1:
            return
        carried = detached(state_of(out))
        if carried is None:
            raise UsageError(
                "the model gives no state to carry between segments",
                where="train.segments",
                fix="use segments = 1, or a model with a state and no gradient checkpointing",
            )


def cache_name(model: Any) -> str:
    """How the model's forward calls its state: transformers renamed it to `cache` in 5.x, model by model."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in STATE_NAMES if name in taken), "past_key_values")


def state_of(out: Any) -> Any:
    """The state in a model's output, whatever this version calls it there; None where there is none."""
    return next((out[name] for name in STATE_NAMES if out.get(name) is not None), None)


def detached(value: Any) -> Any:
    """The same cache with its tensors cut from the graph: tensors, containers, and objects that hold them."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return type(value)((key, detached(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value)(detached(one) for one in value)
    if type(value).__module__.startswith(("transformers.", "glabench.")) and hasattr(value, "__dict__"):
        for name, one in vars(value).items():
            if isinstance(one, torch.Tensor | dict | list | tuple) or _is_cache(one):
                setattr(value, name, detached(one))
    return value


def _is_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__
