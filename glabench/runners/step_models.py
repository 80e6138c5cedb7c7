"""The worker's side of `glabench throughput`: models, built and checked before they are timed."""

import functools
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, Mamba2Config, PreTrainedConfig

from glabench.cases import Arm, Case
from glabench.errors import GlabenchError, UnavailableError, UsageError, nearest
from glabench.installed import installed_version, is_installed, no_fused_operations
from glabench.models import catalog, compiling, fused, layouts, mixer
from glabench.models.config import LinearAttentionConfig
from glabench.registry import implementations
from glabench.runners import cells, tuning, turns
from glabench.runners.throughput_run import PEER
from glabench.training import optimizer
from glabench.training.settings import Settings
from glabench.worker import CellFailure, emit_phase, settle_garbage

LOSS_NEAR = 1.0  # nats that random weights may be off ln(vocabulary)
LAYER_TOKENS = 256  # of the layer's own check
BUILTIN = re.compile(r"(Backward\d+|AccumulateGrad)$")  # PyTorch's own nodes of an autograd graph
SHOWN = re.compile(r"ScaledDotProduct")  # of those, the ones a row names


# --- which models -----------------------------------------------------------------------------------------


def plan(args: dict[str, Any]) -> dict[str, Any]:
    """What the words asked for: {"arms": [...]}, or {"error": {what, where, fix}}.

    args: words (families or shipped names), sizes. An arm: arm (its name), name (the shipped
    configuration's), model, size, family, layers, vocabulary, params, products.
    """
    emit_phase("plan")
    try:
        names = [pair for word in args["words"] for pair in _names(word, args["sizes"])]
        return {"arms": [_arm(arm, name) for arm, name in dict.fromkeys(names)]}
    except GlabenchError as err:
        return {"error": {"what": err.what, "where": err.where, "fix": err.fix}}


def _names(word: str, sizes: list[str]) -> list[tuple[str, str]]:
    """(arm, shipped configuration) of one word. Raises UsageError."""
    for size in sizes:
        if size not in catalog.SIZES:
            raise UsageError(f"no size {size!r}", where="--size", fix=nearest(size, tuple(catalog.SIZES)))
    if word in (*catalog.FAMILIES, PEER):
        return [(f"{word}-{size}", f"{word.removesuffix('-fla')}-{size}") for size in sizes]
    name = word.replace(PEER, "gla", 1) if word.startswith(PEER) else word
    if name not in catalog.names():
        known = (*catalog.FAMILIES, PEER, *catalog.names())
        raise UsageError(f"no model {word!r}", where="MODEL", fix=nearest(word, known))
    return [(word, name)]


def _arm(arm: str, name: str) -> dict[str, Any]:
    config = catalog.config(name)
    with torch.device("meta"):
        model = catalog.build(config)
    family, split = layer_of(config)
    return {
        "arm": arm,
        "name": name,
        "model": PEER if arm.startswith(PEER) else name.split("-")[0],
        "size": name.split("-")[1],
        "family": family,
        "split": asdict(split),
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "params": sum(p.numel() for p in model.parameters()),
        "products": sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
    }


def layer_of(config: PreTrainedConfig) -> tuple[str, Arm]:
    """The registry's family of a model's mixer, and how it splits the width."""
    if isinstance(config, LinearAttentionConfig):
        return config.family, Arm(config.num_heads, config.head_k, config.head_v, "")
    if isinstance(config, LlamaConfig):
        return "attention", Arm(config.num_attention_heads, config.head_dim, config.head_dim, "")
    width = config.expand * config.hidden_size
    if isinstance(config, Mamba2Config):
        return "mamba2", Arm(config.num_heads, config.state_size, config.head_dim, "")
    return "mamba", Arm(1, config.state_size, width, "")


# --- a model that is ready to be timed --------------------------------------------------------------------


@dataclass(slots=True)
class Built:
    """A model with its optimiser, and what a row says of them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Settings
    facts: dict[str, Any]
    is_cuda: bool
    steps: int = 0

    def losses(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda" if self.is_cuda else "cpu", torch.bfloat16, enabled=self.is_cuda):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss


@functools.lru_cache(maxsize=1)
def built(chosen: str) -> Built:
    arm, condition, layer, device, seed = json.loads(chosen)
    is_cuda = device.startswith("cuda")
    if is_cuda:
        tuning.install(turns.step_aside)  # autotuners compile all their configurations at once
    torch.manual_seed(seed)
    model, facts = _model(arm, condition, layer, device)
    count = sum(p.numel() for p in model.parameters())
    if abs(count - arm["params"]) > 0.001 * arm["params"]:
        raise CellFailure("wrong", f"it has {count:,} parameters, not {arm['params']:,}")
    settings = Settings(steps=1 << 20, batch_tokens=1, seqlen=1, warmup_steps=1000)
    made = optimizer.make(model, settings)
    facts |= {
        "precision": "bf16 autocast, fp32 weights" if is_cuda else "fp32",
        "optimizer": f"AdamW{' fused' if is_cuda else ''}, clip {settings.clip:g}",
    }
    built = Built(model.train(), made, settings, facts, is_cuda)
    emit_phase("check")
    facts |= _check(built, arm, layer, device)
    if condition == "modern":
        compiling.compile_blocks(model)
    facts["compile"] = "blocks" if condition == "modern" else "no"
    settle_garbage()
    return built


def _model(arm: dict[str, Any], condition: str, layer: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """On the device, with the condition's operations in place, and what a row says of them."""
    is_modern, is_peer = condition == "modern", arm["model"] == PEER
    with torch.device(device):
        model = _peer(arm["name"], is_modern) if is_peer else _ours(arm["name"], layer, device)
    own = f"flash-linear-attention {installed_version('fla')}"
    if is_peer:  # it brings its own fused norms and SwiGLU, as its users have it
        return model, {"loss_form": f"fused linear, {own}" if is_modern else "plain", "fused": own}
    replaced: tuple[str, ...] = ()
    if no_fused_operations(device) is None:  # a compiler fuses norms and SwiGLU itself
        replaced = fused.fuse(model, operations=not is_modern, loss=is_modern)
    liger = f"fused linear, liger-kernel {installed_version('liger_kernel')}"
    names = " ".join(name for name in replaced if name != "linear_cross_entropy")
    return model, {"loss_form": liger if is_modern else "plain", "fused": names}


