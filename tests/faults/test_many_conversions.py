"""One process, conversion after conversion, a third of them failing: nothing it holds grows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from faults.record import record

MIB = 1 << 20
PROGRAM = Path(__file__).with_name("many_conversions.py")

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see what a process holds")


def endure(count: int, folder: Path, most_growth: int) -> str:
    """Run so many; compare the last quarter with the second (the first loads, compiles and warms up). Says how it went."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, PROGRAM, str(count), folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = json.loads(done.stdout)
    assert len(samples) == count
    quarter = count // 4
    grown = {}
    for what in samples[0]:
        early, late = (median(sample[what] for sample in part) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
        grown[what] = late - early
    assert grown["threads"] == grown["descriptors"] == grown["hidden files"] == 0, grown
    assert samples[-1]["hidden files"] == 0
    assert grown["mappings"] <= 8, grown
    assert grown["anonymous"] <= most_growth, grown
    numbers = ", ".join(f"{what} {value / MIB:+.1f} MiB" if what == "anonymous" else f"{what} {value:+.0f}" for what, value in grown.items())
    return f"last quarter against second: {numbers}; {time.monotonic() - began:.0f} s"


def test_dozens(tmp_path):
    endure(112, tmp_path, 24 * MIB)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_thousand(tmp_path):
    count = 2000
    record("conversions in one process", count, endure(count, tmp_path, 8 * MIB))
