"""Every kernel compiles without a GPU, for the oldest architecture we promise and a current one, and spills nothing.

`python -m benchmarks.compiled` does the same for all architectures and keeps the figures.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import compiled
from streamquant.kernels.gpu import launch

# Refinement compiles to four long kernels each time: here a variant of either form, once.
ARCHITECTURES = {"refined int8 f32": (90,), "refined nf4 f32, dense": (75,)}
VARIANTS = {
    name: call
    for name, call in (compiled.variants() if not launch.interpreting() else {}).items()
    if not name.startswith("refined") or name in ARCHITECTURES
}
REGISTERS = 65536  # of a multiprocessor: what a program may take at most

pytestmark = pytest.mark.skipif(launch.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    architectures = ARCHITECTURES.get(variant, (75, 90))
    rows = list(compiled.compile_variant(variant, VARIANTS[variant], architectures))
    assert {row.architecture for row in rows} == {f"sm_{architecture}" for architecture in architectures}
    # A program of many warps leaves each of its threads fewer.
    assert all(0 < row.registers * row.warps * 32 <= REGISTERS for row in rows)
