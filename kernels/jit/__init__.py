"""The CPU's fast path: the same operations as the torch references, compiled by numba.

Each loop is written so that LLVM vectorises it: int32 arithmetic spelled out (numba would widen to 64 bits),
contiguous slices indexed from zero (no wrap-around test), one loop body without calls. Codes and scales are
bit-identical to the references; the error sums, which are only reported, may differ in the last digits.
"""

from .stale import forget_stale

forget_stale()
