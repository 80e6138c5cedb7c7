"""What `glabench recall` is asked: panels from data and options, their cells, who computes them."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from glabench import env, registry
from glabench.cases import parse_range, split_names
from glabench.errors import UnavailableError, UsageError, nearest
from glabench.installed import is_installed
from glabench.quality.mixers import MIXERS, head_widths, mixer
from glabench.quality.recall_rows import KEYS
from glabench.registry import Implementation
from glabench.runners.request import check_seconds

PANELS = Path(__file__).parents[1] / "quality" / "recall_panels.toml"
SETS = {"paper": ("a", "b")}  # panels that go together
BATCH_TOKENS, BATCH_MOST = 65536, 512  # the reference's batches: 512, 512, 256, 128 at T = 64 .. 512
DTYPES = ("fp32", "bf16")
CELL_LIMIT_S = 7200.0
GPU_JOBS = 4  # small models leave a GPU idle between launches; more only share its memory
KERNEL_WIDTH = 16  # of heads, in the compiled kernels
PLAIN = "{family}_chunk_torch"
OWN = "{family}_chunk"  # compiled with configurations from the package: no autotuning for each width


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A grid over one task: mixers, widths, learning rates and seeds, and how each run trains."""

    suite: str
    mixers: tuple[str, ...]
    dims: tuple[int, ...]
    seqlen: int
    pairs: int
    vocab: int
    lrs: tuple[float, ...]
    seeds: int
    layers: int
    epochs: int
    examples: int
    test: int
    valid: int
    batch: int
    dtype: str
    heads: int | None = None  # of mixers with a recurrence; None: each mixer's own
    control: str = ""  # a mixer that must solve the task before the others are looked at

    def cells(self) -> list["Cell"]:
        return [
            Cell(panel=self, mixer=name, dim=dim, lr=lr, seed=seed)
            for name in self.mixers
            for dim in self.dims
            for lr in self.lrs
            for seed in range(self.seeds)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a mixer at a width, a learning rate and a seed."""

    panel: Panel
    mixer: str
    dim: int
    lr: float
    seed: int

    @property
    def heads(self) -> int | None:
        own = MIXERS[self.mixer]
        return self.panel.heads or own.heads if own.kind == "linear" else own.heads

    @property
    def model(self) -> tuple[Any, ...]:
        """What one sweep over learning rates is about."""
        return self.panel.suite, self.panel.seqlen, self.panel.pairs, self.mixer, self.dim, self.seed

    def keys(self) -> dict[str, Any]:
        """The row's key columns."""
        p = self.panel
        own = {"mixer": self.mixer, "d_model": self.dim, "heads": self.heads, "lr": self.lr}
        own |= {"kv_pairs": p.pairs, "epochs_max": p.epochs}
        return {key: own[key] if key in own else getattr(p, key) for key in KEYS}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.keys(), sort_keys=True).encode()).hexdigest()[:12]

    def cost(self) -> float:
        """Relative, for putting long runs first."""
        return self.dim * self.panel.seqlen * self.panel.examples * self.panel.epochs

    def describe(self) -> str:
        p = self.panel
        return f"T={p.seqlen} K={p.pairs} {self.mixer} d={self.dim} lr={self.lr:.3g} seed={self.seed}"


def panels(name: str | None, changes: Mapping[str, Any], device: str) -> list[Panel]:
    """The panels of a name (quick, a, b, paper) or .toml file, with options over them.

    Without a name: `quick`, or, where `changes` gives both seqlen and pairs, a panel of the protocol's.
    Raises: UsageError for an unknown name or key, or a grid that cannot be.
    """
    data = tomllib.loads(PANELS.read_text(encoding="utf-8"))
    protocol = data.pop("protocol")
    known = (*data, *SETS)
    if name is None:
        name = "" if {"seqlen", "pairs"} <= set(changes) else "quick"
    if name == "":
        chosen = [({}, "options")]
    elif name.endswith(".toml"):
        chosen = [(_read(Path(name)), Path(name).name)]
    elif name in known:
        chosen = [(data[one], "panel " + one) for one in SETS.get(name, (name,))]
    else:
        raise UsageError(f"no panel {name!r}", where="--panel", fix=nearest(name, known))
    grids = [({**protocol, **own, **changes}, where) for own, where in chosen]
    for keys, _ in grids:
        if "mixers" in changes and keys.get("control") not in changes["mixers"]:
            keys.pop("control", None)  # the user's choice of mixers goes before the panel's control
    return [_panel(keys, where, device) for keys, where in grids]


