"""The one table all benchmarks write: a CSV file each, rows only ever added.

A row is one contender's result in one case. Everything it is compared with was measured in the same run, on the same
machine, and says so in the same file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
from rich.table import Table

from benchmarks import machine
from benchmarks.units import format_size

FOLDER = Path(__file__).resolve().parent / "results"


class SchemaError(Exception):
    """A results file has other columns than the ones this version writes."""


@dataclass(frozen=True)
class Result:
    """One row. Times are seconds, sizes bytes; what was not measured is None and an empty cell.

    `ratio` is p50 over the p50 of contender `ratio_to` in the same run; `cache` says how the source was read (see
    `benchmarks.cache`); `note` holds what a reader must know, above all why a contender has no numbers.
    """

    time: str
    benchmark: str
    case: str
    contender: str
    size_bytes: int | None
    output_bytes: int | None
    runs: int
    p20: float | None
    p50: float | None
    p80: float | None
    bytes_per_second: float | None
    ratio_to: str
    ratio: float | None
    peak_anonymous_bytes: int | None
    baseline_anonymous_bytes: int | None
    budget_bytes: int | None
    cache: str
    device: str
    cpu: str
    cores: int
    python: str
    torch: str
    streamquant: str
    commit: str
    note: str


COLUMNS = [field.name for field in fields(Result)]


def result(
    benchmark: str,
    case: str,
    contender: str,
    seconds: Sequence[float],
    *,
    size_bytes: int | None = None,
    output_bytes: int | None = None,
    ratio_to: tuple[str, Sequence[float]] | None = None,
    peak_anonymous_bytes: int | None = None,
    baseline_anonymous_bytes: int | None = None,
    budget_bytes: int | None = None,
    cache: str = "warm",
    device: str = "cpu",
    note: str = "",
) -> Result:
    """Return the row for these timings; `seconds` is empty when the contender failed, and `note` then says why.

    `ratio_to` is another contender's name and its timings.
    """
    p20, p50, p80 = quantiles(seconds)
    other, other_seconds = ratio_to or ("", ())
    other_p50 = quantiles(other_seconds)[1]
    ratio = p50 / other_p50 if p50 and other_p50 else None
    return Result(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        benchmark=benchmark,
        case=case,
        contender=contender,
        size_bytes=size_bytes,
        output_bytes=output_bytes,
        runs=len(seconds),
        p20=p20,
        p50=p50,
        p80=p80,
        bytes_per_second=size_bytes / p50 if size_bytes and p50 else None,
        ratio_to=other if ratio else "",
        ratio=ratio,
        peak_anonymous_bytes=peak_anonymous_bytes,
        baseline_anonymous_bytes=baseline_anonymous_bytes,
        budget_bytes=budget_bytes,
        cache=cache,
        device=device,
        note=note,
        **machine.facts(),
    )


def quantiles(seconds: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 20th, 50th and 80th percentile, or nothing of nothing."""
    if not seconds:
        return None, None, None
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def append(rows: Iterable[Result], folder: Path = FOLDER) -> None:
    """Add `rows` to the file of their benchmark, refusing a file with other columns."""
    for row in rows:
        path = folder / f"{row.benchmark}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if not is_new:
            _check_columns(path)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({name: _cell(value) for name, value in asdict(row).items()})


def read(benchmark: str, folder: Path = FOLDER) -> list[Result]:
    """Return every row of a benchmark, oldest first."""
    path = folder / f"{benchmark}.csv"
    _check_columns(path)
    kinds = {name: get_args(hint)[0] if get_args(hint) else hint for name, hint in get_type_hints(Result).items()}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Result(**{name: _value(text, kinds[name]) for name, text in row.items()}) for row in csv.DictReader(file)
        ]


def _check_columns(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != COLUMNS:
        odd = sorted(set(found) ^ set(COLUMNS)) or ["their order"]
        raise SchemaError(f"{path} has other columns than this version writes ({', '.join(odd)}): move it away first")


def _cell(value: object) -> object:
    """Six digits are more than any timing is worth, and keep the file readable in a diff."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _value(text: str, kind: type) -> object:
    if text == "" and kind is not str:
        return None
    return kind(text)


def table(rows: Sequence[Result], title: str = "") -> Table:
    """Return `rows` as a table for a terminal: the columns that have something to say, the facts of the machine left out."""
    cells = {
        "case": [row.case for row in rows],
        "contender": [row.contender for row in rows],
        "in": [format_size(row.size_bytes) for row in rows],
        "out": [format_size(row.output_bytes) for row in rows],
        "p50 s": ["-" if row.p50 is None else f"{row.p50:.3g}" for row in rows],
        "p20-p80": ["-" if row.p20 is None else f"{row.p20:.3g}-{row.p80:.3g}" for row in rows],
        "per s": [format_size(row.bytes_per_second) for row in rows],
        "ratio": ["-" if row.ratio is None else f"{row.ratio:.2f} x {row.ratio_to}" for row in rows],
        "peak": [format_size(row.peak_anonymous_bytes, binary=True) for row in rows],
        "idle": [format_size(row.baseline_anonymous_bytes, binary=True) for row in rows],
        "budget": [format_size(row.budget_bytes, binary=True) for row in rows],
        "cache": [row.cache for row in rows],
        "note": [row.note for row in rows],
    }
    grid = Table(title=title, box=None)
    shown = [name for name, values in cells.items() if any(value not in ("", "-") for value in values)]
    for name in shown:
        grid.add_column(name, justify="left" if name in ("case", "contender", "cache", "note") else "right")
    for index, row in enumerate(rows):
        grid.add_row(*(cells[name][index] for name in shown), style="bold red" if row.p50 is None else "")
    return grid
