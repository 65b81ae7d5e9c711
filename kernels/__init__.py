"""The arithmetic of streamquant: operations on tiles of weights, knowing nothing of files or layer names.

Installed as `streamquant.kernels`.
"""

from .dispatch import available, select, why_no_jit
from .error_sums import ErrorSums
from .jit_backend import JitBackend
from .torch_backend import TorchBackend

__all__ = ["ErrorSums", "JitBackend", "TorchBackend", "available", "select", "why_no_jit"]
