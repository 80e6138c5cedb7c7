"""How figures look: colours, ticks with units, a page laid out in points, labels that never overlap.

Colours are Okabe and Ito's, which colour-blind readers tell apart; the marker repeats the family and
the line style the implementation, so that a grey print can be read too.
"""

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glabench.errors import ResultsError

FORMATS = ("svg", "png")
DPI = 200
WIDTH_PT = 504.0  # two columns of a paper: 7 inches of 72 points
TEXT_PT = 7.0
EDGE_PT = 6.0  # empty border of a page
LINE_PT = 9.0  # from one line of text to the next
LABEL_PT = 8.4  # the least distance of two labels
TICK_ROOM_PT = 36.0  # left of a panel: "100 ms", "512 MiB"
STRIP_ROW_PT = 9.0  # one row of failed cells above a panel
GREY, LIGHT, DARK = "#8a8a8a", "#dddddd", "#333333"
FAMILIES = {  # family: colour and marker; attention first, since the others are compared with it
    "attention": ("#000000", "s"),
    "gla": ("#D55E00", "o"),
    "simple_gla": ("#CC79A7", "X"),
    "retention": ("#0072B2", "D"),
    "linear_attention": ("#E69F00", "P"),
    "mamba": ("#009E73", "^"),
    "mamba2": ("#56B4E9", "v"),
}
OTHER_FAMILY = ("#777777", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
DASHES += ((0, (8, 2, 3, 2)), (0, (4, 1.2, 1, 1.2, 1, 1.2)), (0, (10, 3)))
FORMS = {  # what stands after the family in an id: its line style, the same in every figure
    "": 0, "chunk": 0, "ssm": 0, "fa2": 0,
    "chunk_fla": 1, "sdpa": 1, "torch": 1, "chunk_torch": 2, "fa4": 2, "cudnn": 3, "recurrent": 3,
    "chunk_materialised": 4, "chunk_recompute": 5,
    "step": 0, "step_ssm": 0, "step_fla": 1, "step_torch": 2, "cached_fa2": 0, "cached_sdpa": 1,
}  # fmt: skip
RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same widths everywhere
    "font.size": TEXT_PT,
    "text.parse_math": False,
    "svg.hashsalt": "glabench",
    "svg.fonttype": "path",
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.labelsize": TEXT_PT,
    "ytick.labelsize": TEXT_PT,
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, slots=True)
class Look:
    """One arm's colour, marker and line style."""

    colour: str
    marker: str
    dashes: Any

    @property
    def ink(self) -> str:
        """The colour for text: light ones darkened until they read on white."""
        parts = [int(self.colour[i : i + 2], 16) for i in (1, 3, 5)]
        light = sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True)) > 130
        return "#" + "".join(f"{int(p * 0.72) if light else p:02x}" for p in parts)


def family_looks(families: Iterable[str]) -> list[Look]:
    """A look a line: the family's colour and marker; a family's second line is dashed, and so on."""
    seen: dict[str, int] = {}
    found = []
    for family in families:
        number = seen[family] = seen.get(family, -1) + 1
        found.append(Look(*FAMILIES.get(family, OTHER_FAMILY), DASHES[number % len(DASHES)]))
    return found


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults and RC, whatever the user's matplotlibrc says; restored afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def save(figure: Any, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write folder/name.svg and .png; unchanged rows give identical files. Raises ResultsError."""
    written = []
    for kind in formats:
        path = folder / f"{name}.{kind}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "png":
                _save_png(figure, path)
            else:
                metadata = {"Date": None, "Creator": None} if kind == "svg" else None
                figure.savefig(path, format=kind, metadata=metadata, facecolor="white")
        except OSError as err:
            raise ResultsError(
                f"cannot write {path.name}: {err.strerror}",
                where=str(path),
                fix="choose another folder with --out",
            ) from err
        written.append(path)
    return written


