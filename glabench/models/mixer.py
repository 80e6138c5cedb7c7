"""The token mixer: projections, gate, linear recurrence, norm of each head, output gate (GLA §4.4)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glabench.errors import UnavailableError, UsageError
from glabench.models.config import LinearAttentionConfig
from glabench.registry import Implementation, implementations, resolve

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
XAVIER_GAIN = 2**-2.5  # of q, k and the gate, in the authors' code
LOADED: dict[str, Callable[..., Any]] = {}  # layers in use, by id
WIDEST_VALUE = 512  # values of one head that the GPU kernels hold; wider heads run in parts


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit types; wider ones keep their own."""
    return torch.promote_types(dtype, torch.float32)


def silu_mul(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) * y."""
    return F.silu(x) * y


def log_gate(x: Tensor, tau: float) -> Tensor:
    """log sigmoid(x) / tau, in float32 of 16-bit logits; the backward pass takes its result alone."""
    return LogGate.apply(x, tau)


class LogGate(torch.autograd.Function):
    """See log_gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: float) -> Tensor:
        g = F.logsigmoid(x.to(wide(x.dtype))) / tau
        ctx.save_for_backward(g)
        ctx.tau, ctx.dtype = tau, x.dtype
        return g

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor, None]:
        (g,) = ctx.saved_tensors
        return (dg * -torch.expm1(g * ctx.tau) / ctx.tau).to(ctx.dtype), None  # sigmoid(-x) / tau


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm without weights that keeps its input's dtype, autocast or not."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class LinearAttention(nn.Module):
    """A layer of GLA, of one of its ablations, or of RetNet, as its configuration says.

    Shapes: x, y [B, T, D]; state [B, H, K, V], float32; rotary: cos, sin [T, K / 2]; mask [B, T], True at
    tokens.
    Source: GLA §4.4; RetNet §2 for rotary positions and fixed decays.
    """

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.config = config
        D, keys, values = config.hidden_size, config.key_width, config.value_width
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, values, bias=False)
        self.g_proj = nn.Linear(D, values, bias=config.layout == "authors")
        self.o_proj = nn.Linear(values, D, bias=False)
        if config.gate == "channel":
            rank = config.gate_low_rank_dim
            self.gk_proj = nn.Sequential(nn.Linear(D, rank, bias=False), nn.Linear(rank, keys))
        elif config.gate == "scalar":
            self.gk_proj = nn.Linear(D, config.num_heads)
        if config.initialisation == "authors":
            gate = self.gk_proj.modules() if config.gate in ("channel", "scalar") else ()
            for linear in (self.q_proj, self.k_proj, *(m for m in gate if isinstance(m, nn.Linear))):
                linear.xavier_gain = XAVIER_GAIN  # a mark: transformers initialises layer by layer
        norm = RMSNorm if config.layout == "fla" else HeadLayerNorm
        self.g_norm = norm(config.head_v, config.norm_eps)
        self.silu_mul, self.log_gate = silu_mul, log_gate  # models/fused.py puts fused ones here

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (self.config.num_heads, -1)
        q, k, v = (p(x).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if mask is not None:
            v = v * mask[..., None, None].to(v.dtype)  # padding adds nothing, and decays a state of zeros
        gates = self.log_gates(x)
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # which would round the state
            step = step_for(self.config, q, state) if x.shape[1] == 1 and state is not None else None
            if step is not None:
                o, state = in_parts(step, q, k, v, gates, self.config.scale, state, True)
            elif x.shape[1] == 1 and state is not None:
                o, state = recurrent_step(q, k, v, gates, self.config, state)
            else:
                layer = layer_for(self.config, q, torch.is_grad_enabled())
                o, state = in_parts(layer, q, k, v, gates, self.config.scale, state, keep_state)
        return self.o_proj(self.norm_gate(o, self.g_proj(x))), state

    def norm_gate(self, o: Tensor, gate: Tensor) -> Tensor:
        """swish(gate) * norm of each head: o [B, T, H, V], gate and the result [B, T, H V]."""
        return self.silu_mul(gate, self.g_norm(o).flatten(-2))

    def log_gates(self, x: Tensor) -> Tensor | None:
        """log alpha, [B, T, H, K] for a gate a channel, [B, T, H] for one a head (GLA §4.4, tau = 16)."""
        if self.config.gate not in ("channel", "scalar"):
            return None
        g = self.log_gate(self.gk_proj(x), self.config.gate_logit_normalizer)
        return g.unflatten(-1, (self.config.num_heads, -1)) if self.config.gate == "channel" else g


def rotary_angles(config: LinearAttentionConfig, first: int, length: int, like: Tensor) -> Any:
    """cos and sin [T, K / 2] of positions first .. first + length - 1, or None without rotary positions."""
    if config.rope_base is None:
        return None
    dtype = wide(like.dtype)
    channels = torch.arange(0, config.head_k, 2, device=like.device, dtype=dtype)
    places = torch.arange(first, first + length, device=like.device, dtype=dtype)
    angles = places[:, None] * config.rope_base ** (-channels / config.head_k)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + K / 2) of x [B, T, H, K] (RoFormer §3.4, the two-halves form)."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, config: LinearAttentionConfig, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: S = alpha S + k^T v, o = scale q S. Returns o [B, 1, H, V] and the new state (GLA eq. 3)."""
    dtype = state.dtype
    if config.gate == "fixed":
        heads = torch.arange(config.num_heads, device=state.device, dtype=dtype)
        alpha = (1 - torch.exp2(-5 - heads))[:, None, None]
    elif g is None:
        alpha = 1.0
    else:
        alpha = g[:, 0].exp().to(dtype).reshape(*g.shape[:1], config.num_heads, -1, 1)
    state = alpha * state + k[:, 0, :, :, None].to(dtype) * v[:, 0, :, None, :].to(dtype)
    o = (q[:, 0, :, None, :].to(dtype) * config.scale) @ state
    return o.transpose(1, 2).to(v.dtype), state


