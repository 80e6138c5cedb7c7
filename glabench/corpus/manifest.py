"""The manifest of a prepared corpus: read, checked against the shards, and the tokens it names."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from glabench.errors import UsageError

MANIFEST = "manifest.json"
SCHEMA = 1
AGAIN = "run glabench data prepare again into a new folder"


def digest_of(manifest: dict[str, Any]) -> str:
    """Names the data: the same tokens in the same order have the same digest, wherever they lie."""
    shards = {split: [s["sha256"] for s in part["shards"]] for split, part in manifest["splits"].items()}
    named = {"tokenizer": manifest["tokenizer"]["sha256"], "dtype": manifest["dtype"], "shards": shards}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: UsageError where there is no manifest, or one that is not this version's."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            "no prepared data", where=str(folder), fix=f"run glabench data prepare TEXT --out {folder}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA or manifest["digest"] != digest_of(manifest):
            raise ValueError("another version's, or changed by hand")
    except (ValueError, KeyError, TypeError) as err:
        raise UsageError(f"{MANIFEST} is not readable: {err}", where=str(path), fix=AGAIN) from err
    return manifest


def verify(folder: Path, manifest: dict[str, Any], *, contents: bool = True) -> None:
    """Compare every shard with the manifest: its size, then, with `contents`, its sha256.

    Raises: UsageError naming the first shard that is missing, truncated or changed.
    """
    width = np.dtype(manifest["dtype"]).itemsize
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    for shard in shards:
        for key, size, digest in (
            ("file", shard["tokens"] * width, shard["sha256"]),
            ("index", shard["documents"] * 8, shard["index_sha256"]),
        ):
            path = folder / shard[key]
            if not path.is_file():
                raise UsageError(f"shard {path.name} is missing", where=str(folder), fix=AGAIN)
            found = path.stat().st_size
            if found != size:
                what = "truncated" if found < size else "longer"
                raise UsageError(
                    f"shard {path.name} is {what}: {found:,} bytes, not {size:,}",
                    where=str(folder),
                    fix=AGAIN,
                )
            if contents:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise UsageError(
                            f"shard {path.name} changed after it was prepared", where=str(folder), fix=AGAIN
                        )


def check_tokenizer(manifest: dict[str, Any], described: dict[str, Any]) -> None:
    """Raises: UsageError where a tokenizer's description is not the one the data was made with."""
    made = manifest["tokenizer"]
    if made["sha256"] != described["sha256"]:
        raise UsageError(
            f"the tokenizer {described['name']} {described['sha256'][:12]} does not match the manifest's, "
            f"{made['name']} {made['sha256'][:12]}",
            where=MANIFEST,
            fix="use the one the data was prepared with, or prepare it again",
        )


class Tokens:
    """One split as a single run of tokens over its memory-mapped shards."""

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.shards = [
            np.memmap(folder / shard["file"], dtype, mode="r")
            for shard in manifest["splits"][split]["shards"]
        ]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `[start, start + length)` as int64 `[length]`. Raises IndexError past the end."""
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        out, at = np.empty(length, np.int64), 0
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while at < length:
            inside = start + at - int(self.starts[number])
            part = self.shards[number][inside : inside + length - at]
            out[at : at + len(part)] = part
            at, number = at + len(part), number + 1
        return out
