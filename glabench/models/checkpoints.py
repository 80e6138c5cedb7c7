"""Checkpoints on disk: ours, transformers', and flash-linear-attention's; safetensors only, never pickle."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from glabench.errors import UsageError, nearest
from glabench.models import layouts
from glabench.models.config import GLAConfig, RetNetConfig
from glabench.models.mamba import prepare

LAYOUTS = ("fla", "glabench")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OURS = (GLAConfig.model_type, RetNetConfig.model_type, "llama")
KINDS = (*OURS, *layouts.KINDS)  # the model types that `load` takes
SIDE_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "vocab*", "merges.txt")


def load(folder: str | Path, *, dtype: torch.dtype | None = None, **overrides: Any) -> nn.Module:
    """The model of a local checkpoint, in evaluation mode, on the CPU, in its own dtype unless given.

    `overrides` are fields of the configuration, such as implementation="gla_recurrent"; `attn_implementation`
    chooses the transformer's attention. Raises: UsageError for a folder that is missing, pickled, remote
    code, torn, of an unknown layout, or whose tensors do not fit its configuration.
    """
    folder = _folder(folder)
    attention = overrides.pop("attn_implementation", None)
    config, tensors = _read(folder, **overrides)
    dtype = dtype or max(tensors.values(), key=Tensor.numel).dtype
    options = {} if attention is None else {"attn_implementation": attention}
    from transformers.initialization import no_init_weights

    prepare(config)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    _check(model, tensors, folder)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model.eval()


def convert(source: str | Path, target: str | Path, layout: str) -> dict[str, Any]:
    """Write the checkpoint `source` to the new folder `target` in a layout, "fla" or "glabench".

    Tensors keep their dtype. Tokenizer files go along. Returns {"layout", "model_type", "tensors", "bytes"}.
    Raises: UsageError; `target` is then as it was.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"no layout {layout!r}", where="--layout", fix=nearest(layout, LAYOUTS))
    source, target = _folder(source), Path(target)
    if target.exists():
        raise UsageError(f"{target} exists", where="OUT", fix="name a new folder")
    config, tensors = _read(source)
    _check(_shell(config), tensors, source)
    dtype = config.dtype = max(tensors.values(), key=Tensor.numel).dtype
    config.architectures = [type(_shell(config)).__name__]
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    fields = layouts.to_fla(config) if layout == "fla" else {}
    tensors = layouts.rename(tensors, config, to=layout)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as err:
        raise UsageError(
            f"cannot write {target}: {err.strerror}", where="OUT", fix="choose another place"
        ) from err
    try:
        if layout == "glabench":
            config.save_pretrained(part)
        else:
            text = json.dumps(fields | {"dtype": str(dtype).removeprefix("torch.")}, indent=2)
            (part / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file({k: t.contiguous() for k, t in tensors.items()}, part / WEIGHTS, metadata={"format": "pt"})
        for name in sorted({p.name for pattern in SIDE_FILES for p in source.glob(pattern) if p.is_file()}):
            shutil.copyfile(source / name, part / name)
        part.chmod(0o755)
        part.rename(target)
    except OSError as err:
        raise UsageError(
            f"cannot write {target}: {err.strerror}", where="OUT", fix="free some space there"
        ) from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return {
        "layout": layout,
        "model_type": fields.get("model_type", config.model_type),
        "tensors": len(tensors),
        "bytes": size,
    }


def read_config(folder: str | Path, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a checkpoint in any known layout, as ours or transformers'. Raises UsageError."""
    folder = _folder(folder)
    where = str(folder / "config.json")
    fields = _json(folder / "config.json")
    if "auto_map" in fields:
        raise UsageError(
            "the checkpoint wants to run code of its own (auto_map)",
            where=where,
            fix="glabench has these models itself: remove auto_map from config.json",
        )
    kind = fields.get("model_type")
    try:
        if kind in OURS or (kind in ("mamba", "mamba2") and "layer_norm_epsilon" in fields):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            config = layouts.from_fla(fields, where)
    except (TypeError, ValueError, AttributeError, OSError, StrictDataclassError) as err:
        raise UsageError(" ".join(str(err).split()), where=where, fix="mend config.json") from err
    for field, value in overrides.items():
        if not hasattr(config, field):
            known = [f for f in vars(config) if not f.startswith("_")]
            raise UsageError(f"no field {field!r} in {kind}", where=where, fix=nearest(field, known))
        setattr(config, field, value)
    return config


def read_tensors(folder: str | Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint by our names; `config` is what read_config made. Raises UsageError."""
    folder = _folder(folder)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as err:
            raise UsageError(
                f"{path.name} cannot be read: {err}", where=str(folder), fix="copy it anew"
            ) from err
    if not tensors:
        raise UsageError("no tensors", where=str(folder), fix="copy the checkpoint anew")
    return layouts.rename(tensors, config, to="glabench")


def _read(folder: Path, **overrides: Any) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    config = read_config(folder, **overrides)
    tensors = read_tensors(folder, config)
    head = tensors.get("lm_head.weight")
    table = tensors.get(_shell(config)._tied_weights_keys["lm_head.weight"])
    if config.tie_word_embeddings and head is not None and table is not None and not torch.equal(head, table):
        if "tie_word_embeddings" in _json(folder / "config.json"):
            raise UsageError(
                "lm_head.weight differs from the embeddings it is tied to",
                where=str(folder),
                fix="set tie_word_embeddings to false in config.json if the weights are right",
            )
        config.tie_word_embeddings = False  # libraries differ in the default that the file leaves out
    return config, tensors


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file():
        pickled = any(folder.match(pattern) for pattern in PICKLED)
        raise (
            _pickled(folder)
            if pickled
            else UsageError(
                f"{folder} is a file", where="checkpoint", fix="name the folder that holds it and config.json"
            )
        )
    if not folder.is_dir():
        raise UsageError(f"no folder {str(folder)!r}", where="checkpoint", fix="check the path")
    return folder


def _pickled(path: Path) -> UsageError:
    return UsageError(
        f"{path.name} is pickled: reading it could run code",
        where=str(path.parent),
        fix="where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        f"{WEIGHTS!r})",
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint; an index may name files of its own folder only. Raises UsageError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        parts = _json(folder / INDEX).get("weight_map", {})
        names = sorted(set(parts.values())) if isinstance(parts, dict) else []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UsageError(f"{INDEX} names {name!r}", where=str(folder), fix="keep parts in the folder")
            if not (folder / name).is_file():
                raise UsageError(f"no {name}", where=str(folder), fix="copy the missing part")
        return [folder / name for name in names]
    pickled = sorted(p for pattern in PICKLED for p in folder.glob(pattern))
    if pickled:
        raise _pickled(pickled[0])
    raise UsageError(f"no {WEIGHTS}", where=str(folder), fix="name a folder with config.json and safetensors")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise UsageError(f"no {path.name}", where=str(path.parent), fix="name a checkpoint's folder") from err
    except (OSError, ValueError) as err:
        raise UsageError(
            f"{path.name} cannot be read: {err}", where=str(path.parent), fix="copy it anew"
        ) from err
    if not isinstance(found, dict):
        raise UsageError(f"{path.name} is no object", where=str(path.parent), fix="copy it anew")
    return found


def _shell(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _check(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Every parameter has a tensor of its shape, and no tensor is left over."""
    wanted = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    if model.config.tie_word_embeddings and "lm_head.weight" not in tensors:
        wanted.pop("lm_head.weight", None)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UsageError(
            f"{len(missing)} tensors are missing, {missing[0]} first",
            where=str(folder),
            fix="check config.json against the weights",
        )
    if extra := sorted(tensors.keys() - wanted.keys() - {"lm_head.weight"}):
        raise UsageError(
            f"{len(extra)} tensors have no place, {extra[0]} first",
            where=str(folder),
            fix="check config.json against the weights",
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UsageError(
                f"{name} is {list(tensors[name].shape)}, not {list(shape)}",
                where=str(folder),
                fix="check config.json against the weights",
            )