def _read(path: Path) -> dict[str, Any]:
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise UsageError(f"cannot read {path.name}: {err}", where="--panel", fix="mend the file") from err
    return {"suite": path.stem, **own}


def _panel(keys: dict[str, Any], where: str, device: str) -> Panel:
    names = tuple(f.name for f in fields(Panel))
    for key in keys:
        if key not in names:
            raise UsageError(f"no key {key!r}", where=where, fix=nearest(key, names))
    for key in ("seqlen", "pairs"):
        if key not in keys:
            raise UsageError(f"no {key}", where=where, fix=f"give --{key}, or a --panel that has it")
    keys = {k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()}
    _check_types(keys, where)
    keys.setdefault("batch", max(1, min(BATCH_MOST, BATCH_TOKENS // keys["seqlen"])))
    keys.setdefault("dtype", "fp32" if device == "cpu" else "bf16")
    panel = Panel(**keys)
    _check(panel, where)
    return panel


def _check_types(keys: Mapping[str, Any], where: str) -> None:
    lists = {"mixers": str, "dims": int, "lrs": (int, float)}
    words = ("suite", "dtype", "control")
    for key, value in keys.items():
        inner = lists.get(key, str if key in words else int)
        values = value if key in lists and isinstance(value, tuple) else (value,)
        if not values or any(isinstance(v, bool) or not isinstance(v, inner) for v in values):
            raise UsageError(
                f"{key} = {value!r} makes no sense", where=where, fix="see docs/METHOD.md, Recall"
            )
        if inner is not str and any(not math.isfinite(v) or v <= 0 for v in values):
            raise UsageError(f"{key} = {value!r} is not above 0", where=where, fix="give positive numbers")
        if len(set(values)) < len(values):
            raise UsageError(f"{key} names a value twice", where=where, fix="name each once")


def _check(panel: Panel, where: str) -> None:
    T, K, V = panel.seqlen, panel.pairs, panel.vocab
    if T % 2:
        raise UsageError(f"a sequence of {T} tokens is odd", where=where, fix="give an even --seqlen")
    if 4 * K > T:
        raise UsageError(
            f"{K} pairs do not fit in {T} tokens",
            where=where,
            fix=f"at most {T // 4} pairs: a pair and its query take 4",
        )
    if T >= V or K > V // 2 - 1:
        raise UsageError(
            f"a vocabulary of {V} is too small for {T} tokens and {K} pairs",
            where=where,
            fix=f"give --vocab above {max(T, 2 * K + 1)}",
        )
    if panel.dtype not in DTYPES:
        raise UsageError(f"no dtype {panel.dtype!r}", where="--dtype", fix=nearest(panel.dtype, DTYPES))
    if panel.batch > panel.examples:
        raise UsageError(
            f"a batch of {panel.batch} of {panel.examples} examples",
            where=where,
            fix="give a smaller --batch",
        )
    for name in panel.mixers:
        mixer(name, "--mixers")
    if panel.control and panel.control not in panel.mixers:
        raise UsageError(
            f"the control {panel.control!r} is not among the mixers", where=where, fix="add it to --mixers"
        )
    for cell in panel.cells():
        head_widths(cell.mixer, cell.dim, cell.heads)


def changes(typed: Mapping[str, Any], *, mixers: str, dims: str, lrs: str) -> dict[str, Any]:
    """What was typed over a panel, by its keys. Raises UsageError."""
    found = {key: value for key, value in typed.items() if value not in (None, "")}
    if mixers:
        found["mixers"] = split_names(mixers, "mixer", "--mixers")
    if dims:
        found["dims"] = parse_range(dims, "--dims")
    if lrs:
        found["lrs"] = parse_rates(lrs)
    return found


def parse_rates(text: str) -> tuple[float, ...]:
    """ "1e-3,1e-2" -> learning rates. Raises UsageError."""
    words = split_names(text, "learning rate", "--lrs")
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise UsageError(f"{text!r} are no learning rates", where="--lrs", fix="write 1e-3,1e-2") from None


def parse_shard(text: str) -> tuple[int, int]:
    """ "0/4" -> (0, 4). Raises UsageError."""
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UsageError(f"no shard {text!r}", where="--shard", fix="write I/N with I from 0 to N - 1")
    return int(first), int(count)


def in_order(cells: Sequence[Cell], shard: tuple[int, int] | None) -> list[Cell]:
    """A shard's cells as they start: likely learning rates of every model first, long runs before short.

    A model's learning rates stay in one shard. A rate is the likelier the nearer it is to the middle of the
    sweep, in logarithms, the larger first.
    """
    models = list(dict.fromkeys(c.model for c in sorted(cells, key=lambda c: (-c.cost(), c.model))))
    if shard is not None:
        models = models[shard[0] :: shard[1]]
    mine = [cell for cell in cells if cell.model in set(models)]
    ranks = {panel: _ranks(panel.lrs) for panel in {cell.panel for cell in mine}}
    return sorted(mine, key=lambda c: (ranks[c.panel][c.lr], -c.cost(), c.model))


def _ranks(rates: Sequence[float]) -> dict[float, int]:
    middle = (math.log(min(rates)) + math.log(max(rates))) / 2
    order = sorted(rates, key=lambda r: (round(abs(math.log(r) - middle), 6), -r))
    return {rate: rank for rank, rate in enumerate(order)}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked: the grid, who computes it, where, and how to go on."""

    panels: list[Panel]
    cells: list[Cell]  # of this shard, in the order they start
    impls: dict[str, Implementation]  # by family
    fixed: frozenset[str] = frozenset()  # families whose implementation was asked for
    device: str
    jobs: int
    out: Path | None
    resume: bool
    stop_sweep: bool
    compiled: bool
    cell_limit_s: float
    argv: tuple[str, ...] = ()

    def impl(self, cell: Cell) -> Implementation:
        """Who computes the cell: plain PyTorch where the kernels do not take its heads, unless asked for."""
        family = MIXERS[cell.mixer].family
        if family not in self.fixed and self.misfit(cell):
            return registry.implementations()[PLAIN.format(family=family)]
        return self.impls[family]

    def misfit(self, cell: Cell) -> str:
        """Why compiled kernels do not take the cell's heads, or nothing."""
        widths = head_widths(cell.mixer, cell.dim, cell.heads)
        is_compiled = MIXERS[cell.mixer].kind == "linear" and self.impls[MIXERS[cell.mixer].family].compiles
        off = [width for width in widths if width % KERNEL_WIDTH]
        return f"heads {off[0]} wide, not a multiple of {KERNEL_WIDTH}" if is_compiled and off else ""

    def folder(self, suite: str, slug: str) -> Path:
        return self.out or Path("results") / suite / slug


def request(
    panel: str | None,
    changes: Mapping[str, Any],
    *,
    device: str,
    impl: str,
    jobs: int | None,
    out: Path | None,
    resume: bool,
    shard: str,
    stop_sweep: bool,
    compiled: bool,
    cell_limit: float | None,
    argv: Sequence[str],
) -> Request:
    """A request of a panel, or a file, and what was typed over it. Raises: UsageError, UnavailableError."""
    device = env.pick_device(device)
    if not is_installed("transformers"):
        raise UnavailableError(
            "transformers is not installed", where="glabench recall", fix="pip install 'glabench[models]'"
        )
    check_seconds(cell_limit, "--cell-limit")
    grids = panels(panel, changes, device)
    mixers = dict.fromkeys(name for one in grids for name in one.mixers)
    impls, fixed = implementations_for([MIXERS[name].family for name in mixers], impl, device)
    return Request(
        panels=grids,
        cells=in_order(
            [cell for one in grids for cell in one.cells()], parse_shard(shard) if shard else None
        ),
        impls=impls,
        fixed=fixed,
        device=device,
        jobs=jobs or (GPU_JOBS if device != "cpu" else env.usable_cores()),
        out=out,
        resume=resume or bool(shard),
        stop_sweep=stop_sweep,
        compiled=compiled,
        cell_limit_s=cell_limit or CELL_LIMIT_S,
        argv=tuple(argv),
    )


def implementations_for(
    families: Sequence[str], asked: str, device: str
) -> tuple[dict[str, Implementation], frozenset[str]]:
    """By family: the id asked for, else our kernel where it runs, else the best; and whose was asked for.

    Raises: UsageError, UnavailableError.
    """
    known = registry.implementations()
    chosen = {}
    for family in dict.fromkeys(families):
        own = known.get(OWN.format(family=family))
        is_own = own is not None and own.unavailable(device) is None
        chosen[family] = own if is_own else registry.best(family, device)
    chosen = {f: known["attention_sdpa"] if f == "attention" else i for f, i in chosen.items()}
    named = registry.resolve(split_names(asked, "implementation", "--impl"), device) if asked else ()
    for _, one in named:
        if one.family not in chosen or one.family == "attention":
            raise UsageError(f"{one.id!r} serves no mixer here", where="--impl", fix="leave it out")
        chosen[one.family] = one
    return chosen, frozenset(one.family for _, one in named)
