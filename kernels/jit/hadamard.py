"""Hadamard group rotation (ConvRot), compiled: the bits of `streamquant.kernels.hadamard.rotate`."""

from __future__ import annotations

import numpy as np
from numba import njit

from .butterflies import BLOCK, WIDTH, rotate_block, rotate_stride

# No fastmath: the order of the additions is part of the definition.
OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(**OPTIONS)
def rotate_groups(groups, factor, rotated):
    """Each group multiplied by H.

    groups [n, g]: uint16 (BF16 bits) or float32, g a power of 4. factor: float32, 1 / √g. rotated [n, g]: float32,
    written. The reference moves the lowest digit of the column number to the front at every stage, so that it always
    works on neighbours; here the columns stay and the stride grows, which makes the same sums. The first three stages
    stay within 64 neighbours, which are one group, a part of one or several; the rest follow while it is in the cache.
    """
    size = groups.shape[1]
    elements = groups.size
    whole = elements - elements % BLOCK
    if size == 4:
        for begin in range(0, whole, BLOCK):
            rotate_block(groups, begin, factor, rotated, begin, 1)
    elif size == 16:
        for begin in range(0, whole, BLOCK):
            rotate_block(groups, begin, factor, rotated, begin, 2)
    else:
        for group in range(0, elements, size):
            for begin in range(group, group + size, BLOCK):
                rotate_block(groups, begin, factor, rotated, begin, 3)
            stride = BLOCK
            while stride < size:
                for quad in range(group, group + size, 4 * stride):
                    for begin in range(quad, quad + stride, WIDTH):
                        rotate_stride(rotated, begin, stride)
                stride *= 4
    if whole < elements:  # fewer groups of 4 or 16 than a block holds
        rest, block = np.empty(BLOCK, dtype=groups.dtype), np.empty(BLOCK, dtype=np.float32)
        for place in range(BLOCK):
            element = min(whole + place, elements - 1)
            rest[place] = groups[element // size, element % size]
        if size == 4:
            rotate_block(rest, 0, factor, block, 0, 1)
        else:
            rotate_block(rest, 0, factor, block, 0, 2)
        for place in range(whole, elements):
            rotated[place // size, place % size] = block[place - whole]
    return np.float32(0)
