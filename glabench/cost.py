"""What a call must cost at least: FLOPs, bytes, memory and the floor time. Pure arithmetic.

e = bytes per element of the case's dtype; per token and head unless said otherwise. The sources:
GLA §3 and §4 (states, chunk form); FlashAttention-2 §4 (attention FLOPs); Mamba §3.3.2 (scan).
"""

from dataclasses import dataclass

from glabench.cases import DECODE, Arm, Case, arm_of
from glabench.errors import UsageError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MIB = 2**20
GATED = {"gla": "channel", "simple_gla": "head"}

FLOP_MODELS = {
    "gla": "4 dk dv per token and head forward, 2x that backward (recurrent count, decay not counted)",
    "simple_gla": "4 dk dv per token and head forward, 2x that backward (recurrent count, decay not counted)",
    "retention": "4 dk dv per token and head forward, 2x that backward (recurrent count, decay not counted)",
    "linear_attention": "4 dk dv per token and head forward, 2x that backward (recurrent count)",
    "attention": "2 T d per token and head forward (causal), 2.5x that backward (FlashAttention's count)",
    "mamba": "9 E N per token forward, 2x that backward (elementwise, not tensor cores)",
    "mamba2": "4 E N per token forward, 2x that backward (recurrent count)",
}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reached in this run: copy bandwidth (read + write) and matrix products by dtype."""

    copy_gb_s: float
    matmul_tflop_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time a device needs, and which of the two limits sets it."""

    time_ms: float
    kind: str  # "bytes" or "flops"


def flop_model(family: str, case: Case) -> str:
    """How `flop_count` counts, in words."""
    if case.passes != DECODE:
        return FLOP_MODELS[family]
    if family == "attention":
        return "4 T d per token and head"
    return FLOP_MODELS[family].partition(" forward")[0]


def _check(passes: str) -> None:
    if passes not in ("fwd", "bwd", "fwd_bwd", DECODE):
        raise UsageError(
            f"no cost is known for the pass {passes!r}", where="cost", fix="use fwd, bwd, fwd_bwd or decode"
        )


