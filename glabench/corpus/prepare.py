"""A folder of text -> shards and a manifest; killed at any time, the same call goes on where it was."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glabench.corpus import sources
from glabench.corpus.manifest import MANIFEST, SCHEMA, digest_of, read_manifest, verify
from glabench.corpus.shards import SplitWriter, stray
from glabench.corpus.tokenizer import Tokenizer
from glabench.errors import UsageError
from glabench.meter import Meter
from glabench.results import held_folder, write_whole

JOURNAL = "progress.json"
BATCH = 1 << 22  # characters tokenized in one call: enough for every core to have its share
SYNC_TOKENS = 1 << 23  # tokens between two journal entries: a kill loses some seconds of work


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to prepare. `valid` is a folder of its own, else a share of the documents, by their content."""

    folder: Path
    out: Path
    tokenizer: Tokenizer
    valid: Path | None = None
    valid_frac: float = 0.0
    shard_tokens: int = 1 << 26
    field: str = "text"


def prepare(request: Request, say: Callable[[str], None], meter: Callable[..., Meter]) -> dict[str, Any]:
    """Write `out/manifest.json` and the shards it names, or find them there; return the manifest.

    Raises: UsageError for a source that cannot be read, or an `out` made from something else.
    """
    inputs = [("train", request.folder), *([("valid", request.valid)] if request.valid else [])]
    found = {}
    for split, folder in inputs:
        found[split], ignored = sources.find(folder)
        if ignored:
            say(f"{ignored} files passed over in {folder}: not .txt, .jsonl or .parquet")
    asked = _describe(request, found)
    _check_folder(request.out)
    with held_folder(request.out, "another process prepares this folder"):
        if (request.out / MANIFEST).exists():
            done = read_manifest(request.out)
            _same(done["request"], asked, request.out)
            verify(request.out, done)
            say(f"already prepared: {request.out}")
            return done
        return _write(request, found, dict(inputs), asked, say, meter)


def _describe(request: Request, found: dict[str, list[sources.Source]]) -> dict[str, Any]:
    return {
        "tokenizer": request.tokenizer.describe(),
        "valid_frac": request.valid_frac,
        "shard_tokens": request.shard_tokens,
        "field": request.field,
        "sources": {split: [asdict(s) for s in listed] for split, listed in found.items()},
    }


def _check_folder(out: Path) -> None:
    """Only an empty folder, or one that prepare began, may be written to."""
    if not out.is_dir():
        if out.exists():
            raise UsageError(f"{out.name} is not a folder", where="--out", fix="choose another path")
        return
    ours = (MANIFEST, JOURNAL, ".lock")
    if any(out.iterdir()) and not any((out / name).exists() for name in ours):
        raise UsageError(
            f"{out.name} holds other files", where="--out", fix="choose an empty or a new folder"
        )


def _same(done: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    """Raise UsageError naming the first thing in which what lies in `out` differs from what was asked."""
    _same_options(done, asked, out)
    for split in sorted({*done["sources"], *asked["sources"]}):
        before = {s["path"]: s for s in done["sources"].get(split, [])}
        after = {s["path"]: s for s in asked["sources"].get(split, [])}
        changed = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
        if changed:
            raise UsageError(
                f"prepared from other {split} text: {changed[0]} is new, gone or changed",
                where=str(out),
                fix="choose another --out",
            )


def _same_options(done: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    fix = "choose another --out"
    if done["tokenizer"] != asked["tokenizer"]:
        ours, theirs = (f"{t['name']} {t['sha256'][:12]}" for t in (asked["tokenizer"], done["tokenizer"]))
        raise UsageError(
            f"the tokenizer {ours} does not match the one it was prepared with, {theirs}",
            where=str(out),
            fix=fix,
        )
    for key in ("valid_frac", "shard_tokens", "field"):
        if done[key] != asked[key]:
            raise UsageError(f"prepared with {key}={done[key]}, not {asked[key]}", where=str(out), fix=fix)


def _write(
    request: Request,
    found: dict[str, list[sources.Source]],
    folders: dict[str, Path],
    asked: dict[str, Any],
    say: Callable[[str], None],
    meter: Callable[..., Meter],
) -> dict[str, Any]:
    journal = _Journal(request.out / JOURNAL, asked, say)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                closing(
                    SplitWriter(
                        request.out,
                        split,
                        request.tokenizer.dtype,
                        request.shard_tokens,
                        journal.splits.get(split),
                    )
                )
            )
            for split in ("train", "valid")
        }
        _fill(request, found, folders, writers, journal, meter)
        return _finish(request, asked, writers)


def _fill(
    request: Request,
    found: dict[str, list[sources.Source]],
    folders: dict[str, Path],
    writers: dict[str, SplitWriter],
    journal: "_Journal",
    meter: Callable[..., Meter],
) -> None:
    jobs = [(split, source) for split, listed in found.items() for source in listed]
    total = sum(source.bytes for _, source in jobs)
    before = sum(source.bytes for _, source in jobs[: journal.source])
    with meter(total, "bytes", done=before) as bar:
        for number, (split, source) in enumerate(jobs):
            if number < journal.source:
                continue
            skip = journal.pieces if number == journal.source else 0

            def tell(done: int, path: str = source.path) -> None:
                bar.update(done, f"{path}  {sum(w.tokens for w in writers.values()):,} tokens")

            for pieces in _one_source(request, folders[split], split, source, skip, writers):
                journal.keep(number, pieces, writers)
                tell(before)  # how much of a packed file is read is not known: the tokens say that it goes on
            journal.keep(number + 1, 0, writers)
            before += source.bytes
            tell(before)


