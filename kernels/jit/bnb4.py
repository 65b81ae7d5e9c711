"""bitsandbytes 4-bit encoding, compiled: fifteen comparisons a weight, no look-up in the way of vectorisation."""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import OPTIONS, as_float32, bits_float, int32, magnitude_bits

SMALLEST_DIVISOR = np.float32(1e-38)


@njit(inline="always")
def _rank(value, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14):
    """How many of 15 ascending boundaries lie below `value`."""
    # "not below or at" instead of "above": a NaN then ranks last, as torch.bucketize ranks it.
    return int32(
        int32(not value <= b0) + int32(not value <= b1) + int32(not value <= b2) + int32(not value <= b3)
        + int32(not value <= b4) + int32(not value <= b5) + int32(not value <= b6) + int32(not value <= b7)
        + int32(not value <= b8) + int32(not value <= b9) + int32(not value <= b10) + int32(not value <= b11)
        + int32(not value <= b12) + int32(not value <= b13) + int32(not value <= b14)
    )  # fmt: skip


@njit(**OPTIONS)
def encode_4bit(flat, block_size, boundaries, pair_codes, ascending_values, given, packed, absmax, sums):
    """Blocks of `block_size` elements: absmax, then the nearest code-book value of each element / absmax.

    flat [elements]: uint16 (BF16 bits) or float32. boundaries [15] float32, ascending.
    pair_codes [256] uint8: byte of two ranks -> byte of two codes.
    ascending_values [16] float32. packed [ceil(elements / 2)]: uint8, written, first element in the high nibble.
    absmax [ceil(elements / block_size)]: float32, written; when `given`, read. sums [2]: float64, added to.
    """
    elements = flat.shape[0]
    b0, b1, b2, b3, b4 = boundaries[0], boundaries[1], boundaries[2], boundaries[3], boundaries[4]
    b5, b6, b7, b8, b9 = boundaries[5], boundaries[6], boundaries[7], boundaries[8], boundaries[9]
    b10, b11, b12, b13, b14 = boundaries[10], boundaries[11], boundaries[12], boundaries[13], boundaries[14]
    half = block_size // 2
    for block in range(elements // block_size):
        run = flat[block * block_size : (block + 1) * block_size]
        out = packed[block * half : (block + 1) * half]
        if not given:
            largest = int32(0)
            for element in range(block_size):
                largest = max(largest, magnitude_bits(run[element]))
            absmax[block] = bits_float(largest)
        block_absmax = absmax[block]
        divisor = block_absmax if not block_absmax < SMALLEST_DIVISOR else SMALLEST_DIVISOR
        factor = np.float32(1) / divisor
        for pair in range(half):
            high = _rank(as_float32(run[2 * pair]) * factor, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14)
            low = _rank(as_float32(run[2 * pair + 1]) * factor, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14)
            out[pair] = np.uint8(int32(int32(high << int32(4)) | low))
        error_sum = np.float32(0)
        weight_sum = np.float32(0)
        for pair in range(half):
            byte = out[pair]
            first = as_float32(run[2 * pair]) * factor
            second = as_float32(run[2 * pair + 1]) * factor
            first_error = ascending_values[byte >> np.uint8(4)] - first
            second_error = ascending_values[byte & np.uint8(15)] - second
            error_sum += first_error * first_error + second_error * second_error
            weight_sum += first * first + second * second
            out[pair] = pair_codes[byte]
        unit = np.float64(block_absmax)
        sums[0] += np.float64(error_sum) * unit * unit
        sums[1] += np.float64(weight_sum) * unit * unit

    # The short last block divides instead of multiplying by a reciprocal, and floors its absmax: so does bitsandbytes.
    begin = elements // block_size * block_size
    if begin < elements:
        run = flat[begin:]
        out = packed[begin // 2 :]
        if not given:
            largest = int32(0)
            for element in range(run.shape[0]):
                largest = max(largest, magnitude_bits(run[element]))
            absmax[elements // block_size] = bits_float(largest)
        divisor = absmax[elements // block_size]
        divisor = divisor if not divisor < SMALLEST_DIVISOR else SMALLEST_DIVISOR
        absmax[elements // block_size] = divisor
        unit = np.float64(divisor)
        for pair in range(out.shape[0]):
            first = as_float32(run[2 * pair]) / divisor
            second = as_float32(run[2 * pair + 1]) / divisor if 2 * pair + 1 < run.shape[0] else np.float32(0)
            high = _rank(first, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14)
            low = _rank(second, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14)
            first_error = np.float64(ascending_values[high] - first) * unit
            second_error = np.float64(ascending_values[low] - second) * unit
            sums[0] += first_error * first_error
            if 2 * pair + 1 < run.shape[0]:
                sums[0] += second_error * second_error
            sums[1] += (np.float64(first) ** 2 + np.float64(second) ** 2) * unit * unit
            out[pair] = pair_codes[int32(int32(high << int32(4)) | low)]
