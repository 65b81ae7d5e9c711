"""The checks of this folder run either in Triton's interpreter on the CPU or compiled on a CUDA device.

Which of the two is settled when triton is first imported, for the whole process; other tests import it too. So the
checks lie in files that pytest does not collect by itself; `test_kernels_gpu.py` runs them in processes of their own.
By hand: TRITON_INTERPRET=1 python -m pytest -o python_files='check_*.py' tests/kernels_gpu
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / folder) for folder in ("kernels", "rounding")]


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels under test run: "cpu" in the interpreter, else "cuda"."""
    import torch

    from streamquant.kernels.gpu import launch

    if launch.interpreting():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device, and TRITON_INTERPRET=1 was not set")
    return "cuda"