def _sum_passes(passes: str, fwd: float, bwd: float) -> float:
    _check(passes)
    return {"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + bwd, DECODE: fwd}[passes]


def unavoidable_bytes(family: str, case: Case) -> float:
    """Bytes that must move through device memory: each input read once, each output written once.

    `fwd_bwd` reads the inputs twice. Attention also writes and reads its 4-byte row statistic. Decoding reads
    and writes a state, or reads a cache and writes one token of it.
    """
    arm, e = arm_of(family, case), BYTES[case.dtype]
    k, v = arm.d_k, arm.d_v
    if family == "attention":
        fwd, bwd = 4 * e * v + 4, 8 * e * v + 4
    elif family == "mamba":  # x, dt, y of E; B, C of N
        fwd, bwd = e * (3 * v + 2 * k), e * (5 * v + 4 * k)
    elif family == "mamba2":  # x, y of P; dt of 1; B, C of N shared by all heads
        fwd, bwd = e * (2 * v + 1 + 2 * k / arm.heads), e * (3 * v + 2 + 4 * k / arm.heads)
    else:
        gate = {"channel": k, "head": 1}.get(GATED.get(family, ""), 0)
        fwd, bwd = e * (2 * k + 2 * v + gate), e * (4 * k + 3 * v + 2 * gate)
    moved = case.computed * arm.heads * _sum_passes(case.passes, fwd, bwd)
    return moved + _carried_bytes(family, arm, case) if case.passes == DECODE else moved


def _carried_bytes(family: str, arm: Arm, case: Case) -> float:
    """Beyond a step's tokens: both ways for a state; one way for a cache, the new token's place included."""
    carried = state_mib(family, case) * MIB
    if family == "attention":
        return carried - case.batch * arm.heads * 4  # a step has no row statistic
    return 2 * carried + (arm.d_v * arm.d_k * 4 if family == "mamba" else 0)  # A is as large as a state


def flop_count(family: str, case: Case) -> float:
    """FLOPs by FLOP_MODELS: what `tflop_s` counts."""
    arm = arm_of(family, case)
    fwd = _forward_flop(family, arm, case)
    return _sum_passes(case.passes, fwd, fwd * (2.5 if family == "attention" else 2.0))


def unavoidable_flop(family: str, case: Case) -> float:
    """FLOPs that matrix units must do; attention's backward without its recomputation (2x forward)."""
    if family == "mamba":
        return 0.0  # elementwise: no matrix unit does them, so they set no floor here
    fwd = _forward_flop(family, arm_of(family, case), case)
    return _sum_passes(case.passes, fwd, 2.0 * fwd)


def _forward_flop(family: str, arm: Arm, case: Case) -> float:
    met = 2 * case.seqlen if case.passes == DECODE else case.seqlen  # the last query meets every key
    return case.computed * forward_flop_per_token(family, arm, met)


def forward_flop_per_token(family: str, arm: Arm, seqlen: int) -> float:
    """One layer's FLOPs of a token in the forward pass, projections apart, by FLOP_MODELS."""
    if family == "attention":
        return arm.heads * 2.0 * seqlen * arm.d_v
    if family == "mamba":
        return 9.0 * arm.d_v * arm.d_k
    return arm.heads * 4.0 * arm.d_k * arm.d_v


def training_flop_per_token(
    family: str, arm: Arm, layers: int, products: int, seqlen: int
) -> tuple[float, str]:
    """(FLOPs of a token in a training step, their formula): three forward passes, nothing recomputed.

    `products` counts the parameters that a token is multiplied with: every linear layer's and the output
    matrix's, tied or not, without the embeddings that are looked up. The habit of adding 12 layers T d for
    attention is not used: it counts the masked half, and it is no property of linear attention at all.
    """
    core = forward_flop_per_token(family, arm, seqlen)
    forms = {
        "attention": f"2 x {seqlen} x {arm.heads} x {arm.d_v}",
        "mamba": f"9 x {arm.d_v} x {arm.d_k}",
    }
    form = forms.get(family, f"4 x {arm.heads} x {arm.d_k} x {arm.d_v}")
    return 6.0 * products + 3.0 * layers * core, f"6 x {products} + 3 x {layers} x {form}"


def floor(family: str, case: Case, ceilings: Ceilings) -> Floor:
    """The larger of bytes over measured bandwidth and FLOPs over the measured matrix rate."""
    by_bytes = unavoidable_bytes(family, case) / (ceilings.copy_gb_s * 1e9) * 1e3
    rate = ceilings.matmul_tflop_s.get(case.dtype)
    by_flop = unavoidable_flop(family, case) / (rate * 1e12) * 1e3 if rate else 0.0
    return Floor(by_flop, "flops") if by_flop > by_bytes else Floor(by_bytes, "bytes")


def state_mib(family: str, case: Case) -> float:
    """What one layer must keep to go on after this sequence, all sequences: fp32 states, or the KV cache."""
    arm = arm_of(family, case)
    if family == "attention":
        return 2 * case.tokens * case.width * BYTES[case.dtype] / MIB
    return case.batch * arm.heads * arm.d_k * arm.d_v * 4 / MIB


def inputs_mib(family: str, case: Case) -> float:
    """The tensors handed in, an output gradient or what a step carries included."""
    arm, e = arm_of(family, case), BYTES[case.dtype]
    k, v, h = arm.d_k, arm.d_v, arm.heads
    if family == "attention":
        per_token = 3 * h * v * e
    elif family == "mamba":
        per_token = (2 * v + 2 * k) * e
    elif family == "mamba2":
        per_token = (h * v + h + 2 * k) * e
    else:
        gate = {"channel": k, "head": 1}.get(GATED.get(family, ""), 0)
        per_token = h * (2 * k + v + gate) * e
    d_out = h * v * e if case.passes in ("bwd", "fwd_bwd") else 0
    carried = state_mib(family, case) if case.passes == DECODE else 0.0
    return case.computed * (per_token + d_out) / MIB + carried


def predicted_mib(family: str, case: Case) -> float:
    """Memory beyond the inputs that no implementation can do without: the output and the gradients."""
    arm, e = arm_of(family, case), BYTES[case.dtype]
    out = case.computed * arm.heads * arm.d_v * e / MIB
    if case.passes in ("fwd", DECODE):
        return out
    gradients = inputs_mib(family, case) - out  # one a tensor; the output gradient is an input already
    return out + gradients
