"""Language models around the token mixer: pre-norm blocks with a SwiGLU feed-forward (GLA §4.4)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from glabench.errors import UsageError
from glabench.models.config import GLAConfig, LinearAttentionConfig, RetNetConfig
from glabench.models.mixer import LinearAttention, RMSNorm, rotary_angles, silu_mul
from glabench.models.state import RecurrentState

# transformers renamed the cache during version 5; both names are arguments, and outputs answer to both
CACHE = next(
    f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values")
)


class SwiGLU(nn.Module):
    """(swish(x W1) * x W2) W3 (GLA §4.4)."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.silu_mul = silu_mul  # models/fused.py puts a fused one here

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.silu_mul(self.gate_proj(x), self.up_proj(x)))


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + ffn(norm(x)); returns x and the layer's final state."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = LinearAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        y, state = self.attn(self.attn_norm(x), state, rotary, mask, keep_state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class Backbone(nn.Module):
    """Embeddings, blocks, last norm: x [B, T, D] -> hidden states, next state, all layers' hidden states."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, past: RecurrentState | None, mask: Tensor | None, keep: bool, show: bool
    ) -> tuple[Tensor, RecurrentState | None, tuple[Tensor, ...] | None]:
        seen = 0 if past is None else past.seen
        rotary = rotary_angles(self.config, seen, x.shape[1], x)
        states, hidden = [], [x]
        for i, block in enumerate(self.layers):
            x, state = block(x, None if past is None else past.states[i], rotary, mask, keep)
            states.append(state)
            hidden.append(x)
        x = self.norm(x)
        state = RecurrentState(states, seen + x.shape[1]) if keep else None
        return x, state, (*hidden[:-1], x) if show else None


class LinearAttentionForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with a recurrent state; GLAForCausalLM and RetNetForCausalLM name its kinds.

    Shapes: input_ids, labels [B, T]; logits [B, T, vocabulary]; attention_mask [B, T] or [B, seen + T], 0 and
    1, zeros at the left, or at the right where no state is asked for.
    `past_key_values` (or `cache`) is a RecurrentState, in training too; `use_cache=True` returns the next.
    Raises: UsageError for a mask with gaps, or a state of another model or batch.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012  transformers' form
    _is_stateful = True

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal with initializer_range; norms 1, biases 0
        if hasattr(module, "xavier_gain"):
            init.xavier_uniform_(module.weight, gain=module.xavier_gain)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() starts with no state, and the first forward pass makes it

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        if (
            inputs.get("cache", inputs.get("past_key_values")) is not None
            and inputs["input_ids"].shape[1] == 1
        ):
            inputs["attention_mask"] = None  # a generated token is never padding
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: RecurrentState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError(
                "neither or both of input_ids and inputs_embeds", where="forward", fix="give one"
            )
        kwargs.pop("position_ids", None)  # positions follow from the state, and only their differences matter
        x = self.model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past = self._checked(past_key_values if cache is None else cache, x.shape[0])
        mask, right = _mask(attention_mask, x.shape[1], 0 if past is None else past.seen)
        if use_cache and right:
            raise UsageError(
                "padding at the right would decay the state", where="attention_mask", fix="pad at the left"
            )
        keep = (self.config.use_cache and not self.training and not right) if use_cache is None else use_cache
        x, state, hidden = self.model(x, past, mask, keep, output_hidden_states or False)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        out = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **{CACHE: state})
        return out.to_tuple() if return_dict is False else out

    def _checked(self, past: Any, batch: int) -> RecurrentState | None:
        if past is None or (isinstance(past, RecurrentState) and not past.states):
            return None
        c = self.config
        wanted = (c.num_hidden_layers, batch, c.num_heads, c.head_k, c.head_v)
        found = (
            (len(past), *past.states[0].shape) if isinstance(past, RecurrentState) else type(past).__name__
        )
        if found != wanted:
            raise UsageError(
                f"a state of {found}, not of {wanted} (layers, batch, heads, d_k, d_v)",
                where="past_key_values",
                fix="pass the state that this model returned for this batch",
            )
        return past


def _mask(mask: Tensor | None, length: int, seen: int) -> tuple[Tensor | None, bool]:
    """(the last `length` columns where any is 0, whether padding is at the right). Raises UsageError."""
    if mask is None:
        return None, False
    if mask.dim() != 2 or mask.shape[1] < length:
        raise UsageError(
            f"a mask of shape {list(mask.shape)} for {length} tokens",
            where="attention_mask",
            fix="give [B, T]",
        )
    whole, mask = mask.bool(), mask[:, -length:].bool()
    if mask.all():
        return None, False
    if whole.shape[1] < seen + length and seen:
        raise UsageError(
            "padding after a state",
            where="attention_mask",
            fix=f"give the mask of all {seen + length} tokens",
        )
    rises, falls = whole[:, 1:] & ~whole[:, :-1], ~whole[:, 1:] & whole[:, :-1]
    right = bool(falls.any())
    if right and bool((rises.any(-1) & falls.any(-1)).any() | (rises.sum(-1) > 1).any()):
        raise UsageError(
            "zeros between tokens", where="attention_mask", fix="pad at the left, and pack without gaps"
        )
    return mask, right


class GLAForCausalLM(LinearAttentionForCausalLM):
    """Gated linear attention, or one of its ablations (GLA §4.4, Table 4)."""

    config_class = GLAConfig


class RetNetForCausalLM(LinearAttentionForCausalLM):
    """RetNet with a SwiGLU feed-forward, the paper's baseline (RetNet §2; GLA §5.1)."""

    config_class = RetNetConfig
