"""Tile shapes of the chunk kernels: measured ones as data, and a rule for every other shape."""

import functools
from dataclasses import dataclass

CHUNK = 64  # larger chunks move fewer bytes, but leave one program a multiprocessor


@dataclass(frozen=True, slots=True)
class Launch:
    """Tile of value channels, warps, pipeline stages and register limit of one kernel."""

    BV: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton's launch takes."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True, slots=True)
class Plan:
    """The tile of key channels, which all kernels share, and each kernel's launch."""

    BK: int
    state: Launch
    output: Launch
    gradient: Launch


# (d_k, d_v, gate kind) of 16-bit inputs -> a plan better than the rule's; empty until one is measured
MEASURED: dict[tuple[int, int, int], Plan] = {}


@functools.cache
def plan_for(K: int, V: int, gate: int, wide: bool) -> Plan:
    """Tiles for key and value widths; `wide` is float32 arithmetic, whose tiles take twice the room."""
    if not wide and (K, V, gate) in MEASURED:
        return MEASURED[K, V, gate]
    most = 32 if wide else 64
    BK, BV = min(most, _power2(K)), min(most, _power2(V))
    stages = 1 if wide else 3
    usual = Launch(BV, 4, stages)
    return Plan(BK, usual, usual, usual)


def _power2(width: int) -> int:
    return 1 << (width - 1).bit_length()


def recurrent_tile(K: int, V: int, pairs: int, multiprocessors: int) -> tuple[Launch, int]:
    """(launch, padded K) of the token-by-token kernel: a state of [padded K, BV] in registers.

    4096 elements are 32 a thread of 4 warps; fewer value channels where `pairs` rows and heads would leave
    multiprocessors idle, down to the 32 bytes that memory moves at once.
    """
    KP = _power2(K)
    BV = min(64, _power2(V), max(8, 4096 // KP))
    while BV > 8 and -(-V // BV) * pairs < multiprocessors:
        BV //= 2
    return Launch(BV, min(4, max(1, KP * BV // 1024)), 1), KP
