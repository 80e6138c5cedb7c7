"""Token shards being written: `SPLIT-00000.bin` beside `.idx`, restored to any journaled point.

A .bin file is the documents' token ids, one after the other; its .idx is the end of each document,
in tokens from the shard's start, as little-endian uint64.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

INDEX_DTYPE = np.dtype("<u8")
DRAFT = ".partial"
SHARD = re.compile(r"(train|valid)-\d{5,}\.(bin|idx)(\.partial)?")


def stray(folder: Path, kept: set[str]) -> list[Path]:
    """Shard files in a folder, finished or not, whose names are not among `kept`."""
    return [p for p in folder.iterdir() if SHARD.fullmatch(p.name) and p.name not in kept]


class SplitWriter:
    """Appends documents of one split. `state` after `sync` is durable, and what `SplitWriter` starts from.

    A shard closes at the end of the document that makes it reach `shard_tokens`.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.state: dict[str, Any] = state or {"shards": [], "tokens": 0, "documents": 0}
        self._restore()

    @property
    def tokens(self) -> int:
        """Tokens in every shard so far."""
        return sum(shard["tokens"] for shard in self.state["shards"]) + self.state["tokens"]

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-{len(self.state['shards']):05d}{suffix}"

    def _restore(self) -> None:
        """Cut the open shard back to the journal; what a killed run wrote after it is lost on purpose."""
        sizes = {
            ".bin": self.state["tokens"] * self.dtype.itemsize,
            ".idx": self.state["documents"] * INDEX_DTYPE.itemsize,
        }
        self.files = {}
        for suffix, size in sizes.items():
            draft, final = self._path(suffix + DRAFT), self._path(suffix)
            if final.exists():  # killed after the rename and before the journal
                final.replace(draft)
            self.files[suffix] = draft.open("r+b" if draft.exists() else "w+b")
            self.files[suffix].truncate(size)
            self.files[suffix].seek(size)

    def append(self, ids: np.ndarray, *, end: int | None) -> None:
        """Add a piece; `end` is the token that closes its document, and with it, maybe, the shard."""
        self.files[".bin"].write(ids.astype(self.dtype, copy=False).tobytes())
        self.state["tokens"] += len(ids)
        if end is None:
            return
        self.files[".bin"].write(np.array([end], self.dtype).tobytes())
        self.state["tokens"] += 1
        self.files[".idx"].write(np.array([self.state["tokens"]], INDEX_DTYPE).tobytes())
        self.state["documents"] += 1
        if self.state["tokens"] >= self.shard_tokens:
            self._close()
            self._restore()

    def sync(self) -> None:
        """Make everything appended so far durable."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> list[dict[str, Any]]:
        """Close the last shard and return what the manifest says of them all."""
        if self.state["tokens"]:
            self._close()
        else:
            for suffix, file in self.files.items():
                file.close()
                self._path(suffix + DRAFT).unlink()
        return self.state["shards"]

    def close(self) -> None:
        """Let go of the files, as they are: the journal decides what of them counts."""
        for file in self.files.values():
            file.close()

    def _close(self) -> None:
        self.sync()
        hashes = {}
        for suffix, file in self.files.items():
            file.seek(0)
            hashes[suffix] = hashlib.file_digest(file, "sha256").hexdigest()
            file.close()
        shard = {
            "file": self._path(".bin").name,
            "tokens": self.state["tokens"],
            "documents": self.state["documents"],
            "sha256": hashes[".bin"],
            "index": self._path(".idx").name,
            "index_sha256": hashes[".idx"],
        }
        for suffix in self.files:
            self._path(suffix + DRAFT).replace(self._path(suffix))
        self.state["shards"].append(shard)
        self.state["tokens"] = self.state["documents"] = 0
