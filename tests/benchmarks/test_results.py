"""The results table: rows are added, read back as they were, and never mixed with another version's columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import results
from benchmarks.units import format_size, parse_size


def test_rows_are_added_and_read_back(tmp_path: Path) -> None:
    floor = results.result("convert", "nf4", "cp", [2.0, 1.0, 3.0], size_bytes=100, cache="cold")
    slower = results.result(
        "convert", "nf4", "streamquant", [4.0], size_bytes=100, ratio_to=("cp", [2.0, 1.0, 3.0]), budget_bytes=2**62 + 1
    )
    results.append([floor], tmp_path)
    results.append([slower], tmp_path)
    assert results.read("convert", tmp_path) == [floor, slower]
    assert (floor.p50, floor.bytes_per_second, floor.runs) == (2.0, 50.0, 3)
    assert (slower.ratio_to, slower.ratio, slower.p20) == ("cp", 2.0, 4.0)


def test_a_failure_is_a_row_with_a_note(tmp_path: Path) -> None:
    failed = results.result("convert", "nf4", "peer", [], note='cannot be installed: no network, "sorry"')
    results.append([failed], tmp_path)
    assert results.read("convert", tmp_path) == [failed]
    assert failed.p50 is None and failed.runs == 0
    console = Console(record=True, width=240)
    console.print(results.table([failed]))
    assert "cannot be installed" in console.export_text()


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "convert.csv"
    path.write_text("time,benchmark\n2020,convert\n")
    with pytest.raises(results.SchemaError, match="other columns"):
        results.append([results.result("convert", "nf4", "cp", [1.0])], tmp_path)
    with pytest.raises(results.SchemaError):
        results.read("convert", tmp_path)
    assert path.read_text() == "time,benchmark\n2020,convert\n"


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("4GB", "256MiB", "1.5 GiB", "7")] == [4 * 10**9, 2**28, 3 * 2**29, 7]
    assert (format_size(4e9), format_size(2**28, binary=True), format_size(None)) == ("4.0 GB", "256.0 MiB", "-")
    with pytest.raises(ValueError, match="not a size"):
        parse_size("much")
