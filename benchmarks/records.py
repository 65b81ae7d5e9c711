"""CSV files whose rows are a frozen dataclass: read with their types, rows only ever added.

A file of an older version lacks the columns that came later: they read as their defaults, and the file is written anew
with them when a row is added. A column that is unknown, or a missing one without a default, is an error.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

Row = TypeVar("Row")


class SchemaError(Exception):
    """A file has other columns than the ones this version writes."""


def columns(kind: type) -> list[str]:
    """The columns of a file of `kind`, a dataclass, in their order."""
    return [field.name for field in fields(kind)]


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Return every row, oldest first. Raises SchemaError."""
    _check_columns(path, kind)
    hints = get_type_hints(kind)
    types = {name: get_args(hint)[0] if get_args(hint) else hint for name, hint in hints.items()}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: _value(text, types[name]) for name, text in row.items()}) for row in csv.DictReader(file)]


def append(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Add `rows` to the file, made first where there is none. Raises SchemaError and leaves the file as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new and _check_columns(path, kind) != columns(kind):
        _widen(path, kind)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(kind), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


def _widen(path: Path, kind: type) -> None:
    """Give a file of an older version the columns it lacks, cells kept as they were written."""
    defaults = {field.name: _cell(field.default) for field in fields(kind) if field.default is not MISSING}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{**defaults, **row} for row in csv.DictReader(file)]
    wider = path.with_name(f"{path.name}.new")
    with wider.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(kind), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    wider.replace(path)


def _check_columns(path: Path, kind: type) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if odd := sorted((set(found) - set(columns(kind))) | (needed - set(found))):
        raise SchemaError(f"{path} has other columns than this version writes ({', '.join(odd)}): move it away first")
    return found


def _cell(value: object) -> object:
    """Six digits are more than any measurement is worth, and keep the file readable in a diff."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _value(text: str, kind: type) -> Any:
    if text == "" and kind is not str:
        return None
    return kind(text)
