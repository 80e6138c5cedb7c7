"""Causal softmax attention by flash-attn 2.x (FlashAttention-2)."""

from glabench.registry import implementation


def limits(case, device):
    if case["head_dim"] > 256 or case["head_dim"] % 8:
        return "flash-attn takes head dims that are multiples of 8, up to 256"
    return None


@implementation(
    label="FlashAttention-2",
    needs=("torch", "flash_attn", "cuda"),
    features=("scale",),
    preference=20,
    limits=limits,
)
def load():
    from flash_attn import flash_attn_func

    def attention(q, k, v, scale=None):
        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)

    return attention
