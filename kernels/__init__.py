"""The arithmetic of streamquant: operations on tiles of weights, knowing nothing of files or layer names.

Installed as `streamquant.kernels`.
"""

from .dispatch import JitBackend, TorchBackend, available, select, why_no_jit
from .sums import DifferenceSums, ErrorSums, Steps

__all__ = ["DifferenceSums", "ErrorSums", "JitBackend", "Steps", "TorchBackend", "available", "select", "why_no_jit"]
