"""Our own converter as a contender: its command line, and what it holds in memory before it has done anything."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from benchmarks.cases import Case
from benchmarks.process import measure
from benchmarks.race import Contender, shout
from benchmarks.results import OURS

# One byte a weight, and the few layers that are kept as they are.
OUTPUT_SHARE = 0.7
# The command line as it stands before it plans: no torch, no compiled kernels. What those take counts as ours.
_IDLE = "import streamquant.cli, time; time.sleep(0.5)"


def contender(case: Case, memory_budget: str, threads: int | None = None) -> Contender:
    """Return our converter set up for `case`."""
    limits = ["--memory-budget", memory_budget, *(["--threads", str(threads)] if threads else [])]

    def command(source: Path, destination: Path) -> list[str]:
        convert = [sys.executable, "-m", "streamquant", "convert", str(source), "-o", str(destination)]
        return [*convert, *case.ours, "--flux2", "--force", "--quiet", *limits]

    return Contender(OURS, command, OUTPUT_SHARE)


def baseline(folder: Path, console: Console) -> int | None:
    """Return the anonymous memory of a process that has imported the converter and sleeps, None if it cannot."""
    measurement = measure([sys.executable, "-c", _IDLE], folder / "idle.log")
    if measurement.exit_code:
        shout(console, f"the idle process could not be measured (see {measurement.log})")
        return None
    measurement.log.unlink()
    return measurement.peak_anonymous_bytes
