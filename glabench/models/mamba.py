"""transformers' Mamba on a CPU: its scan over tokens in Python gives way to the chunked one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glabench.registry import implementations

NAME = "mamba_selective_scan"  # what transformers' Mamba block calls


def use_chunked_scan() -> None:
    """Let transformers' Mamba layers on a CPU compute with mamba_torch; elsewhere nothing changes.

    Without mamba-ssm, transformers steps through the tokens in Python and keeps [B, E, T, N]: minutes for
    a training step that takes a second. Where a version has no such function, its own scan stays.
    """
    from transformers.models.mamba import modeling_mamba

    theirs = getattr(modeling_mamba, NAME, None)
    if theirs is not None and not hasattr(theirs, "glabench"):
        setattr(modeling_mamba, NAME, _on_cpu(implementations()["mamba_torch"].load(), theirs))


def _on_cpu(chunked: Any, theirs: Any) -> Any:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **more: Any,
    ) -> Any:
        if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            options = {"delta_softplus": delta_softplus, "return_last_state": return_last_state, **more}
            return theirs(hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, **options)
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
        dt = F.softplus(dt) if delta_softplus else dt
        D = A.new_zeros(len(A)) if D is None else D
        y, last = chunked(hidden_states.mT, dt.mT, A, B.mT, C.mT, D, output_final_state=return_last_state)
        y = y.mT if z is None else y.mT * F.silu(z)
        return (y, last.to(y.dtype)) if return_last_state else y

    scan.glabench, scan.__wrapped__ = True, theirs
    return scan
