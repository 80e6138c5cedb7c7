"""Softmax attention of one token with a key-value cache, by PyTorch's own flash kernel."""

from glabench.impls.attention_sdpa import limits
from glabench.registry import implementation


@implementation(
    label="Attention with a KV cache (PyTorch SDPA)",
    passes=("decode",),
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    preference=30,
    limits=limits,
    note="pinned to the flash backend; writing the token into the cache is part of the call",
)
def load():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q, k, v, k_cache, v_cache):
        k_cache[:, -1:], v_cache[:, -1:] = k, v
        heads_first = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            o = scaled_dot_product_attention(*heads_first)
        return o.transpose(1, 2)

    return attention
