"""The token mixers that recall compares, as data: no torch, so that a grid can be checked before it runs."""

from dataclasses import dataclass, field
from typing import Any

from glabench.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class Mixer:
    """A mixer and the registry's family that computes it; `options` are fields of its configuration."""

    kind: str  # "linear", "attention" or "mamba"
    family: str
    heads: int | None
    options: dict[str, Any] = field(default_factory=dict)


GLA = {"expand_k": 0.5, "expand_v": 1.0, "gate": "channel"}
MIXERS = {
    "attention": Mixer("attention", "attention", 1),
    "gla": Mixer("linear", "gla", 2, GLA),
    "retnet": Mixer(
        "linear",
        "retention",
        2,
        {"expand_k": 1.0, "expand_v": 2.0, "gate": "fixed", "rope_base": 10000.0},
    ),
    "mamba": Mixer("mamba", "mamba", None),
    "gla-no-gate": Mixer("linear", "linear_attention", 2, {**GLA, "gate": "none"}),
    "gla-fixed-decay": Mixer("linear", "retention", 2, {**GLA, "gate": "fixed"}),
    "gla-scalar-gate": Mixer("linear", "simple_gla", 2, {**GLA, "gate": "scalar"}),
    "gla-1-head": Mixer("linear", "gla", 1, GLA),
}


def mixer(name: str, where: str) -> Mixer:
    """The mixer of that name. Raises UsageError for an unknown one."""
    if name not in MIXERS:
        raise UsageError(f"no mixer {name!r}", where=where, fix=nearest(name, tuple(MIXERS)))
    return MIXERS[name]


def head_widths(name: str, dim: int, heads: int | None) -> tuple[int, int]:
    """Widths of a head's keys and values, or (0, 0). Raises UsageError where they do not divide."""
    one = MIXERS[name]
    if heads is None:
        return 0, 0
    widths = [int(dim * one.options.get(key, 1.0)) for key in ("expand_k", "expand_v")]
    even = 2 if "rope_base" in one.options else 1
    for word, width in zip(("keys", "values"), widths, strict=True):
        if width < heads or width % (heads * (even if word == "keys" else 1)):
            raise UsageError(
                f"{name} at width {dim} has {word} of width {width}, which do not split into {heads} "
                f"{'even ' if even > 1 and word == 'keys' else ''}heads",
                where="dims",
                fix="choose other --dims or --heads",
            )
    return widths[0] // heads, widths[1] // heads
