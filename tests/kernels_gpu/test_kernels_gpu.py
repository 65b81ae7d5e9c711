"""Every Triton kernel against its torch reference, bit for bit: interpreted on the CPU, and compiled where CUDA is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
CHECKS = sorted(path.name for path in FOLDER.glob("check_*.py"))
pytest.importorskip("triton", reason="triton is not installed")


def run_checks(name: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "python_files=check_*.py", "-p", "no:cacheprovider", FOLDER / name]
    outcome = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
    assert "skipped" not in outcome.stdout, outcome.stdout[-2000:]


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name):
    run_checks(name, os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none here")
    run_checks(name, {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"})
