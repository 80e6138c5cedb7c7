"""Plans as data: one TOML file a device, what made it, and what differs from the rule at each point.

The folder that GLABENCH_PLANS names is asked first, point by point, then the files shipped in `plans/`.
Reads no torch: the parent of a measurement and `--dry-run` use it as well.
"""

import functools
import hashlib
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from glabench.errors import GlabenchError, UsageError, nearest

FOLDER = "GLABENCH_PLANS"
SHIPPED = Path(__file__).parent / "plans"
GATES = ("none", "fixed", "head", "channel")  # by their number in gla_tiles
ARITHMETIC = ("bf16", "fp32")  # of products: fp32 for float16 inputs too
MADE = ("device", "torch", "triton", "ptxas", "date", "glabench")


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
    wide: Launch
    state: Launch
    output: Launch
    gradient: Launch
    exact: Launch


class Point(NamedTuple):
    """What a plan is for: widths of a head, gate kind, and whether products are float32's."""

    d_k: int
    d_v: int
    gate: int
    wide: bool


Changes = dict[str, "int | Launch"]  # Plan's fields that differ from the rule
SIZES = ("chunk", "BK")
KERNELS = tuple(f.name for f in fields(Plan) if f.name not in SIZES)


def _power_of_two(low: int, high: int) -> Callable[[int], bool]:
    return lambda n: low <= n <= high and n & (n - 1) == 0


ALLOWED: dict[str, tuple[Callable[[int], bool], str]] = {
    "d_k": (lambda n: 0 < n <= 512 and n % 16 == 0, "a multiple of 16 up to 512"),
    "d_v": (lambda n: 0 < n <= 512 and n % 16 == 0, "a multiple of 16 up to 512"),
    "chunk": (_power_of_two(16, 128), "a power of two from 16 to 128"),  # as gla_tiles.LEVELS allows
    "BK": (_power_of_two(16, 256), "a power of two from 16 to 256"),
    "BV": (_power_of_two(16, 512), "a power of two from 16 to 512"),
    "warps": (_power_of_two(1, 32), "a power of two up to 32"),
    "stages": (lambda n: 1 <= n <= 16, "from 1 to 16"),
    "registers": (lambda n: 24 <= n <= 255, "from 24 to 255"),
}


def folders() -> list[Path]:
    """Where plan files are looked for, first to last. Raises UsageError for a GLABENCH_PLANS that is none."""
    own = os.environ.get(FOLDER)
    if not own:
        return [SHIPPED]
    if not Path(own).is_dir():
        raise UsageError(f"no folder {own!r}", where=FOLDER, fix="make it, or unset the variable")
    return [Path(own), SHIPPED]


def points(device: str) -> dict[Point, Changes]:
    """The points that plan files tell of, for a device's slug; empty where it has none. Raises UsageError."""
    return _points(device, tuple(folders()))


@functools.cache
def _points(device: str, places: tuple[Path, ...]) -> dict[Point, Changes]:
    found: dict[Point, Changes] = {}
    for folder in reversed(places):
        path = folder / f"{device}.toml"
        if path.exists():
            for block in read(path):
                found |= block["plan"]
    return found


