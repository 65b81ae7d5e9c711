"""Hadamard group rotation (ConvRot), compiled: the bits of `streamquant.kernels.hadamard.rotate`."""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import as_float32

# No fastmath: the order of the additions is part of the definition.
OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(**OPTIONS)
def rotate_groups(groups, factor, rotated):
    """Each group multiplied by H.

    groups [n, g]: uint16 (BF16 bits) or float32, g a power of 4. factor: float32, 1 / √g. rotated [n, g]: float32,
    written. The reference moves the lowest digit of the column number to the front at every stage, so that it always
    works on neighbours; here the columns stay and the stride grows, which makes the same sums.
    """
    size = groups.shape[1]
    for index in range(groups.shape[0]):
        source, target = groups[index], rotated[index]
        for quad in range(0, size, 4):
            x0, x1 = as_float32(source[quad]) * factor, as_float32(source[quad + 1]) * factor
            x2, x3 = as_float32(source[quad + 2]) * factor, as_float32(source[quad + 3]) * factor
            plus, minus = x0 + x1, x2 - x3
            target[quad], target[quad + 1] = plus + minus, plus - minus
            plus, minus = x2 + x3, x0 - x1
            target[quad + 2], target[quad + 3] = plus + minus, plus - minus
        stride = 4
        while stride < size:
            for begin in range(0, size, 4 * stride):
                first, second = target[begin : begin + stride], target[begin + stride : begin + 2 * stride]
                third = target[begin + 2 * stride : begin + 3 * stride]
                fourth = target[begin + 3 * stride : begin + 4 * stride]
                for column in range(stride):
                    x0, x1, x2, x3 = first[column], second[column], third[column], fourth[column]
                    plus, minus = x0 + x1, x2 - x3
                    first[column], second[column] = plus + minus, plus - minus
                    plus, minus = x2 + x3, x0 - x1
                    third[column], fourth[column] = plus + minus, plus - minus
            stride *= 4
    return np.float32(0)
