"""The tokenizer that lm-evaluation-harness is given: a checkpoint's own, or the one its training data had."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from glabench.corpus import tokenizer as vocabularies
from glabench.corpus.tokenizer import Tokenizer
from glabench.errors import UsageError
from glabench.quality.loading import TOKENIZERS, Checkpoint


class Pieces(PreTrainedTokenizer):
    """A vocabulary of `data prepare` as a transformers tokenizer: the same ids for the same text."""

    def __init__(self, split: Any, join: Any, pieces: list[str], **special: str) -> None:
        self.split_text, self.join, self.pieces = split, join, pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        super().__init__(split_special_tokens=True, **special)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.split_text(text)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.join(tokens)


def file_of(asked: str) -> str | None:
    """What `--tokenizer` names, as `loading.describe` takes it: a folder stands for the file in it."""
    if not asked or not Path(asked).is_dir():
        return asked or None
    found = next((path for name in TOKENIZERS if (path := Path(asked, name)).is_file()), None)
    if found is None:
        raise UsageError(
            f"no {TOKENIZERS[0]} in {asked}", where="--tokenizer", fix="name a tokenizer's folder"
        )
    return str(found)


def for_harness(checkpoint: Checkpoint, asked: str) -> tuple[PreTrainedTokenizerBase, bool | None]:
    """(tokenizer, whether it adds special tokens; None: as its files say, which is the harness's default).

    A folder's own files are read by transformers. What `data prepare` encoded with is used as it was there:
    without special tokens, and with the end of a document as the token before a text. Raises: UsageError.
    """
    folder = Path(asked) if asked else checkpoint.folder
    if folder.is_dir() and any((folder / name).is_file() for name in TOKENIZERS):
        return _from_folder(folder), None
    return _as_prepared(checkpoint.tokenizer, asked), False


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # the libraries below raise bare Exception for a file they cannot read
        text = " ".join(str(err).split())[:160]
        raise UsageError(f"cannot load the tokenizer: {text}", where=str(folder), fix="mend it") from err
    if not isinstance(found, PreTrainedTokenizer | PreTrainedTokenizerFast):
        raise UsageError(
            f"the harness cannot use a {type(found).__name__}", where=str(folder), fix="add a tokenizer.json"
        )
    if found.eos_token_id is None and found.bos_token_id is None:
        raise UsageError(
            "the tokenizer names neither a first nor a last token",
            where=str(folder),
            fix="add eos_token to its tokenizer_config.json",
        )
    return found


def _as_prepared(known: Tokenizer, asked: str) -> PreTrainedTokenizerBase:
    if known.name == "bytes":
        pieces = [f"<0x{i:02X}>" for i in range(known.end)] + ["<end>"]
        return Pieces(_to_bytes, _from_bytes, pieces, eos_token="<end>", pad_token="<end>")
    if known.name.endswith(".json"):
        import tokenizers

        inner = tokenizers.Tokenizer.from_file(asked)
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=inner.id_to_token(known.end))
    return _sentencepiece(vocabularies.sentencepiece_path(asked or known.name))


def _to_bytes(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode("utf-8")]


def _from_bytes(pieces: list[str]) -> str:
    return bytes(int(p[3:5], 16) for p in pieces if p.startswith("<0x")).decode("utf-8", "replace")


def _sentencepiece(path: Path) -> Pieces:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special = {"eos_token": pieces[model.eos_id()], "unk_token": pieces[model.unk_id()]}
    return Pieces(lambda text: model.encode(text, out_type=str), model.decode, pieces, **special)
