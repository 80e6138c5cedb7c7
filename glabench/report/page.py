"""The page: its style, and what its sections are made of. Everything is escaped here."""

import base64
import html
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glabench.figures import recall as figure_recall
from glabench.figures.rows import Results

CSS = """
:root { color-scheme: light dark;
  --ink: #1c1c1c; --soft: #5c5c5c; --paper: #fff; --line: #d8d8d8; --best: #e8f3ec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #16181a; --line: #3a3d40; --best: #1e3a2a; }
}
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n { text-align: right; white-space: nowrap; } th.n { text-align: right; }
tr.best td { background: var(--best); }
td.reason { overflow-wrap: anywhere; min-width: 18rem; }
figure { margin: 1.5rem 0; } figure img { width: 100%; max-width: 52rem; height: auto; background: #fff; }
figcaption, .soft { color: var(--soft); font-size: 13px; }
code { font-size: 13px; overflow-wrap: anywhere; } summary { cursor: pointer; margin: .6rem 0; }
nav li { margin: .15rem 0; }
"""


def free(place: Path, taken: set[Path]) -> Path:
    """`place`, or with a number where another results folder has the same suite and device."""
    number, found = 1, place
    while found in taken:
        number += 1
        found = place.with_name(f"{place.name}_{number}")
    taken.add(found)
    return found


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, marks: Sequence[str] = ()) -> str:
    """An HTML table of plain strings, escaped here. A heading that starts with ">" aligns right."""
    kinds = ["n" if h.startswith(">") else "reason" if h == "reason" else "" for h in headings]
    classes = [f' class="{k}"' if k else "" for k in kinds]
    head = "".join(f"<th{c}>{text(h.lstrip('>'))}</th>" for h, c in zip(headings, classes, strict=True))
    body = []
    for number, row in enumerate(rows):
        mark = f' class="{marks[number]}"' if number < len(marks) and marks[number] else ""
        cells = "".join(f"<td{c}>{text(v)}</td>" for v, c in zip(row, classes, strict=True))
        body.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def page(sections: Sequence[tuple[Path, str]], empty: Sequence[str]) -> str:
    links = "".join(f'<li><a href="#{anchor(p)}">{text(p.as_posix())}</a></li>\n' for p, _ in sections)
    none = f'<p class="soft">No rows yet in: {text(", ".join(empty))}</p>' if empty else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>glabench: results</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>glabench: results</h1>\n<nav><ul>\n{links}</ul></nav>\n{none}\n"
        + "\n".join(section for _, section in sections)
        + "\n</body>\n</html>\n"
    )


def anchor(place: Path) -> str:
    return text("-".join(place.parts))


def figure(path: Path) -> str:
    """The picture as a data URI: inlined as elements, two pictures would share ids."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    kind, _, name = path.stem.partition("_")
    words = {"time": "Time", "speedup": "Speed-up", "floor": "Time over the floor", "memory": "Memory"}
    words |= {"decode": "Time of one token, and what is kept between tokens,"}
    length = "context" if kind == "decode" else "sequence length"
    alt = f"{words.get(kind, kind)} against {length}: {name}"
    alt = {"loss": "Loss against tokens", **figure_recall.ALT}.get(path.stem, alt)
    if kind == "throughput":
        alt = f"Tokens a second and memory of a training step against length and batch: {name}"
    return f'<figure><img alt="{text(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def commands(runs: Iterable[dict[str, Any]]) -> str:
    found = {}
    for run in runs:
        argv = run.get("argv")
        if isinstance(argv, list) and argv:
            words = [str(word) for word in argv]
            found[shlex.join(words if "glabench" in words[0] else ["glabench", *words])] = None
    return "".join(f"<p><code>{text(line)}</code></p>" for line in found)


def runs_used(part: Results) -> list[dict[str, Any]]:
    """The runs that made the rows of a part."""
    return [run for run in part.runs if run.get("id") in {r.env for r in part.rows()}]


def environments(part: Results) -> str:
    """What run.json says of each environment, as it stands there."""
    blocks = []
    for env in sorted({r.env for r in part.rows()}):
        run = part.run_of(env)
        lines = [[k, _plain(v)] for k, v in run.items() if not isinstance(v, dict) and k != "argv"]
        for name in ("comparable", "measured", "regime", "noted"):
            inner = run.get(name)
            lines += [[k, _plain(v)] for k, v in inner.items()] if isinstance(inner, dict) else []
        lines = [line for line in lines if line[1]]
        body = table(("what", "value"), lines) if lines else "<p>run.json does not describe it.</p>"
        blocks.append(f"<details><summary>Environment {text(env)}</summary>{body}</details>")
    return "\n".join(blocks)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v not in (None, "", {}))
    return "" if value is None else str(value)
