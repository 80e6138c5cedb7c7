"""Tables on stdout: as wide as the terminal, or as wide as they need where it is none."""

import sys
from collections.abc import Iterable, Sequence


def show(headings: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print rows under headings; the headings named in `right` are aligned right. None is left empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)


def number(value: object, digits: int = 4) -> str:
    """`digits` significant digits, plain where that is readable; empty for nothing."""
    if value is None or value == "":
        return ""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def say(text: str) -> None:
    """One line on stdout, under a table."""
    sys.stdout.write(text + "\n")
