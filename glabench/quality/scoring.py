"""Losses of a document's tokens: in pieces with the state carried, whole, or through a sliding window."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glabench.models.config import LinearAttentionConfig
from glabench.models.mamba import carry_states
from glabench.training.segments import cache_name, state_of

PIECE = 2048  # tokens in one forward pass, at most
LOGIT_BYTES = 2**29  # of one piece's logits and of their logarithms, float32 both
PROBE = 96  # tokens on which pieces must agree with the whole
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, root mean square over the second half


class Scorer:
    """Scores documents with one model.

    `piece` is the most tokens of a forward pass, 0 where the model can only read a document whole.
    `is_recurrent` says that its memory does not grow with the document. `limit` is the last position
    it has an embedding for, where positions are learned.
    """

    def __init__(self, model: nn.Module, piece: int | None = None) -> None:
        self.model, self.cache = model, cache_name(model)
        self.device = next(model.parameters()).device
        self.is_recurrent = _is_recurrent(model)
        self.limit = None if self.is_recurrent else _position_limit(model)
        self.piece = piece or piece_length(model.config.vocab_size)
        is_foreign = self.is_recurrent and not isinstance(model.config, LinearAttentionConfig)
        if is_foreign and not self._carries():
            self.piece = 0

    @torch.no_grad()
    def in_pieces(self, ids: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        """(nats of each of ids[1:], state after ids[:-1]), from a state that an earlier call returned.

        The same numbers as from one forward pass, in memory that a longer document of a recurrent model does
        not raise. Shapes: ids [T + 1], losses [T], float32.
        """
        inputs, targets = self._to_device(ids[:-1]), self._to_device(ids[1:])
        count = max(1, math.ceil(len(inputs) / self.piece)) if self.piece else 1
        losses = []
        for part, wanted in zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True):
            carried = {} if state is None else {self.cache: state}
            out = self.model(input_ids=part[None], use_cache=bool(self.piece), **carried)
            state = state_of(out) if self.piece else None
            losses.append(_nats(out.logits[0], wanted))
        return torch.cat(losses).cpu().numpy(), state

    @torch.no_grad()
    def through_windows(self, ids: np.ndarray, window: int, stride: int) -> np.ndarray:
        """Nats of each of ids[1:], from the `window` tokens before it down to `window - stride` + 1.

        Every window is read on its own, its positions from zero. Shapes: ids [T + 1]; losses [T].
        """
        inputs, targets = self._to_device(ids[:-1]), self._to_device(ids[1:])
        losses, done = [], 0
        while done < len(inputs):
            end = min(len(inputs), window if done == 0 else done + stride)
            start = max(0, end - window)
            out = self.model(input_ids=inputs[None, start:end], use_cache=False)
            losses.append(_nats(out.logits[0, done - start :], targets[done:end]))
            done = end
        return torch.cat(losses).cpu().numpy()

    def _to_device(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    def _carries(self) -> bool:
        """Whether two pieces give what one does: versions of transformers differ in what caches keep."""
        if self.model.config.model_type == "mamba" and not carry_states(self.model):
            return False
        ids = np.random.default_rng(0).integers(0, self.model.config.vocab_size, PROBE + 1)
        whole_piece, self.piece = self.piece, 0
        whole, _ = self.in_pieces(ids)
        self.piece = PROBE // 2
        try:
            halves, _ = self.in_pieces(ids)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
            return False  # such a cache takes one token at a time
        finally:
            self.piece = whole_piece
        error = float(np.sqrt(np.mean((whole - halves)[PROBE // 2 :] ** 2)))
        return error <= AGREE.get(self.model.dtype, 0.1)


def piece_length(vocabulary: int) -> int:
    """Tokens of a piece whose logits and their logarithms stay within LOGIT_BYTES: 2048 for 32k entries."""
    return min(PIECE, max(64, LOGIT_BYTES // (8 * vocabulary) // 64 * 64))


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _is_recurrent(model: nn.Module) -> bool:
    return isinstance(model.config, LinearAttentionConfig) or bool(getattr(model, "_is_stateful", False))


def _position_limit(model: nn.Module) -> int | None:
    """Rows of a table of learned positions, or None for positions that have no table."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module is not words
        if is_table and ("pos" in name.lower() or name.endswith("wpe")):
            return min(module.num_embeddings, model.config.max_position_embeddings)
    return None
