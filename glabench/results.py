"""Files of rows, and what is already done: append-only, safe against `kill -9`."""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glabench.errors import ResultsError, UsageError
from glabench.rows import RESUME_KEY, ROWS, SETTLED, Row, ThroughputRow, columns, to_line


def rows_path(folder: Path, verb: str) -> Path:
    """`speed` rows lie in rows.csv; another verb of the same suite beside it, under its own name."""
    return folder / ("rows.csv" if verb == "speed" else f"{verb}.csv")


class RowFile:
    """An append-only CSV of one row type.

    Opening it checks the header, cuts and names a torn last line, and refuses a malformed line
    elsewhere. Raises ResultsError; the file is never rewritten.
    """

    def __init__(self, path: Path, row_type: type[Row]) -> None:
        self.path, self.row_type = path, row_type
        self.repaired: str | None = None
        self.rows: list[dict[str, str]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._repair()
                self.rows = read_rows(path, row_type)
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as err:
            raise ResultsError(
                f"cannot write {path.name}: {err.strerror}",
                where=str(path),
                fix="choose another folder with --out",
            ) from err

    def _repair(self) -> None:
        torn = cut_torn_line(self.path)
        self.repaired = torn[:80] if torn else None

    def append(self, *rows: Row) -> None:
        """Write the rows of one cell, all or none. Raises ResultsError when the disk does not take them."""
        lines = "".join(to_line(row) for row in rows)
        try:
            append_whole(self.path, lines.encode(), header=f"{','.join(columns(self.row_type))}\n".encode())
        except OSError as err:
            raise ResultsError(
                f"cannot write {self.path.name}: {err.strerror}; the rows before it are safe",
                where=str(self.path),
                fix="make room, then run the same command with --resume",
            ) from err
        self.rows += csv.DictReader(io.StringIO(lines), fieldnames=columns(self.row_type))

    @staticmethod
    def key(fields: Mapping[str, Any]) -> tuple[str, ...]:
        """What makes a cell the same cell in another run of the command."""
        return tuple(str(fields[name]) for name in RESUME_KEY)

    def settled(self, replicate: int) -> set[tuple[str, ...]]:
        """Keys that --resume skips in that replicate."""
        mine = (r for r in self.rows if int(r["replicate"]) == replicate)
        return {self.key(r) for r in mine if r["status"] in SETTLED}

    def next_replicate(self) -> int:
        return 1 + max((int(r["replicate"]) for r in self.rows), default=-1)

    def replicate(self, resume: bool) -> int:
        """The replicate that a run adds rows to: with `resume` the last one, else the next."""
        following = self.next_replicate()
        return max(0, following - 1) if resume else following

    def torn(self, unit: str) -> str | None:
        """What to say of a torn last line that was cut, of a "cell", say; None where there was none."""
        if self.repaired is None:
            return None
        return f"{self.path.name}: cut a torn last line ({self.repaired!r}); its {unit} runs again"


def cut_torn_line(path: Path) -> str:
    """Cut a last line without an end, and return it; a line that another process is writing is not torn."""
    with path.open("r+b") as file, _locked(file):
        data = file.read()
        keep = data.rfind(b"\n") + 1
        if keep < len(data):
            file.truncate(keep)
    return data[keep:].decode("utf-8", "replace")


def append_whole(path: Path, data: bytes, header: bytes = b"") -> None:
    """Write whole lines and make them durable, alone with the file; `header` goes into an empty one.

    Raises OSError; no half line stays behind.
    """
    # unbuffered: a buffer that failed to flush would be written again, later, by close()
    with path.open("ab", buffering=0) as file, _locked(file):
        start = file.seek(0, os.SEEK_END)
        data = data if start else header + data
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, start)
            raise


@contextmanager
def _locked(file: Any) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def read_rows(path: Path, row_type: type[Row] | None = None) -> list[dict[str, str]]:
    """Every row as strings. Raises ResultsError for a foreign header or a malformed line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ResultsError(f"cannot read {path.name}: {err}", where=str(path), fix="check the path") from err
    lines = list(csv.reader(io.StringIO(text)))
    if not lines:
        return []
    header = lines[0]
    known = [columns(row_type)] if row_type else [columns(t) for t in (*ROWS.values(), ThroughputRow)]
    if header not in known:
        raise ResultsError(
            f"the columns of {path.name} are not this version's",
            where=str(path),
            fix="move the file away, or measure into another folder",
        )
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ResultsError(
                f"line {number} has {len(line)} fields, not {len(header)}",
                where=str(path),
                fix="mend or remove that line",
            )
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def folders_with(folder: Path, *names: str) -> list[Path]:
    """Every directory at or below `folder` that holds a file so named, hidden ones left out."""
    found = {p.parent for name in names for p in folder.rglob(name) if p.is_file()}
    return sorted(d for d in found if not any(x.startswith(".") for x in d.relative_to(folder).parts))


def append_json(path: Path, record: dict[str, Any]) -> None:
    """One JSON line, flushed: the raw samples beside the rows. Several processes may append."""
    try:
        append_whole(path, json.dumps(record).encode() + b"\n")
    except OSError as err:
        raise ResultsError(
            f"cannot write {path.name}: {err.strerror}", where=str(path), fix="make room, then --resume"
        ) from err


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: whoever reads it sees the old or the new, never half."""
    draft = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as err:
        draft.unlink(missing_ok=True)
        raise ResultsError(
            f"cannot write {path.name}: {err.strerror}", where=str(path), fix="make room, or choose --out"
        ) from err


@contextmanager
def held_folder(out: Path, busy: str) -> Iterator[None]:
    """Make `out` and hold it for this process. Raises UsageError, with `busy` where another one holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as err:
        raise UsageError(
            f"cannot write {out.name}: {err.strerror}", where="--out", fix="choose another path"
        ) from err
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(busy, where=str(out), fix="wait for it to end") from None
        yield
