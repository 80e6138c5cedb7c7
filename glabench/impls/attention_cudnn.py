"""Causal softmax attention by cuDNN, through PyTorch's scaled_dot_product_attention."""

from glabench.registry import implementation


def limits(case, device):
    if case["head_dim"] > 128 or case["head_dim"] % 8:
        return "cuDNN takes head dims that are multiples of 8, up to 128"
    if case["seqlen"] == 1:
        return "PyTorch's cuDNN backend refuses a single key"
    return None


@implementation(
    label="Attention (cuDNN)",
    features=("scale",),
    preference=25,
    limits=limits,
    note="pinned to SDPA's cuDNN backend; heads are moved by strides, not copied",
)
def load():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q, k, v, scale=None):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
        return o.transpose(1, 2)

    return attention
