"""What a device is and reaches, from a process that is alone with it."""

from typing import Any

from glabench.errors import UnavailableError
from glabench.pool import Worker

DESCRIBE = "glabench.runners.cells:describe"
LIMIT_S = 300.0


def describe(device: str, *, threads: int, seconds: float, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """As cells.describe, `seconds` for each ceiling. Raises UnavailableError where there is no answer."""
    arguments = {"device": device, "threads": threads, "seconds": seconds}
    with Worker("probe") as worker:
        outcome = worker.call(DESCRIBE, arguments, limits={"other": limit_s})
    if outcome.status != "ok":
        what = f"the device cannot be described: {outcome.reason}"
        raise UnavailableError(what, where=device, fix="see glabench doctor")
    return outcome.value
