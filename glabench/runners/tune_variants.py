"""What tuning tries for a kernel, and what it takes from what it found: no torch, no GPU."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glabench.kernels import gla_configs
from glabench.kernels.plan_files import KERNELS, SIZES, Changes, Launch, Plan, Point

GATES = {"linear_attention_chunk": 0, "retention_chunk": 1, "simple_gla_chunk": 2, "gla_chunk": 3}
USES = ("scale", "carry", "carry back", "carry alone", "wide")
USES += ("state", "state back", "output", "output back", "gradient")
MARGIN = 0.01  # of the time: a launch or plan that gains less is not told from noise
RULE = "the rule"
CARRY, WIDE = gla_configs.CARRY, gla_configs.WIDE

Variants = Mapping[int, Mapping[str, Sequence[Launch]]]  # chunk -> kernel -> launches


def _launches(**kernels: list[tuple[int, ...]]) -> dict[str, tuple[Launch, ...]]:
    return {name: tuple(Launch(*numbers) for numbers in found) for name, found in kernels.items()}


_CARRY = [(64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3)]
_CARRY_128 = [(64, 8, 1), (64, 8, 2)]
VARIANTS: Variants = {  # BV, warps, stages, registers; those that were once the best on some GPU, or near it
    64: _launches(
        scale=[(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 1), (64, 8, 2)],
        carry=_CARRY,
        carry_back=_CARRY,
        wide=[(64, 4, 2), (64, 8, 2), (128, 8, 1)],
        state=[(64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (256, 8, 2), (256, 8, 3)],
        output=[(64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3), (256, 8, 2), (256, 8, 3)],
        gradient=[(64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 1), (64, 8, 2, 128), (32, 8, 2, 128)],
    ),
    128: _launches(
        scale=[(64, 4, 1), (64, 8, 1), (64, 8, 2), (64, 16, 1)],
        carry=_CARRY_128,
        carry_back=_CARRY_128,
        wide=[(32, 8, 1), (64, 8, 1), (64, 16, 1)],
        state=[(64, 4, 3), (64, 8, 3), (128, 8, 2), (128, 8, 3), (256, 8, 2)],
        output=[
            *((64, 8, 2), (64, 8, 3), (64, 8, 2, 128), (64, 8, 3, 128)),
            *((128, 8, 2), (128, 16, 2), (256, 8, 2), (256, 16, 2)),
        ],
        gradient=[(64, 8, 1), (64, 8, 2), (64, 8, 3), (64, 16, 2), (64, 16, 3), (32, 8, 2), (32, 8, 3)],
    ),
}
_WIDE = [(32, 4, 1), (32, 4, 2), (32, 8, 1), (64, 8, 1)]
WIDE_VARIANTS: Variants = {64: _launches(**dict.fromkeys(VARIANTS[64], _WIDE))}  # float32 tiles


@dataclass(frozen=True, slots=True)
class Trial:
    """One launch of one use of a kernel: "planned", then ok with its time, or why not."""

    chunk: int
    use: str
    launch: Launch
    status: str = "planned"
    us: float | None = None
    reason: str = ""

    @property
    def kernel(self) -> str:
        return kernel_of(self.use)

    def describe(self) -> str:
        return f"{self.use}, {describe(self.launch)}, chunks of {self.chunk}"


@dataclass(frozen=True, slots=True)
class Whole:
    """A forward and backward pass under one plan: checked against float64, then timed."""

    name: str
    plan: Plan
    status: str
    ms: float | None = None
    err_ratio: float | None = None
    reason: str = ""


def kernel_of(use: str) -> str:
    """Whose launch a use takes: "carry back" has its own, "state back" has the state's."""
    return "carry_back" if use == "carry back" else use.split()[0]


def describe(launch: Launch) -> str:
    """A launch in words."""
    limit = "" if launch.registers is None else f", {launch.registers} registers"
    return f"BV {launch.BV}, {launch.warps} warps, {launch.stages} stages{limit}"


def exists(use: str, point: Point, plan: Plan) -> bool:
    """Whether a call of these widths and gates can use a kernel so."""
    name, is_kept = use.split()[0], use not in ("carry alone", WIDE)
    if name in (CARRY, WIDE):
        return name in gla_configs.carriers(point, plan.BK, keep=is_kept)
    # of other gates, it is the scores' launch
    is_made = point.gate == GATES["gla_chunk"] or WIDE in gla_configs.carriers(point, plan.BK, keep=False)
    return name != "scale" or is_made


def trials(point: Point, variants: Variants) -> Iterator[Trial]:
    """Every launch to try at a point, the one in the base plan among them and first."""
    for chunk, kernels in variants.items():
        plan = gla_configs.rule(point, chunk)
        for use in USES:
            wanted = kernels.get(kernel_of(use), ())
            if wanted and exists(use, point, plan):
                first = getattr(plan, kernel_of(use))
                fitting = (x for x in wanted if point.d_v >= x.BV)
                for launch in dict.fromkeys((first, *fitting)):
                    yield Trial(chunk, use, launch)


def choose_launches(plan: Plan, found: Sequence[Trial]) -> Plan:
    """`plan` with each kernel's fastest launch, over all its uses together.

    A launch counts where it was right in every use of its kernel; the plan's own stays unless another is
    faster by MARGIN, or it fails itself.
    """
    chosen = {}
    for kernel in dict.fromkeys(t.kernel for t in found):
        mine = [t for t in found if t.kernel == kernel]
        uses = {t.use for t in mine}
        times: dict[Launch, dict[str, float]] = defaultdict(dict)
        for trial in mine:
            if trial.status == "ok" and trial.us is not None:
                times[trial.launch][trial.use] = trial.us
        totals = {launch: sum(us.values()) for launch, us in times.items() if us.keys() == uses}
        best = min(totals, key=totals.__getitem__, default=None)
        own = totals.get(getattr(plan, kernel))
        if best is not None and (own is None or totals[best] < (1 - MARGIN) * own):
            chosen[kernel] = best
    return dataclasses.replace(plan, **chosen)


def choose_plan(found: Sequence[Whole]) -> Whole | None:
    """The fastest plan whose answers are right; the rule, unless it is beaten by MARGIN; None without any."""
    right = [w for w in found if w.status == "ok" and w.ms is not None]
    best = min(right, key=lambda w: w.ms, default=None)
    rule = next((w for w in right if w.name == RULE), None)
    if best is None or rule is None:
        return best
    return best if best.ms < (1 - MARGIN) * rule.ms else rule


def changes(point: Point, plan: Plan) -> Changes:
    """What a plan file says of a plan: where it differs from the rule."""
    rule = gla_configs.rule(point)
    return {n: getattr(plan, n) for n in (*SIZES, *KERNELS) if getattr(plan, n) != getattr(rule, n)}
