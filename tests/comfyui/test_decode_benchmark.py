"""The decode benchmark takes part in every format, rightly, and says who does not."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from benchmarks import decode


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def test_every_contender_decodes_every_format(console, monkeypatch):
    monkeypatch.setattr(decode, "devices", lambda: ["cpu"])
    recorded = []
    rows = decode.run(console, (256, 256), runs=1, threads=1, record=recorded.extend)
    assert recorded == rows
    assert {row.case.partition(" ")[0] for row in rows} == set(decode.FORMATS)
    for row in rows:
        assert row.size_bytes == 2 * 256 * 256
        assert row.runs == 1, row.note


def test_a_wrong_decoder_takes_no_part(console, monkeypatch):
    monkeypatch.setattr(decode, "devices", lambda: ["cpu"])

    def find(operation, weight):
        return [("wrong", lambda: lambda: torch.zeros_like(weight)), ("right", lambda: lambda: weight)]

    wrong, right = decode.run(console, (8, 8), runs=2, threads=1, operations=["nf4"], find=find, record=lambda rows: None)
    assert wrong.runs == 0 and "relative error of 1.00" in wrong.note
    assert right.runs == 2
    assert "wrong DOES NOT TAKE PART" in console.file.getvalue()
