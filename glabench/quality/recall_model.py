"""The small language model that recall trains: embeddings, mixers without feed-forwards, a tied output.

Source: Zoology appendix E and its program at the tag iclr24; docs/METHOD.md lists what is the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glabench.installed import import_leaf, is_installed
from glabench.models.config import LinearAttentionConfig
from glabench.models.mixer import LinearAttention, rotary_angles
from glabench.quality.mixers import MIXERS
from glabench.registry import implementations

DROPOUT = 0.1  # of the embeddings, and of attention's weights
STD = 0.02


class Linear(nn.Module):
    """GLA, one of its ablations, or RetNet: the token mixer of the language models."""

    def __init__(
        self, dim: int, heads: int, impl: str, options: dict[str, Any], seqlen: int, **_: Any
    ) -> None:
        super().__init__()
        config = LinearAttentionConfig(
            hidden_size=dim,
            num_heads=heads,
            num_hidden_layers=1,
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            implementation=impl,
            **options,
        )
        self.mixer = LinearAttention(config)
        self.out_proj = self.mixer.o_proj
        angles = rotary_angles(config, 0, seqlen, torch.zeros(1))
        for name, values in zip(("cos", "sin"), angles or (None, None), strict=True):
            self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor, keep_state: bool = False) -> Any:
        rotary = None if self.cos is None else (self.cos, self.sin)
        y, state = self.mixer(x, rotary=rotary, keep_state=keep_state)
        return (y, state) if keep_state else y

    def state_elements(self, x: Tensor) -> int:
        return self(x, keep_state=True)[1].numel() // len(x)


class Attention(nn.Module):
    """Causal softmax attention with biases, as the reference has it."""

    def __init__(self, dim: int, heads: int, **_: Any) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=DROPOUT * self.training)
        return self.out_proj(o.transpose(1, 2).flatten(-2))

    def state_elements(self, x: Tensor) -> int:
        return self.in_proj(x).shape[-1] * 2 // 3 * x.shape[1]  # keys and values of every token


class Mamba(nn.Module):
    """Mamba's block around a scan of the registry; state 16, expansion 2, convolution 4.

    Not transformers' own, whose scan is a loop over tokens wherever its kernels are not installed.
    Inside, tensors are [channels, B, T]: the scan wants a channel's tokens adjacent.
    Source: Mamba §3.4, and §3.6 for the start of dt, which is log-uniform in 1e-3 .. 1e-1.
    """

    def __init__(self, dim: int, impl: str, **_: Any) -> None:
        super().__init__()
        E, N, rank = 2 * dim, 16, -(-dim // 16)
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * E, bias=False), nn.Linear(E, dim, bias=False)
        self.x_proj = nn.Linear(E, rank + 2 * N, bias=False)
        self.conv1d = nn.Conv1d(E, E, 4, padding=3, groups=E)
        self.dt_weight = nn.Parameter((2 * torch.rand(E, rank) - 1) * rank**-0.5)
        dt = torch.exp(torch.rand(E) * (math.log(1e-1) - math.log(1e-3)) + math.log(1e-3))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.arange(1, N + 1, dtype=torch.float32).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.scan = implementations()[impl].load()

    def forward(self, x: Tensor) -> Tensor:
        u, z = _project(self.in_proj.weight, x.permute(2, 0, 1)).chunk(2)
        u = _convolve(u.transpose(0, 1), self.conv1d).transpose(0, 1)
        rank, N = self.dt_weight.shape[1], self.A_log.shape[1]
        low, B, C = _project(self.x_proj.weight, u).split((rank, N, N))
        dt = F.softplus(_project(self.dt_weight, low) + self.dt_bias[:, None, None]).to(u.dtype)
        tensors = (z.permute(1, 2, 0) for z in (u, dt, B, C))  # the registry's [B, T, channels]: views
        u_t, dt_t, B_t, C_t = tensors
        y = self.scan(u_t, dt_t, -self.A_log.exp(), B_t, C_t, self.D)
        y = (y[0] if isinstance(y, tuple) else y).permute(2, 0, 1) * F.silu(z)
        return _project(self.out_proj.weight, y).permute(1, 2, 0)

    def state_elements(self, x: Tensor) -> int:
        return self.A_log.numel() + self.conv1d.weight.numel()  # a state and a window a channel


def _project(weight: Tensor, x: Tensor) -> Tensor:
    """weight @ x for x [channels, B, T], the result laid out the same."""
    return (weight @ x.flatten(1)).unflatten(1, x.shape[1:])


def _convolve(u: Tensor, conv: nn.Conv1d) -> Tensor:
    """SiLU of the causal depthwise convolution of u [B, E, T]."""
    fused = _fused_convolution() if u.is_cuda else None
    if fused is not None:
        return fused(u, conv.weight[:, 0].to(u.dtype), conv.bias.to(u.dtype), activation="silu")
    return F.silu(conv(u)[..., : u.shape[-1]])


@functools.cache
def _fused_convolution() -> Callable[..., Tensor] | None:
    return import_leaf("causal_conv1d").causal_conv1d_fn if is_installed("causal_conv1d") else None


KINDS = {"linear": Linear, "attention": Attention, "mamba": Mamba}


class Block(nn.Module):
    """x + mixer(norm(x)); then, but for Mamba, x + norm(x), the reference's identity for a feed-forward."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(dim), mixer
        self.second_norm = None if isinstance(mixer, Mamba) else nn.LayerNorm(dim)

    def forward(self, x: Tensor, compute: torch.dtype) -> Tensor:
        x = x + self.mixer(self.norm(x).to(compute))  # one cast, not one in each projection
        return x if self.second_norm is None else x + self.second_norm(x)


class RecallModel(nn.Module):
    """Two blocks (or more) between tied embeddings; attention alone has positions, learned.

    Shapes: tokens [B, T]; queries [B, K]; hidden states at the queries [B, K, D]. The residual stream is
    float32, mixers compute in `compute`.
    """

    def __init__(
        self, name: str, *, dim: int, heads: int | None, layers: int, vocab: int, seqlen: int, impl: str
    ) -> None:
        super().__init__()
        kind, options = MIXERS[name].kind, MIXERS[name].options
        self.embedding = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(seqlen, dim) if kind == "attention" else None
        self.blocks = nn.ModuleList(
            Block(dim, KINDS[kind](dim=dim, heads=heads, impl=impl, options=options, seqlen=seqlen))
            for _ in range(layers)
        )
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(DROPOUT)
        self.compute = torch.float32
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for block in self.blocks:
            block.mixer.out_proj.weight.div_((2 * len(self.blocks)) ** 0.5)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x, self.compute)
        at = queries.long()[..., None].expand(-1, -1, x.shape[-1])
        return self.norm(x.gather(1, at))

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.long())
        return self.dropout(x if self.positions is None else x + self.positions.weight[: tokens.shape[1]])

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)

    @torch.no_grad()
    def state_elements(self, tokens: Tensor) -> int:
        """Numbers that decoding keeps of one sequence, over all layers, after these tokens."""
        x, count = self._embed(tokens), 0
        for block in self.blocks:
            count += block.mixer.state_elements(block.norm(x).to(self.compute))
            x = block(x, self.compute)
        return count
