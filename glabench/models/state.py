"""The recurrent state of a model: what takes the place of a key-value cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from glabench.errors import UsageError


class RecurrentState(Cache):
    """States of all layers after `seen` tokens; its size does not grow with them.

    Shapes: one [B, H, K, V] a layer, float32. A forward pass reads a state and returns a new one: the old one
    stays as it was, so that one prompt may be continued in several ways. For truncated back-propagation
    through time pass `out.past_key_values.detach()` on.
    """

    def __init__(self, states: Sequence[Tensor], seen: int) -> None:
        super().__init__(layers=[])
        self.states, self.seen = list(states), seen

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"RecurrentState({len(self)} layers, {self.seen} tokens)"

    def detach(self) -> "RecurrentState":
        """The same numbers without their history."""
        return RecurrentState([s.detach() for s in self.states], self.seen)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.states[0].shape[0]

    @property
    def is_linear(self) -> list[bool]:
        """False: like a key-value cache's, a generation that goes on is given the whole sequence."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, *_: Any, **__: Any) -> None:
        raise UsageError(
            "a recurrent state cannot forget its last tokens",
            where="crop",
            fix="keep the state from before them",
        )

    def reset(self) -> None:
        self.states, self.seen = [torch.zeros_like(s) for s in self.states], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [s.index_select(0, indices.to(s.device)) for s in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [s.repeat_interleave(repeats, 0) for s in self.states]
