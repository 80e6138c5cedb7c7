"""What the paper reports, as CSV, each number with its source."""

import csv
from pathlib import Path


def read(name: str) -> list[dict[str, str]]:
    """The records of NAME.csv in this folder."""
    with (Path(__file__).parent / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
