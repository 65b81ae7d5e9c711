"""The results table: rows are added, read back as they were, and never mixed with another version's columns."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import endurance, results
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


def test_a_file_of_an_older_version_is_read_and_widened(tmp_path: Path) -> None:
    """Columns that came later are empty in it, and written when a row is added; its cells stay as they were."""
    row = results.result("convert", "nf4", "cp", [1.0], size_bytes=100)
    results.append([row], tmp_path)
    path = tmp_path / "convert.csv"
    later = {"source", "metric", "detail"}
    with path.open(newline="") as file:
        old = [{name: cell for name, cell in one.items() if name not in later} for one in csv.DictReader(file)]
    old[0]["p50"] = "1.00000"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, old[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(old)
    assert results.read("convert", tmp_path) == [row]
    newer = results.result("convert", "nf4", "cp", [2.0], source="4GB", metric="bytes written again", detail="killed at 50%")
    results.append([newer], tmp_path)
    assert results.read("convert", tmp_path) == [row, newer]
    assert ",1.00000," in path.read_text()
    assert newer.bytes_per_second is None, "only seconds give a speed"


def test_heats_are_what_ran_side_by_side() -> None:
    def run(case: str, *contenders: str) -> list[results.Result]:
        return [results.result("convert", case, name, [1.0], size_bytes=1) for name in contenders]

    rows = [*run("a", "cp", "us", "peer"), *run("a", "cp", "us"), *run("b", "cp", "us"), *run("b", "us")]
    assert [[row.contender for row in heat] for heat in results.heats(rows)] == [
        ["cp", "us", "peer"], ["cp", "us"], ["cp", "us"], ["us"],
    ]  # fmt: skip
    newest = results.newest(rows, lambda heat: len(heat) > 2)
    assert list(newest) == [("a", "")] and len(newest["a", ""]) == 3


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_results_are_read(path: Path) -> None:
    if path.stem == "compiled":
        pytest.importorskip("triton", reason="needs triton to read what it compiled")
        from benchmarks.compiled import read

        assert all(row.spilled_bytes == 0 for row in read(path))
        return
    if path.stem == "endurance":
        assert all(row.count > 0 and row.what for row in endurance.read(path))
        return
    rows = results.read(path.stem)
    assert rows and {row.benchmark for row in rows} == {path.stem}
    assert all(row.p50 is not None or row.note for row in rows), "whoever has no number says why"


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("4GB", "256MiB", "1.5 GiB", "7")] == [4 * 10**9, 2**28, 3 * 2**29, 7]
    assert (format_size(4e9), format_size(2**28, binary=True), format_size(None)) == ("4.0 GB", "256.0 MiB", "-")
    with pytest.raises(ValueError, match="not a size"):
        parse_size("much")