def value_parts(V: int, widest: int) -> int:
    """The fewest equal parts of V values that are no wider than `widest`."""
    parts = -(-V // widest)
    while V % parts:
        parts += 1
    return parts


def in_parts(
    layer: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor | None,
    keep_state: bool,
    widest: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call the layer; values too wide for a kernel go in as more heads, each with the same q, k and gates."""
    H, V = v.shape[2:]
    parts = value_parts(V, widest or (WIDEST_VALUE if v.is_cuda else V))
    gates = () if g is None else (g,)
    if parts > 1:
        q, k, *gates = (x.repeat_interleave(parts, 2) for x in (q, k, *gates))
        v = v.unflatten(-1, (parts, -1)).flatten(2, 3)
        if state is not None:
            state = state.unflatten(-1, (parts, -1)).movedim(-2, 2).flatten(1, 2).contiguous()
    o, final = layer(q, k, v, *gates, scale=scale, initial_state=state, output_final_state=keep_state)
    if parts > 1:
        o = o.unflatten(2, (H, parts)).flatten(-2)
        final = None if final is None else final.unflatten(1, (H, parts)).movedim(2, -2).flatten(-2)
    return o, final


def step_for(config: LinearAttentionConfig, q: Tensor, state: Tensor) -> Callable[..., Any] | None:
    """The kernel that takes one token on a GPU; None where `recurrent_step` does it.

    It leaves the state as it was and gives a new one, which moves as many bytes as one in place.
    """
    if not q.is_cuda or torch.is_grad_enabled() or state.dtype != torch.float32:
        return None
    parts = value_parts(config.head_v, WIDEST_VALUE)
    shape = (config.num_heads * parts, config.head_k, config.head_v // parts)
    name = _load_step(config.family, q.dtype, shape)
    return None if name is None else LOADED[name]


@torch.compiler.assume_constant_result
def _load_step(*key: Any) -> str | None:
    found = _chosen_step(*key)
    if found is None:
        return None
    impl_id, LOADED[impl_id] = found
    return impl_id


@functools.lru_cache(maxsize=64)
def _chosen_step(
    family: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> tuple[str, Callable[..., Any]] | None:
    """(id, callable), or None where the kernel does not run here."""
    impl = implementations()[f"{family}_recurrent_fused"]
    return None if _reason(impl, _case(dtype, shape, False), "cuda") else (impl.id, impl.load())


def layer_for(config: LinearAttentionConfig, q: Tensor, backward: bool) -> Callable[..., Any]:
    """What computes the layer for tensors like q [B, T, H, K]: the one configured, or the best that can."""
    return LOADED[layer_id(config, "cuda" if q.is_cuda else "cpu", q.dtype, backward)]


def layer_id(config: LinearAttentionConfig, device: str, dtype: torch.dtype, backward: bool) -> str:
    """Its id. Raises: UsageError, UnavailableError."""
    shape = (config.num_heads, config.head_k, config.head_v)
    return _load(config.implementation, config.family, device, dtype, shape, backward)


@torch.compiler.assume_constant_result  # a compiler takes the id as given, and does not trace the registry
def _load(*key: Any) -> str:
    impl_id, layer = _chosen(*key)
    LOADED[impl_id] = layer
    return impl_id


@functools.lru_cache(maxsize=64)
def _chosen(
    name: str, family: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int], backward: bool
) -> tuple[str, Callable[..., Any]]:
    """(id, callable). Raises UsageError for a name of another family, UnavailableError where none runs."""
    case = _case(dtype, shape, backward)
    if name != "auto":
        if ".py:" in name:  # a configuration may come with a checkpoint, and must not run code
            raise UsageError(f"{name!r} is no id", where="implementation", fix="make it an entry point")
        ((_, impl),) = resolve((name,), device, where="implementation")
        if impl.family != family:
            raise UsageError(
                f"{name!r} computes {impl.family}, not {family}", where="implementation", fix="use auto"
            )
        if reason := _reason(impl, case, device):
            raise UnavailableError(f"{name!r} cannot compute this model", where="implementation", fix=reason)
        return impl.id, impl.load()
    arms = [i for i in implementations().values() if i.family == family]
    arms.sort(key=lambda i: (i.in_training if backward else i.preference, i.id))
    for impl in arms:
        if _reason(impl, case, device) is None:
            return impl.id, impl.load()
    raise UnavailableError(
        f"no implementation of {family} runs on {device}",
        where="implementation",
        fix="; ".join(f"{i.id}: {_reason(i, case, device)}" for i in arms),
    )


def _case(dtype: torch.dtype, shape: tuple[int, int, int], backward: bool) -> dict[str, Any]:
    """What is asked of an implementation, as the registry's limits read it."""
    case = {"dtype": DTYPES.get(dtype, str(dtype)), "passes": "fwd_bwd" if backward else "fwd"}
    return case | {"batch": 1, "seqlen": 2, "heads": shape[0], "d_k": shape[1], "d_v": shape[2]}


def _reason(impl: Implementation, case: dict[str, Any], device: str) -> str | None:
    """Why `impl` cannot serve a model, or None."""
    if reason := impl.unavailable(device):
        return reason
    if not {"state", "scale"} <= set(impl.features):
        return "takes no state or no scale"
    if case["dtype"] == "fp64" and "cpu" in impl.devices:
        return impl.unsupported(
            case | {"dtype": "fp32"}, device
        )  # plain PyTorch computes in its inputs' type
    return impl.unsupported(case, device)
