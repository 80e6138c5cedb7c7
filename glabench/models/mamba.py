"""What transformers' Mamba layers compute with: mamba-ssm's kernels on a GPU, else our chunked scan."""

import functools
import importlib
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig, PreTrainedConfig

from glabench.installed import has_cuda, import_leaf, is_installed
from glabench.registry import implementations

NAME = "mamba_selective_scan"  # what transformers' Mamba block calls
_carried: list[Tensor | None] = []  # what the next scan starts from, set just before it by its own block
INTERFACE = "mamba_ssm.ops.selective_scan_interface"
LEAVES = (INTERFACE, "mamba_ssm.ops.triton.selective_state_update", "mamba_ssm.ops.triton.ssd_combined")
MODELS = ("transformers.models.mamba.modeling_mamba", "transformers.models.mamba2.modeling_mamba2")


def prepare(config: PreTrainedConfig) -> None:
    """Before transformers builds a model: where it is a Mamba, let it find what computes best here."""
    if isinstance(config, MambaConfig | Mamba2Config):
        use_installed_kernels()
        if not has_cuda():  # else transformers asks for kernels that this machine could not run
            logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    if isinstance(config, MambaConfig):
        use_chunked_scan()


@functools.cache
def use_installed_kernels() -> bool:
    """Let transformers' Mamba layers find mamba-ssm and causal-conv1d; whether they are there. Idempotent.

    mamba-ssm's package imports its language models, which ask transformers for classes of other versions;
    where that import fails transformers goes on without the kernels, token by token. So its operations are
    imported alone, before transformers looks. Newer versions of transformers would call them on a CPU too.
    """
    if not (has_cuda() and is_installed("mamba_ssm") and is_installed("causal_conv1d")):
        return False
    interface, *_ = (import_leaf(name) for name in LEAVES)
    package = sys.modules["mamba_ssm"]
    for name in ("selective_scan_fn", "mamba_inner_fn"):  # what the package itself would offer
        setattr(package, name, getattr(interface, name))
    hub = importlib.import_module("transformers.integrations.hub_kernels")
    known = getattr(hub, "_KERNEL_MODULE_MAPPING", {})  # of versions that ask by name, at first use
    known |= {"mamba-ssm": package, "causal-conv1d": importlib.import_module("causal_conv1d")}
    for model in map(importlib.import_module, MODELS):
        for name, function in list(vars(model).items()):
            if name.startswith(("mamba", "causal_conv1d")) and hasattr(function, "__wrapped__"):
                setattr(model, name, _on_gpu(function))
    return True


def _on_gpu(kernel: Any) -> Any:
    plain = kernel.__wrapped__

    @functools.wraps(plain)
    def choose(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        return (kernel if first.is_cuda else plain)(*args, **kwargs)

    return choose


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
