"""Causal softmax attention by PyTorch's own flash kernel: on a CPU, and its FlashAttention-2 on CUDA."""

from glabench.registry import implementation


def limits(case, device):
    if device == "cuda" and case["dtype"] == "fp32":
        return "the flash backend takes bf16 and fp16 on CUDA"
    if device == "cuda" and case["head_dim"] > 256:
        return "the flash backend takes head dims up to 256"
    return None


@implementation(
    label="Attention (PyTorch SDPA, flash)",
    devices=("cpu", "cuda"),
    dtypes=("fp32", "bf16", "fp16"),
    features=("scale",),
    preference=30,
    limits=limits,
    note="pinned to the flash backend; on a CPU in bf16, dk and dv lose accuracy with length (1.2% at 16k)",
)
def load():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q, k, v, scale=None):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            o = scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
        return o.transpose(1, 2)

    return attention
