"""Tokenizers that need no network: bytes, the 32k Mistral vocabulary, or a file."""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glabench.errors import UnavailableError, UsageError
from glabench.installed import is_installed

END_OF_BYTES = 256  # after the 256 byte values
END_NAMES = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
MISTRAL_FILE = "tokenizer.model.v1"  # the first Mistral release: 32,000 entries, as the paper's models have
EXTRA = "pip install 'glabench[train]', or name another with --tokenizer: bytes, or a file"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text -> token ids and back. `digest` is the vocabulary's sha256; `end` closes a document."""

    name: str
    digest: str
    vocabulary: int
    end: int
    encode: Callable[[Sequence[str]], list[np.ndarray]]  # one [tokens] array a text, no special tokens
    decode: Callable[[np.ndarray], bytes]  # UTF-8; a character that the last token cuts is not the original's

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every id, little-endian on every machine."""
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "vocabulary": self.vocabulary,
            "end_of_document": self.end,
        }


def load(name: str) -> Tokenizer:
    """`bytes`, `mistral`, or the path of a SentencePiece .model or a tokenizers .json file.

    Raises: UsageError for a name or a file that is neither, UnavailableError for a missing package.
    """
    if name == "bytes":
        return _bytes()
    if name == "mistral":
        return _sentencepiece("mistral", _mistral_path())
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"no tokenizer {name!r}", where="--tokenizer", fix="use mistral, bytes or a file")
    if path.suffix == ".json":
        return _tokenizers_json(path)
    return _sentencepiece(path.name, path)


def sentencepiece_path(name: str) -> Path:
    """The file of a SentencePiece vocabulary, "mistral" or a path."""
    return _mistral_path() if name == "mistral" else Path(name)


def _bytes() -> Tokenizer:
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(ids: np.ndarray) -> bytes:
        return ids[ids < END_OF_BYTES].astype(np.uint8).tobytes()

    digest = hashlib.sha256(b"UTF-8 bytes, then end of document = 256").hexdigest()
    return Tokenizer("bytes", digest, END_OF_BYTES + 1, END_OF_BYTES, encode, decode)


def _mistral_path() -> Path:
    spec = importlib.util.find_spec("mistral_common")  # only found, never imported: it takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError("mistral-common is not installed", where="--tokenizer mistral", fix=EXTRA)
    path = Path(spec.submodule_search_locations[0], "data", MISTRAL_FILE)
    if not path.is_file():
        raise UnavailableError(
            f"mistral-common has no {MISTRAL_FILE}",
            where="--tokenizer mistral",
            fix="install another version",
        )
    return path


def _sentencepiece(name: str, path: Path) -> Tokenizer:
    if not is_installed("sentencepiece"):
        raise UnavailableError("sentencepiece is not installed", where=f"--tokenizer {name}", fix=EXTRA)
    import sentencepiece

    data = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as err:
        raise UsageError(
            f"{path.name} is not a SentencePiece model", where=str(path), fix="name a .model or .json file"
        ) from err
    if model.eos_id() < 0:
        raise UsageError(
            "the vocabulary has no end of sequence", where=str(path), fix="use one with an </s> entry"
        )

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.uint32) for ids in model.encode(list(texts), num_threads=-1)]

    def decode(ids: np.ndarray) -> bytes:
        return model.decode(ids.tolist()).encode("utf-8")

    digest = hashlib.sha256(data).hexdigest()
    return Tokenizer(name, digest, model.vocab_size(), model.eos_id(), encode, decode)


def _tokenizers_json(path: Path) -> Tokenizer:
    if not is_installed("tokenizers"):
        raise UnavailableError("tokenizers is not installed", where=str(path), fix=EXTRA)
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises bare Exception for a file it cannot read
        raise UsageError(
            f"{path.name} is not a tokenizer", where=str(path), fix="name a .model or .json file"
        ) from err
    ends = [i for n in END_NAMES if (i := model.token_to_id(n)) is not None]
    if not ends:
        raise UsageError(
            "the vocabulary has no end of document", where=str(path), fix=f"add one of {', '.join(END_NAMES)}"
        )

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        coded = model.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.uint32) for one in coded]

    def decode(ids: np.ndarray) -> bytes:
        return model.decode(ids.tolist(), skip_special_tokens=False).encode("utf-8")

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    vocabulary = model.get_vocab_size(with_added_tokens=True)
    return Tokenizer(path.name, digest, vocabulary, ends[0], encode, decode)
