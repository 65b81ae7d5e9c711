"""Learned rounding: scales of least error, and codes that make the layer's output right rather than its weight.

The arithmetic is in `streamquant.kernels` (`feedback`, `refine`, `jit.refine`); what is known of inputs comes from
`streamquant.calibration`, from the checkpoint itself (`time_sweep`, `structure`), or from nowhere. Neither torch nor
numba is imported here.
"""

from .converter import LearnedRoundingConverter
from .hessian import LayerHessian

__all__ = ["LayerHessian", "LearnedRoundingConverter"]
