"""Fused operations in a model that is built: norms, SwiGLU, rotary positions and the loss from Liger-Kernel.

The token mixer's gates, and the norm of each head, come as kernels of our own.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from glabench.errors import UnavailableError
from glabench.installed import no_fused_operations
from glabench.models.mixer import LinearAttention, log_gate

# what is known to compute x / rms(x) * weight: other families' norms have the same names and other formulas
NORMS = {
    "glabench.models.mixer.RMSNorm": ("eps", "gemma"),  # Liger's word for float32 throughout, rounded once
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": ("variance_epsilon", "llama"),
    "transformers.models.mamba.modeling_mamba.MambaRMSNorm": ("variance_epsilon", "llama"),
    "transformers.models.mamba2.modeling_mamba2.Mamba2RMSNorm": ("variance_epsilon", "llama"),
}
MODELS = ("glabench_gla", "glabench_retnet", "llama", "mamba", "mamba2")
ROTARY = "apply_rotary_pos_emb"  # what transformers' Llama layer calls
IGNORED = -100  # the label that has no loss, in transformers as in PyTorch
LOGITS = 1 << 28  # made at a time: products of fewer rows leave a large GPU half empty


def fuse(model: nn.Module, *, operations: bool = True, loss: bool = True) -> tuple[str, ...]:
    """Let a causal language model, ours or transformers', compute with fused operations; its weights stay.

    `operations`: every RMSNorm, swish(x) * y, the transformer's rotary positions, our mixer's gates.
    `loss`: the output matrix and the cross-entropy in one, where there are labels; logits are then not
    kept, and the output's `logits` are the last hidden states.
    Returns what was replaced: of rms_norm, silu_mul, rotary, log_gate, norm_gate,
    linear_cross_entropy.
    Raises: UnavailableError without Liger-Kernel or a GPU, and for models of other kinds.
    """
    reason = no_fused_operations(str(next(model.parameters()).device))
    if reason is None and model.config.model_type not in MODELS:
        reason = f"known for {', '.join(MODELS)}, not for {model.config.model_type}"
    if reason:
        raise UnavailableError("no fused operations", where="fused", fix=reason)
    replaced = set()
    if operations:
        replaced = {part for module in list(model.modules()) for part in _fuse_module(module)}
        if isinstance(model, modeling_llama.LlamaPreTrainedModel):
            _fuse_rotary()
            replaced.add("rotary")
    if loss:
        _fuse_loss(model)
        replaced.add("linear_cross_entropy")
    return tuple(sorted(replaced))


def _fuse_module(module: nn.Module) -> list[str]:
    """Replace what this one module computes itself; its children come in turn."""
    if is_rms_norm(module):
        module.forward = MethodType(_rms_norm, module)
        return ["rms_norm"]
    if hasattr(module, "silu_mul"):
        from liger_kernel.transformers.functional import liger_swiglu

        module.silu_mul = liger_swiglu
        return ["silu_mul", *fuse_gates(module)]
    if isinstance(module, modeling_llama.LlamaMLP):
        module.forward = MethodType(_swiglu, module)
        return ["silu_mul"]
    return []


def fuse_gates(module: nn.Module) -> list[str]:
    """Let our token mixer's gates run as our own kernels; returns what was replaced."""
    if not isinstance(module, LinearAttention):
        return []
    replaced = []
    if hasattr(module, "gk_proj"):
        module.log_gate = _log_gate
        replaced.append("log_gate")
    if is_rms_norm(module.g_norm):
        module.norm_gate = MethodType(_norm_gate, module)
        replaced.append("norm_gate")
    return replaced


def is_rms_norm(module: nn.Module) -> bool:
    """Whether it is known to compute x / rms(x) * weight."""
    return _name(module) in NORMS


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    eps, casting = NORMS[_name(module)]
    # once: autocast would do it for each projection that follows, and again for each of their gradients
    return _narrow(liger_rms_norm(x, module.weight, getattr(module, eps), 0.0, casting, False))


def _narrow(x: Tensor) -> Tensor:
    """In autocast's type, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _log_gate(x: Tensor, tau: float) -> Tensor:
    from glabench.kernels import log_gate as kernel

    return log_gate(x, tau) if torch.compiler.is_compiling() else kernel.log_gate(x, tau)


def _norm_gate(module: LinearAttention, o: Tensor, gate: Tensor) -> Tensor:
    from glabench.kernels.norm_gate import norm_gate

    if torch.compiler.is_compiling():  # it makes kernels of its own, and keeps as little
        return LinearAttention.norm_gate(module, o, gate)
    norm = module.g_norm
    return norm_gate(o, gate.reshape(o.shape), norm.weight, norm.eps).flatten(-2)


def _swiglu(module: nn.Module, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return module.down_proj(liger_swiglu(module.gate_proj(x), module.up_proj(x)))


def _fuse_rotary() -> None:
    """For all of transformers' Llamas in this process, on a GPU; elsewhere theirs stays."""
    theirs = getattr(modeling_llama, ROTARY)
    if hasattr(theirs, "glabench"):
        return
    from liger_kernel.transformers.functional import liger_rope

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        if not q.is_cuda:
            return theirs(q, k, cos, sin, *more, **options)
        return liger_rope(q, k, cos, sin)

    rotary.glabench = True
    setattr(modeling_llama, ROTARY, rotary)


def _fuse_loss(model: nn.Module) -> None:
    """The output layer hands the hidden states through, and the loss function has its weights."""
    head, plain = model.lm_head, model.loss_function
    wanted = False

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal wanted
        wanted = kwargs.get("labels") is not None

    def logits(x: Tensor) -> Tensor:
        return x if wanted else F.linear(x, head.weight, head.bias)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        if not wanted:
            return plain(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        return linear_cross_entropy(logits, head.weight, labels)

    model.register_forward_pre_hook(before, with_kwargs=True)
    head.forward = logits
    model.loss_function = loss


@torch.compiler.disable
def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, LOGITS or fewer made at a time and dropped.

    Shapes: hidden [B, T, D], weight [vocabulary, D], labels [B, T]. Under autocast in its type; the
    weight's gradient is summed in float32.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight = _narrow(hidden.flatten(0, 1)), _narrow(weight)
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    # Liger makes as many logits at a time as `hidden` has elements: at small widths, parts of few rows
    return liger_fused_linear_cross_entropy(
        hidden,
        weight,
        following.flatten(),
        accum_dtype=torch.float32,
        chunk_mem_const=max(1, LOGITS // hidden.numel()),
    )
