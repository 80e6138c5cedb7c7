"""`glabench models` and `glabench convert`: the shipped configurations, and checkpoints between layouts."""

from pathlib import Path
from typing import Any

from glabench import tables
from glabench.errors import UnavailableError
from glabench.installed import INSTALL, is_installed


def entries() -> dict[str, Any]:
    """{"state_tokens", "models": [{"name", "family", "parameters", "layers", "width", "state_bytes"}]}."""
    _require()
    from glabench.models import catalog

    found = []
    for name in catalog.names():
        config = catalog.config(name)
        found.append(
            {
                "name": name,
                "family": name.split("-")[0],
                "parameters": catalog.parameters(config),
                "layers": config.num_hidden_layers,
                "width": config.hidden_size,
                "vocabulary": config.vocab_size,
                "state_bytes": catalog.state_bytes(config),
            }
        )
    return {"state_tokens": catalog.STATE_TOKENS, "models": found}


def show(found: dict[str, Any]) -> None:
    headings = ("name", "parameters", "layers", "width", "state bytes")
    tables.show(
        headings,
        (
            (m["name"], f"{m['parameters']:,}", m["layers"], m["width"], f"{m['state_bytes']:,}")
            for m in found["models"]
        ),
        right=headings[1:],
    )
    tables.say(f"state: one sequence after {found['state_tokens']:,} tokens; only the transformer's grows")


def convert(source: str, target: str, layout: str) -> dict[str, Any]:
    """Write a checkpoint, or a run's newest, in another layout; what was written. Raises UsageError."""
    _require()
    from glabench.models import checkpoints
    from glabench.training.checkpoint import newest

    folder = newest(Path(source))
    return {"source": str(folder), **checkpoints.convert(folder, target, layout)}


def _require() -> None:
    for need in ("transformers", "safetensors"):
        if not is_installed(need):
            raise UnavailableError(f"{need} is not installed", where="models", fix=INSTALL[need])
