"""A case -> the tensors of a family: realistic gates, no zeros or constants, the same for every arm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glabench.cases import DECODE, Arm, Case, arm_of, choose
from glabench.errors import UsageError

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REGIMES = ("trained", "zero", "vanishing", "strong", "extreme", "mixed")
GATES = {"zero": 0.0, "vanishing": -1e-4, "strong": -20.0, "extreme": -1e4}  # nats a token
STEPS = {"zero": 1e-6, "vanishing": 1e-5, "strong": 2.0, "extreme": 100.0}  # dt, where A is about -1..-16
SHARES = {"trained": 0.6, "zero": 0.1, "vanishing": 0.1, "strong": 0.15, "extreme": 0.05}  # of "mixed"
STATE_FAMILIES = ("gla", "simple_gla", "retention", "linear_attention", "mamba", "mamba2")


def make_inputs(
    family: str, case: Case, device: str, seed: int, *, regime: str = "trained"
) -> dict[str, Tensor]:
    """The tensors of `family` for `case`, by name, in the order it takes them; drawn on the device.

    Shapes: q, k, v, gla's g [B, T, H, D]; simple_gla's g [B, T, H]; mamba x, dt [B, T, E] and B, C
    [B, T, N], stored [B, E, T] and [B, N, T] as the Mamba block keeps them; mamba2 x [B, T, H, P],
    dt [B, T, H], B, C [B, T, 1, N]; A and D, float32.
    Decoding, T is 1 whatever the case's length: the tokens before are in `make_carried`.
    `regime` sets the gates (REGIMES): "trained" is logsigmoid(randn) / 16, for dt log-uniform in 1e-3..1e-1.
    Raises: UsageError.
    """
    choose(regime, REGIMES, "gate regime", "inputs")
    draw = _Draw(device, seed)
    arm, dtype = arm_of(family, case), TORCH_DTYPES[case.dtype]
    batch, T = case.batch, 1 if case.passes == DECODE else case.seqlen
    if family == "mamba":
        tensors = _mamba(draw, arm, batch, T, regime)
    elif family == "mamba2":
        tensors = _mamba2(draw, arm, batch, T, regime)
    else:
        widths = {"q": arm.d_k, "k": arm.d_k, "v": arm.d_v}
        qkv = {name: draw.normal(batch, T, arm.heads, width) for name, width in widths.items()}
        gate = {"gla": (arm.heads, arm.d_k), "simple_gla": (arm.heads,)}.get(family)
        tensors = {**qkv, "g": draw.gates(regime, batch, T, *gate)} if gate else qkv
    return {n: x if n in ("A", "D") else x.to(dtype) for n, x in tensors.items()}


def make_grad_out(family: str, case: Case, device: str, seed: int) -> Tensor:
    """A dense random gradient in the shape, dtype and memory layout of the family's output."""
    draw, arm, dtype = _Draw(device, seed), arm_of(family, case), TORCH_DTYPES[case.dtype]
    if family == "mamba":
        return draw.normal(case.batch, arm.d_v, case.seqlen).to(dtype).mT
    return draw.normal(case.batch, case.seqlen, arm.heads, arm.d_v).to(dtype)


def make_state(family: str, case: Case, device: str, seed: int, rows: int | None = None) -> Tensor:
    """A random state, float32: [rows, H, K, V], mamba [rows, E, N], mamba2 [rows, H, P, N]; rows = batch."""
    if family not in STATE_FAMILIES:
        raise UsageError(f"{family} carries no state", where="inputs", fix="leave the state out")
    arm, rows = arm_of(family, case), case.batch if rows is None else rows
    if family == "mamba":
        shape = (arm.d_v, arm.d_k)
    else:
        shape = (arm.heads, arm.d_v, arm.d_k) if family == "mamba2" else (arm.heads, arm.d_k, arm.d_v)
    return _Draw(device, seed).normal(rows, *shape)


def make_carried(family: str, case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """What a step carries on and may change: the state, or the key-value cache with its last place free.

    Shapes: state as make_state's; k_cache, v_cache [B, T, H, D] in the case's dtype, their last token zero.
    """
    if family in STATE_FAMILIES:
        return {"state": make_state(family, case, device, seed)}
    arm, draw = arm_of(family, case), _Draw(device, seed)
    shape, dtype = (case.batch, case.seqlen, arm.heads, arm.d_v), TORCH_DTYPES[case.dtype]
    caches = {name: draw.normal(*shape, dtype=dtype) for name in ("k_cache", "v_cache")}
    for cache in caches.values():
        cache[:, -1] = 0
    return caches


class _Draw:
    """Random tensors on a device, float32 unless said otherwise, from one seed."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = torch.device(device)
        self.source = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device, generator=self.source)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(*shape, device=self.device).uniform_(low, high, generator=self.source)

    def gates(self, regime: str, *shape: int) -> Tensor:
        """Log gates in nats a token."""
        trained = F.logsigmoid(self.normal(*shape)) / 16  # the paper's GLA layer, §4.4
        return self._in_regime(trained, GATES, regime)

    def steps(self, regime: str, *shape: int) -> Tensor:
        """dt > 0, as Mamba initialises it: log-uniform in 1e-3..1e-1."""
        trained = self.uniform(math.log(1e-3), math.log(1e-1), *shape).exp_()
        return self._in_regime(trained, STEPS, regime)

    def _in_regime(self, trained: Tensor, values: dict[str, float], regime: str) -> Tensor:
        if regime == "trained":
            return trained
        if regime != "mixed":
            return torch.full_like(trained, values[regime])
        mixed, chance, upper = trained.clone(), self.uniform(0, 1, *trained.shape), 0.0
        for name, share in SHARES.items():
            lower, upper = upper, upper + share
            if name in values:
                mixed[(chance >= lower) & (chance < upper)] = values[name]
        return mixed


def _mamba(draw: _Draw, arm: Arm, batch: int, T: int, regime: str) -> dict[str, Tensor]:
    E, N = arm.d_v, arm.d_k
    init = torch.arange(1, N + 1, device=draw.device, dtype=torch.float32)  # S4D-real
    return {
        "x": draw.normal(batch, E, T).mT,
        "dt": draw.steps(regime, batch, E, T).mT,
        "A": -init * draw.uniform(0.8, 1.25, E, N),
        "B": draw.normal(batch, N, T).mT,
        "C": draw.normal(batch, N, T).mT,
        "D": draw.normal(E),
    }


def _mamba2(draw: _Draw, arm: Arm, batch: int, T: int, regime: str) -> dict[str, Tensor]:
    H, P, N = arm.heads, arm.d_v, arm.d_k
    return {
        "x": draw.normal(batch, T, H, P),
        "dt": draw.steps(regime, batch, T, H),
        "A": -draw.uniform(1, 16, H),  # Mamba-2's initial range
        "B": draw.normal(batch, T, 1, N),
        "C": draw.normal(batch, T, 1, N),
        "D": draw.normal(H),
    }
