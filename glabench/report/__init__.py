"""A folder of results -> its figures and one self-contained HTML page: no scripts, nothing fetched."""

from pathlib import Path

from glabench.errors import ResultsError
from glabench.figures import layers as figures
from glabench.figures.rows import Results, load
from glabench.report import layers, models
from glabench.report.page import free, page
from glabench.results import folders_with, rows_path, write_whole

FILES = tuple(rows_path(Path(), verb).name for verb in ("speed", "memory"))


def build(folder: Path, out: Path) -> Path:
    """Draw every results folder below `folder` into out/<suite>/<device> and write out/index.html.

    Returns the page. Raises ResultsError where nothing below `folder` holds rows, a file is not
    ours, or `out` cannot be written.
    """
    parts, empty = _parts(folder)
    sections, taken = [], set[Path]()
    for part in parts:
        place = free(part.place(), taken)
        pictures = figures.render_part(part, out / place)
        sections.append((place, layers.section(part, place, [p for p in pictures if p.suffix == ".svg"])))
    sections += models.sections(folder, out, taken)
    if not sections:
        raise ResultsError(
            "no results below this folder", where=str(folder), fix="run glabench speed or memory first"
        )
    whole = out / "index.html"
    write_whole(whole, page(sections, empty))
    return whole


def _parts(folder: Path) -> tuple[list[Results], list[str]]:
    """One Results a suite and device, and the folders whose files hold no row yet."""
    parts, empty = [], []
    for place in folders_with(folder, *FILES):
        if any(_has_rows(place / name) for name in FILES):
            parts += load(place).parts()
        else:
            empty.append(place.relative_to(folder).as_posix())
    return parts, empty


def _has_rows(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return bool(file.readline()) and bool(file.readline())
