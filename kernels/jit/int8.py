"""INT8 encoding, compiled: divide, round to nearest even, clamp to ±127."""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import OPTIONS, as_float32, float_bits, int32

SPAN = 4096  # elements summed in float32 before the sum goes to float64
LIMIT = np.float32(127)
# 1.5 · 2**23: after this addition the low mantissa bits are the rounded integer.
ALIGNER = np.float32(12582912)
ALIGNER_BITS = np.int32(0x4B400000)


@njit(**OPTIONS)
def encode_int8(tile, scale, codes, sums):
    """codes = round(tile / scale); sums[0] += ||codes * scale - tile||², sums[1] += ||tile||².

    tile [groups, group]: uint16 (BF16 bits) or float32. scale [groups]: float32, not zero.
    codes [groups, group]: int8, written. sums [2]: float64, added to. A NaN gives no defined code; the caller mends it.
    """
    groups, group = tile.shape
    for index in range(groups):
        divisor = scale[index]
        unit = np.float64(divisor)
        for begin in range(0, group, SPAN):
            run = tile[index, begin : begin + SPAN]
            out = codes[index, begin : begin + SPAN]
            error_sum = np.float32(0)
            weight_sum = np.float32(0)
            for element in range(run.shape[0]):
                steps = min(max(as_float32(run[element]) / divisor, -LIMIT), LIMIT)
                code = int32(float_bits(steps + ALIGNER) - ALIGNER_BITS)
                out[element] = np.int8(code)
                error = np.float32(code) - steps
                error_sum += error * error
                weight_sum += steps * steps
            sums[0] += np.float64(error_sum) * unit * unit
            sums[1] += np.float64(weight_sum) * unit * unit
