"""Sums of `streamquant.kernels.difference`, compiled: decode a run into the first cache, then compare it with the weights.

Decoding is compiled apart from summing, for the sums may be reassociated and what is decoded may not.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import OPTIONS, SIGNLESS, as_float32, bits_float, float_bits, int32, magnitude_bits
from .hadamard import rotate_groups

SPAN = 4096  # elements decoded at a time, and summed in float32 before the sum goes to float64
INFINITE = np.int32(0x7F800000)
EXACT = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}
WEIGHT, ERROR, PRODUCT, LARGEST, LARGEST_AT, ABSMAX, FINITE, SATURATED = range(8)



@njit(**OPTIONS)
def _add_span(values, tile, begin, sums):
    """Add values [m] float32 against tile [m], which are elements from `begin` on."""
    size = values.shape[0]
    weight_sum, error_sum, product_sum = np.float32(0), np.float32(0), np.float32(0)
    largest, absmax = int32(0), int32(0)
    for element in range(size):
        weight = as_float32(tile[element])
        error = values[element] - weight
        weight_sum += weight * weight
        error_sum += error * error
        product_sum += error * weight
        largest = max(largest, int32(float_bits(error) & SIGNLESS))
        absmax = max(absmax, magnitude_bits(tile[element]))
    sums[WEIGHT] += np.float64(weight_sum)
    sums[ERROR] += np.float64(error_sum)
    sums[PRODUCT] += np.float64(product_sum)
    # Bits order like magnitudes, with infinity above all numbers and NaN above it; an infinite weight makes its error so.
    if largest >= INFINITE or absmax >= INFINITE:
        sums[FINITE] = 0.0
        return
    sums[ABSMAX] = max(sums[ABSMAX], np.float64(bits_float(absmax)))
    if np.float64(bits_float(largest)) > sums[LARGEST]:
        sums[LARGEST] = np.float64(bits_float(largest))
        for element in range(size):
            if int32(float_bits(values[element] - as_float32(tile[element])) & SIGNLESS) == largest:
                sums[LARGEST_AT] = begin + element
                break


@njit(**OPTIONS)
def difference_of_values(values, tile, sums):
    """values [n] float32 against tile [n]: uint16 (BF16 bits) or float32. sums [8]: float64, added to."""
    for begin in range(0, values.shape[0], SPAN):
        _add_span(values[begin : begin + SPAN], tile[begin : begin + SPAN], begin, sums)


def _make_decoder(mantissa_bits: int, exponent_bias: int, not_numbers: int):
    """A decoder of one FP8 grid: the code's bits in a float32's place, and a power of two for the exponent's bias."""
    shift = int32(23 - mantissa_bits)
    factor = np.float32(2.0 ** (127 - exponent_bias))
    first_bad = int32(not_numbers)
    magnitude_mask, sign_mask, sign_shift = int32(0x7F), int32(0x80), int32(24)
    not_a_number = int32(0x7FC00000)

    @njit(**EXACT)
    def decode(codes, scale, values):
        """values [m] = grid value of codes [m] (uint8) * scale; what is infinite or NaN in the grid becomes NaN."""
        for element in range(values.shape[0]):
            code = int32(codes[element])
            magnitude = int32(code & magnitude_mask)
            exact = bits_float(int32(magnitude << shift)) * factor
            bits = float_bits(exact) if magnitude < first_bad else not_a_number
            values[element] = bits_float(int32(bits | int32(int32(code & sign_mask) << sign_shift))) * scale

    return decode


_decode_e4m3 = _make_decoder(3, 7, 0x7F)
_decode_e5m2 = _make_decoder(2, 15, 0x7C)


@njit(**EXACT)
def _decode_int8(codes, scale, values):
    for element in range(values.shape[0]):
        values[element] = np.float32(np.int8(codes[element])) * scale


@njit(**OPTIONS)
def _count_ends(codes, mask, largest, smallest):
    """How many of codes [m] (uint8) have the largest magnitude of their grid: `& mask` is `largest`, or `smallest`."""
    found = int32(0)
    for element in range(codes.shape[0]):
        code = codes[element] & mask
        found += int32(code == largest) + int32(code == smallest)
    return found


