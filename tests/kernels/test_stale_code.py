"""Compiled code is kept between runs; none of it may outlive the sources it was made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="numba is not installed: nothing is compiled")

REPOSITORY = Path(__file__).resolve().parents[2]
# How many spans 4,096 elements are; SPAN is a constant of kernels/sums.py, the function that has it built in of another file.
SPANS = """
import numpy as np, streamquant
from streamquant.kernels import select
codes, scale, tile = np.zeros(4096, np.uint8), np.ones(1, np.float32), np.zeros(4096, np.float32)
from streamquant.kernels.jit import difference
backend = select("cpu")
assert backend.name == "numba"
print(backend.byte_difference(codes, scale, "int8", 0, tile).steps.spans, sum(difference.difference_of_bytes.stats.cache_hits.values()))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("streamquant", "kernels"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(checkout: Path) -> tuple[int, int]:
    """(spans, functions that came from the cache)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-c", SPANS], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    spans, hits = map(int, done.stdout.split())
    return spans, hits


def test_whether_anything_is_compiled_is_known(tmp_path: Path) -> None:
    program = """
import numpy as np
from streamquant.preflight import is_compiled
from streamquant.kernels.jit.absmax import group_absmax
print(is_compiled())
group_absmax(np.ones((1, 8), np.float32), np.empty(1, np.float32))
print(is_compiled(), is_compiled("absmax"), is_compiled("difference"))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    told = [subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split() for _ in range(2)]
    assert told == [["False", "True", "True", "False"], ["True", "True", "True", "False"]]


def test_a_change_of_any_source_is_compiled(checkout: Path) -> None:
    assert run(checkout) == (4, 0)
    assert run(checkout) == (4, 1)
    sums = checkout / "kernels" / "sums.py"
    sums.write_text(sums.read_text().replace("SPAN = 1024", "SPAN = 2048"))
    assert run(checkout) == (2, 0)
    assert run(checkout) == (2, 1)
