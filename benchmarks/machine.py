"""What a measurement was made on: the facts every result carries."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@cache
def facts() -> dict[str, str | int]:
    """Return the columns of a result that describe the machine and the software, the same for a whole run."""
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "streamquant": installed("streamquant"),
        "commit": commit(),
    }


def cpu() -> str:
    """Return the processor's name as Linux reports it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def installed(package: str) -> str:
    """Return the version of `package`, asked of its metadata because importing torch takes seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Return the commit that is measured, marked `+` when files differ from it."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"
