"""What can be measured: families, implementations, and why one cannot run here.

Nothing here imports torch: availability is read from installed metadata and the CUDA driver.
"""

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glabench.errors import UnavailableError, UsageError, nearest
from glabench.installed import INSTALL, has_cuda, installed_version, is_installed

PACKAGE = Path(__file__).parent
ENTRY_POINTS = "glabench.impls"


@dataclass(frozen=True, slots=True)
class Family:
    """A mathematical function with an oracle; `tensors` are the positional arguments, in order."""

    name: str
    title: str
    tensors: tuple[str, ...]
    gradients: tuple[str, ...]  # the tensors whose gradient is checked and timed
    recurrent: bool = True  # takes initial_state, gives a final state


FAMILIES = {
    f.name: f
    for f in (
        Family("gla", "Gated linear attention", ("q", "k", "v", "g"), ("q", "k", "v", "g")),
        Family(
            "simple_gla", "Linear attention, scalar gate a head", ("q", "k", "v", "g"), ("q", "k", "v", "g")
        ),
        Family("retention", "RetNet retention", ("q", "k", "v"), ("q", "k", "v")),
        Family("linear_attention", "Linear attention, no gate", ("q", "k", "v"), ("q", "k", "v")),
        Family("attention", "Softmax attention", ("q", "k", "v"), ("q", "k", "v"), recurrent=False),
        Family(
            "mamba", "Mamba selective scan", ("x", "dt", "A", "B", "C", "D"), ("x", "dt", "A", "B", "C", "D")
        ),
        Family("mamba2", "Mamba-2 SSD", ("x", "dt", "A", "B", "C", "D"), ("x", "dt", "A", "B", "C", "D")),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to compute a family.

    `load()` returns the callable: `fn(*tensors, **options) -> out` or `(out, final_state)`, the
    tensors in the family's order and its layouts (docs/ARCHITECTURE.md, "Contracts"). Options are
    passed only where `features` names them: "state" (initial_state, output_final_state), "varlen"
    (cu_seqlens) and "scale". A step, of the pass "decode", takes one token and what is carried, which it may
    change in place: `step(*tensors, *carried) -> out` or `(out, new state)`.
    `limits(case, device)` gives a reason a case is unsupported, or None;
    `case` is a dict of Case's fields, `device` "cpu" or "cuda".
    """

    id: str
    label: str
    family: str
    load: Callable[[], Callable[..., Any]]
    passes: tuple[str, ...] = ("fwd", "bwd")
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    needs: tuple[str, ...] = ("torch",)
    features: tuple[str, ...] = ()
    preference: int = 50  # the lowest one that can run is what the family's name resolves to
    training_preference: int | None = None  # in a model that trains, where memory counts; else the same
    layout_copy: bool = False  # converts layouts inside the timed call
    compiles: bool = False  # compiles or tunes kernels for each shape: a sweep does that ahead
    limits: Callable[[Mapping[str, Any], str], str | None] | None = None
    note: str = ""
    source: str = "glabench"  # or the distribution or file that brought it
    path: Path | None = None

    @property
    def in_training(self) -> int:
        """The preference of models that train."""
        return self.preference if self.training_preference is None else self.training_preference

    def unavailable(self, device: str) -> str | None:
        """Why this cannot run on `device` ("cpu", "cuda" or "cuda:N") here, in one line, or None."""
        kind = device.split(":")[0]
        for need in self.needs:
            if need != "cuda" and not is_installed(need):
                return f"{need} is not installed: {INSTALL.get(need, f'pip install {need}')}"
        if kind not in self.devices:
            if self.devices == ("cuda",) and not has_cuda():
                return f"needs {INSTALL['cuda']}"
            return f"runs on {' and '.join(self.devices)} only"
        if kind == "cuda" and not has_cuda():
            return f"needs {INSTALL['cuda']}"
        return None

    def unsupported(self, case: Mapping[str, Any], device: str) -> str | None:
        """Why `case` (a dict of Case's fields) is outside what this computes, or None."""
        if case["dtype"] not in self.dtypes:
            return f"dtype {case['dtype']} is not among {', '.join(self.dtypes)}"
        if case["passes"] == "decode" and "decode" not in self.passes:
            return "takes no single token with a state"
        if case["passes"] != "decode" and "fwd" not in self.passes:
            return "takes one token with a state, no sequence: glabench decode measures it"
        if case["passes"] in ("bwd", "fwd_bwd") and "bwd" not in self.passes:
            return "no backward pass"
        return self.limits(case, device.split(":")[0]) if self.limits else None

    def spec(self) -> dict[str, str]:
        """How a worker process names this implementation: see `from_spec`."""
        if self.id in implementations():
            return {"id": self.id}
        return {"file": f"{self.path}:{self.id.rpartition(':')[2]}", "family": self.family}

    def version(self) -> str:
        """Digest of this implementation's source and of the versions of what it needs."""
        digest = hashlib.sha256()
        for path in _sources(self.path) if self.path else ():
            digest.update(path.read_bytes())
        for need in self.needs:
            digest.update(f"{need}={installed_version(need)}".encode())
        return digest.hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What `@implementation` leaves in a module, before it has an id."""

    load: Callable[[], Callable[..., Any]]
    options: dict[str, Any] = field(default_factory=dict)


def implementation(
    *, label: str, **options: Any
) -> Callable[[Callable[[], Callable[..., Any]]], Declaration]:
    """Declare a loader as an implementation; the options are Implementation's fields.

    The id is the file's stem (or the entry point's name), and the family the longest known family
    that the id starts with, unless `family=` says otherwise.
    """

    def declare(load: Callable[[], Callable[..., Any]]) -> Declaration:
        return Declaration(load, {"label": label, **options})

    return declare


def family_of(impl_id: str) -> str | None:
    """The longest family name that `impl_id` starts with."""
    fits = [f for f in FAMILIES if impl_id == f or impl_id.startswith(f + "_")]
    return max(fits, key=len, default=None)


def build(declared: Any, impl_id: str, *, source: str, path: Path | None, where: str) -> Implementation:
    """Turn a Declaration into an Implementation. Raises UsageError where it does not fit."""
    if not isinstance(declared, Declaration):
        raise UsageError(
            f"{impl_id!r} is not an implementation",
            where=where,
            fix="decorate a loader with @implementation(label=...)",
        )
    options = dict(declared.options)
    family = options.pop("family", None) or family_of(impl_id)
    if family not in FAMILIES:
        raise UsageError(
            f"{impl_id!r} belongs to no family",
            where=where,
            fix=f"start the id with one of {', '.join(FAMILIES)} or give family=",
        )
    try:
        return Implementation(
            id=impl_id, family=family, load=declared.load, source=source, path=path, **options
        )
    except TypeError as err:
        raise UsageError(f"{impl_id!r}: {err}", where=where, fix="see Implementation's fields") from err


@functools.cache
def implementations() -> dict[str, Implementation]:
    """Every known implementation by id: ours, the peers', and third parties' entry points."""
    found: dict[str, Implementation] = {}
    for path in sorted((PACKAGE / "impls").glob("[a-z]*.py")):
        module = importlib.import_module(f"glabench.impls.{path.stem}")
        found[path.stem] = build(
            module.load, path.stem, source="glabench", path=path, where=f"impls/{path.name}"
        )
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        source = point.dist.name if point.dist else "unknown distribution"
        where = f"entry point of {source}"
        if point.name in found:
            raise UsageError(
                f"the id {point.name!r} is taken by {found[point.name].source}",
                where=where,
                fix="rename the entry point",
            )
        try:
            declared = point.load()
        except Exception as err:  # noqa: BLE001  a third party's import may fail in any way; it must not take the rest down
            found[point.name] = _broken(point.name, source, err)
            continue
        spec = importlib.util.find_spec(point.module)
        path = Path(spec.origin) if spec and spec.origin else None
        found[point.name] = build(declared, point.name, source=source, path=path, where=where)
    return found


def _broken(impl_id: str, source: str, err: Exception) -> Implementation:
    """A place-holder whose reason says why a third party's module did not import."""

    def load() -> Callable[..., Any]:
        raise UnavailableError(f"{source} failed to import: {err}", where=impl_id, fix="mend or remove it")

    return Implementation(
        id=impl_id,
        label=f"{impl_id} ({source})",
        family=family_of(impl_id) or "gla",
        load=load,
        devices=(),
        needs=(f"a working {source} ({type(err).__name__}: {err})",),
        source=source,
    )


def from_file(spec: str, family: str | None) -> Implementation:
    """`path/to/file.py:function` as an implementation of `family`. Raises UsageError.

    A bare function is taken as the computation itself; a Declaration as its loader.
    """
    name, _, attribute = spec.rpartition(":")
    path = Path(name)
    if not name.endswith(".py") or not attribute.isidentifier():
        raise UsageError(
            f"{spec!r} is not FILE.py:FUNCTION", where="--impl", fix="name a file and a function in it"
        )
    if not path.is_file():
        raise UsageError(f"no file {name!r}", where="--impl", fix="check the path")
    tree = _parse(path)
    names = (
        {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        | {(a.asname or a.name) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    )
    if attribute not in names:
        raise UsageError(
            f"no {attribute!r} in {path.name}", where="--impl", fix=nearest(attribute, sorted(names))
        )
    family = family or family_of(attribute)
    if family is None:
        raise UsageError(
            f"no family for {spec!r}", where="--impl", fix=f"add --family with one of {', '.join(FAMILIES)}"
        )
    if family not in FAMILIES:
        raise UsageError(f"no family {family!r}", where="--family", fix=nearest(family, tuple(FAMILIES)))
    return Implementation(
        id=f"{path.stem}:{attribute}",
        label=f"{attribute} ({path.name})",
        family=family,
        load=functools.partial(_load_function, path, attribute),
        devices=("cpu", "cuda"),
        dtypes=("fp32", "bf16", "fp16"),
        passes=("fwd", "bwd", "decode"),  # it is taken at its word
        source=path.name,
        path=path.resolve(),
    )


def from_spec(spec: Mapping[str, str]) -> Implementation:
    """The implementation that `Implementation.spec()` named, in another process."""
    return implementations()[spec["id"]] if "id" in spec else from_file(spec["file"], spec["family"])


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError) as err:
        raise UsageError(f"cannot read {path.name}: {err}", where="--impl", fix="mend the file") from err


def _load_function(path: Path, attribute: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"glabench_user_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target = getattr(module, attribute)
    return target.load() if isinstance(target, Declaration) else target


def resolve(
    names: tuple[str, ...],
    device: str,
    family: str | None = None,
    *,
    where: str = "--impl",
    lenient: bool = False,
    passes: str = "fwd",
) -> list[tuple[str, Implementation]]:
    """(asked, implementation) for family names, ids and files.

    A family resolves to its best implementation that runs `passes` ("fwd" or "decode") on `device`; an id
    or file stands for itself. Raises UsageError for an unknown name, and, unless `lenient`,
    UnavailableError for an id that cannot run.
    """
    known = implementations()
    chosen: list[tuple[str, Implementation]] = []
    for name in names:
        if ".py:" in name:
            impl = from_file(name, family)
        elif name in FAMILIES:
            impl = best(name, device, passes)
        elif name in known:
            impl = known[name]
        else:
            raise UsageError(
                f"no implementation {name!r}", where=where, fix=nearest(name, [*FAMILIES, *known])
            )
        reason = None if lenient else impl.unavailable(device)
        if reason:
            raise UnavailableError(f"{impl.id} cannot run on {device}", where=where, fix=reason)
        if any(impl.id == other.id for _, other in chosen):
            if lenient:
                continue  # a family in a suite may resolve to an id that the suite names as well
            raise UsageError(
                f"{impl.id!r} is asked for twice", where=where, fix="name each implementation once"
            )
        chosen.append((name, impl))
    return chosen


def best(family: str, device: str, passes: str = "fwd") -> Implementation:
    """The family's most preferred implementation that runs `passes` on `device`. Raises UnavailableError."""
    arms = sorted(
        (i for i in implementations().values() if i.family == family and passes in i.passes),
        key=lambda i: (i.preference, i.id),
    )
    for impl in arms:
        if impl.unavailable(device) is None:
            return impl
    reasons = "; ".join(f"{i.id}: {i.unavailable(device)}" for i in arms) or "none is known"
    raise UnavailableError(f"no implementation of {family} runs on {device}", where="--impl", fix=reasons)


def _sources(path: Path, seen: frozenset[Path] = frozenset()) -> list[Path]:
    """`path` and every glabench.kernels file it imports, however indirectly, in a stable order."""
    found = {path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.startswith("glabench.kernels"):
            inner = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
            if inner.is_file() and inner not in seen:
                found |= set(_sources(inner, seen | found))
    return sorted(found)
