"""The file of what was endured."""

from __future__ import annotations

import csv

import pytest
from faults.record import record

from benchmarks.records import SchemaError


def test_rows_are_added_under_one_heading(tmp_path, capsys):
    path = tmp_path / "endurance.csv"
    record("calls struck", 1234, "one pass, seed 1", path)
    record("kills survived", 5, path=path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["count"], row["detail"]) for row in rows] == [
        ("calls struck", "1234", "one pass, seed 1"), ("kills survived", "5", ""),
    ]  # fmt: skip
    assert all(row["time"] and row["cpu"] and row["commit"] for row in rows)
    assert capsys.readouterr().out.splitlines()[0] == "calls struck: 1,234 one pass, seed 1"


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "endurance.csv"
    path.write_text("time,what\n")
    with pytest.raises(SchemaError, match="other columns"):
        record("calls struck", 1, path=path)
    assert path.read_text() == "time,what\n"
