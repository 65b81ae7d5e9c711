"""The compiled scale search gives the same bits on every machine: with AVX-512, with AVX2 and with neither."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from streamquant.kernels import why_no_jit

pytestmark = pytest.mark.skipif(why_no_jit() is not None, reason="numba is not installed: nothing is compiled")

SEARCH = """
import hashlib
import numpy as np
from streamquant.kernels import JitBackend

generator = np.random.default_rng(1)
tile = (generator.standard_t(4, 64 * 300) * 0.02).astype(np.float32)
weights = np.exp(generator.standard_normal((3, 64))).astype(np.float32)
backend = JitBackend()
found = [backend.book_absmax(tile, 64, weights, book) for book in ("nf4", "fp4")]
found.append(backend.e4m3_errors(tile, 64, np.abs(tile.reshape(-1, 64)).max(1), weights))
print(hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest())
"""


def search(folder, cpu: dict[str, str]) -> str:
    environment = os.environ | cpu | {"NUMBA_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", SEARCH], env=environment, check=True, capture_output=True, text=True).stdout


def test_every_vector_width_gives_the_same_bits(tmp_path):
    here, generic = search(tmp_path, {}), search(tmp_path, {"NUMBA_CPU_NAME": "generic"})
    assert generic == here