def digest(device: str) -> str | None:
    """Names what plan files say of a device, comments and order apart; None where they say nothing."""
    known = points(device)
    if not known:
        return None
    text = json.dumps(sorted((point, _plain(changes)) for point, changes in known.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(changes: Changes) -> list[tuple[str, Any]]:
    return sorted((name, asdict(x) if isinstance(x, Launch) else x) for name, x in changes.items())


# --- reading ----------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The blocks of a plan file: MADE's keys, and "plan", {point: changes}. Raises UsageError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise UsageError(f"not a plan file: {err}", where=str(path), fix="glabench tune makes one") from err
    _known(data, ("made",), f"{path}")
    blocks, seen = [], set()
    for i, block in enumerate(_tables(data, "made", f"{path}"), 1):
        where = f"{path}: made {i}"
        _known(block, (*MADE, "plan"), where)
        for name in MADE:
            if not isinstance(block.get(name), str):
                raise _wrong(name, block.get(name), "a text", where)
        plans: dict[Point, Changes] = {}
        for j, table in enumerate(_tables(block, "plan", where), 1):
            point, changes = _plan(table, f"{where}, plan {j}")
            if point in seen:
                raise UsageError(f"{describe(point)} stands twice", where=where, fix="keep one of them")
            seen.add(point)
            plans[point] = changes
        blocks.append({**block, "plan": plans})
    return blocks


def _plan(table: dict[str, Any], where: str) -> tuple[Point, Changes]:
    _known(table, ("d_k", "d_v", "gate", "dtype", *SIZES, *KERNELS), where)
    for name, words in (("gate", GATES), ("dtype", ARITHMETIC)):
        if table.get(name) not in words:
            raise _wrong(name, table.get(name), f"one of {', '.join(words)}", where)
    widths = [_number(table, name, where) for name in ("d_k", "d_v")]
    point = Point(*widths, GATES.index(table["gate"]), table["dtype"] != "bf16")
    changes: Changes = {name: _number(table, name, where) for name in SIZES if name in table}
    changes |= {name: _launch(table[name], f"{where}, {name}") for name in KERNELS if name in table}
    return point, changes


def _launch(table: Any, where: str) -> Launch:
    if not isinstance(table, dict):
        raise _wrong("launch", table, "a table of BV, warps and stages", where)
    names = tuple(f.name for f in fields(Launch))
    _known(table, names, where)
    return Launch(**{n: _number(table, n, where) for n in names if n != "registers" or n in table})


def _number(table: Mapping[str, Any], name: str, where: str) -> int:
    fits, words = ALLOWED[name]
    value = table.get(name)
    if type(value) is not int or not fits(value):
        raise _wrong(name, value, words, where)
    return value


def _tables(table: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    found = table.get(name, [])
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise _wrong(name, found, f"tables under [[{name}]]", where)
    return found


def _known(table: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in names:
            raise UsageError(f"no key {key!r}", where=where, fix=nearest(key, names))


def _wrong(name: str, value: Any, words: str, where: str) -> GlabenchError:
    what = f"{name} is missing" if value is None else f"{name} {value!r} is not {words}"
    return UsageError(what, where=where, fix=f"give {words}" if value is None else "glabench tune makes one")


def describe(point: Point) -> str:
    """A point in words."""
    return f"d_k {point.d_k}, d_v {point.d_v}, gate {GATES[point.gate]}, {ARITHMETIC[point.wide]}"


# --- writing ----------------------------------------------------------------------------------------------


def text(blocks: list[dict[str, Any]], device: str) -> str:
    """A plan file of these blocks, as `read` gives them; those without a point are left out."""
    lines = [
        f"# Launches of the chunk kernels on {device} where they differ from the rule (gla_configs.rule)."
    ]
    lines += ["# Written by `glabench tune`; a plan without a launch says that the rule's were the fastest."]
    for block in blocks:
        if not block["plan"]:
            continue
        lines += ["", "[[made]]", *(f"{name} = {json.dumps(block[name])}" for name in MADE)]
        for point, changes in sorted(block["plan"].items()):
            lines += ["", "[[made.plan]]", f"d_k = {point.d_k}", f"d_v = {point.d_v}"]
            lines += [f'gate = "{GATES[point.gate]}"', f'dtype = "{ARITHMETIC[point.wide]}"']
            lines += [f"{name} = {_value(x)}" for name, x in changes.items()]
    return "\n".join(lines) + "\n"


def _value(x: int | Launch) -> str:
    if isinstance(x, int):
        return str(x)
    inner = (f"{name} = {value}" for name, value in asdict(x).items() if value is not None)
    return f"{{ {', '.join(inner)} }}"


def merged(blocks: list[dict[str, Any]], made: Mapping[str, str], plans: dict[Point, Changes]) -> list:
    """`blocks` with the points of one more run, which take the place of what was said of them before."""
    kept = [{**b, "plan": {p: c for p, c in b["plan"].items() if p not in plans}} for b in blocks]
    for block in kept:
        if all(block[name] == made[name] for name in MADE):
            block["plan"] |= plans
            return kept
    return [*kept, {**made, "plan": plans}]
