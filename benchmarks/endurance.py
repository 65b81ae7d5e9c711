"""How much was endured: a row per kind of attack and run, in `benchmarks/results/endurance.csv`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from rich.table import Table

from benchmarks import records, results

PATH = results.FOLDER / "endurance.csv"


@dataclass(frozen=True)
class Endured:
    """what: the kind of attack. count: how many were survived. detail: scenarios, duration, seeds. The rest: the machine."""

    time: str
    what: str
    count: int
    detail: str
    cpu: str
    cores: int
    python: str
    torch: str | None
    streamquant: str
    commit: str


def read(path: Path = PATH) -> list[Endured]:
    """Every row, oldest first. Raises SchemaError."""
    return records.read(path, Endured)


def append(row: Endured, path: Path = PATH) -> None:
    """Add a row."""
    records.append(path, Endured, [row])


def table(rows: list[Endured]) -> Table:
    """Rows as a person reads them."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for field in fields(Endured)[:4]:
        shown.add_column(field.name, justify="right" if field.name == "count" else "left", overflow="fold")
    for row in rows:
        shown.add_row(row.time, row.what, f"{row.count:,}", row.detail)
    return shown
