"""Suites: a TOML file -> the cases to measure and the implementations to put through them."""

import hashlib
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from glabench.cases import (
    DEFAULT_IMPLS,
    DTYPES,
    PASSES,
    SHAPES,
    Case,
    Regime,
    Shape,
    choose,
    device_defaults,
    make_cases,
    parse_range,
)
from glabench.errors import UsageError, nearest

VERBS = ("speed", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A named list of cases and the implementations to put each through."""

    name: str
    verbs: tuple[str, ...] = ("speed",)
    title: str = ""
    artefact: str = ""
    impls: tuple[str, ...] = DEFAULT_IMPLS
    cases: tuple[Case, ...] = ()
    regime: Regime = field(default_factory=Regime)
    seed: int = 0
    digest: str = ""


SUITE_KEYS = ("title", "artefact", "verbs", "seed")
GRID_KEYS = ("impl", "shape", "seqlen", "passes", "dtype", "tokens", "batch")
SHAPE_KEYS = ("name", "heads", "d_k", "d_v", "head_dim")


def shipped_suites() -> dict[str, Path]:
    """Name -> file of every suite that comes with the package (in a wheel) or the repository."""
    package = Path(__file__).parent
    folder = next((d for d in (package / "suites", package.parent / "suites") if d.is_dir()), None)
    return {p.stem: p for p in sorted(folder.glob("*.toml"))} if folder else {}


def find_suite(name: str) -> Path:
    """A path, or the name of a shipped suite. Raises UsageError."""
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    stem = path.stem if path.suffix == ".toml" else name
    shipped = shipped_suites()
    if stem in shipped and (path.suffix != ".toml" or path.parent.name in ("suites", "")):
        return shipped[stem]
    raise UsageError(
        f"no suite {name!r}",
        where="suite",
        fix=nearest(stem, tuple(shipped)) + " (or a path to a .toml file)",
    )


def load_suite(name: str, device: str) -> Suite:
    """Read a suite for `device`. Raises UsageError naming the key that is wrong."""
    path = find_suite(name)
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise UsageError(f"cannot read the suite: {err}", where=path.name, fix="mend the file") from err
    where = path.name
    _known(data, ("suite", "grid", "measure"), where)
    head = _table(data.get("suite", {}), f"{where}: suite")
    _known(head, SUITE_KEYS, f"{where}: suite")
    base = device_defaults(device)
    grids = data.get("grid", [])
    if not isinstance(grids, list) or not grids:
        raise UsageError("no grid", where=where, fix="add a [[grid]] with at least seqlen")
    cases: list[Case] = []
    impls: list[str] = []
    for i, grid in enumerate(grids):
        spot = f"{where}: grid {i + 1}"
        cases += _grid_cases(_table(grid, spot), base, spot)
        for impl in _strings(grid.get("impl", list(DEFAULT_IMPLS)), f"{spot}: impl"):
            if ":" in impl or "/" in impl or impl.endswith(".py"):
                raise UsageError(
                    f"a suite cannot name code ({impl!r})",
                    where=f"{spot}: impl",
                    fix="pass it with --impl on the command line",
                )
            if impl not in impls:
                impls.append(impl)
    twice = [c for c in cases if cases.count(c) > 1]
    if twice:
        raise UsageError(f"the case {twice[0].describe()} stands twice", where=where, fix="remove one")
    verbs = _strings(head.get("verbs", ["speed"]), f"{where}: verbs")
    return Suite(
        name=path.stem,
        verbs=tuple(choose(v, VERBS, "verb", f"{where}: verbs") for v in verbs),
        title=str(head.get("title", "")),
        artefact=str(head.get("artefact", "")),
        impls=tuple(impls),
        cases=tuple(cases),
        regime=_regime(
            _table(data.get("measure", {}), f"{where}: measure"), base["regime"], f"{where}: measure"
        ),
        seed=_whole(head.get("seed", 0), f"{where}: seed", least=0),
        digest=hashlib.sha256(text.encode()).hexdigest()[:12],
    )


def _grid_cases(grid: dict[str, Any], base: dict[str, Any], where: str) -> tuple[Case, ...]:
    _known(grid, GRID_KEYS, where)
    if "tokens" in grid and "batch" in grid:
        raise UsageError("both tokens and batch are set", where=where, fix="keep one")
    if "seqlen" not in grid:
        raise UsageError("no seqlen", where=where, fix='add seqlen = "1k..16k"')
    fixed = "tokens" in grid or "batch" in grid
    return make_cases(
        shapes=tuple(_shape(s, f"{where}: shape") for s in _items(grid.get("shape", base["shape"]))),
        seqlens=parse_range(",".join(str(s) for s in _items(grid["seqlen"])), f"{where}: seqlen"),
        passes=tuple(
            choose(p, PASSES, "pass", f"{where}: passes")
            for p in _strings(grid.get("passes", ["fwd", "fwd_bwd"]), where)
        ),
        dtypes=tuple(
            choose(d, DTYPES, "dtype", f"{where}: dtype")
            for d in _strings(grid.get("dtype", base["dtype"]), where)
        ),
        tokens=_whole(grid["tokens"], f"{where}: tokens")
        if "tokens" in grid
        else (None if fixed else base["tokens"]),
        batch=_whole(grid["batch"], f"{where}: batch")
        if "batch" in grid
        else (None if fixed else base["batch"]),
        where=where,
    )


def _shape(value: Any, where: str) -> Shape:
    if isinstance(value, str):
        return SHAPES[choose(value, tuple(SHAPES), "shape", where)]
    table = _table(value, where)
    _known(table, SHAPE_KEYS, where)
    missing = [k for k in SHAPE_KEYS if k not in table]
    if missing:
        raise UsageError(
            f"a shape without {missing[0]}", where=where, fix=f"give all of {', '.join(SHAPE_KEYS)}"
        )
    return Shape(str(table["name"]), **{k: _whole(table[k], f"{where}.{k}") for k in SHAPE_KEYS[1:]})


def _regime(table: dict[str, Any], base: Regime, where: str) -> Regime:
    _known(table, tuple(asdict(base)), where)
    for key, value in table.items():
        want = type(getattr(base, key))
        if (
            isinstance(value, bool) != (want is bool)
            or not isinstance(value, (bool, int, float))
            or (want is int and not isinstance(value, int))
        ):
            raise UsageError(f"{key} = {value!r} is not a {want.__name__}", where=where, fix="mend the value")
        if want is not bool and (value < 0 or (want is int and value < 1)):
            raise UsageError(f"{key} = {value!r} is too small", where=where, fix="give a positive number")
    return replace(base, **{k: type(getattr(base, k))(v) for k, v in table.items()})


def _known(table: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise UsageError(f"unknown key {key!r}", where=where, fix=nearest(key, keys))


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{value!r} is not a table", where=where, fix="write key = value pairs")
    return value


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _strings(value: Any, where: str) -> list[str]:
    items = _items(value)
    for item in items:
        if not isinstance(item, str):
            raise UsageError(f"{item!r} is not a string", where=where, fix="quote it")
        if items.count(item) > 1:
            raise UsageError(f"{item!r} stands twice", where=where, fix="name each once")
    if not items:
        raise UsageError("an empty list", where=where, fix="name at least one")
    return items


def _whole(value: Any, where: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(
            f"{value!r} is not a whole number of at least {least}", where=where, fix="mend the value"
        )
    return value
