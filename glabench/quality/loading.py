"""A local checkpoint with its tokenizer: ours, flash-linear-attention's, any transformers causal model.

Local files only; no remote code; safetensors only.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glabench.corpus import tokenizer as vocabularies
from glabench.errors import GlabenchError, UsageError
from glabench.models import checkpoints
from glabench.models.mamba import use_chunked_scan

TRAINED = "state.json"  # beside a checkpoint of `glabench train`: which tokenizer its data had
OTHER_LAYOUTS = {"gla", "retnet", "transformer", "mamba", "mamba2", "llama"}  # those of models.checkpoints
DEFAULT_LENGTH = 2048  # where a configuration names none: the length the paper trains at
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in evaluation mode on its device, and the tokenizer that fits it.

    `adds_special` is False where the vocabulary was used without special tokens in training, None where the
    tokenizer's own files decide. `digest` names the weights; `max_length` is what the model was trained at.
    """

    label: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adds_special: bool | None
    digest: str
    tokenizer_digest: str
    max_length: int

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


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


def load(
    folder: Path, *, tokenizer: str = "", device: str = "cpu", dtype: torch.dtype | None = None
) -> Checkpoint:
    """The checkpoint in `folder`; `tokenizer` is a folder, a file, "mistral" or "bytes" in place of its own.

    `dtype` defaults to the weights' own. Raises: UsageError for a folder that is no checkpoint, one whose
    tensors do not fit, or a tokenizer that is missing, or has more entries than the model.
    """
    model = _model(folder, dtype).to(device).eval()
    found, adds_special, digest = _tokenizer(folder, tokenizer)
    entries = model.config.get_text_config().vocab_size
    if len(found) > entries:
        raise UsageError(
            f"the tokenizer has {len(found):,} entries and the model {entries:,}",
            where=label(folder),
            fix="name the tokenizer that the model was trained with (--tokenizer)",
        )
    if found.eos_token_id is None and found.bos_token_id is None:
        raise UsageError(
            "the tokenizer has neither a first nor a last token", where=label(folder), fix="use --tokenizer"
        )
    length = getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    return Checkpoint(label(folder), model, found, adds_special, weights_digest(folder), digest, length)


def label(folder: Path) -> str:
    """A short name for rows: the folder's, with the run's before it for a checkpoint of a training run."""
    folder = folder.resolve()
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}/{folder.name}"
    return folder.name


def weights_digest(folder: Path) -> str:
    """Digest of the configuration and of every weight file: names, sizes, and their first and last 64 KiB."""
    whole = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        whole.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            whole.update(file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            whole.update(file.read())
    return whole.hexdigest()[:12]


def _model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    kind = _read(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if kind in ("mamba", "mamba2"):
        use_chunked_scan()
    if kind is None or kind in OTHER_LAYOUTS or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return checkpoints.load(folder, dtype=dtype)  # it says what is wrong with a folder that is none
    return _transformers_model(folder, dtype)


def _transformers_model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """A causal model of any family that the installed transformers knows."""
    if "auto_map" in _read(folder / "config.json") or not any(folder.glob("*.safetensors")):
        return checkpoints.load(folder)  # refuses code and pickles, in its words
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        text = " ".join(str(err).split())[:200]
        raise UsageError(
            f"cannot load the checkpoint: {text}", where=label(folder), fix="copy it anew"
        ) from err
    for word, key in (("missing", "missing_keys"), ("without a place", "unexpected_keys")):
        names = sorted(map(str, report.get(key, ())))
        if names:
            raise UsageError(
                f"{len(names)} tensors are {word}, {names[0]} first",
                where=label(folder),
                fix="check config.json against the weights",
            )
    return model


def _tokenizer(folder: Path, asked: str) -> tuple[PreTrainedTokenizerBase, bool | None, str]:
    """(tokenizer, whether it adds special tokens by itself or None, its digest)."""
    if asked and not Path(asked).is_dir():
        return _vocabulary(asked, _trained_with(folder))
    source = Path(asked) if asked else folder
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        return _from_folder(source)
    record = _trained_with(source)
    if record.get("name") in ("bytes", "mistral"):
        return _vocabulary(record["name"], record)
    named = f" (its data had {record['name']})" if record.get("name") else ""
    raise UsageError(
        f"no tokenizer beside the weights{named}",
        where=label(source),
        fix="name one: --tokenizer FOLDER, FILE, mistral or bytes",
    )


def _trained_with(folder: Path) -> dict[str, Any]:
    """The tokenizer that a training run of ours recorded; empty for another's checkpoint."""
    path = folder / TRAINED
    record = _read(path).get("tokenizer") if path.is_file() else None
    return record if isinstance(record, dict) else {}


def _from_folder(folder: Path) -> tuple[PreTrainedTokenizerBase, None, str]:
    if "auto_map" in (_read(p) if (p := folder / "tokenizer_config.json").is_file() else {}):
        raise UsageError(
            "the tokenizer wants to run code of its own (auto_map)",
            where=label(folder),
            fix="use --tokenizer with its tokenizer.json or .model file",
        )
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # the libraries below raise bare Exception for a file they cannot read
        text = " ".join(str(err).split())[:160]
        raise UsageError(
            f"cannot load the tokenizer: {text}", where=label(folder), fix="use --tokenizer"
        ) from err
    whole = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            whole.update((folder / name).read_bytes())
    return found, None, whole.hexdigest()


def _vocabulary(name: str, record: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, bool, str]:
    """One that `data prepare` takes, without special tokens, as it was used there."""
    known = vocabularies.load(name)
    if record and record.get("sha256") != known.digest:
        raise UsageError(
            f"the model was trained with the tokenizer {record.get('name')}, not this {known.name}",
            where="--tokenizer",
            fix="name the file its data was prepared with",
        )
    if known.name == "bytes":
        pieces = [f"<0x{i:02X}>" for i in range(256)] + ["<end>"]
        made: PreTrainedTokenizerBase = Pieces(
            _to_bytes, _from_bytes, pieces, eos_token="<end>", pad_token="<end>"
        )
    elif name.endswith(".json"):
        import tokenizers

        inner = tokenizers.Tokenizer.from_file(name)
        made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=inner.id_to_token(known.end))
    else:
        made = _sentencepiece(vocabularies.sentencepiece_path(name))
    return made, False, known.digest


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


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UsageError(f"{path.name} cannot be read", where=str(path.parent), fix="copy it anew") from err
    return found if isinstance(found, dict) else {}


def refusal(folder: Path) -> GlabenchError | None:
    """Why the folder is no checkpoint, from its configuration alone: asked of all before one is loaded."""
    path = folder / "config.json"
    try:
        if not path.is_file() or _read(path).get("model_type") in OTHER_LAYOUTS:
            checkpoints.read_config(folder)
    except GlabenchError as err:
        return err
    return None
