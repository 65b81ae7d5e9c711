"""Sums of `streamquant.kernels.difference`, compiled: decode a span into the first cache, then compare it with the weights.

Decoding is compiled apart from summing, for the sums may be reassociated and what is decoded may not.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..sums import FAR, FARTHER, FARTHEST, LOOSE, SPAN, WILD
from .bits import OPTIONS, SIGNLESS, as_float32, bits_float, float_bits, int32, magnitude_bits
from .hadamard import rotate_groups

INFINITE = np.int32(0x7F800000)
E4M3, E5M2, INT8 = range(3)  # grids of one-byte codes
# What is only summed may be contracted too.
SUMMED = OPTIONS | {"fastmath": OPTIONS["fastmath"] | {"contract"}}
EXACT = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}
# Places in the array of sums: the fields of DifferenceSums, then those of Steps.
WEIGHT, ERROR, PRODUCT, LARGEST, LARGEST_AT, ABSMAX, FINITE, SATURATED = range(8)
FAR_COUNT, FARTHER_COUNT, FARTHEST_COUNT, SPANS, FAR_SPANS, WILD_SPANS, FAR_AT, WILD_AT, LOOSE_COUNT = range(8, 17)
SUMS = 17
FAR, FARTHER, FARTHEST, LOOSE = np.float32(FAR), np.float32(FARTHER), np.float32(FARTHEST), np.float32(LOOSE)


@njit(**SUMMED)
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


@njit(**SUMMED)
def _add_far(values, steps, tile, begin, sums):
    """How far the far elements of one span are, and where the first one is; arguments as of `_add_steps`."""
    size = values.shape[0]
    farther, farthest = int32(0), int32(0)
    for element in range(size):
        value, signed = values[element], steps[element]
        error = value - as_float32(tile[element])
        is_clipped = (signed < np.float32(0)) & (error * value < np.float32(0))
        magnitude = np.float32(0) if is_clipped else abs(error)
        farther += int32(magnitude > FARTHER * abs(signed))
        farthest += int32(magnitude > FARTHEST * abs(signed))
    sums[FARTHER_COUNT] += farther
    sums[FARTHEST_COUNT] += farthest
    if sums[FAR_AT] < 0:
        for element in range(size):
            value, signed = values[element], steps[element]
            error = value - as_float32(tile[element])
            if abs(error) > FAR * abs(signed) and not (signed < 0 and error * value < 0):
                sums[FAR_AT] = begin + element
                break


@njit(**SUMMED)
def _add_steps(values, steps, tile, begin, sums):
    """Judge one span: values [m] against tile [m], in steps [m] float32, negative where a weight beyond is clipped."""
    size = values.shape[0]
    error_sum, step_sum = np.float32(0), np.float32(0)
    far, loose = int32(0), int32(0)
    for element in range(size):
        value, signed = values[element], steps[element]
        error = value - as_float32(tile[element])
        is_clipped = (signed < np.float32(0)) & (error * value < np.float32(0))
        magnitude = np.float32(0) if is_clipped else abs(error)
        step = abs(signed)
        error_sum += magnitude * magnitude
        step_sum += step * step
        loose += int32(magnitude > LOOSE * step)
        far += int32(magnitude > FAR * step)
    sums[SPANS] += 1
    sums[LOOSE_COUNT] += loose
    if far > 0:
        sums[FAR_COUNT] += far
        sums[FAR_SPANS] += 1
        _add_far(values, steps, tile, begin, sums)
        if np.float64(error_sum) > WILD * np.float64(step_sum):
            sums[WILD_SPANS] += 1
            if sums[WILD_AT] < 0:
                sums[WILD_AT] = begin


@njit(**OPTIONS)
def difference_of_values(values, tile, sums):
    """values [n] float32 against tile [n]: uint16 (BF16 bits) or float32. sums [17]: float64, added to."""
    for begin in range(0, values.shape[0], SPAN):
        _add_span(values[begin : begin + SPAN], tile[begin : begin + SPAN], begin, sums)


def _make_decoder(mantissa_bits: int, exponent_bias: int, not_numbers: int):
    """A decoder of one FP8 grid: the code's bits in a float32's place, and a power of two for the exponent's bias."""
    shift = int32(23 - mantissa_bits)
    factor = np.float32(2.0 ** (127 - exponent_bias))
    first_bad, last = int32(not_numbers), int32(not_numbers - 1)
    magnitude_mask, sign_mask, sign_shift = int32(0x7F), int32(0x80), int32(24)
    not_a_number = int32(0x7FC00000)
    # A step is the power of two of the code's binade, less the mantissa's bits; subnormals have that of the first binade.
    binade = int32(-(1 << mantissa_bits))
    first_binade = int32(1 << mantissa_bits)
    step_factor = np.float32(2.0 ** (127 - exponent_bias - mantissa_bits))

    @njit(**EXACT)
    def decode(codes, scale, values, steps):
        """values [m] = grid value of codes [m] (uint8) * scale; what is infinite or NaN in the grid becomes NaN."""
        size = abs(scale)
        for element in range(values.shape[0]):
            code = int32(codes[element])
            magnitude = int32(code & magnitude_mask)
            exact = bits_float(int32(magnitude << shift)) * factor
            bits = float_bits(exact) if magnitude < first_bad else not_a_number
            values[element] = bits_float(int32(bits | int32(int32(code & sign_mask) << sign_shift))) * scale
            power = int32(max(int32(magnitude & binade), first_binade) << shift)
            step = bits_float(power) * step_factor * size
            steps[element] = -step if magnitude == last else step

    return decode


