"""The arithmetic of streamquant: operations on tiles of weights, knowing nothing of files or layer names.

Installed as `streamquant.kernels`.
"""

from .dispatch import ErrorSums, JitBackend, TorchBackend, available, select, why_no_jit

__all__ = ["ErrorSums", "JitBackend", "TorchBackend", "available", "select", "why_no_jit"]
