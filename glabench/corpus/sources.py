"""Where text comes from: files of a folder, packed or not, or a Hugging Face data set; read as documents.

A document is streamed as one or more pieces, so that a file larger than memory can be prepared.
"""

import codecs
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from glabench.corpus.zstd import open_zstd
from glabench.errors import GlabenchError, UnavailableError, UsageError
from glabench.installed import is_installed

SEPARATOR = "\n\n\n\n"  # three blank lines part the documents of a .txt file
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 22  # characters: a longer document is cut, so that memory stays bounded
PACKED = (".xz", ".gz", ".zst")
KINDS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a document, or a part of it; `last` where the document ends here."""

    text: str
    last: bool = True


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or one data set folder. `path` is relative to the folder it was found in."""

    path: str
    kind: str  # ".txt", ".jsonl", ".parquet" or "dataset"
    bytes: int
    sha256: str


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder (`save_to_disk`)."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def find(folder: Path) -> tuple[list[Source], int]:
    """The text files below a folder in the order of their names, and how many others were passed over.

    Raises: UsageError where there is no folder, or no text in it.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder.name!r}", where=str(folder), fix="name a folder of text files")
    if is_dataset(folder):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        whole = hashlib.sha256(b"".join(_digest(p).encode() for p in files)).hexdigest()
        return [Source("dataset", "dataset", sum(p.stat().st_size for p in files), whole)], 0
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(folder))]
    found = [(p, kind) for p in files if (kind := _kind(p))]
    if not found:
        raise UsageError(
            "no text in the folder",
            where=str(folder),
            fix="put .txt, .jsonl or .parquet files there; .xz, .gz and .zst of the first two are read too",
        )
    sources = [
        Source(p.relative_to(folder).as_posix(), kind, p.stat().st_size, _digest(p)) for p, kind in found
    ]
    return sources, len(files) - len(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in KINDS and not (suffix == ".parquet" and path.suffix in PACKED) else None


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise UsageError(
            f"cannot read {path.name}: {err.strerror}", where=str(path), fix="check its permissions"
        ) from err


def read(folder: Path, source: Source, field: str) -> Iterator[Piece]:
    """Stream the pieces of a source. `field` is the column or key that holds the text.

    Raises: UsageError for bad UTF-8 (file and byte offset), a broken archive, a line that is not JSON,
    a missing field; UnavailableError where a reader is not installed.
    """
    path = folder if source.kind == "dataset" else folder / source.path
    reader: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
        ".txt": _read_text,
        ".jsonl": _read_json_lines,
        ".parquet": _read_parquet,
        "dataset": _read_dataset,
    }
    return reader[source.kind](path, field)


@contextmanager
def _unpacking(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked; whatever a broken archive raises becomes one UsageError."""
    broken: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
    openers: dict[str, Callable[[Path], Any]] = {".xz": lzma.open, ".gz": gzip.open}
    if path.suffix == ".zst":
        if not is_installed("zstandard"):
            raise UnavailableError(
                "zstandard is not installed", where=str(path), fix="pip install zstandard, or unpack the file"
            )
        import zstandard

        openers[".zst"], broken = open_zstd, (*broken, zstandard.ZstdError)
    try:
        with openers.get(path.suffix, lambda p: p.open("rb"))(path) as file:
            yield file
    except broken as err:
        doing = "unpack" if path.suffix in PACKED else "read"
        raise UsageError(
            f"cannot {doing} {path.name}: {err}", where=str(path), fix="replace the file, or take it away"
        ) from err


def _bad_utf8(path: Path, offset: int) -> UsageError:
    inside = " of the unpacked text" if path.suffix in PACKED else ""
    return UsageError(
        "not UTF-8", where=f"{path}, byte {offset}{inside}", fix="convert the file to UTF-8, or take it away"
    )


def _read_text(path: Path, field: str) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    seen, text, begun = 0, "", False
    with _unpacking(path) as file:
        while True:
            block = file.read(BLOCK)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                text += decoder.decode(block, final=not block)
            except UnicodeDecodeError as err:
                raise _bad_utf8(path, seen - waiting + err.start) from err
            if seen == 0:
                text = text.removeprefix("\ufeff")
            seen += len(block)
            *whole, text = text.split(SEPARATOR)
            for document in whole:
                yield from _pieces(document, begun)
                begun = False
            while len(text) > PIECE + len(SEPARATOR):
                cut = text.rfind("\n", 1, PIECE) + 1 or PIECE
                yield Piece(text[:cut], last=False)
                text, begun = text[cut:], True
            if not block:
                yield from _pieces(text, begun)
                return


def _pieces(document: str, begun: bool = False) -> Iterator[Piece]:
    """A document of any length in pieces; nothing for an empty one, unless its beginning went before."""
    text = document.rstrip("\n") if begun else document.strip("\n")
    while len(text) > PIECE:
        cut = text.rfind("\n", 1, PIECE) + 1 or PIECE
        yield Piece(text[:cut], last=False)
        text, begun = text[cut:], True
    if text or begun:
        yield Piece(text)


def _text_of(record: Any, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UsageError(
            f"no text under {field!r}", where=where, fix=f"there is {keys}: name it with --field"
        )
    return text


def _read_json_lines(path: Path, field: str) -> Iterator[Piece]:
    seen = 0
    with _unpacking(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as err:
                raise _bad_utf8(path, seen + err.start) from err
            except json.JSONDecodeError as err:
                raise UsageError(f"not JSON: {err.msg}", where=where, fix="mend or remove that line") from err
            seen += len(line)
            if record is not None:
                yield from _pieces(_text_of(record, field, where))


def _read_parquet(path: Path, field: str) -> Iterator[Piece]:
    if not is_installed("pyarrow"):
        raise UnavailableError("pyarrow is not installed", where=str(path), fix="pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                _text_of(dict.fromkeys(names), field, str(path))
            for batch in file.iter_batches(columns=[field], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    yield from _pieces(_text_of({field: text or ""}, field, str(path)))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as err:
        raise UsageError(
            f"cannot read {path.name}: {str(err).splitlines()[0]}", where=str(path), fix="replace the file"
        ) from err


def _read_dataset(path: Path, field: str) -> Iterator[Piece]:
    if not is_installed("datasets"):
        raise UnavailableError(
            "this is a Hugging Face data set and datasets is not installed",
            where=str(path),
            fix="pip install datasets, or export the set as .jsonl or .parquet",
        )
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except GlabenchError:
        raise
    except (OSError, ValueError) as err:
        raise UsageError(
            f"cannot read the data set: {str(err).splitlines()[0]}", where=str(path), fix="save it again"
        ) from err
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UsageError(
                "the data set has no split 'train'",
                where=str(path),
                fix=f"name the folder of one split: {', '.join(data)}",
            )
        data = data["train"]
    for number, record in enumerate(data):
        yield from _pieces(_text_of(record, field, f"{path}, record {number}"))
