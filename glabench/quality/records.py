"""Local evaluation data: which file holds a task's documents, and whether every line of it is one.

A wrong field does not always fail in the harness: a label "1" instead of 1 scores 0 everywhere. So each line
is checked before a model is loaded.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glabench.errors import UnavailableError, UsageError, nearest

TASKS = Path(__file__).with_name("tasks.toml")
SUITES = {
    "paper": "wikitext lambada_openai piqa hellaswag winogrande arc_easy arc_challenge openbookqa "
    "boolq copa sciq",
    "recall": "fda swde squad_completion",
    "recall-like": "fda_like squad_like",
}
OWN_KEYS = {"like", "file"}  # what a task file of the user's may say: data, never code or templates
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string that is not empty", lambda v: isinstance(v, str) and bool(v.strip())),
    "text": ("a string", lambda v: isinstance(v, str)),
    "int": ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "index": ("an index", lambda v: isinstance(v, int) or (isinstance(v, str) and v.isdecimal())),
    "strs": ("two strings or more", lambda v: isinstance(v, list) and len(v) > 1 and all(map(_is_text, v))),
    "choices": ('{"text": [...], "label": [...]} of equal length', lambda v: _are_choices(v)),
    "key": ("a string", lambda v: isinstance(v, str)),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One task: the harness's definition of it, and what its local file holds (tasks.toml)."""

    name: str
    split: str
    fields: dict[str, str]
    definition: str = ""  # below lm_eval/tasks
    python: str = ""  # module:class, where the definition is a class that takes no configuration
    rows: int | None = None  # documents of the published split
    train: bool = False  # few-shot examples come from a training split
    also: str = ""  # another file that holds its documents
    text: str = ""  # how the prompt is made of the fields, where the file has none
    generation: dict[str, Any] = field(default_factory=dict)
    file: str = ""


@dataclass(frozen=True, slots=True)
class Local:
    """The files of one task, checked: split -> path, the scored split's sha256 and documents."""

    spec: Spec
    files: dict[str, Path]
    digest: str
    documents: int


def specs(folder: Path | None = None) -> dict[str, Spec]:
    """Every task with a local form; with `folder`, the user's own task files there (*.toml) as well.

    Such a file says [NAME], like = "arc_easy", file = "mine.jsonl". Raises: UsageError.
    """
    with TASKS.open("rb") as file:
        known = {name: Spec(name=name, **entry) for name, entry in tomllib.load(file).items()}
    for path in sorted(folder.glob("*.toml")) if folder else ():
        known |= _own_specs(path, known)
    return known


def _own_specs(path: Path, known: dict[str, Spec]) -> dict[str, Spec]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise UsageError(f"cannot read the task file: {err}", where=str(path), fix="mend it") from err
    own = {}
    for name, entry in entries.items():
        where = f"{path.name}: [{name}]"
        if not isinstance(entry, dict) or not {*entry} <= OWN_KEYS or "like" not in entry:
            raise UsageError(
                "a task names a known one and a file", where=where, fix='write like = "..." and file = "..."'
            )
        if entry["like"] not in known:
            raise UsageError(f"no task {entry['like']!r}", where=where, fix=nearest(entry["like"], [*known]))
        if name in known:
            raise UsageError(f"{name!r} is a known task's name", where=where, fix="choose another")
        own[name] = replace(known[entry["like"]], name=name, rows=None, also="", file=entry.get("file", ""))
    return own


def select(words: str, folder: Path | None) -> list[tuple[str, str]]:
    """ "paper,my_arc" -> [(task, the suite that brought it or "")], in order, each once.

    With a folder of data every name must be known. Raises: UsageError.
    """
    known = specs(folder)
    chosen: dict[str, str] = {}
    for word in (w.strip() for w in words.split(",")):
        if word in SUITES:
            chosen |= {name: word for name in SUITES[word].split() if name not in chosen}
        elif not word or (folder and word not in known):
            raise UsageError(f"no task {word!r}", where="--tasks", fix=nearest(word, [*SUITES, *known]))
        else:
            chosen[word] = ""
    return list(chosen.items())


def find(spec: Spec, folder: Path) -> Local:
    """The task's checked files in `folder`.

    Raises: UnavailableError where there is none; UsageError for one outside the folder, or with a bad line.
    """
    names = [name for name in (spec.file or f"{spec.name}.jsonl", spec.also) if name]
    path = next((p for name in names if (p := _inside(folder, name, spec)).is_file()), None)
    if path is None:
        raise UnavailableError(f"no {names[0]}", where=str(folder), fix=f"put {spec.name}'s documents there")
    digest, count = hashlib.sha256(), 0
    for line in _checked(path, spec):
        digest.update(line)
        count += 1
    files = {spec.split: path}
    train = _inside(folder, f"{path.stem}_train.jsonl", spec)
    if train.is_file():
        sum(1 for _ in _checked(train, spec))
        files["train"] = train
    return Local(spec, files, digest.hexdigest(), count)


def _inside(folder: Path, name: str, spec: Spec) -> Path:
    """Links are followed first: what counts is where the bytes are."""
    path, root = (folder / name).resolve(), folder.resolve()
    if root not in path.parents:
        raise UsageError(
            f"task {spec.name!r} names a file outside its folder: {name}",
            where="--tasks-from",
            fix="put the file into the folder",
        )
    return path


def _checked(path: Path, spec: Spec) -> Iterator[bytes]:
    """Every line, after it was found to be a document. Raises UsageError at the first that is none."""
    lines = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                problem = _problem(line, spec)
                if problem:
                    raise UsageError(
                        problem, where=f"{path.name} line {number}", fix=f"mend or remove it ({spec.name})"
                    )
                lines += 1
                yield line
    except OSError as err:
        raise UsageError(f"cannot read {path.name}: {err.strerror}", where=str(path), fix="mend it") from err
    if not lines:
        raise UsageError("no documents", where=path.name, fix=f"put {spec.name}'s documents there")


def _problem(line: bytes, spec: Spec) -> str:
    """What is wrong with a line, in words; empty where nothing is."""
    try:
        record = json.loads(line)
    except ValueError:
        return "no JSON object"
    if not isinstance(record, dict):
        return "no JSON object"
    for name, kind in spec.fields.items():
        if name not in record:
            return f"no field {name!r}"
        value = record[name]
        said, fits = TYPES.get(kind) or (f"one of {kind.replace('|', ', ')}", lambda v, k=kind: _one_of(v, k))
        if not fits(value):
            empty = kind == "str" and isinstance(value, str)
            return f"{name!r} is empty" if empty else f"{name!r} is not {said}"
        if kind == "key" and value.strip() not in record["choices"]["label"]:
            return f"{name!r} is none of the choices' labels"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_choices(value: Any) -> bool:
    texts, labels = (value.get(k) for k in ("text", "label")) if isinstance(value, dict) else (None, None)
    return isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) > 1


def _one_of(value: Any, kind: str) -> bool:
    return isinstance(value, str) and value in kind.split("|")