def _make_comparison(decode, mask, largest, smallest):
    mask, largest, smallest = np.uint8(mask), np.uint8(largest), np.uint8(smallest)

    @njit(**OPTIONS)
    def compare(codes, scale, rotation, tile, sums):
        """codes [n] uint8, in runs that share one of scale [runs] float32, against tile [n].

        rotation: the Hadamard group size, 0 for none; it divides n. sums [8]: float64, added to.
        """
        elements, run = codes.shape[0], codes.shape[0] // scale.shape[0]
        span = max(SPAN, rotation)
        values, rotated = np.empty(span, dtype=np.float32), np.empty(span if rotation else 0, dtype=np.float32)
        for begin in range(0, elements, span):
            size = min(span, elements - begin)
            done = 0
            while done < size:
                index = (begin + done) // run
                part = min((index + 1) * run - begin, size) - done
                place = begin + done
                decode(codes[place : place + part], scale[index], values[done : done + part])
                done += part
            sums[SATURATED] += _count_ends(codes[begin : begin + size], mask, largest, smallest)
            tiled = tile[begin : begin + size]
            if rotation:
                groups = values[:size].reshape(size // rotation, rotation)
                factor = np.float32(1.0 / np.sqrt(np.float64(rotation)))
                rotate_groups(groups, factor, rotated[:size].reshape(size // rotation, rotation))
                _add_span(rotated[:size], tiled, begin, sums)
            else:
                _add_span(values[:size], tiled, begin, sums)

    return compare


# INT8's -128 is no code that anybody writes.
difference_of_bytes = {
    "e4m3": _make_comparison(_decode_e4m3, 0x7F, 0x7E, 0x7E + 0x80),
    "e5m2": _make_comparison(_decode_e5m2, 0x7F, 0x7B, 0x7B + 0x80),
    "int8": _make_comparison(_decode_int8, 0xFF, 0x7F, 0x81),
}


@njit(**EXACT)
def _decode_book(packed, pairs, scale, values):
    """values [m] of packed codes [ceil(m / 2)] times scale; pairs [256, 2] float32: the two values of a byte."""
    half = values.shape[0] // 2
    for byte in range(half):
        code = packed[byte]
        values[2 * byte] = pairs[code, 0] * scale
        values[2 * byte + 1] = pairs[code, 1] * scale
    if values.shape[0] % 2:
        values[2 * half] = pairs[packed[half], 0] * scale


@njit(**OPTIONS)
def _count_book_ends(packed, size, high_first, lowest, highest):
    """How many of the first `size` 4-bit codes in packed are `lowest` or `highest` (uint8)."""
    found = int32(0)
    for byte in range(size // 2):
        first, second = packed[byte] >> np.uint8(4), packed[byte] & np.uint8(15)
        found += int32(first == lowest) + int32(first == highest) + int32(second == lowest) + int32(second == highest)
    if size % 2:
        last = packed[size // 2] >> np.uint8(4) if high_first else packed[size // 2] & np.uint8(15)
        found += int32(last == lowest) + int32(last == highest)
    return found


@njit(**OPTIONS)
def difference_of_book(packed, pairs, ends, high_first, absmax, block_size, tile, sums):
    """Packed 4-bit codes [ceil(n / 2)] uint8 in blocks of `block_size` (even), against tile [n].

    pairs [256, 2] float32, in the order of `high_first`. ends [2] uint8: codes of the book's smallest and largest value.
    absmax [blocks] float32. sums [8]: float64, added to.
    """
    elements = tile.shape[0]
    values = np.empty(max(SPAN // block_size, 1) * block_size, dtype=np.float32)
    for begin in range(0, elements, values.shape[0]):
        size = min(values.shape[0], elements - begin)
        for place in range(0, size, block_size):
            part = min(block_size, size - place)
            first = (begin + place) // 2
            block = packed[first : first + (part + 1) // 2]
            _decode_book(block, pairs, absmax[(begin + place) // block_size], values[place : place + part])
        coded = packed[begin // 2 : (begin + size + 1) // 2]
        sums[SATURATED] += _count_book_ends(coded, size, high_first, ends[0], ends[1])
        _add_span(values[:size], tile[begin : begin + size], begin, sums)
