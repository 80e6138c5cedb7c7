"""Any local causal language model with its tokenizer: ours, flash-linear-attention's, transformers'."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from glabench.corpus import tokenizer as tokenizers
from glabench.corpus.tokenizer import Tokenizer
from glabench.errors import UsageError
from glabench.models import checkpoints
from glabench.models.config import LinearAttentionConfig
from glabench.training.checkpoint import FOLDER, STATE, newest
from glabench.training.folder import IDENTITY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the files of one, the first that is there
RECURRENT = {"mamba": "mamba", "mamba2": "mamba2"}  # transformers' model_type -> family, for the colours
EXACT = ("A_log", "D")  # Mamba's decays and skips: bfloat16 would move a decay by half a percent
LEAST_SHARE = 0.9  # of the model's vocabulary that a tokenizer has: the rest is padding to a round number


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's folder and what its files say of it; the weights are not in memory.

    `train_len` is tokens a training segment, `segments` how many of them the state was carried over, where
    known. `digest` names weights and configuration. `begin` is the token that stands before a document.
    """

    name: str
    folder: Path
    family: str
    digest: str
    train_len: int | None
    segments: int | None
    tokenizer: Tokenizer
    begin: int


def describe(folder: Path, tokenizer: str | None = None) -> Checkpoint:
    """Read everything but the weights; a training run's folder means its newest checkpoint.

    `tokenizer` is a name or a file as for `glabench data prepare`; by default what lies in the folder, or
    what the run that made it recorded. Raises: UsageError.
    """
    name = folder.resolve().name
    if folder.resolve().parent.name == FOLDER:
        name = f"{folder.resolve().parent.parent.name}-{name}"
    folder = newest(folder)
    config = _config(folder)
    state = _json(folder / STATE)
    words = _tokenizer(folder, state.get("tokenizer") or {}, tokenizer)
    _check_vocabulary(config, words, folder)
    segment, segments = _training(folder, state, config)
    # a run of ours puts the end of a document before the next one, and no other token
    begin = words.end if state or config.bos_token_id is None else config.bos_token_id
    return Checkpoint(name, folder, _family(config), _digest(folder), segment, segments, words, _first(begin))


def _first(ids: int | list[int]) -> int:
    return ids if isinstance(ids, int) else ids[0]


def load(checkpoint: Checkpoint, device: str, dtype: str) -> nn.Module:
    """The model on the device in a dtype of DTYPES, for evaluation, with logits in float32.

    Raises: UsageError for weights that are missing, left over, of another shape, or pickled.
    """
    folder = checkpoint.folder
    model = checkpoints.load(folder) if _is_known(folder) else _from_transformers(folder)
    exact = {n: p.float() for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] in EXACT}
    model = model.to(DTYPES[dtype])
    for name, value in exact.items():
        model.get_parameter(name).data = value
    model = model.to(device).eval()
    if dtype != "fp32":
        _widen_head(model)
    return model


def parameters(model: nn.Module) -> int:
    """Parameters, a head that is tied to the embeddings once, in whatever dtype `load` holds it."""
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    is_copy = model.config.tie_word_embeddings and head is not words
    return sum(p.numel() for p in model.parameters()) - is_copy * head.numel()


def _widen_head(model: nn.Module) -> None:
    """Logits from a float32 product: in bfloat16 each loss would be rounded to 8 bits."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)  # no longer tied
    if getattr(head, "bias", None) is not None:
        head.bias = nn.Parameter(head.bias.detach().float(), requires_grad=False)
    head.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))


def _is_known(folder: Path) -> bool:
    """Whether glabench's own reader takes it: it checks more, and reads flash-linear-attention's layouts."""
    kind = _json(folder / "config.json").get("model_type")
    return kind in checkpoints.KINDS


def _config(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir() or not (folder / "config.json").is_file() or _is_known(folder):
        return checkpoints.read_config(folder)
    where, fields = str(folder / "config.json"), _json(folder / "config.json")
    if "auto_map" in fields:
        raise UsageError(
            "the checkpoint wants to run code of its own (auto_map)",
            where=where,
            fix="only models that transformers itself has can be read",
        )
    if fields.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"no causal language model of model_type {fields.get('model_type')!r}",
            where=where,
            fix="name a checkpoint of glabench, flash-linear-attention or transformers",
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (TypeError, ValueError, AttributeError, KeyError, OSError) as err:
        raise UsageError(" ".join(str(err).split()), where=where, fix="mend config.json") from err


def _from_transformers(folder: Path) -> nn.Module:
    checkpoints.weight_files(folder)  # refuses pickles and missing parts in one line
    logging.set_verbosity_error()  # what is missing is told once, by us
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as err:
        raise UsageError(
            f"the weights cannot be read: {str(err).strip().splitlines()[0]}",
            where=str(folder),
            fix="check config.json against the weights",
        ) from err
    for key, what in (("missing_keys", "are missing"), ("unexpected_keys", "have no place")):
        if names := sorted(map(str, found.get(key) or ())):
            raise UsageError(
                f"{len(names)} tensors {what}, {names[0]} first",
                where=str(folder),
                fix="check config.json against the weights",
            )
    return model


def _tokenizer(folder: Path, recorded: dict[str, Any], asked: str | None) -> Tokenizer:
    """What was asked for, what lies in the folder, or what the training run recorded, in this order."""
    beside = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if asked is None and not beside and recorded.get("name") not in ("bytes", "mistral"):
        trained = f"it was trained with {recorded['name']}" if recorded else "no tokenizer.json, no .model"
        raise UsageError(
            f"no tokenizer with the checkpoint: {trained}",
            where=str(folder),
            fix="name it with --tokenizer: mistral, bytes or a file",
        )
    words = tokenizers.load(asked or str((beside or [recorded.get("name")])[0]))
    if recorded and recorded.get("sha256") != words.digest:
        raise UsageError(
            f"the tokenizer {words.name} is not the one the checkpoint was trained with, "
            f"{recorded.get('name')} {str(recorded.get('sha256'))[:12]}",
            where=str(folder),
            fix="name that one with --tokenizer",
        )
    return words


def _check_vocabulary(config: PreTrainedConfig, words: Tokenizer, folder: Path) -> None:
    rows = config.vocab_size
    if not LEAST_SHARE * rows <= words.vocabulary <= rows:
        raise UsageError(
            f"the tokenizer {words.name} with {words.vocabulary:,} entries does not fit the model's {rows:,}",
            where=str(folder),
            fix="name the model's own with --tokenizer",
        )


def _training(folder: Path, state: dict[str, Any], config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """(tokens a segment, segments) of the run that made the folder, or the configuration's length."""
    runs = folder.resolve().parent.parent / IDENTITY  # RUN/checkpoints/step-N; older states lack the length
    train = state.get("train") or _json(runs).get("identity", {}).get("train", {})
    if train:
        return train["seqlen"], train["segments"]
    return getattr(config, "max_position_embeddings", None), None


def _family(config: PreTrainedConfig) -> str:
    if isinstance(config, LinearAttentionConfig):
        return config.family
    return RECURRENT.get(config.model_type, "attention")


def _digest(folder: Path) -> str:
    whole = hashlib.sha256((folder / "config.json").read_bytes())
    for path in checkpoints.weight_files(folder):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:12]


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none. Raises UsageError for one that cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as err:
        raise UsageError(
            f"{path.name} cannot be read: {err}", where=str(path.parent), fix="copy it anew"
        ) from err
    return found
