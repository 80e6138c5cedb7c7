"""What a sweep is asked for, and what it keeps of one implementation at one grid point."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from glabench import cost
from glabench.cases import Case, arm_of
from glabench.errors import UsageError
from glabench.registry import Implementation
from glabench.rows import Row
from glabench.suite import Suite

MAX_AHEAD = 24  # processes that compile at once
CORES_AHEAD = 2  # what one of them keeps busy: with fewer its cold start would be its neighbours' doing
CONTEXT_MIB = 600  # of a process on a GPU
AHEAD_COPIES = 1.5  # of inputs, outputs and gradients: what a call holds while its kernels are compiled


def check_seconds(value: float | None, where: str) -> None:
    """Raises UsageError for a limit that is no time: 0, negative, endless or no number."""
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{value:g} is not a time", where=where, fix="give seconds above 0")


class Watch(Protocol):
    """What a sweep tells whoever looks on."""

    def begin(self, cells: int) -> None: ...

    def now(self, impl: str, case: Case, phase: str) -> None: ...

    def row(self, row: Row) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked: a suite, the arms already resolved, where, and how to go on."""

    suite: Suite
    verbs: tuple[str, ...]
    impls: tuple[Implementation, ...]
    asked: tuple[str, ...]  # the words they were asked for by
    device: str
    out: Path | None  # None: results/<suite>/<device>
    resume: bool = False
    argv: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.device.split(":")[0]

    def folder(self, slug: str) -> Path:
        return self.out or Path("results") / self.suite.name / slug


@dataclass
class Arm:
    """One implementation at one grid point."""

    impl: Implementation
    case: Case
    verbs: tuple[str, ...]  # those whose row is still to be made
    started_utc: str = ""
    busy_s: float = 0.0  # since the last row
    seconds: dict[str, float] = field(default_factory=dict)  # in the worker, by function
    prepared: dict[str, Any] = field(default_factory=dict)
    visits: list[dict[str, Any]] = field(default_factory=list)
    failure: tuple[str, str] | None = None

    def spend(self, function: str, seconds: float) -> None:
        """Count a call to the worker."""
        self.busy_s += seconds
        self.seconds[function] = round(self.seconds.get(function, 0.0) + seconds, 3)


def known_failure(impl: Implementation, case: Case, device: str) -> tuple[str, str] | None:
    """(status, reason) where `impl` cannot run `case` on `device`, known without running it."""
    reason = impl.unavailable(device)
    if reason:
        return "unavailable", reason
    try:
        arm_of(impl.family, case)
    except UsageError as err:
        return "unsupported", err.what
    reason = impl.unsupported(asdict(case), device)
    return ("unsupported", reason) if reason else None


def to_compile(arms: Iterable[Arm]) -> list[list[Arm]]:
    """For each implementation, shape and dtype the shortest case with the most passes, and the longest.

    Long sequences may be cut up by other kernels than short ones; what both launch is compiled once.
    """
    groups: dict[tuple[str, str, str], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.impl.id, arm.case.shape, arm.case.dtype), []).append(arm)
    found = []
    for group in groups.values():
        first = min(group, key=lambda a: (a.case.passes == "fwd", a.case.seqlen))
        last = max((a for a in group if a.case.passes == first.case.passes), key=lambda a: a.case.seqlen)
        found.append([first] if last is first else [first, last])
    return found


def fitting(
    waiting: Sequence[list[Arm]], flying: Sequence[list[Arm]], room_mib: float, cores: int
) -> list[list[Arm]]:
    """Groups of `waiting` that may start beside `flying`, in order; one that fits nowhere starts alone."""
    found: list[list[Arm]] = []
    most = max(1, min(MAX_AHEAD, cores // CORES_AHEAD))
    left = room_mib - sum(_held_mib(group) for group in flying)
    for group in waiting:
        busy = len(flying) + len(found)
        if busy >= most or (busy and _held_mib(group) > left):
            break
        found.append(group)
        left -= _held_mib(group)
    return found


def _held_mib(group: list[Arm]) -> float:
    """By a process that runs the group's cases one after the other."""
    family = group[0].impl.family
    sizes = [cost.inputs_mib(family, arm.case) + cost.predicted_mib(family, arm.case) for arm in group]
    return CONTEXT_MIB + AHEAD_COPIES * max(sizes)


def series(arm: Arm) -> tuple[str, ...]:
    """What stays the same while seqlen grows: an arm that ran out of memory once will again."""
    case = arm.case
    return (arm.impl.id, case.shape, case.passes, case.dtype, str(case.heads), str(case.d_k), str(case.d_v))
