"""What a run trains and how: a shipped configuration's recipe, or a TOML file; checked before it starts."""

import hashlib
import json
import math
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from glabench.errors import UsageError, nearest

PRECISIONS = ("auto", "fp32", "bf16")
# may change between a run and its resumption: how often, how much memory, not what is trained
OPERATIONAL = (
    "micro_batch",
    "grad_checkpointing",
    "compile",
    "fused",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of [train]. Lengths and batches are in tokens; learning rates are of the cosine schedule.

    A sequence is `segments` x `seqlen` tokens: the state is carried from segment to segment and the
    gradient is not (the paper's 12 x 2K). Defaults are the paper's where it names a value (GLA §5.1);
    it names neither betas nor eps.
    """

    steps: int
    batch_tokens: int
    seqlen: int
    warmup_steps: int
    segments: int = 1
    lr: float = 3e-4
    lr_end: float = 3e-5  # the initial rate too
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    precision: str = "auto"  # bf16 autocast on a GPU, fp32 on a CPU; weights and AdamW's moments are fp32
    micro_batch: int = 8  # sequences in one forward pass of one process
    grad_checkpointing: bool = False
    compile: bool = False  # torch.compile, block by block
    fused: bool = False  # Liger-Kernel's loss and, where nothing is compiled, norms and SwiGLU; on a GPU
    eval_every: int = 0  # steps; 0: after the last one only
    eval_tokens: int = 1 << 20  # of the validation split, from its start
    save_every: int = 1000
    keep: int = 2

    @property
    def sequences(self) -> int:
        """Sequences in one optimiser step, over all processes."""
        return self.batch_tokens // (self.seqlen * self.segments)


# size -> [train] of the shipped configurations. 340m and 1.3b: tokens, batch and warm-up of GLA §5.1
# (15B and 100B, 0.5M and 2M, 0.5B and 1B). The small ones are ours: for 2 cores, or one GPU and an hour.
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "steps": 400,
        "batch_tokens": 16 * 256,
        "seqlen": 256,
        "warmup_steps": 40,
        "lr": 3e-3,
        "lr_end": 3e-4,
        "micro_batch": 16,
        "eval_every": 100,
        "save_every": 100,
    },
    "8m": {
        "steps": 2000,
        "batch_tokens": 16 * 512,
        "seqlen": 512,
        "warmup_steps": 100,
        "lr": 1e-3,
        "lr_end": 1e-4,
        "eval_every": 500,
        "save_every": 500,
    },
    "30m": {
        "steps": 2400,
        "batch_tokens": 64 * 2048,
        "seqlen": 2048,
        "warmup_steps": 120,
        "lr": 1e-3,
        "lr_end": 1e-4,
        "micro_batch": 16,
        "eval_every": 200,
        "save_every": 400,
    },
    "340m": {
        "steps": 28_610,
        "batch_tokens": 1 << 19,
        "seqlen": 2048,
        "warmup_steps": 954,
        "eval_every": 1000,
    },
    "1.3b": {
        "steps": 47_684,
        "batch_tokens": 1 << 21,
        "seqlen": 2048,
        "warmup_steps": 477,
        "micro_batch": 4,
        "eval_every": 1000,
    },
}


@dataclass(frozen=True, slots=True)
class Config:
    """A model's table and its settings, as they will be used."""

    model: dict[str, Any]
    settings: Settings

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run, seed and data apart."""
        train = {k: v for k, v in asdict(self.settings).items() if k not in OPERATIONAL}
        return {"model": self.model, "train": json.loads(json.dumps(train))}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]


def load(
    name: str,
    *,
    steps: int | None = None,
    micro_batch: int | None = None,
    fused: bool = False,
    compiled: bool = False,
) -> Config:
    """A .toml file, or the name of a shipped configuration with its size's recipe.

    Raises: UsageError for an unknown name or key, or a value that makes no sense.
    """
    if name.endswith(".toml"):
        model, train, where = _from_file(Path(name))
    else:
        model, train, where = {"name": name}, {}, name
    size = next((s for s in RECIPES if s in str(model.get("name", "")).split("-")), None)
    if size is None and not name.endswith(".toml"):
        raise UsageError(
            f"no configuration {name!r}",
            where="CONFIG",
            fix="name a .toml file, or a shipped one such as gla-tiny",
        )
    recipe = {**(RECIPES[size] if size else {}), **train}
    if steps is not None:
        recipe["steps"] = steps
        # a shorter run keeps its warm-up in proportion: a tenth at most
        recipe["warmup_steps"] = min(recipe.get("warmup_steps", 0), max(1, steps // 10), steps - 1)
    if micro_batch is not None:
        recipe["micro_batch"] = micro_batch
    recipe |= {key: True for key, on in (("fused", fused), ("compile", compiled)) if on}
    return Config(model, _settings(recipe, where))


def _from_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise UsageError(f"cannot read {path.name}: {err}", where=str(path), fix="check the file") from err
    unknown = sorted(set(table) - {"model", "train"})
    if unknown:
        raise UsageError(
            f"no table {unknown[0]!r}", where=path.name, fix=nearest(unknown[0], ("model", "train"))
        )
    model, train = table.get("model"), table.get("train", {})
    if not isinstance(model, dict) or not isinstance(train, dict):
        raise UsageError("no [model] table", where=path.name, fix='write [model] and name = "gla-tiny"')
    return model, train, path.name


def _settings(table: dict[str, Any], where: str) -> Settings:
    known = {f.name: f for f in fields(Settings)}
    for key in table:
        if key not in known:
            raise UsageError(f"no key {key!r}", where=f"{where}: train", fix=nearest(key, list(known)))
    for key in ("steps", "batch_tokens", "seqlen", "warmup_steps"):
        if key not in table:
            raise UsageError(f"{key} is missing", where=f"{where}: train", fix=f"write {key} = NUMBER")
    for key, value in table.items():
        table[key] = _value(key, value, f"{where}: train.{key}")
    settings = replace(Settings(steps=1, batch_tokens=1, seqlen=1, warmup_steps=0), **table)
    _check(settings, f"{where}: train")
    return settings


def _value(key: str, value: Any, where: str) -> Any:
    """The value in the type of its key. Raises UsageError."""
    kind = {f.name: f.type for f in fields(Settings)}[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and math.isfinite(value) and value >= 0:
        return float(value)
    if kind is int and is_number and isinstance(value, int) and value >= 0:
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if key == "betas" and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_value("eps", beta, where) for beta in value)
    words = {float: "a number, not negative", int: "a whole number, not negative", bool: "true or false"}
    expected = "two numbers" if key == "betas" else words.get(kind, "a word in quotes")
    raise UsageError(f"{value!r} does not fit {key}", where=where, fix=f"write {expected}")


def _check(s: Settings, where: str) -> None:
    def refuse(what: str, fix: str) -> None:
        raise UsageError(what, where=where, fix=fix)

    for key in (
        "steps",
        "batch_tokens",
        "seqlen",
        "segments",
        "micro_batch",
        "save_every",
        "keep",
        "eval_tokens",
    ):
        if getattr(s, key) < 1:
            refuse(f"{key} is {getattr(s, key)}", "write 1 or more")
    if s.seqlen < 2:
        refuse("seqlen is 1", "write 2 or more: each token is predicted from those before it")
    if s.precision not in PRECISIONS:
        refuse(f"no precision {s.precision!r}", nearest(s.precision, PRECISIONS))
    if s.batch_tokens % (s.seqlen * s.segments):
        refuse(
            f"batch_tokens {s.batch_tokens} is not a multiple of a sequence, {s.seqlen} x {s.segments}",
            "change one of them",
        )
    if s.warmup_steps >= s.steps:
        refuse(f"warmup_steps {s.warmup_steps} leaves nothing of {s.steps} steps", "warm up for fewer")
    if not 0 < s.lr_end <= s.lr:
        refuse(f"lr_end {s.lr_end:g} is not within (0, lr {s.lr:g}]", "lower it")
    if s.clip <= 0 or not all(0 <= beta < 1 for beta in s.betas):
        refuse("clip must be above 0, and betas within [0, 1)", "change them")


def resolve_precision(config: Config, device: str) -> Config:
    """ "auto" -> what the device gets, so that a run's identity names it."""
    if config.settings.precision != "auto":
        return config
    chosen = "bf16" if device.startswith("cuda") else "fp32"
    return Config(config.model, replace(config.settings, precision=chosen))
