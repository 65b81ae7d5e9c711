"""The command line, and the kernel benchmark with stand-ins."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.results import Result
from streamquant.checkpoint.header import read_header


def test_generate_writes_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    done = CliRunner().invoke(main, ["generate", str(path), "--size", "10MB", "--dtype", "f16", "--prefix"])
    assert done.exit_code == 0, done.output
    header = read_header(path)
    assert header.tensors["model.diffusion_model.img_in.weight"].dtype == "F16"
    assert header.size == pytest.approx(1e7, rel=0.05)
    assert "small.safetensors" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "out"],
        ["generate", "out", "--size", "1GB", "--one-tensor", "1GB"],
        ["generate", "out", "--size", "1KB"],
        ["convert", "--memory-budget", "little"],
        ["convert", "--cases", "fp9"],
    ],
)
def test_nonsense_is_refused_at_once(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_conversions_are_measured_without_torch_in_the_harness() -> None:
    program = "import sys, benchmarks.__main__, benchmarks.convert, benchmarks.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_kernels_record_the_missing_too() -> None:
    from benchmarks import kernels

    def missing() -> kernels.Quantize:
        raise ImportError("no such library")

    rows: list[Result] = []
    console = Console(file=io.StringIO(), width=200)
    entries = [("first", lambda: abs), ("second", lambda: abs), ("missing", missing)]
    kernels.run((128, 64), 2, 1, console, ["nf4"], lambda operation, threads: entries, rows.extend)
    first, second, absent = rows
    assert (first.runs, first.size_bytes, first.ratio_to) == (2, 128 * 64 * 2, "")
    assert second.ratio_to == "first" and second.ratio > 0
    assert absent.runs == 0 and absent.note == "ImportError: no such library"
    assert "missing DOES NOT TAKE PART" in console.file.getvalue()


def test_time_against_the_number_of_tensors(tmp_path: Path) -> None:
    from benchmarks import tensors

    rows: list[Result] = []
    tensors.run([40, 80], 1, tmp_path, Console(file=io.StringIO()), rows.extend)
    assert [row.case for row in rows if row.contender == "convert"] == ["40 tensors", "80 tensors"]
    assert all(row.p50 and row.p50 > 0 for row in rows)
    assert {row.ratio_to for row in rows} == {"", tensors.REFERENCE}
    assert list((tmp_path / "tensors").iterdir()) == []
