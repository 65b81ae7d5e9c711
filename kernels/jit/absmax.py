"""Largest magnitude of each group, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import OPTIONS, bits_float, int32, magnitude_bits


@njit(**OPTIONS)
def group_absmax(tile, absmax):
    """Largest magnitude of each run of elements; a NaN anywhere in a run makes that run's result NaN.

    tile [groups, group]: uint16 (BF16 bits) or float32. absmax [groups]: float32, written.
    """
    groups, group = tile.shape
    for index in range(groups):
        run = tile[index]
        largest = int32(0)
        for element in range(group):
            largest = max(largest, magnitude_bits(run[element]))
        absmax[index] = bits_float(largest)
    return np.float32(0)
