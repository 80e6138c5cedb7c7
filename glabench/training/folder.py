"""The folder of a run: whose it is (train.json), and that one process group at a time writes to it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glabench.errors import UsageError
from glabench.results import held_folder, write_whole

IDENTITY = "train.json"
SCHEMA = 1


@contextmanager
def claim(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold `out` for this run; `note` makes it the run's own.

    `identity` is what the losses depend on: model, settings, data, seed. Raises: UsageError where the
    folder belongs to another identity, holds other files, or is in use.
    """
    with held_folder(out, "another run writes here"):
        _runs_of(out, identity)
        yield


def note(out: Path, identity: dict[str, Any], run: dict[str, Any]) -> None:
    """Write whose the folder is, and this start of the run, into train.json."""
    record = {"schema": SCHEMA, "identity": identity, "runs": [*_runs_of(out, identity), run]}
    write_whole(out / IDENTITY, json.dumps(record, indent=1) + "\n")


def _runs_of(out: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    path = out / IDENTITY
    if not path.exists():
        others = sorted(p.name for p in out.iterdir() if p.name != ".lock")
        if others:
            raise UsageError(
                f"{out.name} holds other files: {others[0]}", where="--out", fix="choose another folder"
            )
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, runs = record["identity"], record["runs"]
    except (ValueError, KeyError, TypeError) as err:
        raise UsageError(f"{IDENTITY} is not readable", where=str(path), fix="choose another --out") from err
    changed = first_difference(before, json.loads(json.dumps(identity)))
    if changed:
        key, was, now = changed
        raise UsageError(
            f"this folder was made with {key} {was}, not {now}", where=str(out), fix="choose another --out"
        )
    return runs


def first_difference(before: Any, after: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first key, dotted, whose value differs, with both values in words; None where all are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            found = first_difference(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if before == after else (key, _short(before), _short(after))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
