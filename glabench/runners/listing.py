"""`glabench list`: every implementation, runnable here or not, and what families resolve to."""

from typing import Any

from glabench import env, tables
from glabench.cases import DECODE
from glabench.errors import UnavailableError, UsageError, nearest
from glabench.registry import FAMILIES, best, implementations


def entries(device: str, family: str | None) -> dict[str, Any]:
    """{"device", "families", "steps", "implementations": [...]} for `device` ("auto" allowed).

    `families` and `steps` hold {name: id or None}: what a family's name takes for sequences, and for a token.
    """
    if family is not None and family not in FAMILIES:
        raise UsageError(f"no family {family!r}", where="--family", fix=nearest(family, tuple(FAMILIES)))
    device = env.pick_device(device)
    names = [family] if family else list(FAMILIES)
    arms = sorted(
        (i for i in implementations().values() if i.family in names),
        key=lambda i: (list(FAMILIES).index(i.family), i.preference, i.id),
    )
    return {
        "device": device,
        "families": {name: _best(name, device, "fwd") for name in names},
        "steps": {name: _best(name, device, DECODE) for name in names},
        "implementations": [
            {
                "id": impl.id,
                "label": impl.label,
                "family": impl.family,
                "runs": impl.unavailable(device) is None,
                "reason": impl.unavailable(device),
                "passes": list(impl.passes),
                "devices": list(impl.devices),
                "dtypes": list(impl.dtypes),
                "features": list(impl.features),
                "source": impl.source,
                "note": impl.note,
            }
            for impl in arms
        ],
    }


def _best(family: str, device: str, passes: str) -> str | None:
    try:
        return best(family, device, passes).id
    except UnavailableError:
        return None


def show(found: dict[str, Any]) -> None:
    first = {*found["families"].values(), *found["steps"].values()}
    tables.show(
        ("family", "id", "what", "dtypes", "on " + found["device"]),
        (
            (
                arm["family"],
                arm["id"] + (" *" if arm["id"] in first else ""),
                arm["label"],
                " ".join(arm["dtypes"]),
                "runs" if arm["runs"] else arm["reason"],
            )
            for arm in found["implementations"]
        ),
    )
    tables.say("* what the family's name resolves to here, for sequences and for one token (glabench decode)")
