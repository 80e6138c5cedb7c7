"""`glabench data prepare`: from what was typed to a prepared folder and its summary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from glabench import tables
from glabench.errors import UsageError

DEFAULT_VALID_FRAC = 0.01  # of the documents, where no folder of validation text is named


def prepare(
    folder: Path,
    out: Path,
    *,
    tokenizer: str,
    valid: Path | None,
    valid_frac: float | None,
    shard_tokens: int,
    field: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Prepare a folder and return its summary. Raises UsageError, UnavailableError."""
    from glabench import meter
    from glabench.corpus import prepare as preparing
    from glabench.corpus import tokenizer as tokenizers

    if valid is not None and valid_frac is not None:
        raise UsageError("both --valid and --valid-frac are given", where="--valid", fix="give one")
    frac = valid_frac if valid_frac is not None else 0.0 if valid is not None else DEFAULT_VALID_FRAC
    if not 0 <= frac < 1:
        raise UsageError(
            f"{frac:g} is not a share", where="--valid-frac", fix="write a number from 0 up to 1"
        )
    request = preparing.Request(
        folder=folder,
        out=out,
        tokenizer=tokenizers.load(tokenizer),
        valid=valid,
        valid_frac=frac,
        shard_tokens=shard_tokens,
        field=field,
    )
    manifest = preparing.prepare(request, say, meter.meter)
    if not manifest["splits"]["valid"]["tokens"] and frac:
        say(f"no document fell to the {frac:g} kept for validation; name a folder with --valid")
    return summary(manifest, out)


def summary(manifest: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the table and --json show; its keys are API."""
    splits = {
        name: {"documents": part["documents"], "tokens": part["tokens"], "shards": len(part["shards"])}
        for name, part in manifest["splits"].items()
    }
    return {
        "folder": str(out),
        "digest": manifest["digest"],
        "tokenizer": manifest["tokenizer"]["name"],
        "vocabulary": manifest["tokenizer"]["vocabulary"],
        "dtype": manifest["dtype"],
        "splits": splits,
    }


def show(done: dict[str, Any]) -> None:
    tables.show(
        ("split", "documents", "tokens", "shards"),
        [
            (name, f"{s['documents']:,}", f"{s['tokens']:,}", s["shards"])
            for name, s in done["splits"].items()
        ],
        right=("documents", "tokens", "shards"),
    )
    tables.say(f"{done['folder']}: {done['tokenizer']}, {done['vocabulary']:,} entries, {done['dtype']}")