def _save_png(figure: Any, path: Path) -> None:
    """Few colours are used: a palette takes a third of the bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", dpi=DPI)
    palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def looks(arms: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """Look of each (impl, family). A form not in FORMS takes the first line style its family has left."""
    chosen: dict[str, Look] = {}
    taken: dict[str, set[int]] = {}
    known = [(i, f, FORMS.get(i.removeprefix(f).strip("_"))) for i, f in arms]
    for impl, family, slot in sorted(known, key=lambda a: (a[2] is None, a[0])):
        used = taken.setdefault(family, set())
        free = next((n for n in itertools.count() if n not in used), 0)
        number = slot if slot is not None and slot not in used else free
        used.add(number)
        colour, marker = FAMILIES.get(family, OTHER_FAMILY)
        chosen[impl] = Look(colour, marker, DASHES[number % len(DASHES)])
    return chosen


def text_width(text: str, size: float = TEXT_PT) -> float:
    """Width in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def fit(text: str, width: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` points."""
    if text_width(text) <= width:
        return text
    keep = len(text)
    while keep and text_width(text[:keep].rstrip() + "…") > width:
        keep -= 1
    return text[:keep].rstrip() + "…"


def wrap(text: str, width: float) -> list[str]:
    """Lines of at most `width` points, broken at spaces."""
    lines: list[str] = []
    for word in text.split(" "):  # a no-break space holds
        if lines and text_width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fit(word, width))
    return lines


def spread(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in low..high, at least `gap` apart, in the order of `targets` and as near as can be.

    Least squares: shifted by gap times rank, the order constraint is an isotonic regression.
    """
    order = sorted(range(len(targets)), key=lambda i: (targets[i], i))
    pools: list[list[float]] = []  # [mean, members]
    for rank, i in enumerate(order):
        pools.append([targets[i] - rank * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            mean, members = pools.pop()
            before, held = pools[-1]
            pools[-1] = [(before * held + mean * members) / (held + members), held + members]
    flat = [mean for mean, members in pools for _ in range(int(members))]
    room = max(low, high - gap * (len(targets) - 1))
    placed = [0.0] * len(targets)
    for rank, i in enumerate(order):
        placed[i] = min(max(flat[rank], low), room) + rank * gap
    return placed


def tokens_text(count: float) -> str:
    """1024 -> "1k"; 1536 -> "1.5k"; 1000 -> "1000"."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if count >= unit and count * 2 % unit == 0:
            return f"{count / unit:g}{letter}"
    return f"{count:g}"


def number_text(value: float, digits: int = 3) -> str:
    """`digits` significant digits, never in exponent form."""
    rounded = float(f"{value:.{digits}g}")
    if not rounded:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, places)}f}"


def time_text(ms: float) -> str:
    """0.25 -> "250 µs": three digits, in the unit that leaves one to three before the point."""
    for size, unit in ((1e3, "s"), (1.0, "ms"), (1e-3, "µs")):
        if ms >= size * 0.9995:  # what rounds to 1000 of the next smaller unit
            return f"{number_text(ms / size)} {unit}"
    return f"{number_text(ms * 1e6)} ns"


def memory_text(mib: float) -> str:
    for size, unit in ((2**20, "TiB"), (2**10, "GiB"), (1.0, "MiB")):
        if mib >= size:
            return f"{number_text(mib / size)} {unit}"
    return f"{number_text(mib * 1024)} KiB" if mib else "0"


def ratio_text(ratio: float) -> str:
    return f"{number_text(ratio)}×"  # noqa: RUF001 (the sign readers expect)


def short(text: str) -> str:
    """ "1.20 ms" -> "1.2 ms": no zeros after the point."""
    return re.sub(r"\.(\d*)", lambda m: f".{m[1]}".rstrip("0").rstrip("."), text, count=1)


TEN_STEPS: tuple[tuple[float, ...], ...] = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7))
TEN_STEPS += ((1, 2, 5), (1, 3), (1,))


def decade_ticks(low: float, high: float) -> list[float]:
    """The finest of TEN_STEPS with at most seven ticks in low..high; every second decade and so on beyond."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    for steps in TEN_STEPS:
        every = (s * 10.0**e for e in range(first, last + 1) for s in steps)
        ticks = [t for t in every if low <= t <= high]
        if len(ticks) <= 7:
            break
    return ticks[:: math.ceil(len(ticks) / 7)] if ticks else [low]


def binary_ticks(low: float, high: float) -> list[float]:
    """Powers of two in low..high, at most seven, or decimal ticks where there are fewer than three."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    every = max(1, math.ceil(len(powers) / 7))
    ticks = [2.0**p for p in powers if p % every == 0]
    return ticks if len(ticks) >= 3 else decade_ticks(low, high)


def length_ticks(seqlens: Sequence[int], width: float) -> list[int]:
    """The measured lengths, those left out whose labels would touch at `width` points, log scale."""
    span = math.log(seqlens[-1] / seqlens[0]) or 1.0
    kept: list[int] = []
    for s in reversed(seqlens):
        room = text_width(tokens_text(s)) + 5
        if not kept or math.log(kept[-1] / s) / span * width >= room:
            kept.append(s)
    return kept[::-1]
