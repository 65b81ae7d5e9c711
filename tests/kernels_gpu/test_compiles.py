"""Every kernel compiles without a GPU, for the oldest architecture we promise and a current one, and spills nothing.

`python -m benchmarks.compiled` does the same for all architectures and keeps the figures.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import compiled
from streamquant.kernels.gpu import launch

pytestmark = pytest.mark.skipif(launch.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")


@pytest.mark.parametrize("variant", compiled.variants() if not launch.interpreting() else [])
def test_compiles_without_spills(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = list(compiled.compile_variant(variant, compiled.variants()[variant], (75, 90)))
    assert {row.architecture for row in rows} == {"sm_75", "sm_90"}
    assert all(0 < row.registers <= 128 for row in rows)
