"""Which backend runs, and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiles import JIT, TORCH, TORCH_DTYPES, raw_bytes, weights

from streamquant import kernels
from streamquant.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]


def test_the_cpu_gets_the_compiled_backend_where_it_runs(monkeypatch):
    assert dispatch.why_no_jit() is None
    assert isinstance(kernels.select("cpu"), kernels.JitBackend)
    monkeypatch.setattr(dispatch, "why_no_jit", lambda: "numba is not installed")
    assert isinstance(kernels.select("cpu"), kernels.TorchBackend)
    assert kernels.available()["numba (CPU)"] == "numba is not installed"


def test_why_numba_cannot_run_is_said_in_words(monkeypatch):
    dispatch.why_no_jit.cache_clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    try:
        assert "streamquant[fast]" in dispatch.why_no_jit()
        assert kernels.available()["torch (CPU)"] == "torch is not installed"
    finally:
        dispatch.why_no_jit.cache_clear()


def test_numba_that_is_switched_off_is_done_without():
    program = "from streamquant.kernels import TorchBackend, select; assert type(select('cpu')) is TorchBackend"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_the_compiled_backend_never_imports_torch():
    """It starts in a fraction of the time and of the memory, and is used for that."""
    program = """
import sys
import numpy as np
from streamquant.formats import FORMATS
from streamquant.kernels import select
backend = select("cpu")
raw = np.arange(0x3B00, 0x3B00 + 4096, dtype=np.uint16).tobytes()
for name in ("bnb_nf4", "float8_e4m3fn_rowwise", "int8_tensorwise"):
    layout = FORMATS[name]()
    encoded = layout.encoder((64, 64), "BF16").encode(backend, backend.load(raw, "BF16"))
    assert encoded.payloads[0].any()
assert backend.name == "numba" and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("kind", ["bits", "sparse", "subnormal"])
def test_both_backends_load_the_same_numbers(dtype, kind):
    tensor = weights(kind, 999, dtype, seed=1)
    jit = JIT.without_nonfinite(JIT.load(raw_bytes(tensor), dtype))
    torch_tile = TORCH.without_nonfinite(TORCH.load(raw_bytes(tensor), dtype))
    assert jit.dtype == np.float32
    assert jit.tobytes() == torch_tile.numpy().tobytes() == tensor.float().numpy().tobytes()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_what_is_not_finite_is_found_and_removed(dtype):
    special = [float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0, 1.0]
    tensor = torch.tensor(special * 7, dtype=torch.float64).to(TORCH_DTYPES[dtype])
    for backend in (JIT, TORCH):
        tile = backend.load(raw_bytes(tensor), dtype)
        assert np.array_equal(backend.nan_mask(tile), tensor.isnan().numpy())
        cleaned = np.asarray(backend.without_nonfinite(tile))
        assert cleaned[:6].tolist() == [0, 0, 0, 0, 0, 1]
