"""Every Triton kernel against its torch reference, bit for bit, interpreted on the CPU; `tests/gpu` runs them compiled."""

from __future__ import annotations

import os

import pytest
from checks import CHECKS, run_checks

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name):
    run_checks(name, os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
