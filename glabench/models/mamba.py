"""transformers' Mamba with our chunked scan: on a CPU, and where a sequence is read in pieces."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glabench.registry import implementations

NAME = "mamba_selective_scan"  # what transformers' Mamba block calls
_carried: list[Tensor | None] = []  # what the next scan starts from, set just before it by its own block


def use_chunked_scan() -> None:
    """Let transformers' Mamba layers on a CPU compute with mamba_torch; elsewhere nothing changes.

    Without mamba-ssm, transformers steps through the tokens in Python and keeps [B, E, T, N]: minutes for
    a training step that takes a second. Where a version has no such function, its own scan stays.
    """
    from transformers.models.mamba import modeling_mamba

    theirs = getattr(modeling_mamba, NAME, None)
    if theirs is not None and not hasattr(theirs, "glabench"):
        setattr(modeling_mamba, NAME, _on_cpu(implementations()["mamba_torch"].load(), theirs))


def carry_states(model: nn.Module) -> bool:
    """Let a forward pass of several tokens with a cache go on from its state, on any device, in float32.

    transformers' own starts each scan from zero. False, and nothing is changed, where this version of
    transformers keeps its state in another way.
    """
    from transformers.cache_utils import Cache
    from transformers.models.mamba import modeling_mamba

    mixers = [m for m in model.modules() if isinstance(m, modeling_mamba.MambaMixer)]
    if not mixers or not hasattr(modeling_mamba, NAME) or not hasattr(Cache, "get_recurrent_state"):
        return False
    use_chunked_scan()
    for mixer in mixers:
        mixer.register_forward_pre_hook(_hand_over, with_kwargs=True)
    return True


def _hand_over(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("cache")
    _carried[:] = [] if cache is None else [cache.get_recurrent_state(mixer.layer_idx, state_idx=0)]


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
        is_carried = bool(_carried)
        initial = _carried.pop() if is_carried else None
        if not is_carried and (hidden_states.device.type != "cpu" or torch.compiler.is_compiling()):
            options = {"delta_softplus": delta_softplus, "return_last_state": return_last_state, **more}
            return theirs(hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, **options)
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
        dt = F.softplus(dt) if delta_softplus else dt
        D = A.new_zeros(len(A)) if D is None else D
        options = {"initial_state": initial, "output_final_state": return_last_state}
        y, last = chunked(hidden_states.mT, dt.mT, A, B.mT, C.mT, D, **options)
        y = y.mT if z is None else y.mT * F.silu(z)
        last = last if is_carried or last is None else last.to(y.dtype)  # a carried state stays float32
        return (y, last) if return_last_state else y

    scan.glabench, scan.__wrapped__ = True, theirs
    return scan
