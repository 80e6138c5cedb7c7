"""Softmax attention of one token with a key-value cache, by flash-attn 2.x (split over the keys)."""

import functools

from glabench.impls.attention_fa2 import limits
from glabench.registry import implementation


@implementation(
    label="Attention with a KV cache (flash-attn)",
    passes=("decode",),
    needs=("torch", "flash_attn", "cuda"),
    preference=20,
    limits=limits,
    note="flash_attn_with_kvcache: one call writes the token into the cache and attends to it",
)
def load():
    import torch
    from flash_attn import flash_attn_with_kvcache

    @functools.lru_cache(maxsize=4)
    def lengths(batch, before, device):  # a server has this tensor at hand
        return torch.full((batch,), before, dtype=torch.int32, device=device)

    def attention(q, k, v, k_cache, v_cache):
        before = lengths(q.shape[0], k_cache.shape[1] - 1, q.device)
        return flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=before, causal=True)

    return attention
