"""The shipped configurations: five families in five sizes, and the ablations of GLA's Table 4."""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
)

from glabench.errors import UsageError, nearest
from glabench.models.config import GLAConfig, LinearAttentionConfig, RetNetConfig, ffn_width
from glabench.models.mamba import prepare

# tiny reads bytes: 256 of them, then begin, end and padding. The others have the 32k Mistral vocabulary.
BYTES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
WORDS = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SIZES: dict[str, dict[str, Any]] = {  # layers of Mamba, which has no feed-forward, are twice as many
    "tiny": {**BYTES, "hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 256},
    "8m": {**WORDS, "hidden_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 2048},
    "30m": {**WORDS, "hidden_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 2048},
    "340m": {**WORDS, "hidden_size": 1024, "num_hidden_layers": 24, "max_position_embeddings": 2048},
    "1.3b": {**WORDS, "hidden_size": 2048, "num_hidden_layers": 24, "max_position_embeddings": 2048},
}
HEADS = {  # GLA's head widths are multiples of 16, which the GPU kernels ask for
    "gla": {"tiny": 4, "8m": 3, "30m": 4, "340m": 4, "1.3b": 4},
    "retnet": {"tiny": 4, "8m": 3, "30m": 4, "340m": 4, "1.3b": 8},
    "transformer": {"tiny": 4, "8m": 3, "30m": 8, "340m": 16, "1.3b": 32},
}
UNTIED = {"gla-1.3b", "retnet-1.3b", "transformer-1.3b"}  # as the released configurations
FAMILIES = ("gla", "retnet", "mamba", "mamba2", "transformer")
ABLATIONS: dict[str, dict[str, Any]] = {  # GLA Table 4
    "no-gate": {"gate": "none"},
    "fixed-decay": {"gate": "fixed"},
    "scalar-gate": {"gate": "scalar"},
    "1-head": {"num_heads": 1},
    "8-heads": {"num_heads": 8},
}
ABLATED = ("340m", "30m")
STATE_TOKENS = 2048  # what a key-value cache is counted at


def names() -> tuple[str, ...]:
    """Every shipped configuration, the ablations last."""
    plain = [f"{family}-{size}" for family in FAMILIES for size in SIZES]
    return (*plain, *(f"gla-{size}-{change}" for size in ABLATED for change in ABLATIONS))


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration `name`, with fields changed. Raises UsageError for an unknown name or field."""
    if name not in names():
        raise UsageError(f"no model {name!r}", where="model", fix=nearest(name, names()))
    family, size, *change = name.split("-", 2)
    fields = {**SIZES[size], "tie_word_embeddings": name not in UNTIED}
    if change:
        fields["tie_word_embeddings"] = f"gla-{size}" not in UNTIED
    kind, own = _FIELDS[family](size, fields)
    own |= ABLATIONS[change[0]] if change else {}
    return kind(**{**own, **_known(kind, overrides)})


def _known(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    fields = [f for f in vars(kind()) if not f.startswith("_")] + ["attn_implementation", "implementation"]
    for field in overrides:
        if field not in fields:
            raise UsageError(
                f"no field {field!r} in {kind.__name__}", where="model", fix=nearest(field, fields)
            )
    return overrides


def _gla(size: str, fields: dict[str, Any]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    return GLAConfig, {**fields, "num_heads": HEADS["gla"][size]}


def _retnet(size: str, fields: dict[str, Any]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    return RetNetConfig, {**fields, "num_heads": HEADS["retnet"][size]}


def _transformer(size: str, fields: dict[str, Any]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    heads = HEADS["transformer"][size]
    width = ffn_width(fields["hidden_size"], 4)
    return LlamaConfig, {
        **fields,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": width,
    }


def _mamba(size: str, fields: dict[str, Any]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """State 16, expansion 2, convolution 4."""
    fields = {k: v for k, v in fields.items() if k != "max_position_embeddings"}
    fields |= {"num_hidden_layers": 2 * fields["num_hidden_layers"], "state_size": 16, "expand": 2}
    return MambaConfig, {**fields, "initializer_range": 0.02}


def _mamba2(size: str, fields: dict[str, Any]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    _, fields = _mamba(size, fields)
    heads = 2 * fields["hidden_size"] // 64
    fields |= {"state_size": 64 if size == "tiny" else 128, "head_dim": 64, "num_heads": heads, "n_groups": 1}
    return Mamba2Config, fields


_FIELDS = {"gla": _gla, "retnet": _retnet, "transformer": _transformer, "mamba": _mamba, "mamba2": _mamba2}


def build(name_or_config: str | PreTrainedConfig, *, dtype: Any = None, **overrides: Any) -> nn.Module:
    """A model with fresh weights, on torch's default device. Seed torch first for the same weights again.

    `overrides` are fields of the configuration; `implementation` (GLA, RetNet) and `attn_implementation`
    (the transformer) choose kernels. Raises: UsageError.
    """
    attention = overrides.pop("attn_implementation", None)
    if isinstance(name_or_config, str):
        chosen = config(name_or_config, **overrides)
    else:
        fields = {**name_or_config.to_dict(), **_known(type(name_or_config), overrides)}
        chosen = type(name_or_config).from_dict(fields)
        if hasattr(name_or_config, "implementation") and "implementation" not in overrides:
            chosen.implementation = name_or_config.implementation
    options = {} if attention is None else {"attn_implementation": attention}
    options |= {} if dtype is None else {"dtype": dtype}
    prepare(chosen)
    model = AutoModelForCausalLM.from_config(chosen, **options)
    if isinstance(chosen, MambaConfig | Mamba2Config):
        _shrink_outputs(model)
    return model


@torch.no_grad()
def _shrink_outputs(model: nn.Module) -> None:
    """Outputs of Mamba's layers over sqrt(layers), as its authors initialise them.

    Not by rescale_prenorm_residual: transformers applies that to weights it has just loaded, too.
    """
    for block in model.backbone.layers:
        block.mixer.out_proj.weight.div_(len(model.backbone.layers) ** 0.5)


def parameters(name_or_config: str | PreTrainedConfig) -> int:
    """Parameters, tied ones once; counted on the meta device, so that no memory is taken."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(name_or_config).parameters())


def state_bytes(chosen: PreTrainedConfig, tokens: int = STATE_TOKENS) -> int:
    """Bytes that decoding one sequence keeps after `tokens` tokens.

    Units: recurrent states in float32, key-value caches and convolution windows in 16 bits.
    """
    layers = chosen.num_hidden_layers
    if isinstance(chosen, LinearAttentionConfig):
        return 4 * layers * chosen.num_heads * chosen.head_k * chosen.head_v
    if isinstance(chosen, LlamaConfig):
        return 2 * layers * 2 * chosen.num_key_value_heads * chosen.head_dim * tokens
    width = chosen.expand * chosen.hidden_size
    groups = 2 * chosen.n_groups * chosen.state_size if isinstance(chosen, Mamba2Config) else 0
    return layers * (4 * width * chosen.state_size + 2 * (width + groups) * chosen.conv_kernel)
