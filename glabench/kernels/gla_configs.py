"""Chunks, tiles and launches of the chunk kernels: a rule for all shapes, and what was measured better."""

import dataclasses
import functools
from dataclasses import dataclass

CHUNK = 64  # tokens: larger ones move fewer bytes, but leave fewer programs a multiprocessor
NONE = 0  # the gate kind, as in gla_tiles


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
    """Chunk and tile of key channels, which all kernels share, and each kernel's launch."""

    chunk: int
    BK: int
    scale: Launch
    carry: Launch
    carry_back: Launch
    state: Launch
    output: Launch
    gradient: Launch
    exact: Launch


# (d_k, d_v, gate kind) of bf16 inputs -> what differs from the rule: measured and checked on an H100 SXM
MEASURED: dict[tuple[int, int, int], dict[str, object]] = {
    (128, 256, NONE): {"carry": Launch(64, 4, 3)},
}


@functools.cache
def plan_for(K: int, V: int, gate: int, wide: bool) -> Plan:
    """Plan for key and value widths; `wide` is float32 arithmetic, whose tiles take twice the room."""
    return dataclasses.replace(rule(K, V, wide=wide), **({} if wide else MEASURED.get((K, V, gate), {})))


def rule(K: int, V: int, *, wide: bool) -> Plan:
    """Tiles of 64x64; a carried state of two key blocks is narrower, and outputs wider, where V allows."""
    most = 32 if wide else 64
    BK, BV = min(most, _power2(K)), min(most, _power2(V))
    usual = Launch(BV, 4, 1 if wide else 3)
    carry = dataclasses.replace(usual, BV=min(BV, 32 if K > BK else most))
    output = Launch(128, 4, 2) if not wide and V >= 128 else usual
    return Plan(CHUNK, BK, usual, carry, carry, usual, output, usual, usual)


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
