"""Long documents: the shipped sample or a folder of text, as named token arrays of one length."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from glabench.corpus import sources
from glabench.corpus.manifest import MANIFEST, check_tokenizer, read_manifest, verify
from glabench.corpus.shards import INDEX_DTYPE
from glabench.corpus.tokenizer import Tokenizer
from glabench.errors import UsageError

SAMPLE = Path(__file__).parent / "books"
SAMPLE_NAME = "books"
CHARACTERS = 8  # of text cut off for each wanted token: twice what a token of prose has


@dataclass(frozen=True, slots=True)
class Document:
    """The first tokens of a document: ids [T], and the UTF-8 bytes that each bucket of them stands for."""

    name: str
    digest: str
    ids: np.ndarray
    bytes: list[int]


@dataclass(slots=True)
class Documents:
    """The documents of a folder that are long enough, and how many were passed over."""

    dataset: str
    kept: list[Document] = field(default_factory=list)
    short: int = 0
    empty: int = 0
    longest: int = 0

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(d.digest for d in self.kept).encode()).hexdigest()[:12]

    def skipped(self, tokens: int) -> str:
        """What was passed over, in words; empty for nothing."""
        parts = [f"{self.short} shorter than {tokens:,} tokens"] * bool(self.short)
        parts += [f"{self.empty} empty"] * bool(self.empty)
        return f"{self.dataset}: {' and '.join(parts)}, skipped" if parts else ""


def read(folder: Path | None, words: Tokenizer, tokens: int, bucket: int, most: int | None) -> Documents:
    """At most `most` documents of at least `tokens` tokens, each cut there; the sample without a folder.

    A folder holds text, or what `glabench data prepare` made of it: then its validation split, where there is
    one. The same documents make every bucket, so that a curve shows position and nothing else. Raises:
    UsageError where none is left, or where shards have another vocabulary.
    """
    found = Documents(SAMPLE_NAME if folder is None else folder.resolve().name)
    is_prepared = folder is not None and (folder / MANIFEST).is_file()
    for name, ids in _prepared(folder, words) if is_prepared else _encoded(folder or SAMPLE, words, tokens):
        if not len(ids):
            found.empty += 1
            continue
        found.longest = max(found.longest, len(ids))
        if len(ids) < tokens:
            found.short += 1
            continue
        digest = hashlib.sha256(ids[:tokens].astype("<u4").tobytes()).hexdigest()
        found.kept.append(Document(name, digest, ids[:tokens], _bytes(ids[:tokens], words, bucket)))
        if len(found.kept) == most:
            break
    if not found.kept:
        raise UsageError(
            f"no document of {tokens:,} tokens ({words.name}): the longest has {found.longest:,}; "
            f"{found.skipped(tokens)}",
            where=str(folder or SAMPLE_NAME),
            fix="lower --lengths, or name longer documents with --data",
        )
    return found


def _prepared(folder: Path, words: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """(shard and number, ids) of each document in the shards, without the token that ends it."""
    made = read_manifest(folder)
    verify(folder, made, contents=False)
    check_tokenizer(made, words.describe())
    split = "valid" if made["splits"]["valid"]["tokens"] else "train"
    for shard in made["splits"][split]["shards"]:
        tokens = np.memmap(folder / shard["file"], np.dtype(made["dtype"]), mode="r")
        ends = np.fromfile(folder / shard["index"], INDEX_DTYPE).tolist()
        for number, (start, end) in enumerate(itertools.pairwise([0, *ends]), start=1):
            yield f"{Path(shard['file']).stem}:{number}", np.asarray(tokens[start : end - 1])


def _encoded(folder: Path, words: Tokenizer, tokens: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, at least the first `tokens` ids where it has them) of each document of text."""
    for name, text in _texts(folder):
        yield name, _encode(text, words, tokens) if text.strip() else np.empty(0, np.uint32)


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each document; a file without any is one empty document."""
    for source in sources.find(folder)[0]:
        number, parts = 0, []
        for piece in sources.read(folder, source, "text"):
            parts.append(piece.text)
            if piece.last:
                number += 1
                yield source.path if number == 1 else f"{source.path}:{number}", "".join(parts)
                parts = []
        if number == 0:
            yield source.path, ""


def _encode(text: str, words: Tokenizer, tokens: int) -> np.ndarray:
    """At least the first `tokens` tokens, where the text has them; not all of a book is worth encoding."""
    ids = words.encode([text[: CHARACTERS * tokens]])[0]
    whole = len(text) <= CHARACTERS * tokens or len(ids) > tokens
    return ids if whole else words.encode([text])[0]


def _bytes(ids: np.ndarray, words: Tokenizer, bucket: int) -> list[int]:
    """Bytes of each bucket: differences of prefixes, so that what a cut character adds is taken off again."""
    ends = [len(words.decode(ids[:end])) for end in range(bucket, len(ids) + 1, bucket)]
    return [b - a for a, b in zip([0, *ends], ends, strict=False)]
