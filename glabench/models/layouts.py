"""flash-linear-attention's published layout: its configurations and tensor names, to ours and back.

Plain data in, plain data out; tensors are only renamed, or an old fused one split.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, Mamba2Config, MambaConfig, PreTrainedConfig

from glabench.errors import UsageError
from glabench.models.config import GLAConfig, LinearAttentionConfig, RetNetConfig, ffn_width

SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
)
SHARED += ("pad_token_id", "tie_word_embeddings", "use_cache")
RECURRENT = (
    "num_heads",
    "expand_k",
    "expand_v",
    "hidden_ratio",
    "intermediate_size",
    "max_position_embeddings",
)
MAMBA = ("state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias", "hidden_act", "residual_in_fp32")
MAMBA += ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual")
MAMBA1, MAMBA2 = (
    ["time_step_scale", "time_step_init_scheme"],
    ["num_heads", "head_dim", "n_groups", "chunk_size"],
)
ACTIVATIONS = ("swish", "silu")
KINDS = ("gla", "retnet", "transformer", "mamba", "mamba2")  # their model types
Fields = Mapping[str, Any]


def from_fla(fields: Fields, where: str) -> PreTrainedConfig:
    """Our configuration for a config.json of theirs. Raises UsageError for what our models do not compute."""
    kind = fields.get("model_type")
    readers: dict[str, Callable[..., PreTrainedConfig]] = {
        "gla": _read_gla,
        "retnet": _read_retnet,
        "transformer": _read_transformer,
        "mamba": _read_mamba,
        "mamba2": _read_mamba,
    }
    if kind not in readers:
        raise UsageError(
            f"no layout for model_type {kind!r}", where=where, fix=f"known: {', '.join(readers)}"
        )
    return readers[kind](fields, where)


def to_fla(config: PreTrainedConfig) -> dict[str, Any]:
    """Their config.json for our configuration. Raises UsageError for a variant that theirs cannot express."""
    shared = {k: getattr(config, k, None) for k in SHARED}
    if isinstance(config, LinearAttentionConfig):
        return shared | _write_recurrent(config)
    if isinstance(config, LlamaConfig):
        return shared | {
            "model_type": "transformer",
            "architectures": ["TransformerForCausalLM"],
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_parameters["rope_theta"],
            "norm_eps": config.rms_norm_eps,
            "hidden_act": "swish",
            "qkv_bias": False,
            "qk_norm": False,
            "window_size": None,
        }
    if isinstance(config, MambaConfig | Mamba2Config):
        second = isinstance(config, Mamba2Config)
        own = {k: getattr(config, k) for k in (*MAMBA, *(MAMBA2 if second else MAMBA1))}
        name = "Mamba2" if second else "Mamba"
        return (
            shared
            | own
            | {
                "model_type": name.lower(),
                "architectures": [f"{name}ForCausalLM"],
                "norm_eps": config.layer_norm_epsilon,
            }
        )
    raise UsageError(
        f"no fla layout for {config.model_type}", where="--layout", fix="write --layout glabench"
    )


def _write_recurrent(config: LinearAttentionConfig) -> dict[str, Any]:
    is_gla = isinstance(config, GLAConfig)
    plain = config.gate == ("channel" if is_gla else "fixed") and (config.rope_base is None) == is_gla
    if config.layout != "fla" or not plain:
        raise UsageError(
            f"fla's models have no gate {config.gate!r} with layout {config.layout!r}",
            where="--layout",
            fix="write --layout glabench",
        )
    if is_gla and (config.gate_low_rank_dim, config.gate_logit_normalizer) != (16, 16):
        raise UsageError("fla's gate has rank 16 and tau 16", where="--layout", fix="write --layout glabench")
    if not is_gla and config.rope_base != 10000:
        raise UsageError("fla's rotary base is 10000", where="--layout", fix="write --layout glabench")
    own = {k: getattr(config, k) for k in RECURRENT}
    own |= {"norm_eps": config.norm_eps, "hidden_act": "swish", "attn_mode": "chunk", "use_output_gate": True}
    name = "GLA" if is_gla else "RetNet"
    return own | {
        "model_type": name.lower(),
        "architectures": [f"{name}ForCausalLM"],
        "use_short_conv": False,
        "feature_map": None,
        "num_kv_heads": None,
        "fuse_norm": True,
    }


def _refuse(fields: Fields, where: str, **allowed: tuple[Any, ...]) -> None:
    """Raise for a key that is there with a value which our models do not compute."""
    for key, values in allowed.items():
        if fields.get(key, values[0]) not in values:
            raise UsageError(
                f"{key} = {fields[key]!r} is not supported", where=where, fix=f"supported: {values[0]!r}"
            )


def _shared(fields: Fields) -> dict[str, Any]:
    """Their defaults where a file leaves a key out."""
    defaults = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return defaults | {k: fields[k] for k in SHARED if k in fields}


def _read_recurrent(fields: Fields, where: str, heads: int, expand: tuple[float, float], ratio: float) -> Any:
    heads = fields.get("num_heads") or heads
    _refuse(
        fields,
        where,
        use_short_conv=(False,),
        feature_map=(None,),
        num_kv_heads=(None, heads),
        use_output_gate=(True,),
        clamp_min=(None,),
        attn=(None,),
        hidden_act=ACTIVATIONS,
        gate_fn=ACTIVATIONS,
        elementwise_affine=(True,),
        attn_mode=("chunk", "fused_chunk", "fused_recurrent", "parallel"),
    )
    own = {"hidden_size": 2048, "num_hidden_layers": 24, "max_position_embeddings": 2048} | _shared(fields)
    own |= {"num_heads": heads, "expand_k": expand[0], "expand_v": expand[1], "hidden_ratio": ratio}
    own |= {k: fields[k] for k in RECURRENT if fields.get(k) is not None}
    return own | {"norm_eps": fields.get("norm_eps", fields.get("rms_norm_eps", 1e-6)), "layout": "fla"}


def _read_gla(fields: Fields, where: str) -> PreTrainedConfig:
    return GLAConfig(**_read_recurrent(fields, where, 4, (0.5, 1.0), 4))


def _read_retnet(fields: Fields, where: str) -> PreTrainedConfig:
    return RetNetConfig(**_read_recurrent(fields, where, 8, (1.0, 2.0), 2))


def _read_transformer(fields: Fields, where: str) -> PreTrainedConfig:
    heads = fields.get("num_heads") or fields.get("num_attention_heads") or 32
    _refuse(
        fields,
        where,
        qkv_bias=(False,),
        attention_bias=(False,),
        qk_norm=(False,),
        window_size=(None,),
        attn=(None,),
        hidden_act=ACTIVATIONS,
    )
    own = {"hidden_size": 2048, "num_hidden_layers": 24} | _shared(fields)
    width = fields.get("intermediate_size") or ffn_width(own["hidden_size"], fields.get("hidden_ratio") or 4)
    return LlamaConfig(
        **own,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=fields.get("num_kv_heads") or fields.get("num_key_value_heads") or heads,
        max_position_embeddings=fields.get("max_position_embeddings") or 2048,
        rms_norm_eps=fields.get("norm_eps", fields.get("rms_norm_eps", 1e-6)),
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("rope_theta") or 10000.0},
    )


def _read_mamba(fields: Fields, where: str) -> PreTrainedConfig:
    second = fields["model_type"] == "mamba2"
    kind, keys = (Mamba2Config, MAMBA2) if second else (MambaConfig, MAMBA1)
    _refuse(fields, where, attn=(None,), hidden_act=ACTIVATIONS, rms_norm=(True,), norm_before_gate=(False,))
    own = {k: fields[k] for k in (*SHARED, *MAMBA, *keys) if k in fields}
    eps = fields.get("norm_eps", fields.get("layer_norm_epsilon", 1e-5))
    if own.get("hidden_act"):
        own["hidden_act"] = "silu"
    return kind(**own, layer_norm_epsilon=eps)


RENAMED = {  # theirs -> ours, as patterns on whole names
    "linear": (
        (r"(.*\.attn)\.g_norm_swish_gate\.weight", r"\1.g_norm.weight"),
        (r"(.*\.attn)\.g_norm\.weight", r"\1.g_norm.weight"),
    ),
    "llama": (
        (r"model\.embeddings\.(.*)", r"model.embed_tokens.\1"),
        (r"(model\.layers\.\d+)\.attn_norm\.(.*)", r"\1.input_layernorm.\2"),
        (r"(model\.layers\.\d+)\.mlp_norm\.(.*)", r"\1.post_attention_layernorm.\2"),
        (r"(model\.layers\.\d+)\.attn\.(.*)", r"\1.self_attn.\2"),
    ),
}
WRITTEN = {  # ours -> theirs
    "linear": ((r"(.*\.attn)\.g_norm\.weight", r"\1.g_norm_swish_gate.weight"),),
    "llama": (
        (r"model\.embed_tokens\.(.*)", r"model.embeddings.\1"),
        (r"(model\.layers\.\d+)\.input_layernorm\.(.*)", r"\1.attn_norm.\2"),
        (r"(model\.layers\.\d+)\.post_attention_layernorm\.(.*)", r"\1.mlp_norm.\2"),
        (r"(model\.layers\.\d+)\.self_attn\.(.*)", r"\1.attn.\2"),
    ),
}


def rename(tensors: Mapping[str, Tensor], config: PreTrainedConfig, *, to: str) -> dict[str, Tensor]:
    """Tensors with their names in the layout `to`, "glabench" or "fla".

    A feed-forward gate of twice the width, as files before 2025-02 have it, is split into gate and up.
    """
    kind = "linear" if isinstance(config, LinearAttentionConfig) else config.model_type
    rules = (RENAMED if to == "glabench" else WRITTEN).get(kind, ())
    found = {_renamed(name, rules): tensor for name, tensor in tensors.items()}
    if to == "glabench":
        for name in [n for n in found if n.endswith(".mlp.gate_proj.weight")]:
            up, gate = name.replace("gate_proj", "up_proj"), found[name]
            if up not in found and gate.shape[0] == 2 * config.intermediate_size:
                found[name], found[up] = (half.clone() for half in gate.chunk(2))
    return found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name
