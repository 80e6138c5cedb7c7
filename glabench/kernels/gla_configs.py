"""Chunks, tiles and launches of the chunk kernels: a rule for all shapes, and what plan files say."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from glabench.installed import cuda_device_name, device_slug
from glabench.kernels import plan_files
from glabench.kernels.plan_files import GATES, KERNELS, Launch, Plan, Point

CHUNK = 64  # tokens: larger ones move fewer bytes, but leave fewer programs a multiprocessor
CARRY, WIDE = "carry", "wide"  # kernels that carry the state of a whole head
WIDEST_STATE = {False: 256, True: 0}  # key channels that WIDE takes, by whether arithmetic is float32's

CHANNEL = GATES.index("channel")

_tried: dict[Point, Plan] = {}
_changes = 0  # of what is tried


@functools.cache
def plan_for(K: int, V: int, gate: int, wide: bool, index: int | None) -> Plan:
    """Plan for key and value widths on GPU `index` (None: no GPU).

    `wide` is float32 arithmetic, whose tiles take twice the room. Raises UsageError for a plan file that is
    wrong.
    """
    point = Point(K, V, gate, wide)
    return _tried.get(point) or plan_on(
        device_slug(None if index is None else cuda_device_name(index)), point
    )


def plan_on(device: str, point: Point) -> Plan:
    """Plan for a device by its slug: the rule's, but for what a plan file says of this point."""
    changes = plan_files.points(device).get(point, {})
    return dataclasses.replace(rule(point), **changes)


@contextmanager
def in_force(point: Point, plan: Plan) -> Iterator[None]:
    """Until the end of the block this process launches a point so, on every device."""
    before = _tried.get(point)
    _try(point, plan)
    try:
        yield
    finally:
        _try(point, before)


def _try(point: Point, plan: Plan | None) -> None:
    global _changes
    if plan is None:
        del _tried[point]
    else:
        _tried[point] = plan
    _changes += 1
    plan_for.cache_clear()


def changes_in_force() -> int:
    """How often plans were changed by in_force: another number, other plans."""
    return _changes


def rule(point: Point, chunk: int = CHUNK) -> Plan:
    """Tiles of 64x64; a carried state of two key blocks is narrower, outputs and wide states wider.

    Longer chunks take eight warps, and two stages where tiles are of 16 bits.
    """
    K, V, wide = point.d_k, point.d_v, point.wide
    most = 32 if wide else 64
    BK, BV = min(most, _power2(K)), min(most, _power2(V))
    if chunk > CHUNK:
        plan = Plan(chunk, BK, *([Launch(BV, 8, 1)] * len(KERNELS)))
        two = Launch(BV, 8, 1 if wide else 2)
        return dataclasses.replace(plan, carry=two, carry_back=two, state=two, output=two, gradient=two)
    usual = Launch(BV, 4, 1 if wide else 3)
    carry = dataclasses.replace(usual, BV=min(BV, 32 if K > BK else most))
    whole = Launch(min(128, _power2(V)), 8, 1) if K > 2 * BK else Launch(BV, 4, 2)
    exact = dataclasses.replace(usual, BV=max(16, BV * BK // _power2(K)))
    output = Launch(128, 4, 2) if not wide and V >= 128 else usual
    return Plan(chunk, BK, usual, carry, carry, whole, usual, output, usual, exact)


def carriers(point: Point, BK: int, keep: bool) -> tuple[str, ...]:
    """Kernels that hold the state of a whole head of these widths, the faster first; `keep`: and store it.

    WIDE stores no states. It takes scores from memory: with gates a channel they come with scaled q and k,
    else they cost a pass, which pays where CARRY holds no such state.
    """
    blocks = -(-point.d_k // BK)
    least = 1 if point.gate == CHANNEL else 2
    wide = not keep and least < blocks and point.d_k <= WIDEST_STATE[point.wide]
    return (WIDE,) * wide + (CARRY,) * (blocks <= 2)


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