def _ours(name: str, layer: str, device: str) -> nn.Module:
    config = catalog.config(name)
    if isinstance(config, LinearAttentionConfig):
        return catalog.build(name, implementation=layer)
    if isinstance(config, LlamaConfig):
        flash = device.startswith("cuda") and is_installed("flash_attn") and layer != "attention_sdpa"
        return catalog.build(name, attn_implementation="flash_attention_2" if flash else "sdpa")
    return catalog.build(name)


def _peer(name: str, is_modern: bool) -> nn.Module:
    """flash-linear-attention's model."""
    from fla.models import GLAConfig, GLAForCausalLM

    fields = layouts.to_fla(catalog.config(name))
    loss = {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": is_modern}
    return GLAForCausalLM(GLAConfig.from_dict(fields | loss))


# --- checks before any timing -----------------------------------------------------------------------------


def _check(built: Built, arm: dict[str, Any], layer: str, device: str) -> dict[str, Any]:
    """The layer against its oracle, then one step of the model on a short sequence. Raises CellFailure."""
    found = _check_layer(built, arm, device)
    ids = torch.randint(arm["vocabulary"], (1, LAYER_TOKENS), device=device)
    loss = built.losses(ids)
    names = graph_names(loss)
    loss.backward()
    uniform = math.log(arm["vocabulary"])
    if not abs(loss.item() - uniform) < LOSS_NEAR:
        raise CellFailure("wrong", f"random weights lose {loss.item():.3f} nats, not about {uniform:.3f}")
    for name, parameter in built.model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise CellFailure("wrong", f"{name} has {'no' if parameter.grad is None else 'a bad'} gradient")
    built.optimizer.zero_grad(set_to_none=True)
    found["layer"] = found.get("layer") or _layer(arm["family"], arm["model"], names, built.is_cuda)
    if layer not in ("auto", found["layer"]):
        raise CellFailure("unavailable", f"{layer} was asked for and {found['layer']} ran")
    return found | {"initial_loss_nats": loss.item(), "kernels": " ".join(names)}


def _check_layer(built: Built, arm: dict[str, Any], device: str) -> dict[str, Any]:
    """The registry's layers are held to the oracle at this model's widths; others are checked as a whole."""
    config = built.model.config
    if not isinstance(config, LinearAttentionConfig):
        return {}
    dtype = torch.bfloat16 if built.is_cuda else torch.float32
    try:
        chosen = mixer.layer_id(config, "cuda" if built.is_cuda else "cpu", dtype, True)
    except UnavailableError as err:
        raise CellFailure("unavailable", f"{err.what}: {err.fix}") from err
    split = arm["split"]
    if split["d_v"] > mixer.WIDEST_VALUE:
        return {"layer": chosen}
    case = Case(
        shape=arm["size"],
        passes="fwd_bwd",
        batch=1,
        seqlen=LAYER_TOKENS,
        heads=split["heads"],
        d_k=split["d_k"],
        d_v=split["d_v"],
        head_dim=64,
        dtype="bf16" if built.is_cuda else "fp32",
    )
    asked = {"impl": implementations()[chosen].spec(), "case": asdict(case), "device": device, "seed": 0}
    done = cells.prepare(asked | {"threads": torch.get_num_threads(), "check_tokens": LAYER_TOKENS})
    return {"layer": chosen, "err_ratio": done["err_ratio"], "tol_ratio": done["tol_ratio"]}


def graph_names(loss: torch.Tensor) -> list[str]:
    """Names of the autograd functions behind a loss that are not PyTorch's own, and of its attention."""
    seen, names, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        waiting += [following for following, _ in node.next_functions]
    kept = (name for name in names if SHOWN.search(name) or not BUILTIN.search(name))
    return sorted(name.split("::")[-1].removesuffix("Backward") for name in kept)


def _layer(family: str, model: str, names: list[str], is_cuda: bool) -> str:
    """The implementation that a step's graph shows. Raises CellFailure where a GPU runs a slow stand-in."""
    if model == PEER:
        return "gla_chunk_fla"
    marks = {
        "attention": {"FlashAttnFunc": "attention_fa2", "ScaledDotProduct": "attention_sdpa"},
        "mamba": {"MambaInnerFn": "mamba_ssm"},
        "mamba2": {"MambaSplitConv1dScanCombinedFn": "mamba2_ssm"},
    }[family]
    for mark, impl in marks.items():
        if any(mark in name for name in names):
            return impl
    if is_cuda:
        fix = "pip install 'glabench[peers]' --no-build-isolation"
        raise CellFailure("unavailable", f"transformers found no kernel for {family} here: {fix}")
    return "mamba_torch" if family == "mamba" else f"transformers' {family}"
