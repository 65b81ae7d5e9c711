"""Squared error of codes whose values come from a table, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import OPTIONS


@njit(**OPTIONS)
def table_error(weights, codes, table, scale, column_group, sums):
    """Σ (table[code] · scale - w)² and Σ w².

    weights [rows, N] float32. codes [rows, N] uint8. table [256] float32: the value of each code. scale [rows, groups]
    float32. column_group [N] int64. sums [2]: float64, added to.
    """
    rows, columns = weights.shape
    for row in range(rows):
        error, weight = np.float64(0), np.float64(0)
        for column in range(columns):
            exact = weights[row, column]
            miss = np.float64(table[codes[row, column]] * scale[row, column_group[column]] - exact)
            error += miss * miss
            weight += np.float64(exact) * np.float64(exact)
        sums[0] += error
        sums[1] += weight
