"""What all views share: how tables look, how numbers, names and paths are spelled."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table
from rich.text import Text

from streamquant.checkpoint.header import printable

LISTED = 12  # lines shown before the rest is counted


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An empty table in the manner of this program. right: the columns that hold numbers. whole: those that are not narrowed
    before all others are.
    """
    made = Table(box=None, header_style="bold", pad_edge=False)
    for heading in columns:
        if heading in right:
            made.add_column(heading, justify="right", no_wrap=True)
        else:
            made.add_column(heading, overflow="fold", no_wrap=heading in whole)
    return made


def name_of(text: str, limit: int = 120) -> Text:
    """A name from a file: data, never markup."""
    return Text(printable(text, limit))


def path_of(path: Path) -> str:
    return printable(str(path), 4096)


def path_line(path: Path) -> Text:
    """A path on a line of its own, never broken."""
    return Text(path_of(path), style="green", no_wrap=True)


def report_line(path: Path) -> Text:
    """Where a page was written."""
    return Text.assemble(("report  ", "bold"), path_of(path), no_wrap=True)


def ratio(value: float | None) -> str:
    """A relative error."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan"
    return f"{value:.4f}" if 0.0001 <= value < 1000 or not value else f"{value:.1e}"


def decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "none"


def shape_of(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def count(number: int, noun: str) -> str:
    """ "1 layer", "2,000 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sentences(heading: str, lines: list[str]) -> list[Text]:
    """A heading and the first few lines under it."""
    parts = [Text(f"\n{heading}", style="bold"), *(Text(f"  {printable(line, 4096)}") for line in lines[:LISTED])]
    if len(lines) > LISTED:
        parts.append(Text(f"  and {len(lines) - LISTED:,} more (--json lists all)"))
    return parts
