"""The one table all benchmarks write: a CSV file each, rows only ever added.

A row is one contender's result in one case. Everything it is compared with was measured in the same run, on the same
machine, and says so in the same file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks import machine, records
from benchmarks.records import SchemaError
from benchmarks.units import format_size

__all__ = ["FOLDER", "OURS", "SECONDS", "Result", "SchemaError", "append", "heats", "newest", "read", "result", "table"]

# Elsewhere for rows that are not to be kept.
FOLDER = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).resolve().parent / "results")
SECONDS = "seconds"
OURS = "streamquant"  # as a contender


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row. Times are seconds, sizes bytes; what was not measured is None and an empty cell.

    `source` is what was read or quantized, where `case` does not say it; p20, p50 and p80 are of `metric`, seconds unless it
    says otherwise, over `runs` runs, and `detail` is the part the number is about (a layer, a time t), empty for the whole.
    `ratio` is p50 over the p50 of contender `ratio_to` in the same run; `cache` says how the source was read (see
    `benchmarks.cache`); `note` holds what a reader must know, above all why a contender has no numbers.
    """

    time: str
    benchmark: str
    source: str = ""
    case: str
    contender: str
    metric: str = SECONDS
    detail: str = ""
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


def result(
    benchmark: str,
    case: str,
    contender: str,
    values: Sequence[float],
    *,
    source: str = "",
    metric: str = SECONDS,
    detail: str = "",
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
    """Return the row for these values of `metric`; none when the contender failed, and `note` then says why.

    `ratio_to` is another contender's name and its values.
    """
    p20, p50, p80 = quantiles(values)
    other, other_values = ratio_to or ("", ())
    other_p50 = quantiles(other_values)[1]
    ratio = p50 / other_p50 if p50 and other_p50 else None
    return Result(
        time=now(),
        benchmark=benchmark,
        source=source,
        case=case,
        contender=contender,
        metric=metric,
        detail=detail,
        size_bytes=size_bytes,
        output_bytes=output_bytes,
        runs=len(values),
        p20=p20,
        p50=p50,
        p80=p80,
        bytes_per_second=size_bytes / p50 if metric == SECONDS and size_bytes and p50 else None,
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


def now() -> str:
    """The time as rows have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def quantiles(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 20th, 50th and 80th percentile, or nothing of nothing."""
    if not values:
        return None, None, None
    p20, p50, p80 = np.percentile(values, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def append(rows: Iterable[Result], folder: Path = FOLDER) -> None:
    """Add `rows` to the files of their benchmarks, refusing a file with other columns."""
    by_benchmark: dict[str, list[Result]] = {}
    for row in rows:
        by_benchmark.setdefault(row.benchmark, []).append(row)
    for benchmark, found in by_benchmark.items():
        records.append(folder / f"{benchmark}.csv", Result, found)


def read(benchmark: str, folder: Path = FOLDER) -> list[Result]:
    """Return every row of a benchmark, oldest first; none of one that was never run."""
    path = folder / f"{benchmark}.csv"
    return records.read(path, Result) if path.exists() else []


def heats(rows: Sequence[Result]) -> list[list[Result]]:
    """Rows that were measured side by side: neighbours in one case on one machine, up to a contender's next turn."""
    found: list[list[Result]] = []
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        turn = row.contender, row.metric, row.detail
        if found and turn not in seen and all(getattr(row, name) == getattr(found[-1][0], name) for name in _HEAT):
            found[-1].append(row)
        else:
            found.append([row])
            seen.clear()
        seen.add(turn)
    return found


_HEAT = ("benchmark", "source", "case", "size_bytes", "device", "cpu", "cores", "commit")


def newest(rows: Sequence[Result], wanted: Callable[[list[Result]], bool]) -> dict[tuple[str, str], list[Result]]:
    """The last heat of each (case, source) that is `wanted`."""
    return {(heat[0].case, heat[0].source): heat for heat in heats(rows) if wanted(heat)}


def table(rows: Sequence[Result], title: str = "") -> Table:
    """Return `rows` as a table for a terminal: the columns that have something to say, the facts of the machine left out."""
    cells = {
        "source": [row.source for row in rows],
        "case": [row.case for row in rows],
        "contender": [row.contender for row in rows],
        "in": [format_size(row.size_bytes) for row in rows],
        "out": [format_size(row.output_bytes) for row in rows],
        "metric": ["" if row.metric == SECONDS else row.metric for row in rows],
        "detail": [row.detail for row in rows],
        "p50": ["-" if row.p50 is None else f"{row.p50:.3g}{_unit(row)}" for row in rows],
        "p20-p80": ["-" if row.p20 is None else f"{row.p20:.3g}-{row.p80:.3g}" for row in rows],
        "per s": [format_size(row.bytes_per_second) for row in rows],
        "ratio": ["-" if row.ratio is None else f"{row.ratio:.2f} x {row.ratio_to}" for row in rows],
        "peak": [format_size(row.peak_anonymous_bytes, binary=True) for row in rows],
        "idle": [format_size(row.baseline_anonymous_bytes, binary=True) for row in rows],
        "budget": [format_size(row.budget_bytes, binary=True) for row in rows],
        "cache": [row.cache for row in rows],
        "note": [row.note for row in rows],
    }
    left = ("source", "case", "contender", "metric", "detail", "cache", "note")
    grid = Table(title=title, box=None)
    shown = [name for name, values in cells.items() if any(value not in ("", "-") for value in values)]
    for name in shown:
        grid.add_column(name, justify="left" if name in left else "right")
    for index, row in enumerate(rows):
        grid.add_row(*(cells[name][index] for name in shown), style="bold red" if row.p50 is None else "")
    return grid


def _unit(row: Result) -> str:
    return " s" if row.metric == SECONDS else ""
