"""Configurations of the models with a linear recurrence: GLA, its ablations, and RetNet."""

from typing import Any

from transformers import PreTrainedConfig

from glabench.errors import UsageError, nearest

GATES = {  # how the state decays -> the family of the registry that computes it
    "channel": "gla",  # a gate a key channel, from the token (GLA eq. 3)
    "scalar": "simple_gla",  # a gate a head, from the token
    "fixed": "retention",  # 1 - 2^(-5-h) for head h (RetNet)
    "none": "linear_attention",
}
LAYOUTS = {"fla": 1e-6, "authors": 1e-5}  # -> eps of its norms
INITIALISATIONS = ("authors", "normal")
FFN_MULTIPLE = 256  # the feed-forward width is rounded up to this


def ffn_width(hidden_size: int, ratio: float) -> int:
    """Width of a SwiGLU with as many parameters as a plain one of `ratio` times the hidden size."""
    return -(-int(hidden_size * ratio * 2 / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


class LinearAttentionConfig(PreTrainedConfig):
    """What GLAConfig and RetNetConfig share.

    gate: "channel", "scalar", "fixed" or "none"; layout: "fla" (per-head RMSNorm with weights, scale
    (d_k / H)^-0.5) or "authors" (per-head LayerNorm without weights, scale (d / H)^-0.5, output gate with a
    bias); initialisation: "authors" (Xavier with gain 2^-2.5 for q, k and the gate) or "normal".
    `implementation` is the layer's id in the registry, or "auto"; it is never saved.
    Raises: UsageError.
    Source: GLA section 4.4; its code for what the text leaves out.
    """

    model_type = "glabench_linear"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        hidden_ratio: float = 4.0,
        intermediate_size: int | None = None,
        gate: str = "channel",
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16.0,
        layout: str = "fla",
        rope_base: float | None = None,
        norm_eps: float | None = None,
        initialisation: str = "authors",
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        implementation: str = "auto",
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        for field, value, known in (
            ("gate", gate, tuple(GATES)),
            ("layout", layout, tuple(LAYOUTS)),
            ("initialisation", initialisation, INITIALISATIONS),
        ):
            if value not in known:
                raise UsageError(
                    f"no {field} {value!r}", where="configuration", fix=nearest(str(value), known)
                )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size or ffn_width(hidden_size, hidden_ratio)
        self.gate = gate
        self.gate_low_rank_dim = gate_low_rank_dim
        self.gate_logit_normalizer = gate_logit_normalizer
        self.layout = layout
        self.rope_base = rope_base
        self.norm_eps = LAYOUTS[layout] if norm_eps is None else norm_eps
        self.initialisation = initialisation
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.implementation = implementation
        self._check_widths()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check_widths(self) -> None:
        if min(self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_heads) < 1:
            raise UsageError("a size below 1", where="configuration", fix="give positive sizes")
        for name, width in (("keys", self.key_width), ("values", self.value_width)):
            if width < 1 or width % self.num_heads:
                raise UsageError(
                    f"{name} of width {width} do not split into {self.num_heads} heads",
                    where="configuration",
                    fix="choose num_heads that divides it",
                )
        if self.rope_base and self.head_k % 2:
            raise UsageError(
                f"rotary positions need an even head width, not {self.head_k}",
                where="configuration",
                fix="choose other num_heads",
            )

    @property
    def key_width(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_width(self) -> int:
        return int(self.hidden_size * self.expand_v)

    @property
    def head_k(self) -> int:
        return self.key_width // self.num_heads

    @property
    def head_v(self) -> int:
        return self.value_width // self.num_heads

    @property
    def family(self) -> str:
        """The family of the registry that computes the layer."""
        return GATES[self.gate]

    @property
    def scale(self) -> float:
        """What multiplies q . k."""
        width = self.hidden_size / self.num_heads if self.layout == "authors" else self.head_k
        return width**-0.5

    def to_dict(self) -> dict[str, Any]:
        """Without `implementation`: which kernel computes is no property of the weights."""
        fields = super().to_dict()
        fields.pop("implementation", None)
        return fields


class GLAConfig(LinearAttentionConfig):
    """Gated linear attention with a SwiGLU feed-forward: d_k = d / 2, d_v = d, 4 heads (GLA §4.4)."""

    model_type = "glabench_gla"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class RetNetConfig(LinearAttentionConfig):
    """RetNet as the GLA paper trains it: fixed decays, rotary positions, SwiGLU, d_k = d, d_v = 2 d."""

    model_type = "glabench_retnet"

    def __init__(
        self,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        hidden_ratio: float = 2.0,
        gate: str = "fixed",
        rope_base: float | None = 10000.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            expand_k=expand_k,
            expand_v=expand_v,
            hidden_ratio=hidden_ratio,
            gate=gate,
            rope_base=rope_base,
            **kwargs,
        )
