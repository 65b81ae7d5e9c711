"""float32 and its bits inside compiled code, and the two element types a tile can have."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

# Sums may be reassociated (they are error statistics). No kernel contains an addition whose order decides a code:
# every "add a magic number to round" is followed by a look at the bits, which no compiler may cancel.
OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy", "fastmath": {"reassoc", "nsz"}}

int32 = np.int32
SIGNLESS = np.int32(0x7FFFFFFF)


@njit(inline="always")
def float_bits(value):
    """The bits of a float32 as int32."""
    return np.float32(value).view(np.int32)


@njit(inline="always")
def bits_float(bits):
    """The float32 of int32 bits."""
    return np.int32(bits).view(np.float32)


def as_float32(element):
    """An element of a tile as float32: a uint16 holds BF16 bits, a float32 is itself."""
    raise TypeError("compiled code only")


@overload(as_float32, inline="always")
def _as_float32(element):
    if element == types.uint16:
        return lambda element: bits_float(int32(int32(element) << int32(16)))
    if element == types.float32:
        return lambda element: element
    return None


def magnitude_bits(element):
    """|element| as float32 bits: integers that order like the magnitudes, with inf above all numbers and NaN above inf."""
    raise TypeError("compiled code only")


@overload(magnitude_bits, inline="always")
def _magnitude_bits(element):
    if element == types.uint16:
        return lambda element: int32(int32(element & np.uint16(0x7FFF)) << int32(16))
    if element == types.float32:
        return lambda element: int32(float_bits(element) & SIGNLESS)
    return None
