"""FP8 encoding by integer arithmetic, compiled: round to nearest even, saturating."""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import OPTIONS, SIGNLESS, as_float32, bits_float, float_bits, int32

SPAN = 4096  # elements summed in float32 before the sum goes to float64


def _make_encoder(mantissa_bits: int, exponent_bias: int, maximum: float):
    """An encoder for one FP8 grid; the arithmetic is the same for all, only these constants differ."""
    shift = int32(23 - mantissa_bits)
    half = int32((1 << (22 - mantissa_bits)) - 1)
    rebias = int32((127 - exponent_bias) << mantissa_bits)
    kept_bits = int32(-(1 << (23 - mantissa_bits)))
    smallest_normal = int32(np.float32(2.0 ** (1 - exponent_bias)).view(np.int32))
    largest = int32(np.float32(maximum).view(np.int32))
    # Adding this to a magnitude below the smallest normal leaves the subnormal code in the low mantissa bits,
    # rounded to nearest even by the adder itself.
    aligner = np.float32(2.0 ** (1 - exponent_bias - mantissa_bits + 23))
    aligner_bits = int32(aligner.view(np.int32))
    quantum = np.float32(2.0 ** (1 - exponent_bias - mantissa_bits))
    one = int32(1)
    sign_shift = int32(24)
    sign_mask = int32(0x80)

    @njit(**OPTIONS)
    def encode(tile, multiplier, scale, codes, sums):
        """codes = grid(tile * multiplier); sums[0] += ||codes * scale - tile||², sums[1] += ||tile||².

        tile [groups, group]: uint16 (BF16 bits) or float32. multiplier, scale [groups]: float32.
        codes [groups, group]: uint8, written. sums [2]: float64, added to. NaN encodes as the largest value;
        the caller mends it.
        """
        groups, group = tile.shape
        for index in range(groups):
            factor = multiplier[index]
            unit = np.float64(scale[index])
            for begin in range(0, group, SPAN):
                run = tile[index, begin : begin + SPAN]
                out = codes[index, begin : begin + SPAN]
                error_sum = np.float32(0)
                weight_sum = np.float32(0)
                for element in range(run.shape[0]):
                    weight = as_float32(run[element])
                    scaled = weight * factor
                    bits = float_bits(scaled)
                    magnitude = min(int32(bits & SIGNLESS), largest)
                    lowest_kept = int32(int32(magnitude >> shift) & one)
                    rounded = int32(int32(magnitude + half) + lowest_kept)
                    aligned = bits_float(magnitude) + aligner
                    is_normal = magnitude >= smallest_normal
                    code = int32(int32(rounded >> shift) - rebias) if is_normal else int32(float_bits(aligned) - aligner_bits)
                    # Not `aligned - aligner`: reassociation would cancel it to the magnitude, and the error to nothing.
                    value = bits_float(int32(rounded & kept_bits)) if is_normal else np.float32(code) * quantum
                    out[element] = np.uint8(int32(code | int32(int32(bits >> sign_shift) & sign_mask)))
                    error = value - bits_float(magnitude)
                    error_sum += error * error
                    weight_sum += scaled * scaled
                sums[0] += np.float64(error_sum) * unit * unit
                sums[1] += np.float64(weight_sum) * unit * unit

    return encode


encode_e4m3 = _make_encoder(3, 7, 448.0)
encode_e5m2 = _make_encoder(2, 15, 57344.0)