def _one_source(
    request: Request,
    folder: Path,
    split: str,
    source: sources.Source,
    skip: int,
    writers: dict[str, SplitWriter],
) -> Iterator[int]:
    """Append a source's pieces after the first `skip`; yield, batch by batch, how many are done."""
    frac = request.valid_frac if split == "train" else 0.0
    pieces = route(sources.read(folder, source, request.field), split, frac)
    done = skip
    for batch in _batches(itertools.islice(pieces, skip, None)):
        coded = request.tokenizer.encode([piece.text for _, piece in batch])
        for (target, piece), ids in zip(batch, coded, strict=True):
            writers[target].append(ids, end=request.tokenizer.end if piece.last else None)
        done += len(batch)
        yield done


def route(
    pieces: Iterator[sources.Piece], split: str, valid_frac: float
) -> Iterator[tuple[str, sources.Piece]]:
    """Send each document to its split. A document's own text decides, so its copies stay together."""
    target, begins = split, True
    for piece in pieces:
        if begins and valid_frac:
            draw = int.from_bytes(hashlib.blake2b(piece.text.encode(), digest_size=8).digest()) / 2**64
            target = "valid" if draw < valid_frac else split
        yield target, piece
        begins = piece.last


def _batches(
    pieces: Iterator[tuple[str, sources.Piece]],
) -> Iterator[list[tuple[str, sources.Piece]]]:
    batch, size = [], 0
    for target, piece in pieces:
        batch.append((target, piece))
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _jobs(asked: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every source in the order of its turn, with its split."""
    return [(split, source) for split, listed in asked["sources"].items() for source in listed]


class _Journal:
    """How far the preparation is, in one small file replaced at once after the shards are durable."""

    def __init__(self, path: Path, asked: dict[str, Any], say: Callable[[str], None]) -> None:
        self.path, self.asked = path, asked
        self.source = self.pieces = self.kept = self.shards = 0
        self.splits: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._resume(say)
        if not self.source and not self.pieces:
            for leftover in stray(path.parent, set()):
                leftover.unlink()
            self._write(0, 0)

    def _resume(self, say: Callable[[str], None]) -> None:
        """Go on from the entry; start again where the text up to it changed (a file mended, say)."""
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
            source, pieces, request = before["source"], before["pieces"], before["request"]
            _same_options(request, self.asked, self.path.parent)
            used = source + bool(pieces)
            if _jobs(request)[:used] != _jobs(self.asked)[:used]:
                say("the text changed: starting again")
                return
            self.source, self.pieces, self.splits = source, pieces, before["splits"]
            if used:
                say(f"going on after {source} files")
        except (ValueError, KeyError, TypeError) as err:
            raise UsageError(
                f"{self.path.name} is not readable",
                where=str(self.path),
                fix="empty the folder and start again",
            ) from err

    def keep(self, source: int, pieces: int, writers: dict[str, SplitWriter]) -> None:
        """Note how far it is, where a shard closed or enough came since the last entry."""
        tokens = sum(writer.tokens for writer in writers.values())
        shards = sum(len(writer.state["shards"]) for writer in writers.values())
        if shards == self.shards and tokens - self.kept < SYNC_TOKENS:
            return
        for writer in writers.values():
            writer.sync()
        self.kept, self.shards = tokens, shards
        self.splits = {split: writer.state for split, writer in writers.items()}
        self._write(source, pieces)

    def _write(self, source: int, pieces: int) -> None:
        record = {"request": self.asked, "source": source, "pieces": pieces, "splits": self.splits}
        write_whole(self.path, json.dumps(record))


def _finish(request: Request, asked: dict[str, Any], writers: dict[str, SplitWriter]) -> dict[str, Any]:
    splits = {split: {"shards": writer.finish()} for split, writer in writers.items()}
    named = {shard[key] for part in splits.values() for shard in part["shards"] for key in ("file", "index")}
    for split in splits.values():
        split["tokens"] = sum(shard["tokens"] for shard in split["shards"])
        split["documents"] = sum(shard["documents"] for shard in split["shards"])
    if not splits["train"]["tokens"]:
        raise UsageError(
            "the text files are empty", where=str(request.folder), fix="name a folder with text in it"
        )
    manifest = {
        "schema": SCHEMA,
        "tokenizer": request.tokenizer.describe(),
        "dtype": {2: "uint16", 4: "uint32"}[request.tokenizer.dtype.itemsize],
        "splits": splits,
        "request": asked,
    }
    manifest["digest"] = digest_of(manifest)
    write_whole(request.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    folder = os.open(request.out, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    for leftover in stray(request.out, named):
        leftover.unlink()
    (request.out / JOURNAL).unlink(missing_ok=True)
    return manifest
