"""What to measure: shapes, cases, the regime they are sampled under, and the range grammar (1k..16k)."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from glabench.errors import UsageError, nearest

PASSES = ("fwd", "bwd", "fwd_bwd")
DECODE = "decode"  # a pass of its own: one token a sequence, `seqlen` tokens with it
DTYPES = ("fp32", "bf16", "fp16")
DEFAULT_IMPLS = ("gla", "attention", "mamba", "retention")
MAMBA_EXPAND = 2  # inner width over model width, in Mamba's and Mamba-2's published blocks
UNITS = {"k": 1024, "m": 1024**2}


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's sizes. Every family gets the same model width, heads * d_v.

    Softmax attention splits it into heads of `head_dim`. Mamba and Mamba-2 expand it by two, as their
    blocks do: Mamba with 16 states a channel, Mamba-2 in heads of 64 with 128 states.
    """

    name: str
    heads: int
    d_k: int
    d_v: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.d_v


SHAPES = {
    s.name: s
    for s in (
        Shape("340m", heads=4, d_k=128, d_v=256, head_dim=128),  # the paper's 340M model
        Shape("1.3b", heads=4, d_k=256, d_v=512, head_dim=128),  # the paper's 1.3B model
        Shape("fig2", heads=16, d_k=64, d_v=64, head_dim=64),  # caption of the paper's Figure 2
        Shape("cpu", heads=2, d_k=16, d_v=32, head_dim=64),  # 1k..16k within 2 minutes on 2 cores
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One grid point, the same for every implementation: what is asked, not who answers."""

    shape: str
    passes: str
    batch: int
    seqlen: int
    heads: int
    d_k: int
    d_v: int
    head_dim: int
    dtype: str
    causal: str = "yes"
    packed: str = "no"

    def key(self) -> str:
        """Short digest of every field: the `case` column."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def without_passes(self) -> str:
        """Digest of everything but the passes: cells that share inputs and one check."""
        return replace(self, passes="fwd_bwd").key()

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen

    @property
    def computed(self) -> int:
        """Tokens that one call gives: all, or, decoding, one a sequence."""
        return self.batch if self.passes == DECODE else self.tokens

    @property
    def width(self) -> int:
        return self.heads * self.d_v

    def describe(self) -> str:
        return f"{self.shape} {self.passes} {self.batch}x{self.seqlen} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Arm:
    """How a family splits a case's width: heads of d_k x d_v states, or channels of d_state.

    For attention d_k = d_v = the head dim; for mamba heads = 1, d_v = the inner width and d_k = 16
    states a channel; for mamba2 heads of d_v = 64 channels and d_k = 128 states, B and C in one group.
    """

    heads: int
    d_k: int
    d_v: int
    text: str


def arm_of(family: str, case: Case) -> Arm:
    """The sizes `family` runs `case` at. Raises UsageError where the width does not divide."""
    width = case.width
    if family == "attention":
        size = case.head_dim
        _divides(size, width, family, case)
        return Arm(width // size, size, size, f"{_heads(width // size)} of {size}")
    if family == "mamba":
        inner = MAMBA_EXPAND * width
        return Arm(1, 16, inner, f"{inner} channels of 16 states")
    if family == "mamba2":
        inner = MAMBA_EXPAND * width
        size = min(64, inner)
        _divides(size, inner, family, case)
        return Arm(inner // size, 128, size, f"{_heads(inner // size)} of {size}, 128 states")
    return Arm(case.heads, case.d_k, case.d_v, f"{_heads(case.heads)} of {case.d_k}x{case.d_v}")


def _heads(count: int) -> str:
    return f"{count} head{'s' if count > 1 else ''}"


def _divides(size: int, width: int, family: str, case: Case) -> None:
    if width % size:
        raise UsageError(
            f"{family} heads of {size} do not divide the width {width}",
            where=f"shape {case.shape}",
            fix="change the shape",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """How samples are taken; fixed per suite and recorded, because it moves the answer.

    Units: seconds, except `interval_frac` (half width of the 95% interval of the median).
    """

    visits: int = 2  # an implementation is visited this often a grid point, in shuffled rounds
    min_samples: int = 10
    max_samples: int = 1000
    min_busy_s: float = 0.5  # of measured time, all visits together
    max_busy_s: float = 15.0
    interval_frac: float = 0.02
    backstop: bool = True  # after oom or timeout, longer sequences of that arm are written off at once
    cell_limit_s: float = 120.0
    cold_limit_s: float = 300.0
    wait_for_idle_s: float = 0.0  # how long to wait for other processes on the GPU; 0 warns and goes on


# a shared CPU is noisier than 2%, and `make figures` is to end in minutes
CPU_REGIME = Regime(min_samples=6, min_busy_s=0.1, max_busy_s=1.0, interval_frac=0.05, cell_limit_s=60.0)


def parse_size(text: str, where: str) -> int:
    """`1k` -> 1024. Raises UsageError for anything but a positive whole number, k or m."""
    word = text.strip().lower()
    unit = UNITS.get(word[-1:], 1)
    digits = word[:-1] if unit > 1 else word
    if not digits.isdecimal() or int(digits) == 0:
        raise UsageError(
            f"{text!r} is not a length", where=where, fix="write a positive number such as 512, 1k or 16k"
        )
    return int(digits) * unit


def parse_range(text: str, where: str) -> tuple[int, ...]:
    """`1k..16k` -> every doubling; `1k,2k,8k` -> these; both mix. Raises UsageError."""
    values: list[int] = []
    for part in text.split(","):
        low, dots, high = part.partition("..")
        if not dots:
            values.append(parse_size(part, where))
            continue
        if not low.strip() or not high.strip():
            raise UsageError(
                f"{part.strip()!r} has no end", where=where, fix="write both ends, such as 1k..16k"
            )
        first, last = parse_size(low, where), parse_size(high, where)
        if first > last:
            raise UsageError(
                f"{part.strip()!r} runs backwards", where=where, fix=f"write {high.strip()}..{low.strip()}"
            )
        steps = [first << i for i in range((last // first).bit_length())]
        if steps[-1] != last:
            raise UsageError(
                f"{part.strip()!r} is not a whole number of doublings",
                where=where,
                fix=f"end at {steps[-1]}, or list the lengths",
            )
        values += steps
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise UsageError(f"{twice[0]} stands twice in {text!r}", where=where, fix="name each length once")
    return tuple(values)


def choose(word: str, known: tuple[str, ...], what: str, where: str) -> str:
    """Return `word` if it is known, else raise UsageError with the nearest one."""
    if word not in known:
        raise UsageError(f"no {what} {word!r}", where=where, fix=nearest(word, known))
    return word


def split_names(text: str, what: str, where: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b"); empty and repeated names are errors."""
    names = tuple(part.strip() for part in text.split(","))
    if "" in names:
        raise UsageError(f"an empty {what} in {text!r}", where=where, fix="separate names with single commas")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{what} {name!r} stands twice", where=where, fix="name each once")
    return names


def make_cases(
    *,
    shapes: tuple[Shape, ...],
    seqlens: tuple[int, ...],
    passes: tuple[str, ...],
    dtypes: tuple[str, ...],
    tokens: int | None,
    batch: int | None,
    where: str,
) -> tuple[Case, ...]:
    """The product of the lists; `tokens` fixes batch * seqlen, `batch` fixes the batch."""
    cases = []
    for shape, dtype, seqlen, pass_ in itertools.product(shapes, dtypes, seqlens, passes):
        if batch is None and tokens is not None and seqlen > tokens:
            raise UsageError(
                f"a sequence of {seqlen} does not fit in {tokens} tokens",
                where=where,
                fix=f"use tokens >= {seqlen}, or set the batch",
            )
        size = batch if batch is not None else max(1, (tokens or seqlen) // seqlen)
        cases.append(
            Case(
                shape=shape.name,
                passes=pass_,
                batch=size,
                seqlen=seqlen,
                heads=shape.heads,
                d_k=shape.d_k,
                d_v=shape.d_v,
                head_dim=shape.head_dim,
                dtype=dtype,
            )
        )
    return tuple(cases)


def device_defaults(device: str) -> dict[str, Any]:
    """What a grid takes where it is silent: small and float32 on a CPU, 32k tokens in bf16 on a GPU."""
    if device == "cpu":
        return {"shape": "cpu", "dtype": "fp32", "batch": 1, "tokens": None, "regime": CPU_REGIME}
    return {"shape": "340m", "dtype": "bf16", "batch": None, "tokens": 32768, "regime": Regime()}
