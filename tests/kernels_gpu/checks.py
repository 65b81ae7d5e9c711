"""Runs the checks of this folder, a file in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CHECKS = sorted(path.name for path in FOLDER.glob("check_*.py"))


def run_checks(name: str, environment: dict[str, str]) -> None:
    """All checks of the file `name` must pass, and none be skipped."""
    command = [sys.executable, "-m", "pytest", "-o", "python_files=check_*.py", "-p", "no:cacheprovider", FOLDER / name]
    outcome = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
    assert "skipped" not in outcome.stdout, outcome.stdout[-2000:]
