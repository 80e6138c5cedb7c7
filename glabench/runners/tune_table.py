"""What `glabench tune` prints: what would be tried, and what was found."""

from dataclasses import asdict
from typing import Any

from glabench import tables
from glabench.kernels.plan_files import KERNELS, Launch
from glabench.runners.tune import Request, Tuned
from glabench.runners.tune_variants import describe, kernel_of


def plan(request: Request) -> dict[str, Any]:
    """What a run would try; touches no GPU."""
    return {"dtype": request.dtype, "points": [_planned(t) for t in request.points()]}


def _planned(tuned: Tuned) -> dict[str, Any]:
    launches = [{"chunk": t.chunk, "use": t.use, "launch": asdict(t.launch)} for t in tuned.trials]
    names = ("impl", "d_k", "d_v", "heads", "gate", "dtype")
    return {name: value for name, value in tuned.document().items() if name in names} | {"launches": launches}


def show_plan(found: dict[str, Any]) -> None:
    """A row a point, chunk length and use of a kernel."""
    rows, total = [], 0
    for point in found["points"]:
        groups: dict[tuple[int, str], list[str]] = {}
        for t in point["launches"]:
            groups.setdefault((t["chunk"], t["use"]), []).append(_short(t["launch"]))
        head = (point["impl"], point["d_k"], point["d_v"])
        rows += [(*head, chunk, use, "  ".join(words)) for (chunk, use), words in groups.items()]
        total += len(point["launches"])
    headings = ("implementation", "d_k", "d_v", "chunk", "kernel", "BV x warps x stages (registers)")
    tables.show(headings, rows, right=("d_k", "d_v", "chunk"))
    tables.say(f"{len(found['points'])} points, {total} launches in {found['dtype']}; nothing was run")


def _short(launch: dict[str, Any]) -> str:
    limit = "" if launch["registers"] is None else f" ({launch['registers']})"
    return f"{launch['BV']}x{launch['warps']}x{launch['stages']}{limit}"


def show(report: dict[str, Any]) -> None:
    """A row a point and kernel with the launch that was chosen, then whole calls, then where it is."""
    rows, calls = [], []
    for point in report["points"]:
        head = (point["impl"], point["d_k"], point["d_v"])
        for kernel in KERNELS if point["plan"] else ():
            rows += _kernel(head, kernel, point)
        for call in point["calls"]:
            mark = "chosen" if call["name"] == point["chosen"] else call["reason"]
            calls.append((*head, call["name"], call["status"], tables.number(call["ms"]), mark))
    widths = ("d_k", "d_v")
    headings = ("implementation", *widths, "kernel", "chosen launch", "us")
    tables.show(headings, rows, right=(*widths, "us"))
    headings = ("implementation", *widths, "plan", "status", "fwd+bwd ms", "")
    tables.show(headings, calls, right=(*widths, "fwd+bwd ms"))
    if report["file"] is None:
        tables.say("nothing was written: no plan was tried and found right")
    else:
        tables.say(f"wrote {report['file']}; in force after: {report['in_force']}")


def _kernel(head: tuple[Any, ...], kernel: str, point: dict[str, Any]) -> list[tuple[Any, ...]]:
    """One row for each use of a kernel under the chosen plan."""
    chosen = point["plan"][kernel]
    return [
        (*head, t["use"], describe(Launch(**chosen)), tables.number(t["us"]))
        for t in point["launches"]
        if kernel_of(t["use"]) == kernel and t["launch"] == chosen and t["chunk"] == point["plan"]["chunk"]
    ]