_decode_e4m3 = _make_decoder(3, 7, 0x7F)
_decode_e5m2 = _make_decoder(2, 15, 0x7C)


@njit(**EXACT)
def _decode_int8(codes, scale, values, steps):
    size = abs(scale)
    for element in range(values.shape[0]):
        code = np.int8(codes[element])
        values[element] = np.float32(code) * scale
        steps[element] = -size if (code == 127) | (code == -127) else size


@njit(**OPTIONS)
def _count_ends(steps):
    """How many codes are at an end of their grid."""
    found = int32(0)
    for element in range(steps.shape[0]):
        found += int32(float_bits(steps[element]) < int32(0))
    return found


@njit(**OPTIONS)
def difference_of_bytes(codes, scale, grid, rotation, tile, sums):
    """codes [n] uint8, in runs that share one of scale [runs] float32, against tile [n].

    grid: E4M3, E5M2 or INT8. rotation: the Hadamard group size, 0 for none; it divides n. sums [17]: float64, added to.
    """
    elements, run = codes.shape[0], codes.shape[0] // scale.shape[0]
    span = max(SPAN, rotation)
    values, steps = np.empty(span, dtype=np.float32), np.empty(span, dtype=np.float32)
    rotated = np.empty(span if rotation else 0, dtype=np.float32)
    for begin in range(0, elements, span):
        size = min(span, elements - begin)
        done = 0
        while done < size:
            index = (begin + done) // run
            part = min((index + 1) * run - begin, size) - done
            place, end = begin + done, done + part
            if grid == E4M3:
                _decode_e4m3(codes[place : place + part], scale[index], values[done:end], steps[done:end])
            elif grid == E5M2:
                _decode_e5m2(codes[place : place + part], scale[index], values[done:end], steps[done:end])
            else:
                _decode_int8(codes[place : place + part], scale[index], values[done:end], steps[done:end])
            done = end
        sums[SATURATED] += _count_ends(steps[:size])
        tiled = tile[begin : begin + size]
        if rotation:
            groups, factor = size // rotation, np.float32(1.0 / np.sqrt(np.float64(rotation)))
            shaped = rotated[:size].reshape(groups, rotation)
            rotate_groups(values[:size].reshape(groups, rotation), factor, shaped)
            _add_span(rotated[:size], tiled, begin, sums)
            rotate_groups(tiled.reshape(groups, rotation), factor, shaped)
            for at in range(0, size, SPAN):
                end = min(at + SPAN, size)
                _add_steps(values[at:end], steps[at:end], rotated[at:end], begin + at, sums)
        else:
            _add_span(values[:size], tiled, begin, sums)
            _add_steps(values[:size], steps[:size], tiled, begin, sums)


@njit(**EXACT)
def _look_up(packed, pairs, step_pairs, values, steps):
    """Values and steps of packed codes [m], two at a time: pairs, step_pairs [256] and values, steps [m] uint64."""
    for byte in range(packed.shape[0]):
        code = packed[byte]
        values[byte] = pairs[code]
        steps[byte] = step_pairs[code]


@njit(**EXACT)
def _scale(values, steps, scale):
    size = abs(scale)
    for element in range(values.shape[0]):
        values[element] *= scale
        steps[element] *= size


@njit(**OPTIONS)
def difference_of_book(packed, pairs, step_pairs, absmax, block_size, tile, sums):
    """Packed 4-bit codes [ceil(n / 2)] uint8 in blocks of `block_size` (even), against tile [n].

    pairs, step_pairs [256] uint64: two float32, value or step of the two codes of a byte, the first element's first; steps
    are negative at the ends of the book. absmax [blocks] float32. sums [17]: float64, added to.
    """
    elements = tile.shape[0]
    values, steps = np.empty(SPAN, dtype=np.float32), np.empty(SPAN, dtype=np.float32)
    value_pairs, steps_pairs = values.view(np.uint64), steps.view(np.uint64)
    for begin in range(0, elements, SPAN):
        size = min(SPAN, elements - begin)
        half = (size + 1) // 2
        _look_up(packed[begin // 2 : begin // 2 + half], pairs, step_pairs, value_pairs[:half], steps_pairs[:half])
        done = 0
        while done < size:
            index = (begin + done) // block_size
            end = min((index + 1) * block_size - begin, size)
            _scale(values[done:end], steps[done:end], absmax[index])
            done = end
        sums[SATURATED] += _count_ends(steps[:size])
        _add_span(values[:size], tile[begin : begin + size], begin, sums)
        _add_steps(values[:size], steps[:size], tile[begin : begin + size], begin, sums)
