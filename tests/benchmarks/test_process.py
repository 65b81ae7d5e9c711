"""Measured processes: their memory and their children's is seen, and what failed leaves its log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import cache
from benchmarks.process import measure

ALLOCATE = "import time; block = bytearray(b'x') * 200_000_000; time.sleep(0.2)"
MIB = 2**20


def test_anonymous_memory_of_a_process(tmp_path: Path) -> None:
    measurement = measure([sys.executable, "-c", ALLOCATE], tmp_path / "log")
    assert measurement.exit_code == 0
    assert 200_000_000 < measurement.peak_anonymous_bytes < 200_000_000 + 50 * MIB
    assert measurement.seconds > 0.2


def test_anonymous_memory_of_a_child(tmp_path: Path) -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE!r}])"
    assert measure([sys.executable, "-c", parent], tmp_path / "log").peak_anonymous_bytes > 200_000_000


def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * 100_000_000)
    program = f"import mmap, time; m = mmap.mmap(open({str(file)!r}, 'rb').fileno(), 0, access=mmap.ACCESS_READ); "
    program += "sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.1)"
    assert measure([sys.executable, "-c", program], tmp_path / "log").peak_anonymous_bytes < 50 * MIB


def test_a_failure_has_its_code_and_its_log(tmp_path: Path) -> None:
    measurement = measure([sys.executable, "-c", "import sys; print('because'); sys.exit(3)"], tmp_path / "log")
    assert measurement.exit_code == 3
    assert "because" in measurement.log.read_text()


def test_a_missing_program_is_a_failure(tmp_path: Path) -> None:
    measurement = measure(["no-such-program-anywhere"], tmp_path / "log")
    assert measurement.exit_code == 127
    assert "no-such-program-anywhere" in measurement.log.read_text()


def test_cache_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    dropped = tmp_path / "drop_caches"
    monkeypatch.setattr(cache, "DROP_CACHES", dropped)
    assert cache.drop_everything(file) == "cold"
    assert dropped.read_text() == "1"
    monkeypatch.setattr(cache, "DROP_CACHES", tmp_path / "no" / "right")
    assert cache.drop_everything(file) == "cold file"
    assert cache.keep(file) == "warm"
