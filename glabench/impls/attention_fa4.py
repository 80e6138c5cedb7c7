"""Causal softmax attention by flash_attn.cute (FlashAttention-4)."""

from glabench.installed import cuda_capability
from glabench.registry import implementation


def limits(case, device):
    capability = cuda_capability()
    if capability and capability[0] not in (9, 10):
        return f"written for compute capability 9 and 10, not {capability[0]}"
    if case["head_dim"] not in (64, 96, 128):
        return "flash_attn.cute takes head dims 64, 96 and 128"
    return None


@implementation(
    label="FlashAttention-4",
    needs=("torch", "flash_attn.cute", "cutlass", "cuda"),
    features=("scale",),
    preference=26,
    limits=limits,
    note="flash_attn.cute as installed: flash-attn-4, or the early, slower copy inside flash-attn 2.8",
)
def load():
    from flash_attn.cute.interface import flash_attn_func

    def attention(q, k, v, scale=None):
        result = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
        return result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp

    return attention
